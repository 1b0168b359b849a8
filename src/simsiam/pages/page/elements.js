"use strict";
// Building blocks. All data becomes text or pixels, never markup.

// --- elements ------------------------------------------------------------------------------------

/** Set attributes ("onclick" adds a listener, "style" takes an object), then append children. */
function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else if (isPresent(value) && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter(isPresent));
  return node;
}

function el(tag, attributes = {}, ...children) {
  return build(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function section(id, title, note, ...children) {
  const head = el("div", { class: "head" }, el("h2", {}, title), note && el("small", {}, note));
  return el("section", { id }, head, ...children);
}

/** Fill the document: its header, its sections and a line below; and the links to the sections. */
function showPage(header, sections, footer) {
  document.getElementById("page").replaceChildren(
    header, ...sections, el("footer", {}, el("small", {}, footer)));
  document.getElementById("nav").append(...sections.map((part) =>
    el("a", { href: `#${part.id}` }, part.querySelector("h2").textContent)));
}

function swatch(color) {
  return el("span", { class: "swatch", style: { background: color } });
}

/** A text that leads to the explanation of a word (`words` in page.js). */
function wordLink(word, text = word) {
  return el("a", { class: "word", href: `#${wordId(word)}`, title: data.words[word] }, text);
}

function wordId(word) {
  return `word-${word.replaceAll(" ", "-")}`;
}

const PALETTE = [
  "#4a7bc8", "#ee8a2e", "#4fa254", "#dd5254", "#9a6bc0", "#35afc0", "#d9b42f", "#98694f",
  "#8a929c", "#ea86b6",
];

function categoryColor(index, count) {
  return count <= PALETTE.length ? PALETTE[index] : `hsl(${(index * 137.508) % 360} 58% 56%)`;
}

/** Cells of a table's heading, aligned like numbers where `numeric`. */
function headings(names, numeric = false) {
  return names.map((name) => el("th", { class: numeric ? "number" : null }, name));
}

/** Show what `render(run)` returns for one run; several runs get buttons to switch between them. */
function runSwitcher(runs, render) {
  const content = el("div", { class: "stack" });
  const show = (run) => {
    content.replaceChildren(render(run));
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", runs[i] === run));
  };
  const buttons = runs.map((run) => el("button", { onclick: () => show(run) }, run.name));
  show(runs[0]);
  const row = runs.length > 1 ? el("div", { class: "row" }, buttons) : null;
  return el("div", { class: "stack" }, row, content);
}

// --- values as text ------------------------------------------------------------------------------

function isPresent(value) {
  return value !== null && value !== undefined;
}

function formatTime(text) {
  return text ? text.replace("T", " ").replace(/:\d\d(\.\d+)?\+00:00$/, " UTC") : "";
}

function formatNumber(value, digits = 4) {
  if (!isPresent(value)) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  if (Math.abs(value) < 1e-3) return value.toExponential(1);
  return String(Number(value.toPrecision(digits)));
}

function formatPercent(value) {
  return isPresent(value) ? value.toFixed(1) : "–";
}

function formatDuration(seconds) {
  for (const [unit, length] of [["days", 86400], ["hours", 3600], ["min", 60]]) {
    if (seconds >= 2 * length) return `${formatNumber(seconds / length, 2)} ${unit}`;
  }
  return `${Math.round(seconds)} s`;
}

/** Any JSON value on one line. */
function formatValue(value) {
  if (Array.isArray(value)) return value.map(formatValue).join(" ");
  if (value && typeof value === "object") {
    return Object.entries(value).map(([k, v]) => `${k} ${formatValue(v)}`).join(", ");
  }
  return isPresent(value) ? String(value) : "–";
}
