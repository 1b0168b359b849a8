"""Ask what SimSiam's features hold while it trains on `shapes`, and make the page results/plateau.

    python benchmarks/plateau.py [--steps N] [--seeds N] [--cells NAME ...] [--runs FOLDER]
        [--out FOLDER] [--page]

Cells are SimSiam, SimCLR, and SimSiam with one cell changed. Each is trained with every seed, and
its checkpoint of each epoch is measured: the spectrum of
z, the gain of the predictor along the principal directions of z, and how well h and z hold the
factors of the drawing, by linear probes (ridge regression; R², for the kind accuracy) and by the 20
nearest neighbors. Probes are fitted on training images and read on test images. Each cell and seed
is a file in OUT/cells; what is there is not measured again, so the command can be stopped and
started at any time. `--page` writes only the page and its figures.
"""

import argparse
import json
import time
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from torch import Tensor

from simsiam.config.recipes import ResolvedRecipe
from simsiam.data.batches import make_training_views
from simsiam.data.images import Images, sample
from simsiam.laboratory.drawing import (
    COLORS,
    LINE_STYLES,
    format_axes,
    new_figure,
    save_figure,
)
from simsiam.laboratory.scales import TINY
from simsiam.model.precision import Compute
from simsiam.model.siamese import Siamese, build
from simsiam.monitoring.features import extract_features
from simsiam.monitoring.gauges import effective_rank
from simsiam.monitoring.label_free_monitor import MONITOR_STEP
from simsiam.runs.encoder import eval_transform
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import open_source
from simsiam.sources.shapes import draw_factors
from simsiam.training.launch import pretrain, resume
from simsiam.utils.files import atomic_write

OUT = Path(__file__).parents[1] / "results" / "plateau"
CELLS: dict[str, dict[str, object]] = {
    "simsiam": {},
    "simclr": {"method": "simclr", **TINY.method_overrides["simclr"]},
    "cut-init 3": {"cut_init": 3.0},
    "predictor lr x 10": {"predictor_lr_scale": 10.0},
    "predictor direct": {"predictor": "direct"},
    "IsoLoss": {"predictor": "direct", "iso_loss": True},
    "no weight decay": {"weight_decay": 0.0},
    "weight decay 5e-4": {"weight_decay": 5e-4},
    "predictor without decay": {"predictor_weight_decay": 0.0},
    "crops from 0.2": {"crop_min": 0.2},
    "crops from 0.08": {"crop_min": 0.08},
    "jitter 0.8": {"jitter": (0.8, 0.8, 0.0, 0.0)},
    "no jitter": {"jitter_p": 0.0},
    "simclr jitter 0.8": {
        "method": "simclr",
        **TINY.method_overrides["simclr"],
        "jitter": (0.8, 0.8, 0.0, 0.0),
    },
    "4 views": {"num_views": 4},
    "4 small crops": {"small_crops": 4, "small_crop_scale": (0.1, 0.3)},
    "batch 512": {"batch_size": 512, "base_lr": 0.175},
    "batch 32": {"batch_size": 32, "base_lr": 2.8},
    "momentum target 0.5": {"target": "momentum", "target_decay": 0.5},
    "no output batch norm": {"head_bn": ("proj_hidden", "pred_hidden")},
}
FACTORS = ("kind", "number", "size", "brightness", "x", "y")
DIRECTIONS = 32  # principal directions of z that are followed
NEIGHBORS = 20
PROBE_IMAGES = 2000  # of each split


def trained(cell: str, seed: int, steps: int, runs: Path) -> Run:
    """Return the run of a cell, trained to its end with a checkpoint of each epoch."""
    path = runs / f"{cell}, seed {seed}"
    settings = CELLS[cell] | {"steps": steps, "seed": seed, "save_every": 1, "knn_every": 1}
    if (path / "recipe.yaml").exists():
        resume(path, source="shapes", logger="none")
    else:
        pretrain("shapes", out=path, logger="none", **settings)  # type: ignore[arg-type]
    return Run(path)


