"""See it work: SimSiam on the embedded set, beside what it has to beat and what labels would give."""

import json
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from simsiam.config.recipes import ResolvedRecipe, shapes_recipe
from simsiam.data.images import Images
from simsiam.errors import UsageError
from simsiam.model.precision import Compute
from simsiam.monitoring.features import extract_features
from simsiam.monitoring.nearest_neighbors import knn_top1
from simsiam.runs.encoder import eval_transform, load
from simsiam.runs.run_folder import Run, check_vacant, next_run_path
from simsiam.sources.open_source import Source, open_source
from simsiam.training.prepare import build_training_setup
from simsiam.training.launch import pretrain
from simsiam.utils.files import atomic_write

SUPERVISED_SETTINGS: dict[str, Any] = {
    "method": "supervised", "equal_terms": True, "epochs": 2 * shapes_recipe()["epochs"], "dim": 10, "knn_every": 8,
}  # fmt: skip
RAW_ROW, UNTRAINED_ROW, SIMSIAM_ROW, SUPERVISED_ROW = (
    "raw pixels",
    "untrained network",
    "SimSiam, no labels",
    "supervised, all labels",
)


def demo(*, seeds: int = 1, out: str | None = None) -> dict[str, list[float]]:
    """Train with each seed and print kNN on the test set; returns the accuracies in percent, one a seed.

    The supervised ceiling is the row `supervised` on SimSiam's views and optimizer. It sees as many of them: two epochs
    for each of SimSiam's, which makes two views of an image.
    """
    if seeds < 1:
        raise UsageError(f"seeds is {seeds}; it is at least 1")
    console = Console(highlight=False)
    folder = check_vacant(out) if out else next_run_path("demo")
    source = open_source("shapes")
    found: dict[str, list[float]] = {
        RAW_ROW: [],
        UNTRAINED_ROW: [],
        SIMSIAM_ROW: [],
        SUPERVISED_ROW: [],
    }
    seconds: dict[str, list[float]] = {SIMSIAM_ROW: [], SUPERVISED_ROW: []}
    verdicts = []
    for seed in range(seeds):
        run = Run(pretrain("shapes", out=folder / f"simsiam-{seed}", seed=seed))
        summary = run.json("summary.json")
        seconds[SIMSIAM_ROW].append(summary["training_seconds"])
        verdicts.append(summary["verdict"])
        found[RAW_ROW].append(knn_test_accuracy(nn.Flatten(), source, run.recipe))
        found[UNTRAINED_ROW].append(
            knn_test_accuracy(build_training_setup(run.recipe).model.backbone, source, run.recipe)
        )
        found[SIMSIAM_ROW].append(knn_test_accuracy(load(run.path), source, run.recipe))
        ceiling = Run(
            pretrain("shapes", out=folder / f"supervised-{seed}", seed=seed, **SUPERVISED_SETTINGS)
        )
        seconds[SUPERVISED_ROW].append(ceiling.json("summary.json")["training_seconds"])
        found[SUPERVISED_ROW].append(knn_test_accuracy(load(ceiling.path), source, run.recipe))

    assert source.test is not None
    n = f"mean ± std of {seeds} seeds" if seeds > 1 else "1 seed"
    title = f"kNN top-1 on {len(source.test):,} test images of shapes, {n}"
    table = Table(title=title, title_justify="left", min_width=60)
    table.add_column("features of")
    table.add_column("%", justify="right")
    table.add_column("training, s", justify="right")
    for name, values in found.items():
        spread = f" ± {stdev(values):.1f}" if seeds > 1 else ""
        took = f"{mean(seconds[name]):.0f}" if name in seconds else ""
        table.add_row(
            name, f"{mean(values):.1f}{spread}", took, style="bold" if name == SIMSIAM_ROW else None
        )
    console.print(table)
    console.print(
        f"verdict: {', '.join(verdicts)}; the last epoch's network, on {run.json('environment.json')['device']}"
    )
    console.print(f"run folder: {folder}/simsiam-0", soft_wrap=True)
    about = {
        key: run.json("environment.json")[key]
        for key in ("commit", "device", "threads", "precision", "versions")
    }
    with atomic_write(folder / "demo.json") as part:
        part.write_text(
            json.dumps(
                {"top1": found, "training_seconds": seconds, "verdicts": verdicts, **about},
                indent=2,
            )
            + "\n"
        )
    return found


def knn_test_accuracy(backbone: nn.Module, source: Source, recipe: ResolvedRecipe) -> float:
    """kNN top-1 on the test images, in percent, with the training images as the bank. Never used to choose anything."""
    compute = Compute.pick(recipe.device, "float32")

    def features(images: Images) -> Tensor:
        return extract_features(
            backbone.to(compute.device), images, eval_transform(recipe), compute=compute
        ).matrices[0]

    train, test = source.train, source.test
    assert test is not None and train.labels is not None and test.labels is not None
    labels, truth = torch.from_numpy(train.labels), torch.from_numpy(test.labels)
    return knn_top1(features(train), labels, features(test), truth, classes=len(train.classes))
