// The page: the map on the left, and on the right what is being done.
import { CleanPanel } from "./clean.js";
import { classColor, LabelPanel } from "./label.js";
import { PointMap } from "./points.js";
import {
  attempt, load, onChange, say, searchImage, searchRow, select, showQuery, store, watch,
} from "./state.js";
import { TakePanel } from "./take.js";
import { grid, openImage } from "./tiles.js";

const TABS = { browse: "Browse", label: "Label", clean: "Clean up", take: "Save files" };
const GRAY = [140, 146, 156];
const MAX_LEGEND = 14;
const MAX_IMAGE_BYTES = 2 ** 26;
const MODES = {
  label: "Label", prediction: "Prediction", confidence: "Confidence", cluster: "Cluster",
  similarity: "Similarity to the search", class: "Class in the file",
};

// --- colors ---

const pen = el("canvas", { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
const known = new Map();

/** Red, green and blue of a color in CSS. */
function rgb(color) {
  if (!known.has(color)) {
    pen.fillStyle = color;
    pen.fillRect(0, 0, 1, 1);
    known.set(color, [...pen.getImageData(0, 0, 1, 1).data.slice(0, 3)]);
  }
  return known.get(color);
}

/** A color from dark blue (0) to yellow (1). */
function ramp(value) {
  const stops = [[68, 60, 148], [42, 120, 142], [60, 170, 110], [240, 200, 50]];
  const at = Math.min(2.999, Math.max(0, value) * 3), i = Math.floor(at), part = at - i;
  return stops[i].map((v, c) => v + (stops[i + 1][c] - v) * part);
}

class Coloring {
  constructor() {
    this.mode = "cluster";
    this.chosen = false; // whether a person has chosen the mode
  }

  available() {
    const { state, places, query, data, predictions } = store;
    return {
      label: state.labels.length > 0, prediction: predictions.classes.length > 0,
      confidence: predictions.classes.length > 0, cluster: !!places.clusters,
      similarity: !!query, class: data.classes.some(Boolean),
    };
  }

  /** The color of each row, and the legend: names and colors, or the ends of a ramp. */
  compute() {
    const { predictions, places, query, data, labels } = store;
    const category = (count) => {
      const table = Array.from({ length: count }, (_, i) => rgb(categoryColor(i, count)));
      return (i) => table[i];
    };
    if (this.mode === "label") {
      return { of: (row) => (labels.has(row) ? rgb(classColor(labels.get(row))) : null),
        legend: store.classes.map((name) => [name, classColor(name)]) };
    }
    if (this.mode === "prediction") {
      const names = predictions.classes;
      const table = names.map((name) => rgb(classColor(name)));
      return { of: (row) => table[predictions.predicted[row]],
        legend: names.map((name) => [name, classColor(name)]) };
    }
    if (this.mode === "confidence") {
      return { of: (row) => ramp(predictions.confidence[row] / 100), ends: ["unsure", "sure"] };
    }
    if (this.mode === "similarity" && query) {
      const sorted = [...query.cosines].sort((a, b) => a - b);
      const low = sorted[0], high = sorted[sorted.length - 1];
      return { of: (row) => ramp((query.cosines[row] - low) / (high - low || 1)),
        ends: ["different", "similar"] };
    }
    if (this.mode === "class") {
      const names = [...new Set(data.classes)].sort(), index = new Map(names.map((n, i) => [n, i]));
      const color = category(names.length);
      return { of: (row) => (data.classes[row] ? color(index.get(data.classes[row])) : null),
        legend: names.filter(Boolean).map((name) =>
          [name, categoryColor(index.get(name), names.length)]) };
    }
    if (!places.clusters) return { of: () => null, legend: [] };
    const count = places.clusters.reduce((a, b) => Math.max(a, b), 0) + 1;
    const color = category(count);
    return { of: (row) => color(places.clusters[row]),
      legend: Array.from({ length: count }, (_, i) => [`cluster ${i}`, categoryColor(i, count)]) };
  }
}

// --- the page ---

class Page {
  constructor() {
    this.coloring = new Coloring();
    this.labelPanel = new LabelPanel();
    this.cleanPanel = new CleanPanel();
    this.takePanel = new TakePanel();
    this.browsePanel = el("div", { class: "stack" });
    this.panels = { browse: this.browsePanel, label: this.labelPanel.element,
      clean: this.cleanPanel.element, take: this.takePanel.element };
    this.map = new PointMap({
      pick: (row) => (row === null ? select([]) : this.pick(row)),
      select: (rows) => { select(rows); say(`${formatNumber(rows.length)} images selected.`); },
      hover: (row, place) => this.showTip(row, place),
    });
    this.build();
    this.listen();
  }

  pick(row) {
    if (store.tab === "label") this.labelPanel.setCurrent(row);
    else searchRow(row);
  }

  build() {
    this.tabs = Object.entries(TABS).map(([name, text]) => el("button", {
      type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "panel",
      onclick: () => this.open(name),
    }, text));
    this.search = el("input", {
      class: "input", type: "search", placeholder: "File name …", "aria-label": "File name",
    });
    this.file = el("input", {
      type: "file", accept: "image/*,.heic,.tif,.tiff,.npy", class: "hidden", tabindex: -1,
      "aria-hidden": "true",
      onchange: () => { this.searchFile(this.file.files[0]); this.file.value = ""; },
    });
    const form = el("form", {
      class: "row search-form", role: "search",
      onsubmit: (event) => { event.preventDefault(); this.searchText(this.search.value); },
    }, this.search, el("button", { type: "submit" }, "Search"),
    el("button", {
      type: "button", title: "Or drop an image onto the page, or paste one",
      onclick: () => this.file.click(),
    }, "By image …"), this.file);
    this.mode = el("select", {
      "aria-label": "Color of the points",
      onchange: () => { this.coloring.chosen = true; this.setMode(this.mode.value); },
    });
    this.lasso = el("button", {
      type: "button", "aria-pressed": "false", title: "Or hold Shift and drag",
      onclick: () => {
        this.map.lassoOn = !this.map.lassoOn;
        this.lasso.setAttribute("aria-pressed", String(this.map.lassoOn));
        this.map.element.classList.toggle("lassoing", this.map.lassoOn);
      },
    }, "Lasso");
    this.legend = el("div", { class: "keys" });
    this.tip = el("div", { class: "tip hidden" });
    this.map.element.append(this.tip);
    this.caption = el("small", { class: "pale" });
    const zoom = (factor) => this.map.zoomAt(this.map.width / 2, this.map.height / 2, factor);
    this.panel = el("section", {
      id: "panel", class: "panel", role: "tabpanel", tabindex: -1, "aria-labelledby": "tab-browse",
    });
    document.body.append(
      el("header", { class: "top" },
        el("h1", {}, "simsiam explore"), el("span", { class: "pale file-name" }, store.data.file),
        el("div", { class: "row tabs", role: "tablist", "aria-label": "What to do" }, this.tabs),
        form),
      el("p", { id: "status", role: "status", "aria-live": "polite" }),
      el("main", { class: "split" },
        el("section", { class: "map-side", "aria-label": "Map" },
          el("div", { class: "row map-tools" },
            el("label", { class: "row" }, el("small", {}, "Color"), this.mode), this.lasso,
            el("button", { type: "button", "aria-label": "Zoom in", onclick: () => zoom(1.5) }, "+"),
            el("button", {
              type: "button", "aria-label": "Zoom out", onclick: () => zoom(1 / 1.5),
            }, "−"),
            el("button", { type: "button", onclick: () => this.map.showAll() }, "Whole map")),
          this.map.element, this.legend, this.caption),
        this.panel),
      el("div", { class: "drop-hint hidden" }, "Drop the image to search for images like it"));
  }

  listen() {
    onChange((what) => this.update(what));
    document.addEventListener("keydown", (event) => this.key(event));
    // After a click, keys are for the panel again, and not for the button that was clicked.
    this.panel.addEventListener("click", (event) => {
      if (event.detail) event.target.closest("button, [type=checkbox]")?.blur();
    });
    const hint = document.querySelector(".drop-hint");
    const hasFile = (event) => [...event.dataTransfer?.types ?? []].includes("Files");
    addEventListener("dragover", (event) => {
      if (!hasFile(event)) return;
      event.preventDefault();
      hint.classList.remove("hidden");
    });
    addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) hint.classList.add("hidden");
    });
    addEventListener("drop", (event) => {
      event.preventDefault();
      hint.classList.add("hidden");
      this.searchFile(event.dataTransfer.files[0]);
    });
    addEventListener("paste", (event) => {
      const file = [...event.clipboardData.files][0];
      if (file) this.searchFile(file);
    });
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    const { target } = event;
    if (target.matches("input, select, textarea") || document.querySelector("dialog[open]")) return;
    if (event.repeat && !event.key.startsWith("Arrow")) return;
    if (event.key === "Enter" && target.matches("button")) return;
    if (event.key === "Escape") { select([]); return; }
    const panel = { label: this.labelPanel, clean: this.cleanPanel }[store.tab];
    if (panel?.key(event)) event.preventDefault();
  }

  searchFile(file) {
    if (!file) return;
    if (file.size > MAX_IMAGE_BYTES) say("This file is larger than 64 MB.", true);
    else searchImage(file);
  }

  /** Search by a name: the images whose names contain it; a single one is the query. */
  searchText(text) {
    const wanted = searchForm(text.trim());
    if (!wanted) return;
    this.names ??= store.data.names.map(searchForm);
    const rows = this.names.map((name, row) => (name.includes(wanted) ? row : -1))
      .filter((row) => row >= 0);
    if (rows.length === 1) searchRow(rows[0]);
    else if (rows.length) {
      select(rows);
      this.open("browse");
      say(`${formatNumber(rows.length)} names contain ${text.trim()}: they are selected.`);
    } else say(`No name contains ${text.trim()}.`, true);
  }

  open(name) {
    store.tab = name;
    this.tabs.forEach((button, i) => button.setAttribute(
      "aria-selected", String(Object.keys(TABS)[i] === name)));
    this.panel.setAttribute("aria-labelledby", `tab-${name}`);
    this.panel.replaceChildren(this.panels[name]);
    document.activeElement?.blur();
    if (name === "clean") this.cleanPanel.open();
    else this.updatePanel();
  }

  updatePanel() {
    ({ browse: () => this.showBrowse(), label: () => this.labelPanel.update(),
      clean: () => this.cleanPanel.update(), take: () => this.takePanel.update() })[store.tab]();
  }

  update(what) {
    if (what === "places") this.map.setPlaces(store.places);
    if (what === "query") {
      if (store.tab !== "browse") this.open("browse");
      this.panel.scrollTop = 0;
    }
    if (what === "state" && !this.coloring.chosen && store.predictions.classes.length) {
      this.coloring.mode = "prediction";
    }
    this.setMode(this.coloring.mode);
    this.caption.textContent = [
      `${formatNumber(store.data.names.length)} images placed by ${store.places.layout}.`,
      this.map.how].filter(Boolean).join(" ");
    const shows = { browse: ["selection", "query", "start"], label: ["state", "classes",
      "selection", "start"], clean: ["state", "start"], take: ["state", "selection", "start"] };
    if (shows[store.tab].includes(what)) this.updatePanel();
  }

  setMode(mode) {
    const available = this.coloring.available();
    const fallback = Object.keys(MODES).find((name) => available[name]);
    this.coloring.mode = available[mode] ? mode : fallback ?? "cluster";
    this.mode.replaceChildren(...Object.entries(MODES).map(([name, text]) =>
      el("option", { value: name, disabled: available[name] ? null : "" }, text)));
    this.mode.value = this.coloring.mode;
    const { of, legend = [], ends } = this.coloring.compute();
    const count = store.data.names.length, colors = new Uint8Array(4 * count);
    const { selection } = store;
    for (let row = 0; row < count; row++) {
      const color = of(row), [r, g, b] = color ?? GRAY, at = 4 * row;
      colors[at] = r;
      colors[at + 1] = g;
      colors[at + 2] = b;
      colors[at + 3] = selection.size && !selection.has(row) ? 30 : color ? 225 : 110;
    }
    this.map.setColors(colors);
    const items = legend.slice(0, MAX_LEGEND).map(([name, color]) =>
      el("span", { class: "legend-item" }, swatch(color), name));
    if (legend.length > MAX_LEGEND) items.push(`and ${legend.length - MAX_LEGEND} more`);
    if (ends) items.push(ends[0], el("span", { class: "ramp" }), ends[1]);
    this.legend.replaceChildren(...items);
  }

  showBrowse() {
    const { query, selection, data } = store, parts = [];
    if (query) {
      const shownImage = query.row !== null
        ? el("img", { src: `thumbnails/${query.row}`, alt: "" })
        : el("img", { src: query.picture, alt: "" });
      parts.push(el("div", { class: "stack" },
        el("div", { class: "card query" }, shownImage,
          el("div", {}, el("h2", {}, "Similar images"), el("small", {}, query.name)),
          query.row !== null ? el("button", {
            type: "button", onclick: () => openImage(query.row),
          }, "Open") : null,
          el("button", {
            type: "button", onclick: () => select(query.rows),
          }, "Select these"),
          el("button", {
            type: "button", onclick: () => showQuery(null),
          }, "Clear")),
        grid(query.rows, openImage, query.rows.map((row) => query.cosines[row].toFixed(3)))));
    }
    if (selection.size) {
      parts.unshift(el("div", { class: "head" },
        el("h2", {}, `${formatNumber(selection.size)} selected`),
        el("button", { type: "button", onclick: () => select([]) }, "Select none (Esc)")),
      grid([...selection]));
    }
    if (!parts.length) {
      parts.push(el("div", { class: "head" },
        el("h2", {}, `All ${formatNumber(data.names.length)} images`),
        el("small", {}, "Click one to open it. Click a point for images like it.")),
      grid(data.names.map((_, row) => row)));
    }
    if (data.missing) parts.unshift(el("p", { class: "card warning" },
      `The originals cannot be opened, so thumbnails are shown: ${data.missing}`));
    this.browsePanel.replaceChildren(...parts);
  }

  showTip(row, place) {
    this.tip.classList.toggle("hidden", row === null || !place);
    if (row === null || !place) return;
    if (this.tipRow !== row) {
      this.tipRow = row;
      this.tip.replaceChildren(
        el("img", { src: `thumbnails/${row}`, alt: "" }), store.data.names[row],
        el("div", { class: "pale" }, this.describePoint(row)));
    }
    const [x, y] = place, { width, height } = this.map;
    this.tip.style.left = `${x + 180 > width ? Math.max(0, x - 176) : x + 16}px`;
    this.tip.style.top = `${Math.max(4, Math.min(y, height - this.tip.offsetHeight - 4))}px`;
  }

  describePoint(row) {
    const { predictions, labels, places } = store;
    const guess = predictions.classes.length
      ? `${predictions.classes[predictions.predicted[row]]}? ${predictions.confidence[row]} %` : "";
    return [labels.get(row) ?? guess, places.clusters && `cluster ${places.clusters[row]}`]
      .filter(Boolean).join(" · ");
  }

  start() {
    this.map.setPlaces(store.places);
    this.open("browse");
    this.update("start");
    watch();
  }
}

const status = el("p", { id: "status" }, "Loading …");
document.body.append(status);
await attempt(async () => {
  await load();
  status.remove();
  const page = new Page();
  page.start();
  window.explore = page; // for tests and for the curious
});
