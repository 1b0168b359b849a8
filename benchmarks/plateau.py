"""Ask what SimSiam's features hold while it trains on `shapes`, and make the page results/plateau.

    python benchmarks/plateau.py [--source SOURCE] [--steps N] [--seeds N] [--cells NAME ...]
        [--runs FOLDER] [--out FOLDER] [--page]

Cells are SimSiam, SimCLR, SimSiam with one setting changed, and SimSiam that begins with the
backbone of another cell after a quarter of the steps. Each is trained with every seed, and measured
at each quarter of the steps: the spectrum of z, the gain of the predictor along the principal
directions of z, and how well h and z hold the factors of the drawing, by linear probes (ridge
regression; R², for the kind accuracy) and by the 20 nearest neighbors. Probes are fitted on
training images and read on test images. SOURCE may be another set of labeled images, which is
trained with the settings of `shapes`; the kind is its label. Each cell and seed is a file in
OUT/cells; what is there is not measured again, so the command can be stopped and started at any
time. `--page` writes only the page and its figures.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from cells import argument_parser, measure_once, train_or_resume, write_page
from torch import Tensor

from simsiam.config.recipes import ResolvedRecipe, shapes_recipe
from simsiam.data.batches import make_training_views
from simsiam.data.images import Images, sample
from simsiam.evaluation.finetune import line_styles
from simsiam.laboratory.drawing import format_axes, new_figure, save_figure
from simsiam.laboratory.scales import TINY
from simsiam.model.precision import Compute
from simsiam.model.siamese import Siamese
from simsiam.monitoring.features import extract_features
from simsiam.monitoring.gauges import effective_rank
from simsiam.monitoring.label_free_monitor import MONITOR_STEP
from simsiam.runs.encoder import eval_transform
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import open_source
from simsiam.sources.shapes import draw_factors
from simsiam.training.prepare import build_training_setup

BASE = {"weight_decay": 1e-4}  # section 3; the recipe has more
SIMCLR = {"method": "simclr", **TINY.method_overrides["simclr"]}
OUT = Path(__file__).parents[1] / "results" / "plateau"
CELLS: dict[str, dict[str, object]] = {
    "simsiam": {},
    "simclr": SIMCLR,
    "after a quarter of simclr": {},
    "after a quarter of simsiam": {},
    "4 x as long": {},
    "cut-init 3": {"cut_init": 3.0},
    "predictor lr x 10": {"predictor_lr_scale": 10.0},
    "predictor direct": {"predictor": "direct"},
    "IsoLoss": {"predictor": "direct", "iso_loss": True},
    "no weight decay": {"weight_decay": 0.0},
    "weight decay 5e-4": {"weight_decay": 5e-4},
    "predictor without decay": {"predictor_weight_decay": 0.0},
    "predictor decay 5e-4": {"predictor_weight_decay": 5e-4},
    "decay 5e-4, predictor 1e-4": {"weight_decay": 5e-4, "predictor_weight_decay": 1e-4},
    "decay 5e-4, not of norms": {"weight_decay": 5e-4, "exclude": "bias_and_norm"},
    "lr x 2": {"base_lr": 1.4},
    "constant_decay": {"lr_schedule": "constant_decay"},
    "crops from 0.7": {"crop_min": 0.7},
    "crops from 0.2": {"crop_min": 0.2},
    "jitter 0.8": {"jitter": (0.8, 0.8, 0.0, 0.0)},
    "no jitter": {"jitter_p": 0.0},
    "simclr jitter 0.8": SIMCLR | {"jitter": (0.8, 0.8, 0.0, 0.0)},
    "4 views": {"num_views": 4},
    "4 small crops": {"small_crops": 4, "small_crop_scale": (0.1, 0.3)},
    "batch 512": {"batch_size": 512, "base_lr": 0.175},
    "batch 32": {"batch_size": 32, "base_lr": 2.8},
    "momentum target 0.5": {"target": "momentum", "target_decay": 0.5},
    "no output batch norm": {"head_bn": ("proj_hidden", "pred_hidden")},
}
# The cell whose backbone, after a quarter of the steps, is where this cell begins.
BEGINS_AFTER = {"after a quarter of simclr": "simclr", "after a quarter of simsiam": "simsiam"}
LENGTHS = {"4 x as long": 4}  # times as many steps as the others
FACTORS = ("kind", "number", "size", "brightness", "x", "y")
DIRECTIONS = 32  # principal directions of z that are followed
NEIGHBORS = 20
PROBE_IMAGES = 2000  # of each split


def train(source: str, cell: str, seed: int, steps: int, every: int, runs: Path) -> list[Run]:
    """Train a cell to its end, with a checkpoint about every so many steps.

    Returns:
        Its run, after the run whose backbone it begins with, if there is one.
    """
    steps *= LENGTHS.get(cell, 1)
    path = runs / f"{Path(source).name}, {cell}, {steps} steps, seed {seed}"
    settings = BASE | CELLS[cell] | {"steps": steps, "seed": seed, "knn_every": 10**6}
    before = list[Run]()
    if cell in BEGINS_AFTER:
        before = train(source, BEGINS_AFTER[cell], seed, steps // 4, every, runs)
        settings |= {"init": str(before[0].path), "steps": steps - steps // 4}
    batch_size = int(str(settings.get("batch_size", shapes_recipe()["batch_size"])))
    per_epoch = max(1, len(open_source(source).train) // batch_size)
    settings |= {"save_every": max(1, every // per_epoch)}
    return [*before, train_or_resume(source, path, recipe="shapes", **settings)]


def probe_targets(source: str, split: str, images: Images) -> dict[str, np.ndarray]:
    """Return the classes of some images of a split as the kind; on `shapes` also the factors."""
    assert images.labels is not None
    if source != "shapes":
        return {"kind": images.labels}
    index = np.array([int(key.split("#")[1]) for key in images.keys])
    factors = {name: values[index] for name, values in draw_factors(split).items()}
    return {"kind": images.labels} | factors


def hold(
    fit: np.ndarray, test: np.ndarray, wanted: dict[str, np.ndarray], truth: dict[str, np.ndarray]
) -> dict[str, float]:
    """Measure how well features hold each factor, by a linear probe and by neighbors.

    Args:
        fit: (N, d) features of the training images.
        test: (M, d) features of the test images.
        wanted: The factors of the training images.
        truth: The factors of the test images.

    Returns:
        "NAME linear" and "NAME knn" in percent: R², at least 0; of the kind the accuracy.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.neighbors import NearestNeighbors
    from sklearn.preprocessing import StandardScaler, normalize

    scaler = StandardScaler().fit(fit)
    x, y = scaler.transform(fit), scaler.transform(test)
    unit, unit_test = normalize(fit - fit.mean(0)), normalize(test - fit.mean(0))
    near = NearestNeighbors(n_neighbors=min(NEIGHBORS, len(fit))).fit(unit)
    neighbors = near.kneighbors(unit_test, return_distance=False)
    classes = int(wanted["kind"].max()) + 1
    names = [name for name in wanted if name != "kind"]
    columns = np.column_stack([np.eye(classes)[wanted["kind"]], *(wanted[name] for name in names)])
    ridge = RidgeCV(alphas=np.logspace(-1, 5, 7), alpha_per_target=True).fit(x, columns)
    result = dict[str, float]()
    for probe, guess in (("linear", ridge.predict(y)), ("knn", columns[neighbors].mean(axis=1))):
        right = guess[:, :classes].argmax(1) == truth["kind"]
        result[f"kind {probe}"] = round(100 * float(right.mean()), 2)
        for name, column in zip(names, guess[:, classes:].T):
            error = np.square(column - truth[name]).mean() / truth[name].var()
            result[f"{name} {probe}"] = round(100 * max(0.0, 1 - float(error)), 2)
    return result


