// The page of `simsiam reproduce switches`: turn a switch and see what it did to a recorded run.

const GLOSSARY = "../../glossary.html#"; // from results/tiny/ of the site

const ON_OFF = [["on", "on"], ["off", "off"]];
const SWITCHES = [
  {
    key: "stop_gradient", name: "stop-gradient", term: "stop-gradient", options: ON_OFF,
    note: "on: one side of the loss counts as a fixed target",
  },
  {
    key: "predictor", name: "predictor", term: "predictor", options: ON_OFF,
    note: "on: a small network predicts one view's z from the other's",
  },
  {
    key: "batch_norm", name: "batch norm", term: "batch-norm", options: ON_OFF,
    note: "on: projector and predictor have it; the backbone always has it",
  },
  {
    key: "batch_size", name: "batch size", term: null,
    options: data.batch_sizes.map((n) => [n, String(n)]),
    note: "images in one step; all runs have the same number of epochs",
  },
];
const CURVES = [
  {
    key: "loss", title: "Loss",
    note: "−1: the views of each image agree; 0: nothing in common; both runs from start to end",
  },
  {
    key: "z_std_sqrt_d", title: "Standard deviation of z, × √d", from: 0, mark: 1,
    note: "how much z differs between images; 1: spread evenly; 0: all images have the same z",
  },
  {
    key: "z_rank", title: "Effective rank of z", from: 0,
    note: "directions that z uses, of 300 test images: many before training; 1: all z on a line",
  },
  {
    key: "knn_top1", title: "kNN accuracy of h, %", from: 0,
    note: "test images whose nearest neighbors have the same class; training sees no classes",
  },
];
const QUESTIONS = [
  {
    key: "rank", name: "the effective rank of z",
    text: "What will the spectrum do? At the end of training, z will use",
    options: [["lower", "fewer directions"], ["about the same", "about as many"],
      ["higher", "more directions"]],
  },
  {
    key: "knn", name: "the kNN accuracy of h",
    text: "How useful will the features be? At the end of training, the kNN accuracy of h will be",
    options: [["lower", "lower"], ["about the same", "about the same"], ["higher", "higher"]],
  },
];
const BARS = 16; // of the spectrum that are shown
const MOVE_TIME = 400, PLAY_TIME = 900; // milliseconds
const PICTURE = 26; // pixels of a picture on the map
const NUM_PICTURES = 24;

const still = matchMedia("(prefers-reduced-motion: reduce)");

function term(name, text = name) {
  return el("a", { href: GLOSSARY + name }, text);
}

function findRun(options) {
  return data.runs.find((run) => SWITCHES.every(({ key }) => run.options[key] === options[key]));
}

/** The last position of a run's records. */
function lastPosition(run) {
  return run.recording.steps.length - 1;
}

function radios(group, options, checked, onchange) {
  return options.map(([value, text]) => el("label", {},
    el("input", {
      type: "radio", name: group, value, ...(value === checked ? { checked: "" } : {}),
      onchange: () => onchange(value),
    }), text));
}

class SwitchPage {
  constructor() {
    const everything = { stop_gradient: "on", predictor: "on", batch_norm: "on" };
    const middle = data.batch_sizes[data.batch_sizes.length >> 1];
    this.run = findRun({ ...everything, batch_size: middle }) ?? data.runs[0];
    this.before = null; // the run that was shown before the last turn
    this.pending = null; // the switch that a reader is about to turn, and its new value
    this.position = lastPosition(this.run);
    this.asks = true;
    this.timer = null;
    this.map = new FeatureMap(data.gallery);
    this.sections = [this.buildSwitches(), this.buildRun(), this.buildTable(), about()];
    this.showRun();
    this.say(el("p", {}, "Turn one of the four switches."));
  }

  // --- turning a switch ---

