// The verdict, the accuracies, the detectors, the recipe and the environment.

// --- verdict -------------------------------------------------------------------------------------

const BAD_VERDICTS = ["collapsed", "partial collapse", "diverged", "not converging"];

function header() {
  const sources = new Set(data.runs.map(
    ({ recipe, embedding }) => formatValue(recipe ? recipe.source : embedding.source || "images")));
  const methods = new Set(data.runs.map(({ recipe }) => (
    recipe ? `${recipe.method.name}, ${recipe.backbone}` : "features")));
  const kind = data.runs.every((run) => run.recipe) ? "runs" : "runs and embeddings";
  const title = several ? `Comparison of ${data.runs.length} ${kind}` : data.runs[0].name;
  return el("div", {},
    el("header", {},
      el("h1", {}, title),
      el("p", { class: "pale" }, `${[...methods].join(" · ")} on ${[...sources].join(" · ")}`)),
    el("div", { class: "verdicts" }, data.runs.map(verdictCard)));
}

function verdictCard(run) {
  const { summary, embedding } = run;
  const verdict = embedding ? "embedding" : summary.verdict ?? "unfinished";
  const tone = verdict === "healthy" ? "good" : BAD_VERDICTS.includes(verdict) ? "bad" : "";
  const name = several
    ? el("div", { class: "row" }, swatch(run.color), el("h3", {}, run.name)) : null;
  const figures = el("dl", { class: "figures" }, keyFigures(run).map(([label, value]) =>
    el("div", {}, el("dt", {}, label), el("dd", {}, formatNumber(value)))));
  return el("article", { class: "card stack", id: several ? null : "verdict" },
    name,
    el("div", { class: `verdict ${tone}` }, verdict),
    embedding ? null
      : el("p", {}, summary.remedy ?? "The run is not finished: simsiam resume continues it."),
    summary.advice ? el("p", { class: "pale" }, summary.advice) : null,
    figures,
    run.missing ? el("p", { class: "pale" }, run.missing) : null,
    run.unreadable.count ? unreadableFiles(run.unreadable) : null);
}

function keyFigures({ summary, curves, embedding }) {
  const knn = summary.knn_top1;
  if (summary.steps === 0) return [];
  return [
    ["images", embedding?.images],
    ["numbers in a feature", embedding?.dim],
    [wordLink("kNN", "last kNN accuracy, %"), knn && formatPercent(knn.last)],
    ["best kNN accuracy, %", knn && formatPercent(knn.best)],
    ["epochs", summary.epochs ?? curves.epoch?.at(-1)],
    ["steps", summary.steps ?? curves.step?.at(-1)],
    ["training time", summary.training_seconds && formatDuration(summary.training_seconds)],
    ["images per second", summary.images_per_second && Math.round(summary.images_per_second)],
  ].filter(([, value]) => isPresent(value));
}

function unreadableFiles({ count, first }) {
  return el("details", {},
    el("summary", {}, `${formatNumber(count)} unreadable files were left out`),
    el("div", { class: "stack" }, first.map((line) => el("small", {}, line))));
}

// --- accuracies ----------------------------------------------------------------------------------

const PROTOCOLS = {
  knn: "Nearest neighbors", linear: "Linear classifier", few_label: "Few labels",
  finetune: "Fine-tuning", label_free: "Without labels",
};
const SIGNALS = [
  ["view_retrieval", "view retrieval, %"], ["rankme", "effective rank"],
  ["spectrum_auc", "area under the spectrum"], ["alignment", "alignment"],
  ["uniformity", "uniformity"],
];
const BASELINES = ["raw pixels", "untrained network", "from scratch"];

const isBaseline = (record) => BASELINES.includes(record.features);