def spectra(z: Tensor, p: Tensor, other: Tensor) -> dict[str, list[float]]:
    """Describe z by its principal directions, and the predictor by what it makes of each.

    Args:
        z: (N, d) projections of one view.
        p: (N, d) predictions of it.
        other: (N, d) projections of another view of the same images.

    Returns:
        For each direction `share` of the variance of z; `gain`, the component of the predictor's
        linear map along the direction (by least squares); `alignment`, the cosine of the direction
        with what the map makes of it; `agreement`, the correlation of the two views.
    """
    mean = z.mean(0)
    z, p, other = z - mean, p - p.mean(0), other - mean
    _, values, directions = torch.linalg.svd(z, full_matrices=False)
    v = directions[:DIRECTIONS]
    scores, others = z @ v.T, other @ v.T
    mapped = scores.T @ p / scores.square().sum(0)[:, None].clamp_min(1e-20)  # (k, d)
    gain = (mapped * v).sum(1)
    agreement = (scores * others).sum(0) / (scores.norm(dim=0) * others.norm(dim=0)).clamp_min(
        1e-20
    )
    rows = {
        "share": values[:DIRECTIONS].square() / values.square().sum().clamp_min(1e-20),
        "gain": gain,
        "alignment": gain / mapped.norm(dim=1).clamp_min(1e-20),
        "agreement": agreement,
    }
    return {name: [round(x, 5) for x in row.tolist()] for name, row in rows.items()}