  buildSwitches() {
    this.inputs = el("div", { class: "switches" }, SWITCHES.map((item) => {
      const choose = (value) => this.choose(item, value);
      const title = item.term ? term(item.term, item.name) : item.name;
      return el("fieldset", { class: "card", "data-switch": item.key },
        el("legend", {}, title),
        el("div", { class: "options" },
          radios(item.key, item.options, this.run.options[item.key], choose)),
        el("small", {}, item.note));
    }));
    this.answer = el("div", { class: "card stack", role: "status", tabindex: -1, id: "answer" });
    const ask = el("input", {
      type: "checkbox", checked: "", onchange: () => { this.asks = ask.checked; },
    });
    return section("switches", "Four switches", "", this.inputs, this.answer,
      el("label", { class: "ask" }, ask, "Ask me for a prediction before a switch is turned"));
  }

  say(...content) {
    this.answer.replaceChildren(...content.flat());
  }

  /** Set the radio buttons to what is shown, except for the switch that is about to be turned. */
  syncInputs() {
    for (const input of this.inputs.querySelectorAll("input")) {
      const wanted = this.pending?.item.key === input.name
        ? this.pending.value : this.run.options[input.name];
      input.checked = input.value === String(wanted);
    }
  }

  choose(item, value) {
    const run = findRun({ ...this.run.options, [item.key]: value });
    this.pending = run && run !== this.run ? { item, value, run } : null;
    this.syncInputs();
    if (!run) this.say(el("p", {}, "This combination was not recorded."));
    else if (!this.pending) this.say(el("p", {}, "Turn one of the four switches."));
    else if (this.asks) this.ask();
    else this.turn({});
  }

  /** Ask what a reader expects. */
  ask() {
    const { item, value } = this.pending;
    const expected = {};
    const questions = QUESTIONS.filter(({ key }) => this.pendingTurn()[key] !== null);
    this.say(
      el("h3", {}, `Predict: ${describeTurn(item, value)}`),
      questions.map(({ key, text, options }) => el("fieldset", { class: "question" },
        el("legend", {}, text),
        el("div", { class: "options" }, radios(`expect-${key}`, options, null,
          (choice) => { expected[key] = choice; })))),
      el("small", {}, data.rule),
      el("div", { class: "row" },
        el("button", { class: "main", onclick: () => this.turn(expected) }, "Turn the switch"),
        el("button", { onclick: () => this.cancel() }, "Leave it as it is")));
  }

  cancel() {
    const { item } = this.pending;
    this.pending = null;
    this.syncInputs();
    this.say(el("p", {}, "Turn one of the four switches."));
    this.inputs.querySelector(`[name="${item.key}"]:checked`).focus();
  }

  pendingTurn() {
    return data.turns[`${data.runs.indexOf(this.run)}-${data.runs.indexOf(this.pending.run)}`];
  }

  turn(expected) {
    const turn = this.pendingTurn();
    const { item, value, run } = this.pending;
    const old = this.run, asked = this.asks;
    this.pending = null;
    this.stop();
    this.before = old;
    this.run = run;
    this.position = lastPosition(run);
    this.syncInputs();
    this.showRun();
    const results = QUESTIONS.filter(({ key }) => turn[key] !== null).map(({ key, name }) => {
      const column = key === "rank" ? "z_rank" : "knn_top1";
      const [from, to] = [old, run].map((r) => formatPercent(r.recording[column].at(-1)));
      const unit = key === "rank" ? "" : " %";
      const right = expected[key] === turn[key];
      const verdict = expected[key]
        ? el("b", { class: right ? "good" : "bad" },
          right ? " As you expected." : ` You expected: ${expected[key]}.`)
        : asked ? el("span", { class: "pale" }, " You made no prediction.") : null;
      return el("li", {}, `${name}: ${turn[key]} (${from}${unit} before, ${to}${unit} now).`, verdict);
    });
    this.say(
      el("h3", {}, `What happened: ${describeTurn(item, value)}`),
      el("ul", {}, results),
      el("small", {}, data.rule),
      turn.sentences.map((text) => el("p", {}, text)));
    if (asked) this.answer.focus({ preventScroll: true });
  }

  // --- the recorded run ---

  buildRun() {
    this.settings = el("span");
    this.ending = el("p", { class: "ending" });
    this.slider = el("input", {
      type: "range", min: 0, step: 1, id: "position",
      oninput: () => { this.stop(); this.show(Number(this.slider.value)); },
    });
    this.play = el("button", { onclick: () => (this.timer ? this.stop() : this.start()) }, "Play");
    this.place = el("output", { for: "position" });
    this.charts = el("div", { class: "charts" });
    this.spectrum = el("figure", { class: "card chart stack", id: "spectrum" });
    const player = el("div", { class: "player card" }, this.play,
      el("label", { for: "position" }, "Recorded step"), this.slider, this.place);
    return section("run", "The recorded run", this.settings, this.ending, player,
      this.charts);
  }

