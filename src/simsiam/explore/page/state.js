// What the server knows, as the page has it, and who is told when it changes.

export const store = {
  data: null, // what never changes: names, classes
  places: null, // of the images on the map
  state: null, // labels, decisions, the queue
  predictions: { classes: [], predicted: [], confidence: [] },
  labels: new Map(), // row -> label
  decisions: new Map(), // row -> "keep" or "drop"
  classes: [], // the labels, in the order of their number keys
  query: null, // the last search: name, row, rows, cosines
  selection: new Set(),
  tab: "browse",
};

const listeners = [];

/** Call a function with the name of what has changed. */
export function onChange(listener) {
  listeners.push(listener);
}

export function changed(what) {
  for (const listener of listeners) listener(what);
}

// --- the server ---

let saying = 0;

/** Say something in the status line for some seconds; errors stay until the next message. */
export function say(text, isError = false) {
  const status = document.getElementById("status");
  status.textContent = text;
  status.classList.toggle("bad-text", isError);
  clearTimeout(saying);
  if (!isError) saying = setTimeout(() => say(""), 8000);
}

async function check(response) {
  if (!response.ok) throw new Error(await response.text());
  return response;
}

async function get(path) {
  return (await check(await fetch(path))).json();
}

async function send(path, body, type = "application/json") {
  const content = type === "application/json" ? JSON.stringify(body) : body;
  const options = { method: "POST", body: content, headers: { "Content-Type": type } };
  return check(await fetch(path, options));
}

export async function post(path, body) {
  return (await send(path, body)).json();
}

export { get };

/** Run what a person asked for; say why, if it fails. */
export async function attempt(work) {
  try {
    return await work();
  } catch (error) {
    const gone = error instanceof TypeError && /fetch|network/i.test(error.message);
    const text = "simsiam explore is not running any more: start it again, and open its address.";
    say(gone ? text : error.message, true);
    return null;
  }
}

// --- loading ---

export async function load() {
  [store.data, store.places] = await Promise.all([get("data"), get("places")]);
  await refresh(true);
}

let loading = false;

/** Take over a state, and fetch what has changed with it. */
async function take(state) {
  const before = store.state;
  if (before && state.version < before.version) return;
  store.state = state;
  store.labels = new Map(state.labels);
  store.decisions = new Map(state.decisions);
  for (const name of state.classes) if (!store.classes.includes(name)) store.classes.push(name);
  const { places } = store;
  if (places.arranged !== state.arranged || !!places.clusters !== state.clustered) {
    store.places = await get("places");
    changed("places");
  }
  if (before?.fittedVersion !== state.fittedVersion) store.predictions = await get("predictions");
  for (const problem of state.problems.slice(before?.problems.length ?? 0)) say(problem, true);
  changed("state");
}

export async function refresh(always = false) {
  if (loading) return;
  loading = true;
  try {
    const state = await get("state");
    if (always || state.version !== store.state.version) await take(state);
  } finally {
    loading = false;
  }
}

/** Ask for changes: often while the server computes, and seldom otherwise. */
export function watch() {
  const step = async () => {
    if (!document.hidden) await attempt(() => refresh());
    const busy = !store.state?.fitted || !store.state?.arranged;
    setTimeout(step, busy ? 250 : 1500);
  };
  step();
}

// --- what a person does ---

export async function label(rows, text) {
  return attempt(async () => {
    await take(await post("label", { rows: [...rows], label: text, classes: store.classes }));
    return true;
  });
}

export async function decide(decisions) {
  return attempt(async () => {
    await take(await post("decide", { decisions }));
    return true;
  });
}

export async function undo(what) {
  return attempt(async () => take(await post("undo", { what })));
}

export function addClass(name) {
  const text = name.trim().replace(/\s+/g, " ");
  if (text && !store.classes.includes(text)) store.classes.push(text);
  changed("classes");
  return text;
}

export function select(rows) {
  if (!rows.length) say("");
  store.selection = new Set(rows);
  changed("selection");
}

/** Show the result of a search; null ends it. */
export function showQuery(query) {
  if (store.query?.picture) URL.revokeObjectURL(store.query.picture);
  store.query = query;
  changed("query");
}

let searches = 0;

/** Search; a slow answer does not replace the one to a later question. */
async function search(ask) {
  const number = ++searches;
  return attempt(async () => {
    const query = await ask();
    if (number === searches) showQuery(query);
    return true;
  });
}

export async function searchRow(row) {
  return search(() => post("search", { row }));
}

export async function searchImage(blob) {
  say("Searching for images like the dropped one …");
  return search(async () => {
    const response = await send("search-image", blob, "application/octet-stream");
    const query = { ...await response.json(), picture: URL.createObjectURL(blob) };
    say("");
    return query;
  });
}

/** Save a file; tell how many images it leaves out, because they have no file any more. */
export async function download(kind, rows) {
  return attempt(async () => {
    const response = await send("export", { kind, rows: [...rows] });
    const url = URL.createObjectURL(await response.blob());
    el("a", { href: url, download: kind }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
    return { leftOut: Number(response.headers.get("Left-Out")) };
  });
}
