// Views, thumbnails, and the nearest neighbors of images.

// --- views ---------------------------------------------------------------------------------------

function views() {
  const runs = data.runs.filter((run) => run.views);
  if (!runs.length) return null;
  const note = "images, each with pairs of views that a training step compares";
  return section("views", "Views", note, runSwitcher(runs, (run) => viewsCard(run.views)));
}

function viewsCard({ rows, description, pixelated }) {
  const picture = (src, i, name) => el("img", {
    src, alt: i ? `view ${i} of ${name}` : name, title: i ? `view ${((i - 1) % 2) + 1}` : name,
    class: `${pixelated ? "pixelated" : ""}${i % 2 ? " pair" : ""}`,
  });
  const row = ({ name, pictures }) =>
    el("div", {}, pictures.map((src, i) => picture(src, i, name)));
  const text = ({ name, lines }) =>
    el("div", {}, el("h3", {}, name), lines.map((line) => el("p", { class: "pale" }, line)));
  return el("div", { class: "card stack" },
    el("div", { class: "scroll" }, el("div", { class: "views" }, rows.map(row))),
    el("div", { class: "description" }, description.map(text)));
}

// --- thumbnails ----------------------------------------------------------------------------------

/** A promise of a decoded sheet of thumbnails; a sheet is decoded when it is first needed. */
function loadSheet(gallery, index) {
  gallery.promises ??= [];
  gallery.decoded ??= [];
  gallery.promises[index] ??= new Promise((resolve) => {
    const image = new Image();
    image.onload = () => { gallery.decoded[index] = image; resolve(image); };
    image.src = gallery.sheets[index];
  });
  return gallery.promises[index];
}

/** The sheet of a thumbnail, and its upper left corner there in pixels. */
function locateThumbnail({ across, side }, i) {
  const perSheet = across * across, place = i % perSheet;
  return {
    index: Math.floor(i / perSheet),
    x: (place % across) * side,
    y: Math.floor(place / across) * side,
  };
}

/** A file name with its control characters escaped. */
function shown(name) {
  return name.replace(/[\p{Cc}\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/gu,
    (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

function thumbnail(gallery, i, size) {
  const { side } = gallery;
  const { index, x, y } = locateThumbnail(gallery, i);
  const canvas = el("canvas", {
    width: side, height: side, class: gallery.pixelated ? "pixelated" : "", role: "img",
    "aria-label": shown(gallery.names[i]), style: size ? { width: `${size}px`, height: `${size}px` } : {},
  });
  loadSheet(gallery, index).then((sheet) =>
    canvas.getContext("2d").drawImage(sheet, x, y, side, side, 0, 0, side, side));
  return canvas;
}

const NO_LABEL = "(no label)"; // as in embedding_gallery.py

function labelOf(gallery, i) {
  return gallery.labels ? gallery.classes[gallery.labels[i]] : null;
}

function hasClass(gallery, i) {
  return !!gallery.labels && labelOf(gallery, i) !== NO_LABEL;
}

/** A thumbnail to click on; a neighbor of image `query` also shows its cosine similarity to it. */
function tile(gallery, i, { pick, query, cosine }) {
  const sameClass = query !== undefined && query !== i
    && hasClass(gallery, i) && gallery.labels[i] === gallery.labels[query];
  const title = [shown(gallery.names[i]), labelOf(gallery, i)].filter(Boolean).join("\n");
  return el("button",
    { class: `tile${sameClass ? " same" : ""}`, title, "data-image": i, onclick: () => pick(i) },
    thumbnail(gallery, i), cosine === undefined ? null : el("small", {}, cosine.toFixed(3)));
}

/** The tiles of an image's neighbors. */
function neighborTiles(gallery, { neighbors, cosines }, query, pick) {
  return neighbors[query].map((i, k) =>
    tile(gallery, i, { pick, query, cosine: cosines[query][k] }));
}

// --- nearest neighbors ---------------------------------------------------------------------------

const NEIGHBOR_ROWS = 10; // images shown with their neighbors

function mappedRuns() {
  return data.runs.filter((run) => run.map);
}

function neighborsSection() {
  const runs = mappedRuns();
  if (!runs.length) return null;
  const note = "each row: an image, and the images with the most similar features";
  return section("neighbors", "Nearest neighbors", note, runSwitcher(runs, neighborsCard));
}

function neighborsCard(run) {
  const { neighbors } = run.map;
  const gallery = data.galleries[run.map.gallery];
  const count = neighbors.length, rows = Math.min(NEIGHBOR_ROWS, count);
  const labelNumber = (i) => (gallery.labels ? gallery.labels[i] : 0);
  const order = neighbors.map((_, i) => i).sort((a, b) => labelNumber(a) - labelNumber(b) || a - b);
  const sheet = el("div", { class: "sheet" });
  const pick = (i) => fill([i, ...neighbors[i]].slice(0, rows));
  const fill = (queries) => sheet.replaceChildren(...queries.map((i) => el("div", {},
    tile(gallery, i, { pick }), el("span"), neighborTiles(gallery, run.map, i, pick))));
  let turn = 0;
  const showNext = () => {
    const place = (row) => (Math.floor((row * count) / rows) + 7 * turn) % count;
    fill(Array.from({ length: rows }, (_, row) => order[place(row)]));
    turn += 1;
  };
  showNext();
  return el("div", { class: "card stack" },
    el("div", { class: "head" },
      el("small", {}, sameClassShare(gallery, neighbors)),
      el("button", { onclick: showNext }, "Show other images")),
    el("div", { class: "scroll" }, sheet));
}

/** The share over the images that have a class. */
function sameClassShare(gallery, neighbors) {
  const { labels } = gallery;
  const pairs = neighbors.flatMap((row, i) =>
    (hasClass(gallery, i) ? row.map((j) => labels[i] === labels[j]) : []));
  if (!pairs.length) return "";
  const share = formatPercent((100 * pairs.filter(Boolean).length) / pairs.length);
  return `On average, ${share} % of an image's ${neighbors[0].length} nearest neighbors have its `
    + "class (underlined).";
}