  showRun() {
    const { run, before } = this, { recording } = run;
    this.settings.textContent =
      SWITCHES.map(({ key, name }) => `${name} ${run.options[key]}`).join(", ");
    this.ending.textContent = run.ending;
    this.slider.max = lastPosition(run);
    const lines = (key) => [
      { name: "this run", recording, color: "var(--run-0)" },
      ...run.repeats.map((other) =>
        ({ name: "second seed", recording: other, color: "var(--run-0)", second: true })),
      ...(before ? [{ name: "before the turn", recording: before.recording, color: "var(--run-1)" }] : []),
    ].map((line) => ({ ...line, points: points(line.recording, key) }));
    const axis = {
      last: lastPosition(run),
      ticks: recording.steps.map((step, i) => [i, formatNumber(step)]).filter((_, i) => i % 2 === 0),
      describe: (position) => `step ${formatNumber(recording.steps[Math.round(position)])}`,
    };
    this.drawn = CURVES.map((spec) => {
      const shown = lines(spec.key).filter((line) => line.points.length);
      if (!shown.length) return null;
      const chart = drawChart(spec, shown, axis, fullRange(spec));
      chart.plot.addEventListener("click", (event) => {
        this.stop();
        this.show(Math.round(chart.epochAt(event)));
      });
      return chart;
    }).filter(Boolean);
    const cards = this.drawn.map((chart) => chart.card);
    this.charts.replaceChildren(this.map.element, this.spectrum, ...cards);
    this.show(Math.min(this.position, lastPosition(run)));
  }

  show(position) {
    const { run, before } = this, { steps } = run.recording;
    this.position = position;
    this.slider.value = position;
    const images = steps[position] * run.options.batch_size;
    const text = `step ${formatNumber(steps[position])} of ${formatNumber(steps.at(-1))}, `
      + `${formatNumber(images)} images seen`;
    this.place.textContent = text;
    this.slider.setAttribute("aria-valuetext", text);
    this.drawn.forEach((chart) => chart.show(position));
    this.spectrum.replaceChildren(...spectrumCard(run, before, position));
    this.map.show(run, position);
  }

  start() {
    if (this.position >= lastPosition(this.run)) this.show(0);
    this.play.textContent = "Pause";
    this.timer = setInterval(() => {
      this.show(this.position + 1);
      if (this.position >= lastPosition(this.run)) this.stop();
    }, PLAY_TIME);
  }

  stop() {
    clearInterval(this.timer);
    this.timer = null;
    this.play.textContent = "Play";
  }

  // --- all runs ---

  buildTable() {
    const row = (run, recording, seed) => {
      const values = ["loss", "z_std_sqrt_d", "z_rank", "knn_top1"].map((key) => recording[key].at(-1));
      return el("tr", {},
        SWITCHES.map(({ key }) => el("td", {}, String(run.options[key]))),
        el("td", { class: "number" }, String(seed)),
        values.map((value) => el("td", { class: "number" }, formatNumber(value, 3))));
    };
    const rows = data.runs.flatMap((run) =>
      [row(run, run.recording, 0), ...run.repeats.map((other, i) => row(run, other, i + 1))]);
    return section("all", "All runs", "at their last step",
      el("div", { class: "card scroll", tabindex: 0, role: "group", "aria-label": "Table of all runs" },
        el("table", {},
          el("thead", {}, el("tr", {}, headings(SWITCHES.map(({ name }) => name)),
            headings(["seed", "loss", "std of z × √d", "rank of z", "kNN %"], true))),
          el("tbody", {}, rows))));
  }
}

function describeTurn(item, value) {
  return item.key === "batch_size" ? `the batch size becomes ${value}` : `${item.name} ${value}`;
}

/** Pairs of position and value, without missing values. */
function points(recording, key) {
  return recording[key].map((y, i) => [i, y]).filter(([, y]) => isPresent(y));
}

