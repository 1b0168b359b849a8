// Cleaning up: copies side by side, outliers one by one; decisions by key, and no file is touched.
import { attempt, decide, get, post, store, undo } from "./state.js";
import { formatFacts, openImage, shownName } from "./tiles.js";

export class CleanPanel {
  constructor() {
    this.kind = "copies";
    this.groups = { copies: null, outliers: null };
    this.at = { copies: 0, outliers: 0 };
    this.threshold = 0.28;
    this.kinds = ["copies", "outliers"].map((kind) => el("button", {
      type: "button", onclick: () => this.open(kind),
    }, kind === "copies" ? "Copies" : "Outliers"));
    this.summary = el("p", { role: "status" });
    this.content = el("div", { class: "stack" });
    this.undoButton = el("button", {
      type: "button", onclick: () => undo("decisions"),
    }, "Undo (Z)");
    const limit = el("input", {
      class: "input number-input", type: "number", min: 0, max: 1, step: 0.02,
      value: this.threshold, "aria-label": "Largest distance of copies",
      onchange: () => {
        this.threshold = Number(limit.value);
        this.groups.copies = null;
        this.at.copies = 0;
        this.open("copies");
      },
    });
    this.limit = el("label", { class: "row" }, el("small", {}, "Largest distance"), limit);
    this.element = el("div", { class: "stack" },
      el("div", { class: "row" }, this.kinds, this.limit, this.undoButton),
      this.summary, this.content,
      el("small", { class: "pale" },
        "Nothing is deleted: Take along writes a list or a script, which you run yourself."));
  }

  /** Show copies or outliers; ask the server for them until it has found them. */
  async open(kind = this.kind) {
    this.kind = kind;
    this.update();
    if (this.groups[kind] || this.asking) return;
    this.asking = true;
    const found = await attempt(() => (kind === "copies"
      ? post("copies", { threshold: this.threshold }) : get("outliers")));
    this.asking = false;
    if (found) {
      this.groups[kind] = found;
      this.update();
    } else if (this.element.isConnected && !document.querySelector("#status.bad-text")) {
      setTimeout(() => this.open(this.kind), 500);
    }
  }

  group() {
    return this.groups[this.kind]?.[this.at[this.kind]];
  }

  isDecided(group) {
    return group.rows.some((row) => store.decisions.has(row));
  }

  move(by) {
    const groups = this.groups[this.kind];
    if (!groups?.length) return;
    this.at[this.kind] = Math.min(groups.length - 1, Math.max(0, this.at[this.kind] + by));
    this.update();
  }

  /** Decide about the images of a group, and go on to the next one. */
  async decideAll(of, andNext = true) {
    const group = this.group();
    if (!group) return;
    if (andNext) this.move(1);
    await decide(group.rows.map((row, i) => [row, of(i)]));
  }

  async toggle(i) {
    const row = this.group()?.rows[i];
    if (row === undefined) return;
    await decide([[row, store.decisions.get(row) === "drop" ? "keep" : "drop"]]);
  }

  key(event) {
    const digit = "123456789".indexOf(event.key);
    const isCopies = this.kind === "copies";
    if (event.key === "Enter" && isCopies) this.decideAll((i) => (i ? "drop" : "keep"));
    else if (event.key === "k" || event.key === "K") this.decideAll(() => "keep");
    else if (event.key === "d" || event.key === "D") this.decideAll(() => "drop");
    else if (event.key === "ArrowRight") this.move(1);
    else if (event.key === "ArrowLeft") this.move(-1);
    else if (event.key === "z" || event.key === "Z") undo("decisions");
    else if (digit >= 0) this.toggle(digit);
    else return false;
    return true;
  }

  update() {
    this.kinds.forEach((button, i) => button.setAttribute(
      "aria-pressed", String(["copies", "outliers"][i] === this.kind)));
    this.limit.classList.toggle("hidden", this.kind !== "copies");
    this.undoButton.disabled = !store.state?.undoDecisions;
    const groups = this.groups[this.kind], isCopies = this.kind === "copies";
    if (!groups) {
      this.summary.textContent = isCopies
        ? "Comparing images; this takes a moment …" : "Looking for images unlike all others …";
      this.content.replaceChildren();
      return;
    }
    if (!groups.length) {
      this.summary.textContent = isCopies ? "There are no copies." : "There are no outliers.";
      this.content.replaceChildren();
      return;
    }
    const decided = groups.filter((group) => this.isDecided(group)).length;
    const drops = [...store.decisions.values()].filter((value) => value === "drop").length;
    this.summary.textContent = `${isCopies ? "Group" : "Outlier"} ${this.at[this.kind] + 1} of `
      + `${groups.length} · ${decided} decided · ${formatNumber(drops)} images to drop`;
    this.showGroup(this.group(), isCopies);
  }

  showGroup(group, isCopies) {
    const figures = group.rows.map((row, i) => {
      const decision = store.decisions.get(row);
      const proposal = isCopies ? (i ? "drop" : "keep") : "";
      const button = el("button", {
        type: "button", class: `decision ${decision ?? ""}`, "aria-pressed": String(!!decision),
        onclick: () => this.toggle(i),
      }, i < 9 && isCopies ? el("kbd", {}, String(i + 1)) : null,
      decision ?? (proposal && `${proposal}?`) ?? "", decision || proposal ? null : "keep or drop?");
      const image = el("img", { alt: shownName(row), src: `images/${row}` });
      image.addEventListener("error", () => { image.src = `thumbnails/${row}`; }, { once: true });
      const distance = isCopies && i ? `distance ${group.distances[i]}` : "";
      const outlier = isCopies ? "" : `distance to its neighbors ${group.distances[i]}`;
      return el("figure", { class: decision ?? "" },
        el("button", {
          type: "button", class: "picture", "aria-label": `Open ${shownName(row)}`,
          onclick: () => openImage(row, group.rows),
        }, image),
        el("figcaption", {},
          button, el("div", { class: "name" }, shownName(row)),
          el("small", {}, formatFacts(group.facts[i])),
          el("small", {}, [distance, outlier, group.notes[i]].filter(Boolean).join(" · ")),
          isCopies && i === 0
            ? el("small", { class: "good-text" }, `Best: ${group.reason}`) : null));
    });
    const actions = isCopies
      ? [["Keep the best, drop the others (Enter)", () =>
        this.decideAll((i) => (i ? "drop" : "keep"))],
      ["Keep all (K)", () => this.decideAll(() => "keep")]]
      : [["Keep (K)", () => this.decideAll(() => "keep")],
        ["Drop (D)", () => this.decideAll(() => "drop")]];
    this.content.replaceChildren(
      el("div", { class: "row" },
        actions.map(([text, act], i) => el("button", {
          type: "button", class: i ? "" : "main", onclick: act,
        }, text)),
        el("button", { type: "button", onclick: () => this.move(-1) }, "← Back"),
        el("button", { type: "button", onclick: () => this.move(1) }, "Next →")),
      el("div", { class: "copies" }, figures));
  }
}
