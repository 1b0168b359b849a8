// What can be taken along: lists, tables and scripts.
import { download, say, store } from "./state.js";

export class TakePanel {
  constructor() {
    this.onlySelected = false;
    this.scope = el("div", { class: "row" });
    this.list = el("div", { class: "stack" });
    this.hint = el("div", { class: "card stack hidden" });
    this.element = el("div", { class: "stack" }, this.scope, this.list, this.hint,
      el("p", { class: "pale", id: "kept-line" }));
  }

  update() {
    if (!store.state) return;
    const count = store.selection.size;
    if (!count) this.onlySelected = false;
    const choice = (text, value, disabled) => el("button", {
      type: "button", disabled: disabled && "", "aria-pressed": String(this.onlySelected === value),
      onclick: () => { this.onlySelected = value; this.update(); },
    }, text);
    this.scope.replaceChildren(
      choice(`All ${formatNumber(store.data.names.length)} images`, false, false),
      choice(`${formatNumber(count)} selected`, true, !count));
    this.list.replaceChildren(...Object.entries(store.data.exports).map(([kind, text]) =>
      el("div", { class: "take-row" },
        el("div", {}, el("b", {}, kind), el("div", {}, el("small", {}, text))),
        el("button", {
          type: "button", "aria-label": `Save ${kind}`, onclick: () => this.save(kind),
        }, "Save"))));
    this.element.querySelector("#kept-line").textContent =
      `Labels are in ${store.data.labelsFile}, decisions in ${store.data.decisionsFile}, beside `
      + `${store.data.file}, after every click. simsiam probe ${store.data.file} `
      + `${store.data.labelsFile} --out all.csv predicts the other labels.`;
  }

  async save(kind) {
    say("");
    const saved = await download(kind, this.onlySelected ? store.selection : []);
    if (!saved) return;
    const isScript = kind.endsWith(".sh"), isList = kind.endsWith(".txt");
    this.hint.classList.toggle("hidden", !isScript && !isList);
    if (isScript) {
      this.hint.replaceChildren(
        el("p", {}, "Nothing has been changed yet. This shows what the script would do:"),
        el("code", {}, `sh ${kind} FOLDER`),
        el("p", {}, "FOLDER is the folder of the images. This does it:"),
        el("code", {}, `sh ${kind} FOLDER --yes`));
    } else if (isList) {
      this.hint.replaceChildren(
        el("p", {}, `Move ${kind} into the folder of the images: its paths are relative to that.`));
    }
    const count = formatNumber(saved.leftOut);
    say(`${kind} is in the folder to which your browser downloads.`
      + (saved.leftOut ? ` It leaves out ${count} images that have no file any more.` : ""));
  }
}
