"use strict";
// Everything shown comes from one JSON element and becomes text or pixels, never markup.

const data = JSON.parse(document.getElementById("data").textContent);
const several = data.runs.length > 1;

// --- building blocks ---------------------------------------------------------------------------------------------------

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

function el(tag, attributes = {}, ...children) {
  return build(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function section(id, title, about, ...children) {
  return el("section", { id }, el("div", { class: "head" }, el("h2", {}, title), about && el("small", {}, about)), ...children);
}

/** What `render(run)` makes of one run, and buttons to choose which, where several runs have it. */
function chosenRun(runs, render) {
  const place = el("div", { class: "stack" });
  const show = (run) => {
    place.replaceChildren(render(run));
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", runs[i] === run));
  };
  const buttons = runs.map((run) => el("button", { onclick: () => show(run) }, run.name));
  show(runs[0]);
  return el("div", { class: "stack" }, runs.length > 1 ? el("div", { class: "row" }, buttons) : null, place);
}

function nameRuns() {
  const last = data.runs.map((run) => run.path.replace(/\/+$/, "").split("/").pop());
  const clear = new Set(last).size === last.length;
  data.runs.forEach((run, i) => Object.assign(run, { name: (clear && last[i]) || run.path, color: `var(--run-${i % 8})` }));
}

function day(text) {
  return text ? text.replace("T", " ").replace(/:\d\d(\.\d+)?\+00:00$/, " UTC") : "";
}

function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  return Math.abs(value) < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(digits)));
}

function percent(value) {
  return value === null || value === undefined ? "–" : value.toFixed(1);
}

function duration(seconds) {
  for (const [unit, length] of [["days", 86400], ["hours", 3600], ["min", 60]]) {
    if (seconds >= 2 * length) return `${number(seconds / length, 2)} ${unit}`;
  }
  return `${Math.round(seconds)} s`;
}

function words(value) {
  if (Array.isArray(value)) return value.map(words).join(" ");
  if (value && typeof value === "object") return Object.entries(value).map(([k, v]) => `${k} ${words(v)}`).join(", ");
  return value === null || value === undefined ? "–" : typeof value === "number" ? String(value) : String(value);
}

function swatch(color) {
  return el("span", { class: "swatch", style: { background: color } });
}

// --- verdict -----------------------------------------------------------------------------------------------------------

function header() {
  const sources = [...new Set(data.runs.map((run) => words(run.recipe.source)))];
  const methods = [...new Set(data.runs.map((run) => `${run.recipe.method.name}, ${run.recipe.backbone}`))];
  return el("div", {},
    el("header", {},
      el("h1", {}, several ? `${data.runs.length} runs side by side` : data.runs[0].name),
      el("p", { class: "pale" }, `${methods.join(" · ")} on ${sources.join(" · ")}`)),
    el("div", { class: "verdicts" }, data.runs.map(verdict)));
}

function verdict(run) {
  const { summary } = run;
  const word = summary.verdict ?? "unfinished";
  const tone = word === "healthy" ? "good" : ["collapsed", "partial collapse", "diverged", "not converging"].includes(word) ? "bad" : "";
  const steps = run.curves.step ?? [];
  const figures = [
    ["kNN, last, %", summary.knn_top1 && percent(summary.knn_top1.last)],
    ["kNN, best, %", summary.knn_top1 && percent(summary.knn_top1.best)],
    ["epochs", summary.epochs ?? run.curves.epoch?.at(-1)],
    ["steps", summary.steps ?? steps.at(-1)],
    ["training", summary.training_seconds && duration(summary.training_seconds)],
    ["images/s", summary.images_per_second && Math.round(summary.images_per_second)],
  ].filter(([, value]) => value !== null && value !== undefined);
  return el("article", { class: "card stack", id: several ? null : "verdict" },
    several ? el("div", { class: "row" }, swatch(run.color), el("h3", {}, run.name)) : null,
    el("div", { class: `verdict ${tone}` }, word),
    el("p", {}, summary.remedy ?? "The run has no summary yet: simsiam resume finishes it."),
    summary.advice ? el("p", { class: "pale" }, summary.advice) : null,
    el("dl", { class: "figures" }, figures.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, number(value))))),
    run.missing ? el("p", { class: "pale" }, run.missing) : null,
    run.unreadable.count ? el("details", {},
      el("summary", {}, `${number(run.unreadable.count)} unreadable files were left out`),
      el("div", { class: "stack" }, run.unreadable.first.map((line) => el("small", {}, line)))) : null);
}

// --- results -----------------------------------------------------------------------------------------------------------

