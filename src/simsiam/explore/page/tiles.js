// Images as tiles, and one image in full size.
import { attempt, decide, get, label, searchRow, store } from "./state.js";

const PAGE = 120; // tiles that are added at a time

export function shownName(row) {
  return store.data.names[row];
}

export function describe(row) {
  const { predictions } = store, parts = [];
  const given = store.labels.get(row);
  if (given) parts.push(given);
  else if (predictions.classes.length) {
    parts.push(`${predictions.classes[predictions.predicted[row]]}? ${predictions.confidence[row]} %`);
  }
  if (!parts.length && store.data.classes[row]) parts.push(store.data.classes[row]);
  if (store.decisions.has(row)) parts.push(store.decisions.get(row));
  return parts.join(" · ");
}

/** A thumbnail with its name; `open` is called when it is clicked. */
export function tile(row, open, note = "") {
  const name = shownName(row);
  return el("button", {
    class: `tile${store.selection.has(row) ? " chosen" : ""}`, type: "button", title: name,
    "data-row": row, onclick: () => open(row),
  },
  el("img", { src: `thumbnails/${row}`, alt: "", loading: "lazy", width: 96, height: 96 }),
  el("span", { class: "name" }, name.split("/").pop()),
  el("span", { class: "note" }, note || describe(row)));
}

/** A grid of tiles that grows on demand. */
export function grid(rows, open = openImage, notes = null) {
  const list = el("div", { class: "tiles" });
  const more = el("button", { type: "button" }, "Show more");
  let shownCount = 0;
  const add = () => {
    const next = rows.slice(shownCount, shownCount + PAGE);
    list.append(...next.map((row, i) =>
      tile(row, (r) => open(r, rows), notes ? notes[shownCount + i] : "")));
    shownCount += next.length;
    more.classList.toggle("hidden", shownCount >= rows.length);
  };
  more.addEventListener("click", add);
  add();
  return el("div", { class: "stack" }, list, more);
}

export function formatFacts(facts) {
  if (facts.error) return facts.error;
  const size = facts.bytes > 1e6 ? `${(facts.bytes / 1e6).toFixed(1)} MB`
    : `${Math.max(1, Math.round(facts.bytes / 1e3))} kB`;
  return [`${facts.width} × ${facts.height}`, facts.format, size, facts.modified]
    .filter(Boolean).join(" · ");
}

/** An image in full size; where it is gone, its thumbnail and the reason. */
export function fullImage(row) {
  const note = el("p", { class: "pale gone hidden", role: "status" });
  const image = el("img", { class: "full", alt: shownName(row), src: `thumbnails/${row}` });
  (async () => {
    const response = await fetch(`images/${row}`).catch(() => null);
    if (!response?.ok) {
      note.textContent = response ? await response.text() : "simsiam explore is not running.";
      note.classList.remove("hidden");
      return;
    }
    const url = URL.createObjectURL(await response.blob());
    image.onload = () => URL.revokeObjectURL(url);
    image.src = url;
  })();
  return el("div", { class: "full-frame" }, image, note);
}

let viewer = null;

/** Open an image in full size, with the others of its list before and after it. */
export function openImage(row, rows = [row]) {
  viewer?.close();
  const dialog = el("dialog", { class: "viewer", "aria-label": shownName(row) });
  let at = rows.indexOf(row);
  const name = el("b"), facts = el("small"), frame = el("div", { class: "viewer-frame" });
  const classes = store.classes.slice(0, 12).map((text) => el("button", {
    type: "button",
    onclick: async () => {
      const now = rows[at];
      await label([now], store.labels.get(now) === text ? "" : text);
      showState();
    },
  }, text));
  const drop = el("button", {
    type: "button",
    onclick: async () => {
      await decide([[rows[at], store.decisions.get(rows[at]) === "drop" ? "" : "drop"]]);
      showState();
    },
  }, "Drop");
  const showState = () => {
    for (const button of classes) {
      button.setAttribute("aria-pressed", String(store.labels.get(rows[at]) === button.textContent));
    }
    drop.setAttribute("aria-pressed", String(store.decisions.get(rows[at]) === "drop"));
  };
  // Buttons stay: the one that was pressed keeps the focus.
  const show = () => {
    const now = rows[at];
    name.textContent = shownName(now);
    facts.textContent = "…";
    attempt(async () => {
      const found = formatFacts(await get(`facts/${now}`));
      if (now === rows[at]) facts.textContent = found;
    });
    frame.replaceChildren(fullImage(now));
    showState();
  };
  const step = (by) => { at = (at + by + rows.length) % rows.length; show(); };
  dialog.append(
    el("div", { class: "viewer-head" }, el("div", {}, name, el("div", {}, facts)),
      el("div", { class: "row" },
        rows.length > 1
          ? [el("button", { type: "button", onclick: () => step(-1) }, "← Previous"),
            el("button", { type: "button", onclick: () => step(1) }, "Next →")] : null,
        el("button", {
          type: "button", class: "similar",
          onclick: () => { dialog.close(); searchRow(rows[at]); },
        }, "Find similar"),
        classes, drop,
        el("button", { type: "button", class: "close", onclick: () => dialog.close() }, "Close"))),
    frame);
  dialog.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by && rows.length > 1) { step(by); event.preventDefault(); }
    event.stopPropagation();
  });
  dialog.addEventListener("close", () => { dialog.remove(); viewer = null; });
  document.body.append(dialog);
  viewer = dialog;
  show();
  dialog.showModal();
}
