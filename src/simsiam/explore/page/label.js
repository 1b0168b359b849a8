// Labeling: the image that would teach most, the classes with their keys, and the queue.
import { addClass, label, select, store, undo } from "./state.js";
import { fullImage, grid, openImage, shownName, tile } from "./tiles.js";

const KEYS = "1234567890"; // the tenth class has the 0

export class LabelPanel {
  constructor() {
    this.current = null; // the row that is asked about
    this.skipped = new Set();
    this.done = new Set(); // labeled here since the queue was made
    this.progress = el("p", { class: "progress-line", role: "status" });
    this.bar = el("div", { class: "bar-inner" });
    this.question = el("div", { class: "question" });
    this.classes = el("div", { class: "row classes", role: "group", "aria-label": "Classes" });
    this.input = el("input", {
      class: "input", placeholder: "New class …", "aria-label": "Name of a new class",
      maxlength: 100,
    });
    const form = el("form", {
      class: "row",
      onsubmit: (event) => {
        event.preventDefault();
        const name = addClass(this.input.value);
        this.input.value = "";
        if (name) this.update();
        this.input.blur();
      },
    }, this.input, el("button", { type: "submit" }, "Add class"));
    this.answered = []; // rows, for undo
    this.undoButton = el("button", { type: "button", onclick: () => this.undo() }, "Undo (Z)");
    this.removeButton = el("button", {
      type: "button", onclick: () => this.choose(""),
    }, "Remove label (X)");
    this.selected = el("div", { class: "card stack selected-box hidden" });
    this.queue = el("div", { class: "tiles small" });
    this.element = el("div", { class: "stack" },
      el("div", { class: "stack tight" }, this.progress,
        el("div", { class: "bar-outer", "aria-hidden": "true" }, this.bar),
        el("small", { class: "pale" }, "The accuracy is estimated from the labeled images: too "
          + "low if you label what is asked here, too high if you label whole regions.")),
      this.question, this.classes, form,
      el("div", { class: "row" }, this.undoButton,
        el("button", { type: "button", onclick: () => this.skip() }, "Skip (S)"),
        this.removeButton,
        el("button", {
          type: "button", onclick: () => this.current !== null && openImage(this.current),
        }, "Full size")),
      this.selected, el("h2", {}, "Next"), el("small", { class: "pale" },
        "Ordered by what would teach most: unsure, and typical of many others."),
      this.queue);
  }

  waiting() {
    const open = (row) => !store.labels.has(row) && !this.skipped.has(row) && !this.done.has(row)
      && store.decisions.get(row) !== "drop";
    const rows = store.state.queue.filter(open);
    if (rows.length) return rows;
    const all = store.data.names.map((_, row) => row).filter(open);
    return all.length ? all.slice(0, 24) : [...this.skipped].filter((r) => !store.labels.has(r));
  }

  setCurrent(row) {
    this.current = row;
    this.update();
  }

  next() {
    this.current = this.waiting().find((row) => row !== this.current) ?? null;
    this.update();
  }

  skip() {
    if (this.current !== null) this.skipped.add(this.current);
    this.next();
  }

  async answer(name) {
    const row = this.current;
    if (row === null) return;
    if (name) this.done.add(row);
    this.answered.push(row);
    this.next(); // at once: the server is quick, and another answer may follow
    await label([row], name);
    this.done.delete(row);
  }

  /** Take the last change back, and show the image again. */
  async undo() {
    await undo("labels");
    const row = this.answered.pop();
    if (row !== undefined) this.setCurrent(row);
  }

  guess() {
    const { predictions } = store, row = this.current;
    if (row === null || store.labels.has(row) || !predictions.classes.length) return null;
    return { name: predictions.classes[predictions.predicted[row]],
      confidence: predictions.confidence[row] };
  }

  key(event) {
    const place = KEYS.indexOf(event.key);
    if (place >= 0 && place < store.classes.length) this.choose(store.classes[place]);
    else if (event.key === "x" || event.key === "X") this.choose("");
    else if (event.key === "s" || event.key === "S") this.skip();
    else if (event.key === "z" || event.key === "Z") this.undo();
    else if (event.key === "n" || event.key === "N") this.input.focus();
    else if (event.key === "Enter" && this.guess()) this.answer(this.guess().name);
    else return false;
    return true;
  }