function results() {
  const records = data.runs.flatMap((run) => run.results.map((record) => ({ ...record, run })));
  if (!records.length) return null;
  const groups = new Map();
  for (const record of records) {
    const same = [record.protocol, record.source, record.train, record.test, record.checkpoint].join("\0");
    groups.set(same, [...(groups.get(same) ?? []), record]);
  }
  return section("results", "Results", "top-1, percent; small: the 95 % interval, or ± the standard deviation over draws of labels",
    ...[...groups.values()].map((group) => el("div", { class: "card stack" },
      el("div", { class: "head" }, el("h3", {}, PROTOCOLS[group[0].protocol] ?? group[0].protocol), el("small", {}, protocol(group))),
      el("div", { class: "scroll" }, group.some((r) => "top1" in r) ? accuracies(group) : signals(group)),
      conditions(group))));
}

const PROTOCOLS = { knn: "Nearest neighbors", linear: "Linear classifier", few_label: "Few labels", finetune: "Fine-tuning", label_free: "Without labels" };

function protocol(group) {
  const { source, train, test, checkpoint, train_images, n } = group[0];
  const learned = train && "top1" in group[0] ? `learned from ${train}${train_images ? ` (${number(train_images)})` : ""}, ` : "";
  const steps = [...new Set(group.map((r) => r.step).filter((step) => step !== undefined))];
  return [source, `${learned}tested on ${test ?? "?"}${n ? ` (${number(n)})` : ""}`,
    `${checkpoint ?? "last"} checkpoint${steps.length === 1 ? `, step ${number(steps[0])}` : ""}`].filter(Boolean).join(" · ");
}

const isBaseline = (record) => ["raw pixels", "untrained network", "from scratch"].includes(record.features);

/** A row for each setting; columns are kinds of features, or the runs where there are several. */
function accuracies(group) {
  const rowOf = (r) => (several ? `${r.name}\0${r.features}` : r.name);
  const columnOf = (r) => (several ? r.run : r.features);
  const rows = [...new Set(group.map(rowOf))];
  const columns = several ? data.runs : [...new Set(group.map(columnOf))];
  return el("table", { class: "accuracies", style: { minWidth: `${5 + 4.3 * columns.length}rem` } },
    el("tr", {}, el("th", {}, "protocol"), several ? el("th", {}, "features") : null, el("th", { class: "wide" }, "0 to 100 %"),
      columns.map((c) => el("th", { class: "number" }, several ? el("span", {}, swatch(c.color), ` ${c.name}`) : c))),
    rows.map((row) => {
      const inRow = group.filter((r) => rowOf(r) === row);
      return el("tr", { class: several && isBaseline(inRow[0]) ? "pale" : null },
        el("td", {}, inRow[0].name), several ? el("td", {}, inRow[0].features) : null, el("td", { class: "wide" }, track(inRow)),
        columns.map((c) => accuracy(inRow.find((r) => columnOf(r) === c))));
    }));
}

function accuracy(record) {
  if (!record) return el("td", { class: "number pale" }, "–");
  const spread = record.interval ? record.interval.map(percent).join("–") : `± ${percent(record.top1_std)}`;
  const top5 = record.top5 === null || record.top5 === undefined ? null : el("span", { class: "wide" }, ` · top-5 ${percent(record.top5)}`);
  const value = percent(record.top1);
  return el("td", { class: "number" }, isBaseline(record) ? value : el("b", {}, value), el("small", {}, spread, top5));
}

function track(records) {
  const marks = records.flatMap((r) => {
    const color = isBaseline(r) ? "var(--pale)" : several ? r.run.color : "var(--accent)";
    const [low, high] = r.interval ?? [r.top1 - (r.top1_std ?? 0), r.top1 + (r.top1_std ?? 0)];
    return [
      el("em", { style: { color, left: `${low}%`, width: `${high - low}%` } }),
      el("span", { class: isBaseline(r) ? "" : "main", style: { color, left: `${r.top1}%` }, title: `${r.features}: ${percent(r.top1)} %` }),
    ];
  });
  return el("div", { class: "track" }, marks);
}

const SIGNALS = [
  ["view_retrieval", "views that find each other, %"], ["rankme", "effective rank"], ["spectrum_auc", "spectrum, area"],
  ["alignment", "alignment"], ["uniformity", "uniformity"],
];

function signals(group) {
  const known = SIGNALS.filter(([key]) => group.some((r) => key in r));
  return el("table", {},
    el("tr", {}, el("th", {}, "signal"), group.map((r) => el("th", { class: "number" }, several ? `${r.run.name}, ${r.name}` : r.name))),
    known.map(([key, name]) => el("tr", {}, el("td", {}, name), group.map((r) => el("td", { class: "number" }, number(r[key]))))));
}

function conditions(group) {
  const lines = new Set(group.map((r) => `${r.name}: ${words(r.parameters ?? {})}${r.chosen && Object.keys(r.chosen).length && !isBaseline(r) ? `; chosen: ${words(r.chosen)}` : ""}`));
  const where = new Set(group.map((r) => `measured ${day(r.measured)}, ${words(r.environment ?? {})}`));
  return el("details", {}, el("summary", {}, "How this was measured"),
    el("div", { class: "stack" }, [...lines, ...where].map((line) => el("small", {}, line))));
}