function results() {
  const records = data.runs.flatMap((run) => run.results.map((record) => ({ ...record, run })));
  if (!records.length) return null;
  const groups = new Map();
  for (const record of records) {
    const { protocol, source, train, test, checkpoint } = record;
    const key = [protocol, source, train, test, checkpoint].join("\0");
    groups.set(key, [...(groups.get(key) ?? []), record]);
  }
  const note = "top-1 accuracy in percent; in small print the 95 % interval, "
    + "or ± the standard deviation over draws of the labels";
  return section("results", "Results", note, [...groups.values()].map(resultCard));
}

/** One protocol on one data set. */
function resultCard(group) {
  const [{ protocol }] = group;
  const table = group.some((r) => "top1" in r) ? accuracyTable(group) : signalTable(group);
  return el("div", { class: "card stack" },
    el("div", { class: "head" },
      el("h3", {}, PROTOCOLS[protocol] ?? protocol), el("small", {}, dataSets(group))),
    el("div", { class: "scroll" }, table),
    conditions(group));
}

/** Which images were used: "photos · trained on train (900), tested on val (100) · ...". */
function dataSets(group) {
  const { source, train, test, checkpoint, train_images: trainImages, n } = group[0];
  const sized = (name, size) => `${name}${size ? ` (${formatNumber(size)})` : ""}`;
  const training = train && "top1" in group[0] ? `trained on ${sized(train, trainImages)}, ` : "";
  const steps = [...new Set(group.map((r) => r.step).filter((step) => step !== undefined))];
  const step = steps.length === 1 ? `, step ${formatNumber(steps[0])}` : "";
  const parts = [
    source, `${training}tested on ${sized(test ?? "?", n)}`,
    `${checkpoint ?? "last"} checkpoint${step}`,
  ];
  return parts.filter(Boolean).join(" · ");
}

/** A row for each setting; the columns are kinds of features, or runs if there are several. */
function accuracyTable(group) {
  const rowOf = (r) => (several ? `${r.name}\0${r.features}` : r.name);
  const columnOf = (r) => (several ? r.run : r.features);
  const rows = [...new Set(group.map(rowOf))];
  const columns = several ? data.runs : [...new Set(group.map(columnOf))];
  const title = (c) => (several ? el("span", {}, swatch(c.color), ` ${c.name}`) : c);
  const row = (key) => {
    const records = group.filter((r) => rowOf(r) === key);
    return el("tr", { class: several && isBaseline(records[0]) ? "pale" : null },
      el("td", {}, records[0].name),
      several ? el("td", {}, records[0].features) : null,
      el("td", { class: "wide" }, accuracyTrack(records)),
      columns.map((c) => accuracyCell(records.find((r) => columnOf(r) === c))));
  };
  return el("table",
    { class: "accuracies", style: { minWidth: `${5 + 4.3 * columns.length}rem` } },
    el("tr", {},
      headings(several ? ["setting", "features"] : ["setting"]),
      el("th", { class: "wide" }, "0 to 100 %"),
      headings(columns.map(title), true)),
    rows.map(row));
}

function accuracyCell(record) {
  if (!record) return el("td", { class: "number pale" }, "–");
  const { interval, top1, top5 } = record;
  const spread = interval
    ? interval.map(formatPercent).join("–") : `± ${formatPercent(record.top1_std)}`;
  const second = isPresent(top5)
    ? el("span", { class: "wide" }, ` · top-5 ${formatPercent(top5)}`) : null;
  const value = formatPercent(top1);
  return el("td", { class: "number" },
    isBaseline(record) ? value : el("b", {}, value), el("small", {}, spread, second));
}

/** The accuracies of a row as points on a line, each with its interval. */
function accuracyTrack(records) {
  return el("div", { class: "track" }, records.map((r) => {
    const color = isBaseline(r) ? "var(--pale)" : several ? r.run.color : "var(--accent)";
    const std = r.top1_std ?? 0;
    const [low, high] = r.interval ?? [r.top1 - std, r.top1 + std];
    const title = `${r.features}: ${formatPercent(r.top1)} %`;
    const style = { color, left: `${r.top1}%` };
    return [
      el("em", { style: { color, left: `${low}%`, width: `${high - low}%` } }),
      el("span", { class: isBaseline(r) ? "" : "main", style, title }),
    ];
  }));
}