  /** Give a class to the selected images, or to the one that is asked about. */
  async choose(name) {
    if (!store.selection.size) {
      if (name || store.labels.has(this.current)) this.answer(name);
      return;
    }
    this.answered.length = 0;
    const rows = [...store.selection];
    select([]);
    await label(rows, name);
    if (name && rows.includes(this.current)) this.next();
  }

  update() {
    if (!store.state) return;
    const { labeled, count, low, high } = store.state.progress;
    const accuracy = low === null || low === undefined
      ? (store.state.hasPredictions ? `accuracy unknown: label ${this.needed()}` : "")
      : `estimated accuracy ${low.toFixed(0)} to ${high.toFixed(0)} %`;
    const text = `Labeled ${formatNumber(labeled)} of ${formatNumber(count)}`;
    const busy = store.state.fitted ? "" : " · learning …";
    this.progress.textContent = [text, accuracy].filter(Boolean).join(", ") + busy;
    this.bar.style.width = `${100 * labeled / count}%`;
    this.undoButton.disabled = !store.state.undoLabels;
    this.removeButton.disabled = !store.selection.size && !store.labels.has(this.current);
    const waiting = this.waiting();
    if (this.current === null) this.current = waiting[0] ?? null;
    this.question.classList.toggle("hidden", store.selection.size > 0);
    this.showQuestion();
    this.showClasses();
    this.showSelection();
    this.queue.replaceChildren(...waiting.filter((row) => row !== this.current).slice(0, 12)
      .map((row) => tile(row, () => this.setCurrent(row))));
  }

  showQuestion() {
    const row = this.current, guess = this.guess();
    if (row === null) {
      this.shownRow = null;
      this.question.replaceChildren(el("p", {}, "Every image has a label."));
      return;
    }
    if (this.shownRow !== row) {
      this.shownRow = row;
      this.guessLine = el("p", { class: "guess" });
      this.question.replaceChildren(
        fullImage(row), el("small", { class: "pale name" }, shownName(row)), this.guessLine);
    }
    const given = store.labels.get(row);
    this.guessLine.textContent = given ? `Labeled: ${given}`
      : guess ? `Prediction: ${guess.name}, ${guess.confidence} % (Enter accepts it)`
        : store.classes.length > 1 ? "What is this? Press the number of its class."
          : "What is this? Add two classes or more (N), then press their numbers.";
  }

  counts() {
    const counts = new Map();
    for (const name of store.labels.values()) counts.set(name, (counts.get(name) || 0) + 1);
    return counts;
  }

  /** What is needed for an estimate of the accuracy, in words. */
  needed() {
    const single = [...this.counts()].filter(([, count]) => count === 1).map(([name]) => name);
    return single.length ? `a second image of ${single.join(", ")}` : "more images";
  }

  showClasses() {
    const given = store.labels.get(this.current), counts = this.counts();
    const names = store.classes;
    this.classes.replaceChildren(...names.map((name, i) => el("button", {
      type: "button", "aria-pressed": String(given === name), onclick: () => this.choose(name),
    }, i < KEYS.length ? el("kbd", {}, KEYS[i]) : null, swatch(classColor(name)), name,
    el("small", {}, String(counts.get(name) || 0)))));
  }

  showSelection() {
    const rows = [...store.selection];
    this.selected.classList.toggle("hidden", !rows.length);
    if (!rows.length) return;
    this.selected.replaceChildren(
      el("h2", {}, `${formatNumber(rows.length)} images selected`),
      el("div", { class: "row" },
        el("small", { class: "pale" }, "A class or its key now labels all of them."),
        el("button", { type: "button", onclick: () => select([]) }, "Select none (Esc)")),
      grid(rows));
  }
}

/** The color of a label on the map and beside it. */
export function classColor(name) {
  return categoryColor(Math.max(0, store.classes.indexOf(name)), store.classes.length);
}