def probe_targets(split: str, images: Images, index: np.ndarray) -> dict[str, np.ndarray]:
    """Return the factors of some images of a split: classes for the kind, else numbers."""
    assert images.labels is not None
    factors = {name: values[index] for name, values in draw_factors(split).items()}
    return {"kind": images.labels[index]} | factors


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
    columns = np.column_stack(
        [np.eye(classes)[wanted["kind"]], *(wanted[name] for name in FACTORS[1:])]
    )
    ridge = RidgeCV(alphas=np.logspace(-1, 5, 7), alpha_per_target=True).fit(x, columns)
    result = dict[str, float]()
    for probe, guess in (("linear", ridge.predict(y)), ("knn", columns[neighbors].mean(axis=1))):
        right = guess[:, :classes].argmax(1) == truth["kind"]
        result[f"kind {probe}"] = round(100 * float(right.mean()), 2)
        for name, column in zip(FACTORS[1:], guess[:, classes:].T):
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
    model: Siamese, recipe: ResolvedRecipe, fit: Images, test: Images, compute: Compute
) -> dict[str, object]:
    """Measure a network: ranks, spectra, and what h and z hold."""

    def h_and_z(x: Tensor) -> tuple[Tensor, Tensor]:
        h = model.backbone(x)
        return h, model.projector(h)

    transform, model = eval_transform(recipe), compute.place(model).eval()
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
    keys = (
        [int(key.split("#")[1]) for key in fit.keys],
        [int(key.split("#")[1]) for key in test.keys],
    )
    wanted = probe_targets("train", open_source("shapes").train, np.array(keys[0]))
    tests = open_source("shapes").test
    assert tests is not None
    truth = probe_targets("test", tests, np.array(keys[1]))
    result: dict[str, object] = {"spectra": spectra(z[0], p, z[1])}
    for i, name in enumerate(("h", "z")):
        rows = [features.matrices[i] for features in found]
        result[name] = hold(rows[0].numpy(), rows[1].numpy(), wanted, truth)
        result[f"{name}_rank"] = round(effective_rank(rows[1]).item(), 3)
    return result


def measure_run(run: Run, steps: int) -> list[dict[str, object]]:
    """Measure the untrained network and each checkpoint of a run."""
    recipe, compute, source = run.recipe, Compute.pick("cpu", "float32"), open_source("shapes")
    assert source.test is not None
    fit, test = sample(source.train, PROBE_IMAGES), sample(source.test, PROBE_IMAGES)
    model = build(
        recipe.method,
        backbone=recipe.backbone,
        image_size=recipe.image_size,
        width=recipe.width,
        seed=recipe.seed,
    )
    rows = [{"step": 0} | measure(model, recipe, fit, test, compute)]
    files = sorted((run.path / "checkpoints").glob("epoch-*.pt"))
    for name in [*(file.stem for file in files), "last"]:
        state = run.checkpoint(name)
        assert state is not None
        if state["step"] > int(str(rows[-1]["step"])):
            model.load_state_dict(state["model"])
            rows.append({"step": state["step"]} | measure(model, recipe, fit, test, compute))
    return rows


def read_cells(folder: Path) -> dict[str, list[dict]]:
    """Read what was measured: the content of all seeds of each cell."""
    found: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        found.setdefault(content["cell"], []).append(content)
    return {cell: found[cell] for cell in CELLS if cell in found}