function signalTable(group) {
  const title = (r) => (several ? `${r.run.name}, ${r.name}` : r.name);
  const known = SIGNALS.filter(([key]) => group.some((r) => key in r));
  return el("table", {},
    el("tr", {}, headings(["signal"]), headings(group.map(title), true)),
    known.map(([key, name]) => el("tr", {},
      el("td", {}, name),
      group.map((r) => el("td", { class: "number" }, formatNumber(r[key]))))));
}

function conditions(group) {
  const settings = group.map((r) => {
    const chosen = r.chosen && Object.keys(r.chosen).length && !isBaseline(r)
      ? `; chosen: ${formatValue(r.chosen)}` : "";
    return `${r.name}: ${formatValue(r.parameters ?? {})}${chosen}`;
  });
  const measurements = group.map(
    (r) => `measured ${formatTime(r.measured)}, ${formatValue(r.environment ?? {})}`);
  const lines = [...new Set(settings), ...new Set(measurements)];
  return el("details", {},
    el("summary", {}, "Settings and environment"),
    el("div", { class: "stack" }, lines.map((line) => el("small", {}, line))));
}

// --- features at the start and at the end --------------------------------------------------------

function features() {
  const runs = data.runs.filter((run) => run.features?.length);
  if (!runs.length) return null;
  const note = "the trained network beside what it was and simpler features, on the same images; "
    + "95 % intervals";
  return section("features", "What training brought", note, runs.map((run) => {
    const [titles, ...rows] = run.features;
    return el("div", { class: "card scroll" },
      several ? el("h3", {}, swatch(run.color), ` ${run.name}`) : null,
      el("table", {},
        el("tr", {}, headings(titles)),
        rows.map((row) => el("tr", { class: row[0].startsWith("end") ? null : "pale" },
          row.map((text) => el("td", {}, text))))));
  }));
}

// --- encoders that were compared -----------------------------------------------------------------

function candidates() {
  const runs = data.runs.filter((run) => run.candidates?.length);
  if (!runs.length) return null;
  const note = "measured on images that nothing was fitted on; "
    + "an encoder is taken if its score is higher than the best before by more than noise; "
    + "patches are put beside a network that was trained on views by rule, whatever the score";
  return section("candidates", "Encoders compared", note, runs.map((run) => {
    const withLabels = run.candidates.some((row) => isPresent(row.knn_top1));
    const numbers = (row) => [
      formatNumber(row.score, 3), formatPercent(row.view_retrieval),
      ...(withLabels ? [formatPercent(row.knn_top1)] : []),
      isPresent(row.gain) ? `${formatNumber(row.gain, 2)} ± ${formatNumber(row.error, 2)}` : "",
    ];
    const titles = [
      wordLink("Label-free score", "score"), wordLink("View retrieval", "views found, %"),
      ...(withLabels ? [wordLink("kNN", "kNN, %")] : []), "gain ± error",
    ];
    return el("div", { class: "card scroll" },
      several ? el("h3", {}, swatch(run.color), ` ${run.name}`) : null,
      el("table", {},
        el("tr", {}, headings(["encoder"]), headings(titles, true), headings(["taken"])),
        run.candidates.map((row) => el("tr", { class: row.taken ? null : "pale" },
          el("td", {}, row.candidate),
          numbers(row).map((text) => el("td", { class: "number" }, text)),
          el("td", {}, row.by_rule ? "by rule" : row.taken ? "yes" : "no")))));
  }));
}

// --- detectors -----------------------------------------------------------------------------------

const METRICS = { voc_box: "boxes, VOC", coco_box: "boxes, COCO", coco_mask: "masks, COCO" };
const PRECISIONS = ["AP50", "AP", "AP75"];

