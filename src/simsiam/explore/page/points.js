// The map: points drawn with WebGL (or on a canvas), pictures when zoomed in, lasso, pan and zoom.
import { store } from "./state.js";

const PICTURE = 56; // side of a picture on the map, in pixels
const MAX_PICTURES = 150; // that are loaded for one view
const POINTS_FOR_PICTURES = 1200; // in view, from which on there are only points
const REACH = 14; // pixels from the pointer to a point that it means
const MANY = 20000; // points, from which on the last picture is moved while the map moves
const SETTLE = 150; // milliseconds without a movement, after which the points are drawn again
const VERTEX = `#version 300 es
in vec2 place; in vec4 color; uniform vec2 scale, offset; uniform float size; out vec4 tint;
void main() {
  gl_Position = vec4(place * scale + offset, 0.0, 1.0); gl_PointSize = size; tint = color;
}`;
const FRAGMENT = `#version 300 es
precision mediump float; in vec4 tint; out vec4 color;
void main() {
  float far = length(gl_PointCoord - 0.5) * 2.0;
  if (far > 1.0) discard;
  color = vec4(tint.rgb * tint.a, tint.a);
}`;

/** Draws points with WebGL. */
class WebGlPoints {
  constructor(canvas) {
    const gl = canvas.getContext("webgl2", { premultipliedAlpha: true, antialias: false });
    if (!gl) throw new Error("no WebGL");
    const program = gl.createProgram();
    for (const [kind, text] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, text);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error("no WebGL");
    gl.useProgram(program);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    this.uniform = Object.fromEntries(
      ["scale", "offset", "size"].map((name) => [name, gl.getUniformLocation(program, name)]));
    this.buffers = ["place", "color"].map((name, i) => {
      const buffer = gl.createBuffer(), slot = gl.getAttribLocation(program, name);
      gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
      gl.enableVertexAttribArray(slot);
      if (i) gl.vertexAttribPointer(slot, 4, gl.UNSIGNED_BYTE, true, 0, 0);
      else gl.vertexAttribPointer(slot, 2, gl.FLOAT, false, 0, 0);
      return buffer;
    });
    Object.assign(this, { gl, canvas, count: 0 });
  }

  upload(which, array) {
    const { gl } = this;
    gl.bindBuffer(gl.ARRAY_BUFFER, this.buffers[which]);
    gl.bufferData(gl.ARRAY_BUFFER, array, gl.STATIC_DRAW);
  }

  setPlaces(places) {
    this.count = places.length / 2;
    this.upload(0, places);
  }

  setColors(colors) {
    this.upload(1, colors);
  }

  draw({ width, height, scale, x, y, radius, ratio }) {
    const { gl, canvas, uniform } = this;
    gl.viewport(0, 0, canvas.width, canvas.height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    const sx = 2 * scale / width, sy = -2 * scale / height;
    gl.uniform2f(uniform.scale, sx, sy);
    gl.uniform2f(uniform.offset, -x * sx, -y * sy);
    gl.uniform1f(uniform.size, 2 * radius * ratio);
    gl.drawArrays(gl.POINTS, 0, this.count);
  }
}

/** Draws points on a canvas, where there is no WebGL. */
class CanvasPoints {
  constructor(canvas) {
    this.pen = canvas.getContext("2d");
  }

  setPlaces(places) { this.places = places; }

  setColors(colors) { this.colors = colors; }

  draw({ width, height, scale, x, y, radius, ratio }) {
    const { pen, places, colors } = this, side = 2 * radius;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    for (let i = 0; 2 * i < places.length; i++) {
      const [r, g, b, a] = colors.subarray(4 * i, 4 * i + 4);
      pen.fillStyle = `rgb(${r} ${g} ${b} / ${a / 255})`;
      const px = width / 2 + (places[2 * i] - x) * scale;
      const py = height / 2 + (places[2 * i + 1] - y) * scale;
      pen.fillRect(px - radius, py - radius, side, side);
    }
  }
}

export class PointMap {
  /** `actions` has pick(row), select(rows) and hover(row). */
  constructor(actions) {
    this.actions = actions;
    this.view = { x: 0.5, y: 0.5, size: 1 };
    this.lassoOn = false;
    this.lasso = null; // points of the line that is being drawn, in pixels
    this.hovered = null;
    this.pointers = new Map();
    this.pictures = new Map(); // row -> Image
    this.cells = new Map(); // "column row" -> the image drawn there
    this.canvas = el("canvas", { class: "points", "aria-hidden": "true" });
    this.overlay = el("canvas", {
      class: "overlay", role: "application", tabindex: 0,
      "aria-label": "Map of the images. Arrow keys move it, plus and minus zoom, Home shows all of "
        + "it. The list beside the map has the same images.",
    });
    this.element = el("div", { class: "map-area" }, this.canvas, this.overlay);
    try {
      this.points = new WebGlPoints(this.canvas);
      this.how = "";
    } catch {
      const plain = el("canvas", { class: "points", "aria-hidden": "true" });
      this.canvas.replaceWith(plain);
      this.canvas = plain;
      this.points = new CanvasPoints(plain);
      this.how = "Drawn without WebGL, which this browser lacks: many images move slowly.";
    }
    this.listen();
  }