// --- detectors ---------------------------------------------------------------------------------------------------------

const METRICS = { voc_box: "boxes, VOC", coco_box: "boxes, COCO", coco_mask: "masks, COCO" };

function transfers() {
  const records = data.runs.flatMap((run) => (run.transfers ?? []).map((record) => ({ ...record, run })));
  if (!records.length) return null;
  return section("transfers", "Detection and segmentation", "average precision of the fine-tuned backbone, percent",
    el("div", { class: "card scroll" }, el("table", {},
      el("tr", {}, several ? el("th", {}, "run") : null, ["detector", "from", "lr", "tested on", "metric"].map((name) => el("th", {}, name)),
        ["AP50", "AP", "AP75"].map((name) => el("th", { class: "number" }, name))),
      records.flatMap((r) => Object.entries(r.metrics).map(([metric, values]) => el("tr", { class: metric === r.tested_by ? null : "pale" },
        several ? el("td", {}, swatch(r.run.color), ` ${r.run.name}`) : null,
        [r.protocol, r.init.from, number(r.chosen.lr), `${r.source}, ${r.test} (${number(r.n)})`, METRICS[metric] ?? metric].map((text) => el("td", {}, text)),
        ["AP50", "AP", "AP75"].map((key) => el("td", { class: "number" }, percent(values[key])))))))),
    records.filter((r) => r.shown).map((r) => el("details", { class: "card", open: !several },
      el("summary", {}, `${r.source}, ${r.protocol}, from ${r.init.from}`),
      el("img", { src: r.shown, alt: "above what is there, below what is found", style: { width: "100%" } }))));
}

// --- curves ------------------------------------------------------------------------------------------------------------

const CHARTS = [
  { title: "Loss", series: [["loss", "loss"]] },
  { title: "Standard deviation of z, × √d", series: [["z_std_sqrt_d", "z"]], from: 0, mark: 1, note: "1 spread evenly, 0 collapsed" },
  { title: "Effective rank", series: [["h_rank", "h"], ["z_rank", "z"]], from: 0 },
  { title: "kNN accuracy, %", series: [["knn_top1", "h"], ["knn_top1_z", "z"]] },
  { title: "Learning rate", series: [["lr", "encoder"], ["lr_predictor", "predictor"]], from: 0 },
  { title: "Views that find each other, %", series: [["view_retrieval", "h"]], from: 0 },
];

function curves() {
  const charts = CHARTS.map(chart).filter(Boolean);
  if (!charts.length) return null;
  const at = (epoch) => charts.forEach((c) => c.at(epoch));
  charts.forEach((c) => {
    c.plot.addEventListener("pointermove", (event) => at(c.epoch(event)));
    c.plot.addEventListener("pointerleave", () => at(null));
  });
  return section("curves", "Curves", "by epoch", el("div", { class: "charts" }, charts.map((c) => c.card)));
}

function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((s) => s * power >= raw) * power;
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}