def measure(
    model: Siamese, recipe: ResolvedRecipe, source: str, fit: Images, test: Images
) -> dict[str, object]:
    """Measure a network: ranks, spectra, and what h and z hold."""
    compute = Compute.pick("cpu", "float32")

    def h_and_z(x: Tensor) -> tuple[Tensor, Tensor]:
        h = model.backbone(x)
        return h, model.projector(h)

    transform = eval_transform(recipe)
    compute.place(model).eval()
    found = [
        extract_features(model, images, transform, compute=compute, forward=h_and_z)
        for images in (fit, test)
    ]
    with torch.no_grad():
        views = make_training_views(
            test, np.arange(min(len(test), 1000)), recipe, MONITOR_STEP, compute.device
        )
        z = [model.projector(model.backbone(x)).float() for x in views]
        p = model.predictor(z[0]).float()
    wanted = probe_targets(source, "train", fit)
    truth = probe_targets(source, "test", test)
    result: dict[str, object] = {"spectra": spectra(z[0], p, z[1])}
    for i, name in enumerate(("h", "z")):
        rows = [features.matrices[i] for features in found]
        result[name] = hold(rows[0].numpy(), rows[1].numpy(), wanted, truth)
        result[f"{name}_rank"] = round(effective_rank(rows[1]).item(), 3)
    return result


def measure_runs(runs: Sequence[Run], source: str) -> list[dict[str, object]]:
    """Measure the untrained network and each checkpoint of runs that follow one another."""
    opened = open_source(source)
    assert opened.test is not None
    fit, test = sample(opened.train, PROBE_IMAGES), sample(opened.test, PROBE_IMAGES)
    rows, begin = list[dict[str, Any]](), 0
    for run in runs:
        recipe = run.recipe
        model = build_training_setup(recipe).model
        if not rows:
            rows.append({"step": 0} | measure(model, recipe, source, fit, test))
        files = sorted((run.path / "checkpoints").glob("epoch-*.pt"))
        for name in [*(file.stem for file in files), "last"]:
            state = run.checkpoint(name)
            assert state is not None
            if (step := begin + state["step"]) > rows[-1]["step"]:
                model.load_state_dict(state["model"])
                rows.append({"step": step} | measure(model, recipe, source, fit, test))
        begin = rows[-1]["step"]
    return rows


