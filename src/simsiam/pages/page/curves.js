// Curves by epoch, each chart an SVG; all charts follow the pointer together.

const CHARTS = [
  {
    title: "Loss", word: "Loss", series: [["loss", "loss"]],
    note: "falls while the views of an image come closer; alone it does not show collapse",
  },
  {
    title: "Standard deviation of z, × √d", word: "std", series: [["z_std_sqrt_d", "z"]],
    from: 0, mark: 1,
    note: "1: evenly spread, 0: collapsed",
  },
  {
    title: "Effective rank", word: "Rank", series: [["h_rank", "h"], ["z_rank", "z"]], from: 0,
    note: "directions in use: higher is better, near 1 is collapsed",
  },
  {
    title: "kNN accuracy, %", word: "kNN", series: [["knn_top1", "h"], ["knn_top1_z", "z"]],
    note: "of held-out images by their nearest neighbors: higher is better",
  },
  {
    title: "Learning rate", word: "Learning rate",
    series: [["lr", "encoder"], ["lr_predictor", "predictor"]], from: 0,
    note: "the size of the steps, as the recipe plans it",
  },
  {
    title: "View retrieval, %", word: "View retrieval", series: [["view_retrieval", "h"]], from: 0,
    note: "how often the other view of an image is the nearest: higher is better",
  },
];
// Lengths in units of the SVG.
const CHART = { width: 360, height: 190, left: 40, right: 8, top: 8, bottom: 22 };
const MAX_POINTS_WITH_DOTS = 40; // shorter curves show their points

function curves() {
  const charts = CHARTS.map(buildChart).filter(Boolean);
  if (!charts.length) return null;
  const showAll = (epoch) => charts.forEach((chart) => chart.show(epoch));
  for (const { plot, epochAt } of charts) {
    plot.addEventListener("pointermove", (event) => showAll(epochAt(event)));
    plot.addEventListener("pointerleave", () => showAll(null));
  }
  const cards = charts.map((chart) => chart.card);
  return section("curves", "Curves", ["by ", wordLink("Epoch", "epoch")],
    el("div", { class: "charts" }, cards));
}

/** The lines of a chart that have points: a line for each run and each series. */
function chartLines(series) {
  return data.runs.flatMap((run) => series.map(([key, seriesName], place) => {
    const points = (run.curves[key] ?? []).map((y, i) => [run.curves.epoch?.[i], y])
      .filter(([x, y]) => isPresent(x) && isPresent(y));
    const runName = series.length > 1 ? `${run.name} ${seriesName}` : run.name;
    const color = several || place === 0 ? run.color : "var(--pale)";
    return { name: several ? runName : seriesName, points, second: several && place > 0, color };
  })).filter((line) => line.points.length);
}

/** The range of the values of a chart, with some space above them. */
function valueRange(ys, mark, from) {
  ys = ys.concat(mark ?? [], from ?? []);
  const low = ys.reduce((a, b) => Math.min(a, b)), high = ys.reduce((a, b) => Math.max(a, b));
  if (high - low >= 1e-9) return [low, high + (high - low) * 0.05];
  return from === 0 && low >= 0 ? [0, high * 1.1 || 1] : [low - 0.5, high + 0.5];
}

/** Round numbers between low and high, about `count` of them. */
function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((s) => s * power >= raw) * power;
  const values = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) {
    values.push(Number((k * step).toPrecision(12)));
  }
  return values;
}

function buildChart(spec) {
  const lines = chartLines(spec.series);
  if (!lines.length) return null;
  const epochs = data.runs.flatMap((run) => run.curves.epoch ?? []);
  const last = epochs.reduce((a, b) => Math.max(a, b ?? 0), 0) || 1;
  const axis = {
    last,
    ticks: ticks(0, last, 5).map((x) => [x, formatNumber(x, 3)]),
    describe: (epoch) => `epoch ${epoch.toFixed(1)}`,
  };
  const ys = lines.flatMap((line) => line.points.map(([, y]) => y));
  return drawChart(spec, lines, axis, valueRange(ys, spec.mark, spec.from));
}

/**
 * A chart of lines: {name, points, color, second}. The horizontal axis goes from 0 to `last`, has
 * `ticks` (pairs of place and text), and `describe(x)` says what a place on it is.
 */
function drawChart({ title, word, mark, note }, lines, axis, [low, high]) {
  const { last, ticks: places, describe } = axis;
  const { width, height, left, right, top, bottom } = CHART;
  const px = (x) => left + (x / last) * (width - left - right);
  const py = (y) => top + ((high - y) / (high - low)) * (height - top - bottom);
  const across = (y) => ({ x1: left, x2: width - right, y1: py(y), y2: py(y) });
  const cross = svg("line", { class: "cross hidden", y1: top, y2: height - bottom });
  const plot = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title },
    ticks(low, high, 4).map((y) => [
      svg("line", { class: "grid", ...across(y) }),
      svg("text", { x: left - 7, y: py(y) + 3.5, "text-anchor": "end" }, formatNumber(y, 3)),
    ]),
    places.map(([x, text]) =>
      svg("text", { x: px(x), y: height - 5, "text-anchor": "middle" }, text)),
    mark === undefined ? null : svg("line", { class: "mark", ...across(mark) }),
    lines.map((line) => drawCurve(line, px, py)),
    cross,
    lines.map((line) => {
      line.dot = svg("circle", { class: "hidden", r: 3.5, style: { fill: line.color } });
      return line.dot;
    }));
  const when = el("small");
  /** Show the values at an epoch, or the last values where it is null. */
  const show = (epoch) => {
    const hidden = epoch === null;
    cross.classList.toggle("hidden", hidden);
    for (const line of lines) {
      const [x, y] = hidden ? line.points.at(-1) : nearestPoint(line.points, epoch);
      line.value.textContent = formatNumber(y);
      line.dot.classList.toggle("hidden", hidden);
      line.dot.setAttribute("cx", px(x));
      line.dot.setAttribute("cy", py(y));
    }
    if (!hidden) for (const end of ["x1", "x2"]) cross.setAttribute(end, px(epoch));
    when.textContent = hidden ? "" : describe(epoch);
  };
  const epochAt = (event) => {
    const box = plot.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * width;
    return Math.min(Math.max((x - left) / (width - left - right), 0), 1) * last;
  };
  const card = el("figure", { class: "card chart stack", style: { margin: 0 } },
    el("div", { class: "head" }, el("h3", {}, word ? wordLink(word, title) : title), when),
    plot, chartLegend(lines, note));
  show(null);
  return { show, plot, epochAt, card };
}

function drawCurve({ points, color, second }, px, py) {
  const path = points.map(([x, y]) => `${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join("L");
  const dots = points.length > MAX_POINTS_WITH_DOTS ? [] : points;
  return [
    svg("path",
      { class: `curve${second ? " second" : ""}`, style: { stroke: color }, d: `M${path}` }),
    dots.map(([x, y]) => svg("circle", { cx: px(x), cy: py(y), r: 2.2, style: { fill: color } })),
  ];
}

function chartLegend(lines, note) {
  return el("div", { class: "legend" }, lines.map((line) => {
    line.value = el("b", {});
    const sample = el("i", { class: line.second ? "second" : "", style: { color: line.color } });
    return el("span", {}, sample, line.name, line.value);
  }), note);
}

/** The point whose x is nearest, by bisection; the points are in order of x. */
function nearestPoint(points, x) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= x) low = middle; else high = middle;
  }
  return x - points[low][0] < points[high][0] - x ? points[low] : points[high];
}
