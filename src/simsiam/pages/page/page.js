// The page: all sections that have something to show, and links to them.

nameRuns();
const sections = [
  features(), candidates(), results(), transfers(), curves(), views(), mapSection(), neighborsSection(), recipe(),
].filter(Boolean);
const footer = `Created by simsiam ${data.version} on ${formatTime(data.created)}. `
  + "This page is self-contained: it makes no network requests.";
document.getElementById("page").replaceChildren(
  header(), ...sections, el("footer", {}, el("small", {}, footer)));
document.getElementById("nav").append(...sections.map((part) =>
  el("a", { href: `#${part.id}` }, part.querySelector("h2").textContent)));