/** The range of a curve over all runs, so that it stays the same when a switch is turned. */
function fullRange({ key, mark, from }) {
  const all = data.runs.flatMap((run) => [run.recording, ...run.repeats]);
  return valueRange(all.flatMap((recording) => points(recording, key).map(([, y]) => y)), mark, from);
}

/** The largest eigenvalues as bars, and those of the run before as lines. */
function spectrumCard(run, before, position) {
  const { width, height, left, right, top, bottom } = CHART;
  const shares = run.recording.spectrum[position].slice(0, BARS);
  const old = before?.recording.spectrum[Math.min(position, lastPosition(before))].slice(0, BARS) ?? [];
  const step = (width - left - right) / BARS;
  const py = (share) => top + (1 - share) * (height - top - bottom);
  const rank = run.recording.z_rank[position];
  const summary = `The first direction holds ${formatPercent(100 * shares[0])} % of the variance of `
    + `z; the effective rank is ${formatPercent(rank)}.`;
  const plot = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": summary },
    [0, 0.25, 0.5, 0.75, 1].map((share) => [
      svg("line", { class: "grid", x1: left, x2: width - right, y1: py(share), y2: py(share) }),
      svg("text", { x: left - 7, y: py(share) + 3.5, "text-anchor": "end" }, String(100 * share)),
    ]),
    shares.map((share, i) => [
      svg("rect", {
        x: left + i * step + step * 0.15, width: step * 0.7, y: py(share),
        height: Math.max(0.5, py(0) - py(share)), style: { fill: "var(--run-0)" },
      }),
      i % 5 === 4 || i === 0 ? svg("text",
        { x: left + (i + 0.5) * step, y: height - 5, "text-anchor": "middle" }, String(i + 1)) : null,
    ]),
    old.map((share, i) => svg("line", {
      x1: left + i * step, x2: left + (i + 1) * step, y1: py(share), y2: py(share),
      style: { stroke: "var(--run-1)", strokeWidth: 2 },
    })));
  const key = (color, text) => el("span", {}, el("i", { style: { color } }), text);
  return [
    el("div", { class: "head" }, el("h3", {}, term("spectrum", "Spectrum"), " of z, % of its variance")),
    plot,
    el("div", { class: "legend" }, key("var(--run-0)", "this run"),
      before ? key("var(--run-1)", "before the turn") : null,
      `the ${BARS} directions of largest variance`),
    el("p", {}, summary),
  ];
}