function transfers() {
  const records = data.runs.flatMap((run) => run.transfers.map((record) => ({ ...record, run })));
  if (!records.length) return null;
  const columns = ["detector", "initialized from", "lr", "tested on", "metric"];
  const row = (r, metric, values) => {
    const tested = `${r.source}, ${r.test} (${formatNumber(r.n)})`;
    const cells = [
      r.protocol, r.init?.from, formatNumber(r.chosen?.lr), tested, METRICS[metric] ?? metric];
    return el("tr", { class: metric === r.tested_by ? null : "pale" },
      several ? el("td", {}, swatch(r.run.color), ` ${r.run.name}`) : null,
      cells.map((cell) => el("td", {}, cell)),
      PRECISIONS.map((key) => el("td", { class: "number" }, formatPercent(values[key]))));
  };
  const picture = (r) => el("details", { class: "card", open: !several },
    el("summary", {}, `${r.source}, ${r.protocol}, initialized from ${r.init?.from}`),
    el("img", {
      src: r.shown, alt: "top: annotated objects, bottom: detected objects",
      style: { width: "100%" },
    }));
  return section("transfers", "Detection and segmentation",
    "average precision of the fine-tuned backbone, percent",
    el("div", { class: "card scroll" }, el("table", {},
      el("tr", {}, headings(several ? ["run", ...columns] : columns), headings(PRECISIONS, true)),
      records.flatMap((r) => Object.entries(r.metrics ?? {}).map(([metric, values]) =>
        row(r, metric, values))))),
    records.filter((r) => r.shown).map(picture));
}

// --- recipe and environment ----------------------------------------------------------------------

/** A recipe as settings by name: {"image_size": 32, "flip, view 1": 0.5, ...}. */
function flattenRecipe({ method, ...settings }) {
  const { name, views = [], ...methodSettings } = method;
  const viewName = (key, i) => (views.length > 1 ? `${key}, view ${i + 1}` : key);
  const viewSettings = views.flatMap((view, i) =>
    Object.entries(view).map(([key, value]) => [viewName(key, i), value]));
  return { method: name, ...settings, ...methodSettings, ...Object.fromEntries(viewSettings) };
}

function flattenEnvironment({ versions = {}, ...settings }) {
  return { ...settings, ...versions, command: formatValue(settings.command) };
}

function recipe() {
  const runs = data.runs.filter((run) => run.recipe);
  if (!runs.length) return null;
  const note = runs.length > 1 ? "differences are highlighted" : "all settings of the run";
  return section("recipe", "Recipe and environment", note,
    settingsCard("Recipe", runs, runs.map((run) => flattenRecipe(run.recipe))),
    settingsCard("Environment", runs, runs.map((run) => flattenEnvironment(run.environment))));
}

/** The settings of one run as a list; of several runs as a table, those that differ first. */
function settingsCard(title, runs, columns) {
  const names = [...new Set(columns.flatMap(Object.keys))];
  const rows = names.map((name) => {
    const cells = columns.map((column) => formatValue(column[name]));
    return { name, cells, differs: new Set(cells).size > 1 };
  });
  if (runs.length === 1) {
    const fact = ({ name, cells }) => el("div", {}, el("dt", {}, name), el("dd", {}, cells[0]));
    return el("div", { class: "card stack" },
      el("h3", {}, title), el("dl", { class: "facts" }, rows.map(fact)));
  }
  const different = rows.filter((row) => row.differs), equal = rows.filter((row) => !row.differs);
  return el("div", { class: "card stack" },
    el("h3", {}, title),
    different.length ? settingsTable(runs, different)
      : el("p", { class: "pale" }, "No differences."),
    el("details", {},
      el("summary", {}, `${equal.length} equal settings`), settingsTable(runs, equal)));
}

function settingsTable(runs, rows) {
  const titles = runs.map((run) => el("th", {}, swatch(run.color), ` ${run.name}`));
  return el("div", { class: "scroll" }, el("table", { class: "settings" },
    el("tr", {}, el("th", {}, ""), titles),
    rows.map(({ name, cells, differs }) => el("tr", { class: differs ? "differs" : null },
      el("td", {}, name), cells.map((cell) => el("td", {}, cell))))));
}
