// Cleaning up: copies side by side, outliers one by one; decisions by key, and no file is touched.
import { attempt, decide, get, post, say, store, undo } from "./state.js";
import { formatFacts, openImage, shownName } from "./tiles.js";

const DISTANCE_HINT = "0: the same picture. Up to 0.28: copies. Above 0.5: also other pictures.";

/** What is proposed for an image of a group: the first one is the best. */
const proposal = (i) => (i ? "drop" : "keep");

export class CleanPanel {
  constructor() {
    this.kind = "copies";
    this.groups = { copies: null, outliers: null };
    this.at = { copies: 0, outliers: 0 };
    this.question = { threshold: 0.28, crops: false };
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
      value: this.question.threshold, "aria-label": "Largest distance of copies",
      title: DISTANCE_HINT,
      onchange: () => {
        limit.value = Math.min(1, Math.max(0, Number(limit.value) || 0));
        this.ask({ threshold: Number(limit.value) });
      },
    });
    const crops = el("input", {
      type: "checkbox", onchange: () => this.ask({ crops: crops.checked }),
    });
    this.options = el("div", { class: "row" },
      el("label", { class: "row" }, el("small", {}, "Largest distance"), limit),
      el("label", { class: "row" }, crops, el("small", {}, "also crops (takes minutes)")));
    this.element = el("div", { class: "stack" },
      el("div", { class: "row" }, this.kinds, this.options, this.undoButton),
      this.summary, this.content,
      el("small", { class: "pale" },
        "Nothing is deleted: Save files has a list and a script, which you run yourself."));
  }

  /** Look for copies by another rule. */
  ask(change) {
    Object.assign(this.question, change);
    this.isStale = true; // the groups stay until others are found
    this.open("copies");
  }

  /** Show copies or outliers; ask the server for them until it has found them. */
  async open(kind = this.kind) {
    this.kind = kind;
    this.failed = null;
    this.update();
    if (!this.isMissing(kind) || this.asking) return;
    this.asking = true;
    const question = { ...this.question };
    const answer = await attempt(async () => ({
      found: kind === "copies" ? await post("copies", question) : await get("outliers"),
    }));
    this.asking = false;
    const isAsked = JSON.stringify(question) === JSON.stringify(this.question);
    if (!answer) this.failed = kind;
    else if (answer.found && isAsked) {
      this.groups[kind] = answer.found;
      if (kind === "copies") this.isStale = false;
      this.at[kind] = Math.max(0, answer.found.findIndex((group) => !this.isDecided(group)));
    }
    this.update();
    const isWaiting = this.isMissing(this.kind) && this.failed !== this.kind;
    if (isWaiting && this.element.isConnected) setTimeout(() => this.open(this.kind), 500);
  }

  isMissing(kind) {
    return !this.groups[kind] || (kind === "copies" && this.isStale);
  }

  group() {
    return this.groups[this.kind]?.[this.at[this.kind]];
  }

  isDecided(group) {
    return group.rows.every((row) => store.decisions.has(row));
  }

  move(by) {
    const groups = this.groups[this.kind];
    if (!groups?.length) return;
    this.at[this.kind] = Math.min(groups.length - 1, Math.max(0, this.at[this.kind] + by));
    this.update();
  }

  /** Decide about the images of a group, and go on to the next one that is not decided. */
  async decideAll(of) {
    const group = this.group(), groups = this.groups[this.kind], now = this.at[this.kind];
    if (!group) return;
    const isOpen = (other) => other !== group && !this.isDecided(other);
    const after = groups.findIndex((other, i) => i > now && isOpen(other));
    const next = after >= 0 ? after : groups.findIndex(isOpen);
    this.at[this.kind] = next >= 0 ? next : now;
    this.update();
    await decide(group.rows.map((row, i) => [row, of(i)]));
  }

  /** Keep the best image of every group that is not decided; what was decided stays. */
  async decideRest() {
    const isDropped = (group) => store.decisions.get(group.rows[0]) === "drop";
    const open = this.groups.copies.filter((group) => !this.isDecided(group));
    const left = open.filter(isDropped).length;
    const decisions = open.filter((group) => !isDropped(group)).flatMap((group) =>
      group.rows.map((row, i) => [row, store.decisions.get(row) ?? proposal(i)]));
    if (decisions.length && !await decide(decisions)) return;
    if (left) say(`Groups that are left because their best image is dropped: ${formatNumber(left)}.`);
  }

  /** Take the proposal for one image; if it is decided, decide the opposite. */
  async toggle(i) {
    const row = this.group()?.rows[i];
    if (row === undefined) return;
    const decision = store.decisions.get(row) ?? (i ? "keep" : "drop");
    await decide([[row, decision === "drop" ? "keep" : "drop"]]);
  }

  key(event) {
    const digit = "123456789".indexOf(event.key);
    const isCopies = this.kind === "copies", group = this.group();
    if (event.key === "Enter" && isCopies) this.decideAll(proposal);
    else if (event.key === "k" || event.key === "K") this.decideAll(() => "keep");
    else if (event.key === "d" || event.key === "D") this.decideAll(() => "drop");
    else if (event.key === "ArrowRight") this.move(1);
    else if (event.key === "ArrowLeft") this.move(-1);
    else if (event.key === "z" || event.key === "Z") undo("decisions");
    else if (digit >= 0 && isCopies && digit < (group?.rows.length ?? 0)) {
      this.decideAll((i) => (i === digit ? "keep" : "drop"));
    } else return false;
    return true;
  }

  update() {
    this.kinds.forEach((button, i) => button.setAttribute(
      "aria-pressed", String(["copies", "outliers"][i] === this.kind)));
    this.options.classList.toggle("hidden", this.kind !== "copies");
    this.undoButton.disabled = !store.state?.undoDecisions;
    const groups = this.groups[this.kind], isCopies = this.kind === "copies";
    if (!groups?.length) {
      this.summary.textContent = groups
        ? (isCopies ? "There are no copies." : "There are no outliers.")
        : this.failed === this.kind ? "They could not be found; the reason is given below."
          : isCopies ? "Comparing images; this takes a moment …"
            : "Looking for images that differ from all others …";
      this.content.replaceChildren();
      this.shown = null;
      return;
    }
    const decided = groups.filter((group) => this.isDecided(group)).length;
    const drops = [...store.decisions.values()].filter((value) => value === "drop").length;
    const count = decided === groups.length ? "all are decided" : `${decided} decided`;
    this.summary.textContent = `${isCopies ? "Group" : "Outlier"} ${this.at[this.kind] + 1} of `
      + `${groups.length} · ${count} · ${formatNumber(drops)} images to drop`
      + (this.isMissing(this.kind) && !this.failed ? " · comparing images again …" : "");
    if (this.shown !== this.group()) this.showGroup(this.group(), isCopies);
    this.showDecisions(this.group(), isCopies);
    this.restButton?.classList.toggle("hidden", decided === groups.length);
  }

  /** Say on each picture what was decided, or is proposed. */
  showDecisions(group, isCopies) {
    group.rows.forEach((row, i) => {
      const decision = store.decisions.get(row), { figure, button } = this.figures[i];
      const question = isCopies ? `${proposal(i)}?` : "keep or drop?";
      figure.className = decision ?? "";
      button.className = `decision ${decision ?? ""}`;
      button.setAttribute("aria-pressed", String(!!decision));
      button.textContent = decision ?? question;
    });
  }

  showGroup(group, isCopies) {
    this.shown = group;
    this.figures = group.rows.map((row, i) => this.makeFigure(group, row, i, isCopies));
    this.restButton = isCopies ? el("button", {
      type: "button", onclick: () => this.decideRest(),
    }, "Keep the best in all groups that are not decided") : null;
    const actions = isCopies
      ? [["Keep the best, drop the others (Enter)", () =>
        this.decideAll(proposal)],
      ["Keep all (K)", () => this.decideAll(() => "keep")]]
      : [["Keep (K)", () => this.decideAll(() => "keep")],
        ["Drop (D)", () => this.decideAll(() => "drop")]];
    this.content.replaceChildren(
      el("div", { class: "row" },
        actions.map(([text, act], i) => el("button", {
          type: "button", class: i ? "" : "main", onclick: act,
        }, text)),
        el("button", { type: "button", onclick: () => this.move(-1) }, "← Back"),
        el("button", { type: "button", onclick: () => this.move(1) }, "Next →"),
        this.restButton),
      el("div", { class: "copies" }, this.figures.map(({ figure }) => figure)));
  }

  makeFigure(group, row, i, isCopies) {
    const button = el("button", { type: "button", onclick: () => this.toggle(i) });
    const image = el("img", {
      alt: shownName(row), src: `images/${row}`, loading: i < 8 ? null : "lazy",
    });
    image.addEventListener("error", () => { image.src = `thumbnails/${row}`; }, { once: true });
    const notes = isCopies ? [i && `distance ${group.distances[i]}`, group.notes[i]]
      : [`distance to its neighbors ${group.distances[i]}`, group.notes[i]];
    const figure = el("figure", {},
      el("button", {
        type: "button", class: "picture", "aria-label": `Open ${shownName(row)}`,
        onclick: () => openImage(row, group.rows),
      }, image),
      el("figcaption", {},
        el("div", { class: "row" },
          i < 9 && isCopies ? el("small", {}, el("kbd", {}, String(i + 1)), " keeps this one") : null,
          button),
        el("div", { class: "name" }, shownName(row)),
        el("small", {}, formatFacts(group.facts[i])),
        el("small", {}, notes.filter(Boolean).join(" · ")),
        isCopies && i === 0 ? el("small", { class: "good-text" }, `Best: ${group.reason}`) : null));
    return { figure, button };
  }
}