  setPlaces({ x, y }) {
    this.places = new Float32Array(2 * x.length);
    x.forEach((value, i) => { this.places[2 * i] = value; this.places[2 * i + 1] = y[i]; });
    const width = x.reduce((a, b) => Math.max(a, b), 0);
    const height = y.reduce((a, b) => Math.max(a, b), 0);
    this.whole = { x: width / 2, y: height / 2, size: Math.max(width, height, 0.01) };
    this.view = { ...this.whole };
    this.points.setPlaces(this.places);
    this.drawn = null;
    this.redraw();
  }

  setColors(colors) {
    this.points.setColors(colors);
    this.drawn = null;
    this.colors = colors;
    this.redraw();
  }

  // --- drawing ---

  redraw() {
    if (this.scheduled) return;
    this.scheduled = true;
    requestAnimationFrame(() => { this.scheduled = false; this.draw(); });
  }

  draw() {
    const { overlay, canvas, element } = this;
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    this.width = element.clientWidth;
    this.height = element.clientHeight;
    if (!this.width || !this.places || !this.colors) return;
    for (const layer of [canvas, overlay]) {
      const [w, h] = [Math.round(this.width * ratio), Math.round(this.height * ratio)];
      if (layer.width !== w || layer.height !== h) Object.assign(layer, { width: w, height: h });
    }
    this.scale = (Math.min(this.width, this.height) - 48) / this.view.size;
    const zoom = this.whole.size / this.view.size;
    const count = this.places.length / 2;
    this.radius = (count > 20000 ? 1.3 : count > 4000 ? 2 : 3.2) * Math.min(2.2, zoom ** 0.4);
    this.drawPoints(ratio);
    const pen = overlay.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, this.width, this.height);
    this.drawPictures(pen);
    this.drawMarks(pen);
    this.frames = (this.frames || 0) + 1;
  }

  /** Draw the points; of many points, move what was drawn before while the map moves. */
  drawPoints(ratio) {
    const { canvas, view, drawn, width, height, scale } = this;
    const isMoving = performance.now() - (this.movedAt ?? -SETTLE) < SETTLE;
    if (isMoving && drawn && this.places.length > 2 * MANY) {
      const zoom = drawn.size / view.size;
      const x = width / 2 * (1 - zoom) + (drawn.x - view.x) * scale;
      const y = height / 2 * (1 - zoom) + (drawn.y - view.y) * scale;
      canvas.style.transform = `translate(${x}px, ${y}px) scale(${zoom})`;
      clearTimeout(this.settling);
      this.settling = setTimeout(() => this.redraw(), SETTLE + 10);
      return;
    }
    this.points.draw({ ...this, ...view, ratio });
    this.drawn = { ...view };
    canvas.style.transform = "none";
  }

  toX(row) { return this.width / 2 + (this.places[2 * row] - this.view.x) * this.scale; }

  toY(row) { return this.height / 2 + (this.places[2 * row + 1] - this.view.y) * this.scale; }

  rowsInView() {
    const rows = [];
    for (let row = 0; 2 * row < this.places.length; row++) {
      const x = this.toX(row), y = this.toY(row);
      if (x >= 0 && x < this.width && y >= 0 && y < this.height) {
        rows.push(row);
        if (rows.length > POINTS_FOR_PICTURES) return null;
      }
    }
    return rows;
  }

  drawPictures(pen) {
    this.cells.clear();
    const isZoomed = this.view.size < 0.6 * this.whole.size;
    if (!isZoomed || !store.data.thumbnails) return;
    for (const row of this.rowsInView() ?? []) {
      const column = Math.floor(this.toX(row) / PICTURE), line = Math.floor(this.toY(row) / PICTURE);
      const key = `${column} ${line}`;
      if (this.cells.has(key) || this.cells.size >= MAX_PICTURES) continue;
      this.cells.set(key, row);
      const picture = this.picture(row);
      if (!picture.complete || !picture.naturalWidth) continue;
      const [r, g, b] = this.colors.subarray(4 * row, 4 * row + 3);
      pen.fillStyle = `rgb(${r} ${g} ${b})`;
      pen.fillRect(column * PICTURE + 1, line * PICTURE + 1, PICTURE - 2, PICTURE - 2);
      pen.drawImage(picture, column * PICTURE + 3, line * PICTURE + 3, PICTURE - 6, PICTURE - 6);
    }
  }

  picture(row) {
    if (!this.pictures.has(row)) {
      if (this.pictures.size > 1500) this.pictures.clear();
      const picture = new Image();
      picture.onload = () => this.redraw();
      picture.src = `thumbnails/${row}`;
      this.pictures.set(row, picture);
    }
    return this.pictures.get(row);
  }

