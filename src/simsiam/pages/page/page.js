// The page: all sections that have something to show, and links to them.

/** What the words mean that the other parts of the page link to. */
function words(parts) {
  const links = parts.flatMap((part) => [...part.querySelectorAll(".word")]);
  const linked = new Set(links.map((link) => link.getAttribute("href").slice(1)));
  const terms = Object.entries(data.words).filter(([word]) => linked.has(wordId(word)));
  return terms.length && section("words", "Words", null,
    el("dl", { class: "words card" }, terms.map(([word, text]) =>
      el("div", { id: wordId(word) }, el("dt", {}, word), el("dd", {}, text)))));
}

/** What `render` returns; if it fails, a section that says so, so that the others are shown. */
function attempt(render) {
  try {
    return render();
  } catch (error) {
    return section(`failed-${render.name}`, `No ${render.name}`, null,
      el("p", { class: "pale" }, `This part of the page cannot be shown: ${error.message}`));
  }
}

nameRuns();
const sections = [
  features, candidates, results, transfers, curves, views, mapSection, neighborsSection, recipe,
].map(attempt).filter(Boolean);
const parts = [attempt(header), ...sections];
sections.push(...[attempt(() => words(parts))].filter(Boolean));
const footer = `Created by simsiam ${data.version} on ${formatTime(data.created)}. `
  + "This page is self-contained: it makes no network requests.";
showPage(parts[0], sections, footer);