def mean_and_spread(values: Sequence[float]) -> str:
    """Format the mean with its 95 % interval (Student's t), or one value alone."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return f"{fmean(values):.1f} ± {half:.1f}"


def draw_factors_figure(cells: dict[str, list[dict]], path: Path) -> None:
    """Draw what h and z hold of each factor over training, for SimSiam and SimCLR side by side."""
    figure = new_figure(14, 6.5)
    panels = figure.subplots(2, len(FACTORS), sharex=True, sharey=True)
    for row, letter in zip(panels, ("h", "z")):
        for axes, factor in zip(row, FACTORS):
            for cell, color, dash in zip(("simsiam", "simclr"), COLORS, LINE_STYLES):
                for i, content in enumerate(cells.get(cell, ())):
                    x = [point["step"] for point in content["points"]]
                    y = [point[letter][f"{factor} linear"] for point in content["points"]]
                    label = None if i else cell
                    axes.plot(x, y, color=color, linestyle=dash, label=label, linewidth=1.2)
            unit = "accuracy" if factor == "kind" else "R²"
            axes.set_title(f"{factor} in {letter}", fontsize=9)
            format_axes(axes, "step" if letter == "z" else "", f"linear probe, {unit} (%)")
    save_figure(figure, path)


def draw_spectra_figure(cells: dict[str, list[dict]], path: Path) -> None:
    """Draw shares, gains, alignment and agreement of the directions of z at the last step."""
    figure = new_figure(14, 3.6)
    quantities = {
        "share": "share of the variance of z", "gain": "gain of the predictor",
        "alignment": "cosine with the direction", "agreement": "correlation of two views",
    }  # fmt: skip
    for axes, (name, label) in zip(figure.subplots(1, 4), quantities.items()):
        for cell, color, dash in zip(("simsiam", "simclr"), COLORS, LINE_STYLES):
            for i, content in enumerate(cells.get(cell, ())):
                y = content["points"][-1]["spectra"][name]
                note = None if i else cell
                axes.plot(range(1, len(y) + 1), y, color=color, linestyle=dash, label=note)
        if name == "share":
            axes.set_yscale("log")
        format_axes(axes, "principal direction of z", label)
    save_figure(figure, path)


def draw_kinds_figure(cells: dict[str, list[dict]], path: Path) -> None:
    """Draw kNN of the kind on h over training, of every cell: means over seeds."""
    figure = new_figure(8, 5)
    axes = figure.subplots()
    for (cell, contents), color, dash in zip(cells.items(), cycle(COLORS), cycle(LINE_STYLES)):
        by_step: dict[int, list[float]] = {}
        for content in contents:
            for point in content["points"]:
                by_step.setdefault(point["step"], []).append(point["h"]["kind knn"])
        steps = sorted(by_step)
        means = [fmean(by_step[step]) for step in steps]
        axes.plot(steps, means, color=color, linestyle=dash, label=cell)
    format_axes(axes, "step", "kNN of the kind on h (%)")
    save_figure(figure, path)


def write_page(out: Path) -> None:
    """Write the page and its figures from what was measured."""
    cells = read_cells(out / "cells")
    if not cells:
        return
    draw_factors_figure(cells, out / "factors")
    draw_spectra_figure(cells, out / "spectra")
    draw_kinds_figure(cells, out / "kinds")
    lines = [
        "# What moves the plateau of SimSiam on `shapes`", "",
        "Written by `python benchmarks/plateau.py`; cells/ has each measurement. At the last step: "
        "kNN of the kind (20 neighbors), linear probes of the factors (kind: accuracy; others: R², "
        "percent), the effective ranks of h and z, and the gain of the predictor along the first "
        "and the eighth principal direction of z. Mean ± half of the 95 % interval over n seeds.",
        "", "![what h and z hold](factors.svg)", "", "![spectra](spectra.svg)", "",
        "![kNN of the kind](kinds.svg)", "",
        "| cell | n | steps | kNN of h | kNN of z | " + " | ".join(f"{f} in h" for f in FACTORS)
        + " | rank of h | rank of z | gain 1 | gain 8 |",
        "|---|---|---|---|---|" + "---|" * len(FACTORS) + "---|---|---|---|",
    ]  # fmt: skip
    for cell, contents in cells.items():
        ends = [content["points"][-1] for content in contents]
        columns = [[end[letter]["kind knn"] for end in ends] for letter in ("h", "z")]
        columns += [[end["h"][f"{factor} linear"] for end in ends] for factor in FACTORS]
        columns += [[end[f"{letter}_rank"] for end in ends] for letter in ("h", "z")]
        text = [mean_and_spread(values) for values in columns]
        gains = [[end["spectra"]["gain"][i] for end in ends] for i in (0, 7)]
        text += [f"{fmean(values):.2f}" for values in gains]
        steps = ends[0]["step"]
        lines.append(f"| {cell} | {len(ends)} | {steps} | " + " | ".join(text) + " |")
    reading = out / "README.reading.md"
    if reading.exists():
        lines += ["", reading.read_text().rstrip()]
    with atomic_write(out / "README.md") as part:
        part.write_text("\n".join(lines) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and measure the cells that are missing, then write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=868)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--runs", type=Path, default=Path("runs/plateau"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args(arguments)
    folder = options.out / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(0 if options.page else options.seeds):
        for cell in options.cells:
            path = folder / f"{cell.replace(' ', '_')}-{seed}.json"
            if path.exists():
                continue
            start = time.monotonic()
            run = trained(cell, seed, options.steps, options.runs)
            content = {"cell": cell, "seed": seed, "points": measure_run(run, options.steps)}
            seconds = round(time.monotonic() - start)
            content |= {"settings": CELLS[cell], "seconds": seconds}
            with atomic_write(path) as part:
                part.write_text(json.dumps(content) + "\n")
            print(path.name, f"{seconds} s", flush=True)
            write_page(options.out)
    write_page(options.out)


if __name__ == "__main__":
    main()