  drawMarks(pen) {
    const style = getComputedStyle(document.documentElement);
    const accent = style.getPropertyValue("--accent"), ink = style.getPropertyValue("--ink");
    const ring = (row, radius, color) => {
      pen.strokeStyle = color;
      pen.lineWidth = 2;
      pen.beginPath();
      pen.arc(this.toX(row), this.toY(row), radius, 0, 7);
      pen.stroke();
    };
    for (const row of store.query?.rows.slice(0, 20) ?? []) ring(row, this.radius + 3, accent);
    const { row: asked = null } = store.query ?? {};
    if (asked !== null) ring(asked, this.radius + 7, ink);
    if (this.hovered !== null) ring(this.hovered, this.radius + 5, ink);
    if (this.lasso) {
      pen.beginPath();
      this.lasso.forEach(([x, y]) => pen.lineTo(x, y));
      pen.closePath();
      pen.strokeStyle = pen.fillStyle = accent;
      pen.globalAlpha = 0.15;
      pen.fill();
      pen.globalAlpha = 1;
      pen.stroke();
    }
  }

  // --- what a person does ---

  rowAt(x, y) {
    const cell = this.cells.get(`${Math.floor(x / PICTURE)} ${Math.floor(y / PICTURE)}`);
    if (cell !== undefined) return cell;
    let nearest = null, least = REACH * REACH;
    for (let row = 0; 2 * row < this.places.length; row++) {
      const distance = (this.toX(row) - x) ** 2 + (this.toY(row) - y) ** 2;
      if (distance < least) { least = distance; nearest = row; }
    }
    return nearest;
  }

  rowsIn(line) {
    const rows = [];
    for (let row = 0; 2 * row < this.places.length; row++) {
      const x = this.toX(row), y = this.toY(row);
      let inside = false;
      for (let i = 0, j = line.length - 1; i < line.length; j = i++) {
        const [xi, yi] = line[i], [xj, yj] = line[j];
        if ((yi > y) !== (yj > y) && x < (xj - xi) * (y - yi) / (yj - yi) + xi) inside = !inside;
      }
      if (inside) rows.push(row);
    }
    return rows;
  }

  zoomAt(x, y, factor) {
    const dx = (x - this.width / 2) / this.scale, dy = (y - this.height / 2) / this.scale;
    const size = Math.min(1.5 * this.whole.size,
      Math.max(this.whole.size / 400, this.view.size / factor));
    const kept = 1 - size / this.view.size;
    this.view = { x: this.view.x + dx * kept, y: this.view.y + dy * kept, size };
    this.movedAt = performance.now();
    this.redraw();
  }

  showAll() {
    this.view = { ...this.whole };
    this.redraw();
  }

  pan(dx, dy) {
    this.view.x -= dx / this.scale;
    this.view.y -= dy / this.scale;
    this.movedAt = performance.now();
    this.redraw();
  }

  listen() {
    const { overlay, pointers } = this;
    const point = (event) => {
      const box = overlay.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    overlay.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      overlay.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, point(event));
      this.moved = 0;
      if (pointers.size === 1 && (this.lassoOn || event.shiftKey)) this.lasso = [point(event)];
    });
    overlay.addEventListener("pointermove", (event) => {
      const now = point(event), before = pointers.get(event.pointerId);
      if (!before) { this.hover(this.places && this.rowAt(...now), now); return; }
      this.moved += Math.hypot(now[0] - before[0], now[1] - before[1]);
      if (pointers.size === 2) {
        const other = [...pointers].find(([id]) => id !== event.pointerId)[1];
        const length = (a) => Math.hypot(a[0] - other[0], a[1] - other[1]);
        this.lasso = null;
        this.zoomAt((now[0] + other[0]) / 2, (now[1] + other[1]) / 2,
          length(now) / Math.max(1, length(before)));
      } else if (this.lasso) this.lasso.push(now);
      else this.pan(now[0] - before[0], now[1] - before[1]);
      pointers.set(event.pointerId, now);
      this.hover(null);
      this.redraw();
    });
    overlay.addEventListener("pointerup", (event) => {
      if (!pointers.delete(event.pointerId)) return;
      const { lasso } = this;
      this.lasso = null;
      if (lasso && this.moved > 10) this.actions.select(this.rowsIn(lasso));
      else if (this.moved < 5) this.actions.pick(this.rowAt(...point(event)));
      this.redraw();
    });
    overlay.addEventListener("pointercancel", (event) => {
      pointers.delete(event.pointerId);
      this.lasso = null;
      this.redraw();
    });
    overlay.addEventListener("pointerleave", () => this.hover(null));
    overlay.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoomAt(...point(event), Math.exp(-event.deltaY / 400));
    }, { passive: false });
    overlay.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60],
        ArrowDown: [0, -60] }[event.key];
      const zoom = { "+": 1.4, "=": 1.4, "-": 1 / 1.4 }[event.key];
      if (step) this.pan(...step);
      else if (zoom) this.zoomAt(this.width / 2, this.height / 2, zoom);
      else if (event.key === "Home") this.showAll();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    new ResizeObserver(() => this.redraw()).observe(this.element);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
  }

  hover(row, place) {
    if (row !== this.hovered) this.redraw();
    this.hovered = row;
    this.actions.hover(row, place);
  }
}