/** The map of the features h: points move from record to record and from run to run. */
class FeatureMap {
  constructor(gallery) {
    this.gallery = gallery;
    this.extent = Math.max(...data.runs.map((run) => run.recording.extent));
    this.count = gallery.names.length;
    this.place = null; // where points are drawn: x and y of each, from -1 to 1
    this.frame = null;
    this.showsPictures = true;
    this.canvas = el("canvas", { role: "img" });
    const pictures = el("button", { "aria-pressed": "true", onclick: () => {
      this.showsPictures = !this.showsPictures;
      pictures.setAttribute("aria-pressed", this.showsPictures);
      this.draw();
    } }, "Pictures");
    const names = gallery.labels ? gallery.classes : [];
    this.element = el("figure", { class: "card stack feature-map" },
      el("div", { class: "head" },
        el("h3", {}, "Map of the ", term("feature", "features"), " h"), pictures),
      this.canvas,
      el("div", { class: "legend" }, names.map((name, i) =>
        el("span", {}, swatch(categoryColor(i, names.length)), name))),
      el("small", {}, "Each point is a test image, colored by its class; training never sees classes. "
        + "It is placed along the two directions in which the features differ most. From step to "
        + "step the map is rotated so that points move little; all runs have the same scale."));
    loadSheet(gallery, 0).then(() => this.draw());
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  show(run, position) {
    const { points: maps, extent, steps, knn_top1: knn } = run.recording;
    const bytes = Uint8Array.from(atob(maps[position]), (c) => c.charCodeAt(0));
    const goal = Float32Array.from(bytes, (b) => ((b / 127.5 - 1) * extent) / this.extent);
    const accuracy = isPresent(knn[position])
      ? `; kNN finds the class of ${formatPercent(knn[position])} %` : "";
    this.canvas.setAttribute("aria-label",
      `Map of ${this.count} test images at step ${steps[position]}${accuracy}`);
    cancelAnimationFrame(this.frame);
    if (!this.place || still.matches) {
      this.place = goal;
      this.draw();
      return;
    }
    const start = this.place, begin = performance.now();
    const move = (now) => {
      const t = Math.min(1, Math.max(0, (now - begin) / MOVE_TIME)), ease = t * t * (3 - 2 * t);
      this.place = t === 1 ? goal : goal.map((v, i) => start[i] + (v - start[i]) * ease);
      this.draw();
      if (t < 1) this.frame = requestAnimationFrame(move);
    };
    this.frame = requestAnimationFrame(move);
  }

  draw() {
    const { canvas, gallery, place, count } = this;
    const { clientWidth: width, clientHeight: height } = canvas;
    const ratio = window.devicePixelRatio || 1;
    if (!width || !place) return;
    const pixels = [width, height].map((length) => Math.round(length * ratio));
    if (canvas.width !== pixels[0] || canvas.height !== pixels[1]) {
      [canvas.width, canvas.height] = pixels;
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    const scale = (Math.min(width, height) - PICTURE) / 2 - 2;
    const x = (i) => width / 2 + place[2 * i] * scale;
    const y = (i) => height / 2 + place[2 * i + 1] * scale;
    const color = (i) => (gallery.labels
      ? categoryColor(gallery.labels[i], gallery.classes.length) : categoryColor(0, 1));
    pen.globalAlpha = 0.85;
    for (let i = 0; i < count; i++) {
      pen.fillStyle = color(i);
      pen.beginPath();
      pen.arc(x(i), y(i), 3.2, 0, 7);
      pen.fill();
    }
    pen.globalAlpha = 1;
    if (this.showsPictures) this.drawPictures(pen, x, y, color);
  }

  drawPictures(pen, x, y, color) {
    const { gallery, count } = this, { side } = gallery;
    pen.imageSmoothingEnabled = !gallery.pixelated;
    const number = Math.min(NUM_PICTURES, count);
    for (let k = 0; k < number; k++) {
      const i = Math.floor(((k + 0.5) * count) / number);
      const place = locateThumbnail(gallery, i), sheet = gallery.decoded?.[place.index];
      if (!sheet) continue;
      const left = x(i) - PICTURE / 2, top = y(i) - PICTURE / 2;
      pen.fillStyle = color(i);
      pen.fillRect(left, top, PICTURE, PICTURE);
      pen.drawImage(sheet, place.x, place.y, side, side, left + 2, top + 2, PICTURE - 4, PICTURE - 4);
    }
  }
}

function intro() {
  return el("header", {},
    el("h1", {}, "What keeps SimSiam from collapsing?"),
    el("p", {}, "SimSiam learns without labels. It makes two ", term("view", "views"),
      " of an image, changed at random, and trains an ", term("encoder"),
      " to give both nearly the same output z. There is a cheap way to do that: give all images ",
      "the same output, or outputs on one line. That is ", term("collapse"),
      ": z then says little or nothing about the image."),
    el("p", {}, "A view goes through the backbone, which computes the ", term("feature", "features"),
      " h; the ", term("projector"), " turns h into z. From the z of one view the predictor ",
      "predicts the z of the other."),
    el("p", {}, `This page holds ${data.num_runs} recorded trainings of a small network: `,
      `${data.runs.length} combinations, some with a second seed. Choose a switch, `,
      "predict what it will do, turn it, and compare. The numbers are those of these ",
      "trainings: other images, a larger network or longer training can behave in another way."));
}

function about() {
  return section("about", "How this was made", "",
    data.facts.map((text) => el("p", {}, text)),
    el("p", {}, term("knn", "kNN"), " accuracy asks whether images with similar features have ",
      "the same class; ", term("linear-evaluation", "linear evaluation"),
      " is another way to ask. The effective rank of h is called ",
      term("representation-rank", "representation rank"), "."));
}

const switchPage = new SwitchPage();
showPage(intro(), switchPage.sections,
  `Written by ${data.command}. This page is self-contained: it makes no network requests.`);
