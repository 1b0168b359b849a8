// The map: images as points or pictures, with hover, click, selection, search and zoom.

// Lengths in pixels.
const CELL = 30; // of a picture on the map
const MAP_HEIGHT = 620; // at most
const MAP_PADDING = 20;
const TIP_WIDTH = 158, TIP_OFFSET = 16, TIP_THUMBNAIL = 144;
const REACH = { mouse: 14, touch: 24 }; // from the pointer to a point that it means
const MIN_DRAG = 5; // a shorter drag is a click
const MAX_TILES = 64; // images of a selection that are shown

function mapSection() {
  const runs = mappedRuns();
  if (!runs.length) return null;
  const note = "images with similar features are close together; large distances have no meaning";
  return section("map", "Map", note, runSwitcher(runs, (run) => new ImageMap(run).element));
}

/** The center and the size of the square around points, in the units of the map. */
function boundingSquare(xs, ys, indices) {
  const range = (values) => indices.map((i) => values[i])
    .reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);
  const [[left, right], [top, bottom]] = [range(xs), range(ys)];
  const size = Math.max(right - left, bottom - top, 0.01);
  return { x: (left + right) / 2, y: (top + bottom) / 2, size };
}

function downloadList(names) {
  const text = names.map((name) => `${name}\n`).join("");
  const url = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
  el("a", { href: url, download: "selection.txt" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

/** What two spellings of a name have in common: letter case, and composed or special characters. */
function searchForm(name) {
  return name.normalize("NFKC").toLowerCase();
}

class ImageMap {
  constructor(run) {
    this.data = run.map;
    this.gallery = data.galleries[run.map.gallery];
    this.count = run.map.x.length;
    this.indices = Array.from({ length: this.count }, (_, i) => i);
    this.searchNames = this.gallery.names.map(searchForm);
    const numClusters = run.map.clusters.reduce((a, b) => Math.max(a, b), 0) + 1;
    const clusterNames = Array.from({ length: numClusters }, (_, c) => `cluster ${c}`);
    this.categories = {
      label: { of: this.gallery.labels, names: this.gallery.classes },
      cluster: { of: run.map.clusters, names: clusterNames },
    };
    this.kind = this.gallery.labels ? "label" : "cluster"; // of the categories that give the colors
    this.category = null; // the only category shown; null: all
    this.query = ""; // what is searched for, in lower case
    this.showsPictures = false;
    this.pictureCells = new Map(); // "column row" -> the image drawn there
    this.hovered = null;
    this.picked = null;
    this.selected = [];
    this.drag = null; // corners of the region that is being selected, in pixels
    this.fullView = boundingSquare(run.map.x, run.map.y, this.indices);
    this.view = this.fullView;
    // The layer holds points or pictures until they change; `draw` adds what the pointer does.
    this.layer = el("canvas");
    this.layerIsStale = true;
    this.drawIsScheduled = false;
    this.element = this.buildElement();
    this.listen();
    this.updateKeys();
    this.pick(null);
  }

  // --- which images, and where ---

  get current() {
    return this.categories[this.kind];
  }

  isMatch(i) {
    return this.searchNames[i].includes(this.query);
  }

  isShown(i) {
    return (this.category === null || this.current.of[i] === this.category) && this.isMatch(i);
  }

  matches() {
    return this.query ? this.indices.filter((i) => this.isMatch(i)) : [];
  }

  colorOf(i) {
    return categoryColor(this.current.of[i], this.current.names.length);
  }

  xOf(i) {
    return this.width / 2 + (this.data.x[i] - this.view.x) * this.scale;
  }

  yOf(i) {
    return this.height / 2 + (this.data.y[i] - this.view.y) * this.scale;
  }

  describe(i) {
    const cluster = `cluster ${this.data.clusters[i]}`;
    return [labelOf(this.gallery, i), cluster].filter(Boolean).join(" · ");
  }

  /** The image under the pointer: a picture, or without pictures the nearest point in reach. */
  imageAt(x, y, reach) {
    if (this.showsPictures) {
      return this.pictureCells.get(`${Math.floor(x / CELL)} ${Math.floor(y / CELL)}`) ?? null;
    }
    let nearest = null, least = reach * reach;
    for (const i of this.indices) {
      const distance = (this.xOf(i) - x) ** 2 + (this.yOf(i) - y) ** 2;
      if (distance < least && this.isShown(i)) { least = distance; nearest = i; }
    }
    return nearest;
  }

  // --- drawing ---

  /** Draw at the next frame, the layer only if the points or pictures have changed. */
  redraw({ layer = true } = {}) {
    this.layerIsStale ||= layer;
    if (this.drawIsScheduled) return;
    this.drawIsScheduled = true;
    requestAnimationFrame(() => { this.drawIsScheduled = false; this.draw(); });
  }

  draw() {
    const { canvas, layer } = this;
    const ratio = window.devicePixelRatio || 1;
    this.width = canvas.clientWidth;
    this.height = Math.round(Math.min(this.width, MAP_HEIGHT));
    this.scale = (Math.min(this.width, this.height) - 2 * MAP_PADDING) / this.view.size;
    this.radius = (this.count > 4000 ? 2 : 3) * Math.min(2, this.view.size ** -0.35);
    if (!this.width) return;
    canvas.style.height = `${this.height}px`;
    if (canvas.width !== Math.round(this.width * ratio)) {
      canvas.width = layer.width = Math.round(this.width * ratio);
      canvas.height = layer.height = Math.round(this.height * ratio);
      this.layerIsStale = true;
    }
    const style = getComputedStyle(document.documentElement);
    const accent = style.getPropertyValue("--accent"), ink = style.getPropertyValue("--ink");
    if (this.layerIsStale) this.drawLayer(ink);
    this.layerIsStale = false;
    const pen = canvas.getContext("2d");
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.drawImage(layer, 0, 0);
    pen.setTransform(canvas.width / this.width, 0, 0, canvas.width / this.width, 0, 0);
    this.drawMarks(pen, ink, accent);
  }

  /** Draw all points, those that are not shown faintly, or pictures. */
  drawLayer(ink) {
    const { layer, width, height } = this;
    const pen = layer.getContext("2d");
    pen.setTransform(layer.width / width, 0, 0, layer.width / width, 0, 0);
    pen.clearRect(0, 0, width, height);
    const isInside = (i) => {
      const x = this.xOf(i), y = this.yOf(i);
      return x > -50 && x < width + 50 && y > -50 && y < height + 50;
    };
    const shown = [];
    pen.globalAlpha = 0.13;
    pen.fillStyle = ink;
    for (const i of this.indices.filter(isInside)) {
      if (this.isShown(i)) shown.push(i); else this.fillCircle(pen, i, this.radius);
    }
    pen.globalAlpha = this.showsPictures ? 0.35 : 0.85;
    for (const i of shown) {
      pen.fillStyle = this.colorOf(i);
      this.fillCircle(pen, i, this.radius);
    }
    pen.globalAlpha = 1;
    if (this.showsPictures) this.drawPictures(pen, shown);
  }

  /** Draw thumbnails at their points, one in each cell of a grid. */
  drawPictures(pen, shown) {
    const { gallery, pictureCells } = this, { side } = gallery;
    pen.imageSmoothingEnabled = !gallery.pixelated;
    pictureCells.clear();
    for (const i of shown) {
      const column = Math.floor(this.xOf(i) / CELL), row = Math.floor(this.yOf(i) / CELL);
      if (pictureCells.has(`${column} ${row}`)) continue;
      pictureCells.set(`${column} ${row}`, i);
      const { index, x, y } = locateThumbnail(gallery, i);
      const sheet = gallery.decoded?.[index];
      if (!sheet) { loadSheet(gallery, index).then(() => this.redraw()); continue; }
      const left = column * CELL, top = row * CELL;
      pen.fillStyle = this.colorOf(i);
      pen.fillRect(left, top, CELL - 1, CELL - 1);
      pen.drawImage(sheet, x, y, side, side, left + 2, top + 2, CELL - 5, CELL - 5);
    }
  }

  /** Draw the selection, the picked image and its neighbors, the hovered image and the drag. */
  drawMarks(pen, ink, accent) {
    const { radius, picked, hovered, drag } = this;
    pen.strokeStyle = ink;
    pen.lineWidth = 1.5;
    for (const i of this.selected) this.strokeCircle(pen, i, radius + 1.5);
    if (picked !== null) {
      pen.strokeStyle = pen.fillStyle = accent;
      for (const i of this.data.neighbors[picked]) {
        pen.globalAlpha = 0.5;
        pen.beginPath();
        pen.moveTo(this.xOf(picked), this.yOf(picked));
        pen.lineTo(this.xOf(i), this.yOf(i));
        pen.stroke();
        pen.globalAlpha = 1;
        this.strokeCircle(pen, i, radius + 2);
      }
      this.fillCircle(pen, picked, radius + 4);
    }
    if (hovered !== null) {
      pen.strokeStyle = ink;
      this.strokeCircle(pen, hovered, radius + 4);
    }
    if (drag) {
      const { x0, y0, x1, y1 } = drag;
      pen.fillStyle = pen.strokeStyle = accent;
      pen.globalAlpha = 0.12;
      pen.fillRect(x0, y0, x1 - x0, y1 - y0);
      pen.globalAlpha = 1;
      pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
    }
  }

  circle(pen, i, radius) {
    pen.beginPath();
    pen.arc(this.xOf(i), this.yOf(i), radius, 0, 7);
  }

  fillCircle(pen, i, radius) {
    this.circle(pen, i, radius);
    pen.fill();
  }

  strokeCircle(pen, i, radius) {
    this.circle(pen, i, radius);
    pen.stroke();
  }

  // --- what a reader does ---

  hover(i, x, y) {
    const { tip } = this;
    if (i !== this.hovered) {
      this.hovered = i;
      tip.classList.toggle("hidden", i === null);
      if (i !== null) {
        tip.replaceChildren(
          thumbnail(this.gallery, i, TIP_THUMBNAIL), shown(this.gallery.names[i]),
          el("div", { class: "pale" }, this.describe(i)));
      }
      this.redraw({ layer: false });
    }
    if (i !== null) {
      const right = x + TIP_OFFSET;
      const left = Math.max(0, x - TIP_WIDTH - TIP_OFFSET);
      tip.style.left = `${right + TIP_WIDTH > this.width ? left : right}px`;
      const lowest = this.height - tip.offsetHeight - 4;
      tip.style.top = `${Math.max(4, Math.min(y + 12, lowest))}px`;
    }
  }

  pick(i) {
    this.picked = i;
    this.side.replaceChildren(...(i === null ? this.buildHint() : this.buildDetails(i)));
    this.redraw({ layer: false });
  }

  select(indices) {
    this.selected = indices;
    this.selection.classList.toggle("hidden", !indices.length);
    this.selection.replaceChildren(...this.buildSelection(indices));
    this.redraw({ layer: false });
  }

  search(text) {
    this.query = searchForm(text.trim());
    const count = this.matches().length;
    this.matchCount.textContent =
      this.query ? `${formatNumber(count)} of ${formatNumber(this.count)}` : "";
    this.selectMatches.disabled = !count;
    this.redraw();
  }

  zoom(view) {
    this.view = view;
    this.zoomOut.disabled = view === this.fullView;
    this.redraw();
  }

  listen() {
    const { canvas } = this;
    const point = (event) => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    canvas.addEventListener("pointerdown", (event) => {
      const scrolls = event.pointerType === "touch" && !canvas.classList.contains("selecting");
      if (event.button || scrolls) return;
      const [x, y] = point(event);
      this.drag = { x0: x, y0: y, x1: x, y1: y };
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      const [x, y] = point(event);
      if (this.drag) {
        Object.assign(this.drag, { x1: x, y1: y });
        this.hover(null);
        this.redraw({ layer: false });
      } else if (event.pointerType !== "touch") this.hover(this.imageAt(x, y, REACH.mouse), x, y);
    });
    canvas.addEventListener("pointerleave", () => this.hover(null));
    canvas.addEventListener("pointercancel", () => {
      this.drag = null;
      this.redraw({ layer: false });
    });
    canvas.addEventListener("pointerup", (event) => {
      if (event.button) return;
      const { drag } = this;
      this.drag = null;
      if (drag && Math.hypot(drag.x1 - drag.x0, drag.y1 - drag.y0) > MIN_DRAG) {
        this.select(this.imagesIn(drag));
      } else this.pick(this.imageAt(...point(event), REACH[event.pointerType] ?? REACH.mouse));
    });
    canvas.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { this.select([]); this.pick(null); }
    });
    new ResizeObserver(() => this.redraw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
  }

  /** The images shown in a region. */
  imagesIn({ x0, y0, x1, y1 }) {
    const isBetween = (v, a, b) => v >= Math.min(a, b) && v <= Math.max(a, b);
    return this.indices.filter((i) =>
      isBetween(this.xOf(i), x0, x1) && isBetween(this.yOf(i), y0, y1) && this.isShown(i));
  }

  // --- elements ---

  buildElement() {
    const { gallery, count, data: { layout, dim } } = this;
    this.canvas = el("canvas", {
      role: "img", tabindex: 0, "aria-label": `A map of ${count} images`,
    });
    this.tip = el("div", { class: "tip hidden" });
    this.side = el("aside", { class: "card side" });
    this.keys = el("div", { class: "keys" });
    this.selection = el("div", { class: "card stack hidden", id: "selection" });
    this.matchCount = el("small", { id: "match-count" });
    this.selectMatches = el("button",
      { disabled: "", onclick: () => this.select(this.matches()) }, "Select matches");
    this.zoomOut = el("button",
      { disabled: "", onclick: () => this.zoom(this.fullView) }, "Whole map");
    const input = el("input", {
      class: "input search", type: "search", placeholder: "Search file names",
      "aria-label": "Search file names",
      oninput: () => this.search(input.value),
      onkeydown: (event) => {
        if (event.key === "Enter" && this.matches().length) this.pick(this.matches()[0]);
      },
    });
    const pictures = this.buildToggle("Pictures", (on) => { this.showsPictures = on; });
    const drag = this.buildToggle("Drag to select",
      (on) => this.canvas.classList.toggle("selecting", on));
    drag.classList.add("touch");
    const caption = `${layout} of ${formatNumber(count)} images, computed from the backbone's `
      + `features h (${dim} dimensions).`;
    return el("div", { class: "stack" },
      el("div", { class: "row" }, input, this.selectMatches, this.matchCount),
      el("div", { class: "row" },
        gallery.labels ? this.buildColorSelect() : null, pictures, this.zoomOut, drag),
      this.keys,
      el("div", { class: "map" },
        el("div", { class: "stack" },
          el("div", { class: "card plot" }, this.canvas, this.tip), this.selection,
          el("small", {}, caption)),
        this.side));
  }

  buildToggle(name, set) {
    const onclick = () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", on);
      set(on);
      this.redraw();
    };
    const button = el("button", { "aria-pressed": "false", onclick }, name);
    return button;
  }

  buildColorSelect() {
    const onchange = (event) => {
      this.kind = event.target.value;
      this.category = null;
      this.updateKeys();
      this.redraw();
    };
    return el("select", { "aria-label": "Color by", onchange },
      el("option", { value: "label" }, "Color by label"),
      el("option", { value: "cluster" }, "Color by cluster"));
  }

  /** The keys to the colors; a click on one shows only its images, or all again. */
  updateKeys() {
    const { of, names } = this.current;
    const counts = names.map(() => 0);
    of.forEach((c) => { counts[c] += 1; });
    const key = (name, c) => {
      const onclick = () => {
        this.category = this.category === c ? null : c;
        this.updateKeys();
        this.redraw();
      };
      return el("button", { "aria-pressed": this.category === c ? "true" : "false", onclick },
        swatch(categoryColor(c, names.length)), name, el("small", {}, formatNumber(counts[c])));
    };
    this.keys.replaceChildren(...names.map(key).filter((_, c) => counts[c]));
  }

  buildHint() {
    const text = "Click an image on the map to see the images with the most similar features. "
      + "Drag across the map to select a region and download the list of its files.";
    return [el("h3", {}, "Neighbors"), el("p", { class: "pale" }, text)];
  }

  buildDetails(i) {
    const { gallery } = this;
    const close = el("button", { onclick: () => this.pick(null) }, "Close");
    const tiles = neighborTiles(gallery, this.data, i, (j) => this.pick(j));
    const note = gallery.labels ? " Underlined: same class." : "";
    return [
      el("div", { class: "head" }, el("h3", {}, "Neighbors"), close),
      thumbnail(gallery, i, TIP_THUMBNAIL),
      el("div", {},
        el("b", {}, shown(gallery.names[i])), el("div", { class: "pale" }, this.describe(i))),
      el("div", { class: "tiles" }, tiles),
      el("small", {}, `The numbers are cosine similarities of features.${note}`),
    ];
  }

  buildSelection(indices) {
    const { gallery } = this;
    const download = () => downloadList(indices.map((i) => gallery.names[i]));
    const zoomIn = () => this.zoom(boundingSquare(this.data.x, this.data.y, indices));
    const pick = (i) => this.pick(i);
    const more = indices.length - MAX_TILES;
    return [
      el("div", { class: "head" },
        el("h3", {}, `${formatNumber(indices.length)} selected`),
        el("div", { class: "row" },
          el("button", { id: "download", onclick: download }, "Download the file list"),
          el("button", { onclick: zoomIn }, "Zoom in"),
          el("button", { onclick: () => this.select([]) }, "Clear"))),
      el("div", { class: "tiles" },
        indices.slice(0, MAX_TILES).map((i) => tile(gallery, i, { pick }))),
      more > 0 ? el("small", {}, `and ${formatNumber(more)} more`) : "",
    ];
  }
}