function chart({ title, series, from, mark, note }) {
  const lines = data.runs.flatMap((run) => series.map(([key, name], place) => {
    const points = (run.curves[key] ?? []).map((y, i) => [run.curves.epoch[i], y]).filter(([x, y]) => x !== null && y !== null);
    const color = several || place === 0 ? run.color : "var(--pale)";
    return { name: several ? (series.length > 1 ? `${run.name} ${name}` : run.name) : name, points, second: several && place > 0, color };
  })).filter((line) => line.points.length);
  if (!lines.length) return null;
  const width = 360, height = 190, left = 40, right = 8, top = 8, bottom = 22;
  const ys = lines.flatMap((line) => line.points.map((p) => p[1])).concat(mark ?? [], from ?? []);
  const last = data.runs.flatMap((run) => run.curves.epoch ?? []).reduce((a, b) => Math.max(a, b ?? 0), 0) || 1;
  let low = ys.reduce((a, b) => Math.min(a, b)), high = ys.reduce((a, b) => Math.max(a, b));
  if (high - low < 1e-9) [low, high] = from === 0 && low >= 0 ? [0, high * 1.1 || 1] : [low - 0.5, high + 0.5];
  else high += (high - low) * 0.05;
  const px = (x) => left + (x / last) * (width - left - right);
  const py = (y) => top + ((high - y) / (high - low)) * (height - top - bottom);
  const cross = svg("line", { class: "cross hidden", y1: top, y2: height - bottom });
  const plot = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title },
    ticks(low, high, 4).map((y) => [svg("line", { class: "grid", x1: left, x2: width - right, y1: py(y), y2: py(y) }),
      svg("text", { x: left - 7, y: py(y) + 3.5, "text-anchor": "end" }, number(y, 3))]),
    ticks(0, last, 5).map((x) => svg("text", { x: px(x), y: height - 5, "text-anchor": "middle" }, number(x, 3))),
    mark === undefined ? null : svg("line", { class: "mark", x1: left, x2: width - right, y1: py(mark), y2: py(mark) }),
    lines.map((line) => svg("path", { class: `curve${line.second ? " second" : ""}`, style: { stroke: line.color },
      d: "M" + line.points.map(([x, y]) => `${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join("L") })),
    lines.map((line) => (line.points.length > 40 ? null : line.points.map(([x, y]) => svg("circle", { cx: px(x), cy: py(y), r: 2.2, style: { fill: line.color } })))),
    cross,
    lines.map((line) => (line.dot = svg("circle", { class: "hidden", r: 3.5, style: { fill: line.color } }))));
  const when = el("small");
  const values = lines.map((line) => (line.value = el("b", {})));
  const at = (epoch) => {
    cross.classList.toggle("hidden", epoch === null);
    for (const line of lines) {
      const point = epoch === null ? line.points.at(-1) : nearest(line.points, epoch);
      line.value.textContent = number(point[1]);
      line.dot.classList.toggle("hidden", epoch === null);
      line.dot.setAttribute("cx", px(point[0]));
      line.dot.setAttribute("cy", py(point[1]));
    }
    if (epoch !== null) for (const end of ["x1", "x2"]) cross.setAttribute(end, px(epoch));
    when.textContent = epoch === null ? "" : `epoch ${epoch.toFixed(1)}`;
  };
  at(null);
  return {
    at, plot,
    epoch: (event) => {
      const box = plot.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * width;
      return Math.min(Math.max((x - left) / (width - left - right), 0), 1) * last;
    },
    card: el("figure", { class: "card chart stack", style: { margin: 0 } },
      el("div", { class: "head" }, el("h3", {}, title), when), plot,
      el("div", { class: "legend" }, lines.map((line, i) => el("span", {}, el("i", { class: line.second ? "second" : "", style: { color: line.color } }), line.name, values[i])), note ?? "")),
  };
}

function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= x) low = middle; else high = middle;
  }
  return x - points[low][0] < points[high][0] - x ? points[low] : points[high];
}

// --- views -------------------------------------------------------------------------------------------------------------

function views() {
  const runs = data.runs.filter((run) => run.views);
  if (!runs.length) return null;
  return section("views", "Views", "what training sees: an image, and pairs of views that it compares",
    chosenRun(runs, ({ views: { rows, words: said, pixelated } }) => el("div", { class: "card stack" },
      el("div", { class: "scroll" }, el("div", { class: "views" }, rows.map(({ name, pictures }) => el("div", {},
        pictures.map((src, i) => el("img", { src, alt: i ? `view ${i} of ${name}` : name, title: i ? `view ${((i - 1) % 2) + 1}` : name,
          class: `${pixelated ? "pixelated" : ""}${i % 2 ? " pair" : ""}` })))))),
      el("div", { class: "words" }, said.map(({ name, lines }) => el("div", {}, el("h3", {}, name), lines.map((line) => el("p", { class: "pale" }, line))))))));
}

// --- thumbnails --------------------------------------------------------------------------------------------------------

/** The decoded sheet of thumbnails, once it is needed. */
function sheetOf(gallery, index) {
  gallery.images ??= [];
  gallery.images[index] ??= new Promise((done) => {
    const image = new Image();
    image.onload = () => { gallery.ready ??= []; gallery.ready[index] = image; done(image); };
    image.src = gallery.sheets[index];
  });
  return gallery.images[index];
}

function place(gallery, i) {
  const { across, side } = gallery;
  const within = i % (across * across);
  return { sheet: Math.floor(i / (across * across)), x: (within % across) * side, y: Math.floor(within / across) * side };
}

function thumbnail(gallery, i, size) {
  const { sheet: index, x, y } = place(gallery, i);
  const canvas = el("canvas", { width: gallery.side, height: gallery.side, class: gallery.pixelated ? "pixelated" : "",
    role: "img", "aria-label": gallery.names[i], style: size ? { width: `${size}px`, height: `${size}px` } : {} });
  sheetOf(gallery, index).then((image) => canvas.getContext("2d").drawImage(image, x, y, gallery.side, gallery.side, 0, 0, gallery.side, gallery.side));
  return canvas;
}

function labelOf(gallery, i) {
  return gallery.labels ? gallery.classes[gallery.labels[i]] : null;
}

function tile(gallery, i, { cosine, query, pick }) {
  const same = gallery.labels && query !== undefined && query !== i && gallery.labels[i] === gallery.labels[query];
  const about = [gallery.names[i], labelOf(gallery, i)].filter(Boolean).join("\n");
  return el("button", { class: `tile${same ? " same" : ""}`, title: about, "data-image": i, onclick: () => pick(i) },
    thumbnail(gallery, i), cosine === undefined ? null : el("small", {}, cosine.toFixed(3)));
}

// --- map ---------------------------------------------------------------------------------------------------------------

const HUES = ["#4a7bc8", "#ee8a2e", "#4fa254", "#dd5254", "#9a6bc0", "#35afc0", "#d9b42f", "#98694f", "#8a929c", "#ea86b6"];
const CELL = 30; // pixels that a picture takes on the map
const categoryColor = (index, count) => (count <= HUES.length ? HUES[index] : `hsl(${(index * 137.508) % 360} 58% 56%)`);

function mappedRuns() {
  return data.runs.filter((run) => run.map);
}

function map() {
  const runs = mappedRuns();
  if (!runs.length) return null;
  return section("map", "Map", "images with like features lie close together; distances across the map mean little", chosenRun(runs, mapOf));
}

function mapOf(run) {
  const { x: xs, y: ys, clusters, neighbors, cosines, layout, dim } = run.map;
  const gallery = data.galleries[run.map.gallery];
  const count = xs.length;
  const lowered = gallery.names.map((name) => name.toLowerCase());
  const kinds = { label: { of: gallery.labels, names: gallery.classes }, cluster: { of: clusters, names: [] } };
  kinds.cluster.names = Array.from({ length: clusters.reduce((a, b) => Math.max(a, b), 0) + 1 }, (_, c) => `cluster ${c + 1}`);
  const all = () => Array.from({ length: count }, (_, i) => i);
  const whole = around(all());
  const state = { kind: gallery.labels ? "label" : "cluster", pictures: false, only: null, query: "", view: whole, hover: null, picked: null, selected: [], drag: null, cells: new Map() };

  const canvas = el("canvas", { role: "img", tabindex: 0, "aria-label": `A map of ${count} images` });
  const tip = el("div", { class: "tip hidden" });
  const side = el("aside", { class: "card side" });
  const keys = el("div", { class: "keys" });
  const chosen = el("div", { class: "card stack hidden", id: "selection" });
  const found = el("small", { id: "found" });
  const matches = () => (state.query ? all().filter((i) => lowered[i].includes(state.query)) : []);
  const shows = (i) => (state.only === null || kinds[state.kind].of[i] === state.only) && (!state.query || lowered[i].includes(state.query));
  const colorOf = (i) => categoryColor(kinds[state.kind].of[i], kinds[state.kind].names.length);

  const layer = el("canvas");
  let width = 0, height = 0, scale = 1, stale = true, waiting = false;
  const atX = (i) => width / 2 + (xs[i] - state.view.x) * scale;
  const atY = (i) => height / 2 + (ys[i] - state.view.y) * scale;
  const dot = (pen, i, radius) => { pen.beginPath(); pen.arc(atX(i), atY(i), radius, 0, 7); pen.fill(); };

  /** Points, or pictures, into `layer`, which lasts until they change; what the pointer does is drawn over it. */
  function drawLayer(ink, radius) {
    const pen = layer.getContext("2d");
    pen.setTransform(layer.width / width, 0, 0, layer.width / width, 0, 0);
    pen.clearRect(0, 0, width, height);
    const inside = (i) => atX(i) > -50 && atX(i) < width + 50 && atY(i) > -50 && atY(i) < height + 50;
    const lit = [];
    pen.globalAlpha = 0.13;
    pen.fillStyle = ink;
    for (let i = 0; i < count; i++) if (inside(i)) { if (shows(i)) lit.push(i); else dot(pen, i, radius); }
    pen.globalAlpha = state.pictures ? 0.35 : 0.85;
    for (const i of lit) { pen.fillStyle = colorOf(i); dot(pen, i, radius); }
    pen.globalAlpha = 1;
    if (state.pictures) pictures(pen, lit);
  }

  function draw() {
    const ratio = window.devicePixelRatio || 1;
    width = canvas.clientWidth;
    height = Math.round(Math.min(width, 620));
    scale = (Math.min(width, height) - 40) / state.view.size;
    if (!width) return;
    const style = getComputedStyle(document.documentElement);
    const accent = style.getPropertyValue("--accent"), ink = style.getPropertyValue("--ink");
    const radius = (count > 4000 ? 2 : 3) * Math.min(2, state.view.size ** -0.35);
    canvas.style.height = `${height}px`;
    if (canvas.width !== Math.round(width * ratio)) {
      canvas.width = layer.width = Math.round(width * ratio);
      canvas.height = layer.height = Math.round(height * ratio);
      stale = true;
    }
    if (stale) drawLayer(ink, radius);
    stale = false;
    const pen = canvas.getContext("2d");
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.drawImage(layer, 0, 0);
    pen.setTransform(canvas.width / width, 0, 0, canvas.width / width, 0, 0);
    pen.strokeStyle = ink;
    pen.lineWidth = 1.5;
    for (const i of state.selected) { pen.beginPath(); pen.arc(atX(i), atY(i), radius + 1.5, 0, 7); pen.stroke(); }
    if (state.picked !== null) {
      pen.strokeStyle = accent;
      for (const j of neighbors[state.picked]) {
        pen.globalAlpha = 0.5;
        pen.beginPath(); pen.moveTo(atX(state.picked), atY(state.picked)); pen.lineTo(atX(j), atY(j)); pen.stroke();
        pen.globalAlpha = 1;
        pen.beginPath(); pen.arc(atX(j), atY(j), radius + 2, 0, 7); pen.stroke();
      }
      pen.fillStyle = accent;
      dot(pen, state.picked, radius + 4);
    }
    if (state.hover !== null) { pen.strokeStyle = ink; pen.beginPath(); pen.arc(atX(state.hover), atY(state.hover), radius + 4, 0, 7); pen.stroke(); }
    if (state.drag) {
      const { x0, y0, x1, y1 } = state.drag;
      pen.fillStyle = pen.strokeStyle = accent;
      pen.globalAlpha = 0.12; pen.fillRect(x0, y0, x1 - x0, y1 - y0);
      pen.globalAlpha = 1; pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
    }
  }

  /** Thumbnails at their points, each where there is still room. */
  function pictures(pen, lit) {
    pen.imageSmoothingEnabled = !gallery.pixelated;
    state.cells.clear();
    for (const i of lit) {
      const column = Math.floor(atX(i) / CELL), row = Math.floor(atY(i) / CELL);
      if (state.cells.has(`${column} ${row}`)) continue;
      state.cells.set(`${column} ${row}`, i);
      const { sheet: index, x, y } = place(gallery, i);
      const image = gallery.ready?.[index];
      if (!image) { sheetOf(gallery, index).then(() => redraw()); continue; }
      pen.fillStyle = colorOf(i);
      pen.fillRect(column * CELL, row * CELL, CELL - 1, CELL - 1);
      pen.drawImage(image, x, y, gallery.side, gallery.side, column * CELL + 2, row * CELL + 2, CELL - 5, CELL - 5);
    }
  }

  /** At the next frame; `over` is true where only what is drawn over the points has changed. */
  function redraw(over = false) {
    stale ||= !over;
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  }

  /** The image under the pointer: the picture where pictures are shown, else the closest point within reach. */
  function closest(x, y, reach) {
    if (state.pictures) return state.cells.get(`${Math.floor(x / CELL)} ${Math.floor(y / CELL)}`) ?? null;
    let best = null, least = reach * reach;
    for (let i = 0; i < count; i++) {
      const distance = (atX(i) - x) ** 2 + (atY(i) - y) ** 2;
      if (distance < least && shows(i)) { least = distance; best = i; }
    }
    return best;
  }

  function hover(i, x, y) {
    if (i !== state.hover) {
      state.hover = i;
      tip.classList.toggle("hidden", i === null);
      if (i !== null) tip.replaceChildren(thumbnail(gallery, i, 144), gallery.names[i], el("div", { class: "pale" }, [labelOf(gallery, i), `cluster ${clusters[i] + 1}`].filter(Boolean).join(" · ")));
      redraw(true);
    }
    if (i !== null) {
      tip.style.left = `${x + 16 + 158 > width ? Math.max(0, x - 174) : x + 16}px`;
      tip.style.top = `${Math.max(4, Math.min(y + 12, height - tip.offsetHeight - 4))}px`;
    }
  }

  function pick(i) {
    state.picked = i;
    side.replaceChildren(...(i === null ? hint() : details(i)));
    redraw(true);
  }

  function hint() {
    return [el("h3", {}, "Neighbors"), el("p", { class: "pale" }, "Click an image on the map to see which others the network finds most alike. Drag over a region to select it and take its file names with you.")];
  }

  function details(i) {
    return [
      el("div", { class: "head" }, el("h3", {}, "Neighbors"), el("button", { onclick: () => pick(null) }, "Close")),
      thumbnail(gallery, i, 144),
      el("div", {}, el("b", {}, gallery.names[i]), el("div", { class: "pale" }, [labelOf(gallery, i), `cluster ${clusters[i] + 1}`].filter(Boolean).join(" · "))),
      el("div", { class: "tiles" }, neighbors[i].map((j, k) => tile(gallery, j, { cosine: cosines[i][k], query: i, pick }))),
      el("small", {}, `Cosine of their features${gallery.labels ? "; underlined: of the same class" : ""}.`),
    ];
  }

  function select(indices) {
    state.selected = indices;
    chosen.classList.toggle("hidden", !indices.length);
    const names = indices.map((i) => gallery.names[i]);
    chosen.replaceChildren(
      el("div", { class: "head" }, el("h3", {}, `${number(indices.length)} selected`),
        el("div", { class: "row" },
          el("button", { id: "download", onclick: () => download(names) }, "Download the file list"),
          el("button", { onclick: () => { state.view = around(indices); zoomOut.disabled = false; redraw(); } }, "Zoom in"),
          el("button", { onclick: () => select([]) }, "Clear"))),
      el("div", { class: "tiles" }, indices.slice(0, 64).map((i) => tile(gallery, i, { pick }))),
      indices.length > 64 ? el("small", {}, `and ${number(indices.length - 64)} more`) : "");
    redraw(true);
  }

  function around(indices) {
    const [x, y] = [xs, ys].map((values) => indices.map((i) => values[i])).map((values) => [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))]);
    return { x: (x[0] + x[1]) / 2, y: (y[0] + y[1]) / 2, size: Math.max(x[1] - x[0], y[1] - y[0], 0.01) };
  }

  function legend() {
    const { of, names } = kinds[state.kind];
    const counts = names.map(() => 0);
    of.forEach((c) => { counts[c] += 1; });
    keys.replaceChildren(...names.map((name, c) => (counts[c] ? el("button", { "aria-pressed": state.only === c, onclick: () => { state.only = state.only === c ? null : c; legend(); redraw(); } },
      swatch(categoryColor(c, names.length)), name, el("small", {}, number(counts[c]))) : null)).filter(Boolean));
  }

  function toggle(name, pressed, act) {
    const button = el("button", { "aria-pressed": pressed, onclick: () => { const on = button.getAttribute("aria-pressed") !== "true"; button.setAttribute("aria-pressed", on); act(on); redraw(); } }, name);
    return button;
  }

  const zoomOut = el("button", { disabled: "", onclick: () => { state.view = whole; zoomOut.disabled = true; redraw(); } }, "Whole map");
  const search = el("input", { class: "input search", type: "search", placeholder: "Search file names", "aria-label": "Search file names", oninput: () => {
    state.query = search.value.trim().toLowerCase();
    const hits = matches();
    found.textContent = state.query ? `${number(hits.length)} of ${number(count)}` : "";
    choose.disabled = !hits.length;
    redraw();
  }, onkeydown: (event) => { if (event.key === "Enter" && matches().length) pick(matches()[0]); } });
  const choose = el("button", { disabled: "", onclick: () => select(matches()) }, "Select them");
  const drag = toggle("Drag to select", false, (on) => canvas.classList.toggle("selecting", on));
  drag.classList.add("touch");
  const colors = gallery.labels ? el("select", { "aria-label": "Color by", onchange: (event) => { state.kind = event.target.value; state.only = null; legend(); redraw(); } },
    el("option", { value: "label" }, "Color by label"), el("option", { value: "cluster" }, "Color by cluster")) : null;

  const point = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button || (event.pointerType === "touch" && !canvas.classList.contains("selecting"))) return;
    const [x, y] = point(event);
    state.drag = { x0: x, y0: y, x1: x, y1: y };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = point(event);
    if (state.drag) { Object.assign(state.drag, { x1: x, y1: y }); hover(null); redraw(true); } else if (event.pointerType !== "touch") hover(closest(x, y, 14), x, y);
  });
  canvas.addEventListener("pointerleave", () => hover(null));
  canvas.addEventListener("pointercancel", () => { state.drag = null; redraw(true); });
  canvas.addEventListener("pointerup", (event) => {
    if (event.button) return;
    const { x0, y0, x1, y1 } = state.drag ?? { x0: 0, y0: 0, x1: 0, y1: 0 };
    const dragged = state.drag && Math.hypot(x1 - x0, y1 - y0) > 5;
    state.drag = null;
    if (dragged) {
      const [left, right, top, bottom] = [Math.min(x0, x1), Math.max(x0, x1), Math.min(y0, y1), Math.max(y0, y1)];
      select(all().filter((i) => atX(i) >= left && atX(i) <= right && atY(i) >= top && atY(i) <= bottom && shows(i)));
    } else pick(closest(...point(event), event.pointerType === "touch" ? 24 : 14));
  });
  canvas.addEventListener("keydown", (event) => { if (event.key === "Escape") { select([]); pick(null); } });
  new ResizeObserver(() => redraw()).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw());

  legend();
  pick(null);
  return el("div", { class: "stack" },
    el("div", { class: "row" }, search, choose, found),
    el("div", { class: "row" }, colors, toggle("Pictures", false, (on) => { state.pictures = on; }), zoomOut, drag),
    keys,
    el("div", { class: "map" }, el("div", { class: "stack" }, el("div", { class: "card plot" }, canvas, tip), chosen,
      el("small", {}, `${layout} of the backbone's features h (${dim} numbers an image) of ${number(count)} images.`)), side));
}

function download(names) {
  const url = URL.createObjectURL(new Blob([names.map((name) => `${name}\n`).join("")], { type: "text/plain" }));
  el("a", { href: url, download: "selection.txt" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

// --- nearest neighbors -------------------------------------------------------------------------------------------------

function sheet() {
  const runs = mappedRuns();
  if (!runs.length) return null;
  return section("neighbors", "Nearest neighbors", "an image, and those whose features have the largest cosine with its own", chosenRun(runs, sheetFor));
}

function sheetFor(run) {
  const { neighbors, cosines } = run.map;
  const gallery = data.galleries[run.map.gallery];
  const count = neighbors.length, rows = Math.min(10, count);
  const order = Array.from({ length: count }, (_, i) => i).sort((a, b) => (gallery.labels ? gallery.labels[a] - gallery.labels[b] : 0) || a - b);
  const place = el("div", { class: "sheet" });
  let turn = 0;
  const pick = (i) => fill([i, ...neighbors[i]].slice(0, rows));
  const fill = (queries) => place.replaceChildren(...queries.map((i) => el("div", {},
    tile(gallery, i, { pick }), el("span"), neighbors[i].map((j, k) => tile(gallery, j, { cosine: cosines[i][k], query: i, pick })))));
  const next = () => { fill(Array.from({ length: rows }, (_, r) => order[(Math.floor((r * count) / rows) + 7 * turn) % count])); turn += 1; };
  next();
  const pairs = neighbors.flatMap((row, i) => row.map((j) => gallery.labels?.[i] === gallery.labels?.[j]));
  const share = gallery.labels ? `${percent((100 * pairs.filter(Boolean).length) / pairs.length)} % of all images' ${neighbors[0].length} nearest are of the same class (underlined).` : "";
  return el("div", { class: "card stack" }, el("div", { class: "head" }, el("small", {}, share), el("button", { onclick: next }, "Other images")), el("div", { class: "scroll" }, place));
}

// --- recipe ------------------------------------------------------------------------------------------------------------

/** {"image_size": 32, "view 1 flip": 0.5, ...}: the words of a recipe, as its flags say them. */
function flat(recipeOf) {
  const { method, ...rest } = recipeOf;
  const { name, views: kinds = [], ...cells } = method;
  const seen = kinds.flatMap((view, i) => Object.entries(view).map(([k, v]) => [kinds.length > 1 ? `${k}, view ${i + 1}` : k, v]));
  return { method: name, ...rest, ...cells, ...Object.fromEntries(seen) };
}

function recipe() {
  const environment = ({ versions = {}, ...rest }) => ({ ...rest, ...versions, command: words(rest.command) });
  return section("recipe", "Recipe and environment", several ? "tinted: what differs" : "everything that determines the run",
    settings("Recipe", data.runs.map((run) => flat(run.recipe))),
    settings("Environment", data.runs.map((run) => environment(run.environment))));
}

function settings(title, columns) {
  const names = [...new Set(columns.flatMap(Object.keys))];
  const rows = names.map((name) => ({ name, cells: columns.map((column) => words(column[name])) }))
    .map((row) => ({ ...row, differs: new Set(row.cells).size > 1 }));
  const heading = () => el("tr", {}, el("th", {}, ""), data.runs.map((run) => el("th", {}, swatch(run.color), ` ${run.name}`)));
  const fact = ({ name, cells }) => el("div", {}, el("dt", {}, name), el("dd", {}, cells[0]));
  const table = (kept) => el("div", { class: "scroll" }, el("table", { class: "settings" }, heading(),
    kept.map(({ name, cells, differs }) => el("tr", { class: differs ? "differs" : null }, el("td", {}, name), cells.map((cell) => el("td", {}, cell))))));
  if (!several) return el("div", { class: "card stack" }, el("h3", {}, title), el("dl", { class: "facts" }, rows.map(fact)));
  const differing = rows.filter((row) => row.differs), equal = rows.filter((row) => !row.differs);
  return el("div", { class: "card stack" }, el("h3", {}, title), differing.length ? table(differing) : el("p", { class: "pale" }, "Nothing differs."),
    el("details", {}, el("summary", {}, `${equal.length} that are the same`), table(equal)));
}

// --- the page ----------------------------------------------------------------------------------------------------------

nameRuns();
const made = `Made by simsiam ${data.version} on ${day(data.made)}. This page holds all it shows and asks no network.`;
const sections = [results(), transfers(), curves(), views(), map(), sheet(), recipe()].filter(Boolean);
document.getElementById("page").replaceChildren(header(), ...sections, el("footer", {}, el("small", {}, made)));
document.getElementById("nav").append(...sections.map((part) => el("a", { href: `#${part.id}` }, part.querySelector("h2").textContent)));
