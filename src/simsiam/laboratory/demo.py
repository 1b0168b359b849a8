"""The demo: SimSiam on the data set `shapes`, compared with baselines and supervised training."""

import json
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from simsiam.config.recipes import ResolvedRecipe, shapes_recipe
from simsiam.errors import UsageError
from simsiam.model.precision import Compute
from simsiam.monitoring.nearest_neighbors import encoder_knn_top1
from simsiam.runs.encoder import eval_transform, load
from simsiam.runs.run_folder import Run, choose_run_path
from simsiam.sources.open_source import Source, open_source
from simsiam.training.launch import pretrain
from simsiam.training.prepare import build_training_setup
from simsiam.utils.files import write_text

# Two epochs for each of SimSiam's, which makes two views of an image.
SUPERVISED_SETTINGS: dict[str, Any] = {
    "method": "supervised",
    "equal_terms": True,
    "epochs": 2 * shapes_recipe()["epochs"],
    "dim": 10,
    "knn_every": 8,
}
RAW_ROW, UNTRAINED_ROW = "raw pixels", "untrained network"
SIMSIAM_ROW, SUPERVISED_ROW = "SimSiam, no labels", "supervised, all labels"
ROWS = (RAW_ROW, UNTRAINED_ROW, SIMSIAM_ROW, SUPERVISED_ROW)


def demo(*, seeds: int = 1, out: str | None = None) -> dict[str, list[float]]:
    """Train with each seed and print kNN accuracy on the test set.

    The upper bound is supervised training with SimSiam's views and optimizer, on as many views.

    Args:
        seeds: The number of seeds.
        out: The folder of the runs; None creates one.

    Returns:
        Top-1 accuracy in percent of each seed, by row of the table.

    Raises:
        UsageError: If `seeds` is below 1, or the folder is not empty.
    """
    if seeds < 1:
        raise UsageError(f"seeds is {seeds}; it is at least 1")
    folder = choose_run_path(out, "demo", None)
    source = open_source("shapes")
    top1: dict[str, list[float]] = {row: [] for row in ROWS}
    seconds: dict[str, list[float]] = {SIMSIAM_ROW: [], SUPERVISED_ROW: []}
    verdicts = []
    for seed in range(seeds):
        run = Run(pretrain("shapes", out=folder / f"simsiam-{seed}", seed=seed))
        supervised = Run(
            pretrain("shapes", out=folder / f"supervised-{seed}", seed=seed, **SUPERVISED_SETTINGS)
        )
        backbones = {
            RAW_ROW: nn.Flatten(),
            UNTRAINED_ROW: build_training_setup(run.recipe).model.backbone,
            SIMSIAM_ROW: load(run.path, head=False),
            SUPERVISED_ROW: load(supervised.path, head=False),
        }
        for row, backbone in backbones.items():
            top1[row].append(knn_test_accuracy(backbone, source, run.recipe))
        for row, trained in ((SIMSIAM_ROW, run), (SUPERVISED_ROW, supervised)):
            seconds[row].append(trained.json("summary.json")["training_seconds"])
        verdicts.append(run.json("summary.json")["verdict"])

    environment = run.json("environment.json")
    console = Console(highlight=False)
    console.print(demo_table(top1, seconds, len(source.test or ())))
    console.print(
        f"verdict: {', '.join(verdicts)}; network of the last epoch, on {environment['device']}"
    )
    console.print(f"run folder: {folder}/simsiam-0", soft_wrap=True)
    keys = ("commit", "device", "threads", "precision", "versions")
    record = {"top1": top1, "training_seconds": seconds, "verdicts": verdicts}
    record |= {key: environment[key] for key in keys}
    write_text(folder / "demo.json", json.dumps(record, indent=2) + "\n")
    return top1


def demo_table(
    top1: Mapping[str, Sequence[float]], seconds: Mapping[str, Sequence[float]], num_images: int
) -> Table:
    """Format the results of the demo.

    Args:
        top1: Accuracy in percent of each seed, by row.
        seconds: Seconds of training of each seed, for the rows with training.
        num_images: The number of test images.

    Returns:
        The table.
    """
    seeds = len(top1[SIMSIAM_ROW])
    n = f"mean ± std of {seeds} seeds" if seeds > 1 else "1 seed"
    title = f"kNN top-1 on {num_images:,} test images of shapes, {n}"
    table = Table(title=title, title_justify="left", min_width=60)
    table.add_column("features of")
    table.add_column("%", justify="right")
    table.add_column("training, s", justify="right")
    for row, values in top1.items():
        deviation = f" ± {stdev(values):.1f}" if seeds > 1 else ""
        duration = f"{mean(seconds[row]):.0f}" if row in seconds else ""
        style = "bold" if row == SIMSIAM_ROW else None
        table.add_row(row, f"{mean(values):.1f}{deviation}", duration, style=style)
    return table


def knn_test_accuracy(backbone: nn.Module, source: Source, recipe: ResolvedRecipe) -> float:
    """Measure kNN accuracy on the test images, with the training images as neighbors.

    The result must not be used to choose anything.

    Args:
        backbone: Maps normalized images to features.
        source: Labeled training and test images.
        recipe: The recipe of the run, for the preprocessing and the device.

    Returns:
        Top-1 accuracy in percent.
    """
    compute = Compute.pick(recipe.device, "float32")
    backbone, transform = backbone.to(compute.device), eval_transform(recipe)
    assert source.test is not None
    return encoder_knn_top1(backbone, source.train, source.test, transform, compute=compute)