def measure_cell(options: argparse.Namespace, cell: str, seed: int) -> dict[str, object]:
    """Train a cell with a seed, and measure it."""
    runs = train(options.source, cell, seed, options.steps, options.steps // 4, options.runs)
    return {
        "source": Path(options.source).name,
        "cell": cell,
        "seed": seed,
        "points": measure_runs(runs, options.source),
        "settings": CELLS[cell],
    }


Cells = dict[str, dict[int, dict[str, Any]]]  # what was measured, by cell and seed


def read_cells(folder: Path) -> dict[str, Cells]:
    """Read what was measured, by source; `shapes` comes first."""
    found: dict[str, Cells] = {"shapes": {}}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        cells = found.setdefault(content.get("source", "shapes"), {})
        cells.setdefault(content["cell"], {})[content["seed"]] = content
    return {source: {c: cells[c] for c in CELLS if c in cells} for source, cells in found.items()}


def mean_and_spread(values: Sequence[float]) -> str:
    """Format the mean with its 95 % interval (Student's t), or one value alone."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return f"{fmean(values):.1f} ± {half:.1f}"


def draw_factors_figure(cells: Cells, path: Path) -> None:
    """Draw what h and z hold of each factor over training, for SimSiam and SimCLR side by side."""
    figure = new_figure(14, 6.5)
    panels = figure.subplots(2, len(FACTORS), sharex=True, sharey=True)
    for row, letter in zip(panels, ("h", "z")):
        for axes, factor in zip(row, FACTORS):
            for cell, (color, dash) in zip(("simsiam", "simclr"), line_styles()):
                for i, content in enumerate(cells.get(cell, {}).values()):
                    x = [point["step"] for point in content["points"]]
                    y = [point[letter][f"{factor} linear"] for point in content["points"]]
                    label = cell if factor == "kind" and not i else None
                    axes.plot(x, y, color=color, linestyle=dash, label=label, linewidth=1.2)
            unit = "accuracy" if factor == "kind" else "R²"
            axes.set_title(f"{factor} in {letter}: {unit} (%)", fontsize=9)
            format_axes(axes, "step" if letter == "z" else "", "")
    save_figure(figure, path)


def draw_spectra_figure(cells: Cells, path: Path) -> None:
    """Draw shares, gains, alignment and agreement of the directions of z at the last step.

    SimCLR has no predictor, so the panels of the predictor leave it out.
    """
    drawn = ("simsiam", "simclr", "after a quarter of simclr")
    figure = new_figure(14, 3.6)
    quantities = {
        "share": "share of the variance of z", "gain": "gain of the predictor",
        "alignment": "cosine with the direction", "agreement": "correlation of two views",
    }  # fmt: skip
    for axes, (name, label) in zip(figure.subplots(1, 4), quantities.items()):
        for cell, (color, dash) in zip(drawn, line_styles()):
            if cell == "simclr" and name in ("gain", "alignment"):
                continue
            for i, content in enumerate(cells.get(cell, {}).values()):
                y = content["points"][-1]["spectra"][name]
                note = cell if name == "share" and not i else None
                axes.plot(
                    range(1, len(y) + 1), y, color=color, linestyle=dash, label=note, linewidth=1.2
                )
        if name == "share":
            axes.set_yscale("log")
        format_axes(axes, "principal direction of z", label)
    save_figure(figure, path)


def draw_kinds_figure(cells: Cells, path: Path) -> None:
    """Draw kNN of the kind on h over training: means over seeds, of cells with several."""
    figure = new_figure(8, 5)
    axes = figure.subplots()
    drawn = [item for item in cells.items() if len(item[1]) > 1]
    for (cell, seeds), (color, dash) in zip(drawn, line_styles()):
        curves = [
            {point["step"]: point["h"]["kind knn"] for point in content["points"]}
            for content in seeds.values()
        ]
        steps = sorted(set.intersection(*map(set, curves)))
        means = [fmean(curve[step] for curve in curves) for step in steps]
        axes.plot(steps, means, color=color, linestyle=dash, label=f"{cell} (n = {len(curves)})")
    format_axes(axes, "step", "kNN of the kind on h (%)")
    save_figure(figure, path)


def agreeing(point: dict[str, Any]) -> int:
    """Count the directions of z in which two views agree: their correlation is above a half."""
    return sum(value > 0.5 for value in point["spectra"]["agreement"])


def make_table(cells: Cells) -> list[str]:
    """Make the table of a source: each cell at the last step."""
    factors = [f for f in FACTORS if any(f"{f} linear" in _last(c)[0]["h"] for c in cells.values())]
    titles = ["cell", "n", "steps", "kNN of h", "kNN of z", "h against simsiam", "agreeing"]
    titles += [*(f"{factor} in h" for factor in factors), "rank of h", "rank of z"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    base = cells.get("simsiam", {})
    for cell, seeds in cells.items():
        ends, shared = _last(seeds), sorted(seeds.keys() & base.keys())
        knn = {letter: [end[letter]["kind knn"] for end in ends] for letter in ("h", "z")}
        gains = [
            seeds[seed]["points"][-1]["h"]["kind knn"] - base[seed]["points"][-1]["h"]["kind knn"]
            for seed in shared
        ]
        text = [cell, str(len(ends)), str(ends[0]["step"])]
        text += map(mean_and_spread, knn.values())
        text.append(mean_and_spread(gains) if gains and cell != "simsiam" else "")
        text.append(mean_and_spread([agreeing(end) for end in ends]))
        text += [mean_and_spread([end["h"][f"{name} linear"] for end in ends]) for name in factors]
        text += [mean_and_spread([end[f"{letter}_rank"] for end in ends]) for letter in ("h", "z")]
        lines.append("| " + " | ".join(text) + " |")
    return lines


def _last(seeds: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [content["points"][-1] for content in seeds.values()]


def make_page(out: Path) -> None:
    """Write the page and its figures from what was measured."""
    sources = read_cells(out / "cells")
    shapes = sources.pop("shapes")
    if not shapes:
        return
    draw_factors_figure(shapes, out / "factors")
    draw_spectra_figure(shapes, out / "spectra")
    draw_kinds_figure(shapes, out / "kinds")
    lines = [
        "# What moves the plateau of SimSiam on `shapes`", "",
        "Written by `python benchmarks/plateau.py --page` from cells/, which has each measurement; "
        "`--cells NAME ... --seeds n` (and `--source SOURCE`) measures what a row of the tables "
        "shows. At the last step: kNN of the kind; its difference to `simsiam` with the same seed; "
        f"the agreeing directions, among the first {DIRECTIONS} principal directions of z those in "
        "which two views (made as the cell makes them) have a correlation above 0.5; linear probes "
        "of the factors (kind: accuracy; others: R², percent); the effective ranks of h and z. "
        "Mean ± half of the 95 % interval (Student's t) over n seeds; rows with n = 1 have seed 0.",
        "",
        f"kNN here is not the number of other pages: {PROBE_IMAGES:,} training images vote, "
        f"centered, the nearest {NEIGHBORS} with equal weight. It is lower than that of `evaluate` "
        "and differences between rows are larger; [the results at small scale](../README.md) have "
        "that of `evaluate` for `simsiam` and `weight decay 5e-4`.",
        "",
        "![what h and z hold](factors.svg)", "",
        "What a linear probe reads from h and z during training: accuracy for the kind, R² for the "
        "others. A line is one seed; only seed 0 was also measured between the quarters.", "",
        "![spectra](spectra.svg)", "",
        "The directions of z at the last step. A line is one seed. SimCLR has no predictor, so the "
        "second and the third panel leave it out.", "",
        "![kNN of the kind](kinds.svg)", "",
        "kNN of the kind on h: means over n seeds; the table has the intervals at the last step.",
        "", *make_table(shapes),
    ]  # fmt: skip
    for source, cells in sources.items():
        lines += ["", f"The same settings on `{source}`:", "", *make_table(cells)]
    write_page(out, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and measure the cells that are missing, then write the page."""
    parser = argument_parser(__doc__)
    parser.add_argument("--source", default="shapes")
    parser.add_argument("--steps", type=int, default=868)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--runs", type=Path, default=Path("runs/plateau"))
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    for seed in range(0 if options.page else options.seeds):
        for cell in options.cells:
            name = Path(options.source).name
            prefix = "" if name == "shapes" else f"{name}-"
            path = options.out / "cells" / f"{prefix}{cell.replace(' ', '_')}-{seed}.json"
            measure_once(path, partial(measure_cell, options, cell, seed))
    make_page(options.out)


if __name__ == "__main__":
    main()
