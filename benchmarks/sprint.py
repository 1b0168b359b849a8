"""Search a recipe that learns fast (`--recipe sprint`), and make the page results/sprint.

    python benchmarks/sprint.py SOURCE [--epochs N] [--limit N] [--jobs N] [--runs FOLDER]
        [--out FOLDER]

The search goes from the recipe of SOURCE through STAGES. A stage tries each other value of each of
its cells alone, from the best settings so far. Of each cell the best value is kept, if it is better
by more than MARGIN. All trainings cost the same: EPOCHS are those of two views of the images' size,
and whoever makes and encodes more pixels per image gets fewer epochs. The score is the kNN accuracy
on h of images held out of the training split; the test split is not opened. Each training is a file
in OUT/cells; what is there is not trained again, so the command can be stopped and started at any
time. `--jobs N` trains N at once; give each one core with OMP_NUM_THREADS=1.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from hashlib import blake2b
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from typing import Any

from cells import measure_once, train_or_resume, write_page

from simsiam.config.method import SECOND_ENCODER_TARGETS
from simsiam.config.recipes import Recipe
from simsiam.runs.compose import compose_recipe

OUT = Path(__file__).parents[1] / "results" / "sprint"
Settings = dict[str, Any]
NETWORK: Settings = {
    "method": "simsiam", "backbone": "resnet18", "width": 16, "batch_size": 256, "base_lr": 0.2,
}  # fmt: skip
# Methods without a predictor, on SimSiam's terms: its optimizer, schedule and views.
SIMCLR: Settings = {"method": "simclr", "equal_terms": True, "dim": 128, "proj_layers": 2}
BARLOW: Settings = {
    "method": "barlow_twins", "equal_terms": True, "dim": 512, "proj_hidden": 512,
    "proj_layers": 2, "loss_scale": 0.02,
}  # fmt: skip
# The first value of each cell is the base's.
CELLS: dict[str, tuple[Settings, ...]] = {
    "method": (
        {}, SIMCLR | {"tau": 0.5}, SIMCLR | {"tau": 0.2}, BARLOW,
        {"predictor": "direct", "dim": 512}, {"target": "momentum", "target_decay": 0.9},
    ),
    "tau": ({}, {"tau": 0.1}),
    "lr": ({}, {"base_lr": 0.4}, {"base_lr": 0.8}, {"base_lr": 1.6}),
    "views": ({}, {"num_views": 4}, {"small_crops": 4, "small_crop_scale": (0.08, 0.3)}),
    "crops": ({}, {"crop_min": 0.08}, {"crop_min": 0.4}),
    "batch": ({}, {"batch_size": 128}, {"batch_size": 512}),
    "predictor lr": ({}, {"predictor_lr_scale": 5.0}),
    "decay": ({}, {"weight_decay": 1e-4}, {"weight_decay": 2e-3}),  # see results/plateau
    "schedule": ({}, {"lr_schedule": "constant_decay"}),
    "start": ({}, {"cut_init": 3.0}),
    "average": ({}, {"average_weights": 0.99}),
    "size": ({}, {"view_ratio": 0.75}, {"view_ratio": 0.625}, {"view_ratio": 0.5}),
}  # fmt: skip
STAGES = (
    ("method",),
    ("tau", "lr"),
    ("views", "crops", "batch"),
    ("predictor lr", "decay", "schedule", "start", "average"),
    ("lr",),
    ("size",),
)
# Of the time that a view costs on one core at 32 px, the part that does not depend on its size.
FIXED_COST = 0.24
MARGIN = 1.0  # percentage points of kNN accuracy
Choice = dict[str, int]  # the position of the value of each cell that is not the base's


def settings_of(choice: Mapping[str, int]) -> Settings:
    """Return the settings of a choice, in the order of CELLS."""
    settings: Settings = {}
    for cell in CELLS:
        settings |= CELLS[cell][choice.get(cell, 0)]
    return settings


def change(choice: Choice, values: Mapping[str, int]) -> Choice:
    """Return a choice with other values of some cells."""
    return {cell: value for cell, value in {**choice, **values}.items() if value}


def alternatives(best: Choice, cell: str) -> list[Choice]:
    """Return the choices that differ from the best one so far in one cell, and are possible."""
    settings = settings_of(best)
    needs = {
        "tau": "tau" in settings,
        "predictor lr": not settings.keys() & {"method", "predictor"},
    }
    if not needs.get(cell, True):
        return []
    values = [value for value in range(len(CELLS[cell])) if value != best.get(cell, 0)]
    return [change(best, {cell: value}) for value in values]


def cost(recipe: Recipe) -> float:
    """Return the time of a step per image, relative to two views of the images' size."""
    assert recipe.image_size is not None
    encoded = [(size / recipe.image_size) ** 2 for size in recipe.view_sizes]
    fixed = FIXED_COST * len(encoded)
    if recipe.method.target in SECOND_ENCODER_TARGETS:  # without a backward pass: a third
        encoded += [share / 3 for share in encoded[: recipe.method.full_view_count]]
    return (fixed + (1 - FIXED_COST) * sum(encoded)) / 2


def train(
    source: str, choice: Mapping[str, int], epochs: float, limit: int | None, run: Path
) -> dict[str, object]:
    """Train a candidate and return its kNN accuracy on held-out images, and what it took."""
    settings = NETWORK | settings_of(choice) | {"limit": limit}
    recipe, opened, _ = compose_recipe(source, None, settings)
    # The step is the unit: steps of a smaller batch are more, and of more pixels fewer.
    images = len(opened.train) if limit is None else limit
    images -= min(images // 10, 5000)
    steps = max(2, round(epochs * images / recipe.batch_size / cost(recipe)))
    settings |= {"steps": steps, "knn_every": 10**6, "log_every": max(1, steps // 20)}
    trained = train_or_resume(source, run, **settings)
    summary = trained.json("summary.json")
    return {
        "knn": summary["knn_top1"]["last"],
        "verdict": summary["verdict"],
        "steps": steps,
        "images": steps * trained.recipe.batch_size,
        "seconds": summary["training_seconds"],
    }


def try_choice(options: argparse.Namespace, choice: Choice) -> float:
    """Train a choice if it has no file yet, and return its kNN accuracy."""
    source = Path(options.source).name
    key = json.dumps([choice, source, options.limit], sort_keys=True)
    name = f"{options.epochs}-{blake2b(key.encode(), digest_size=4).hexdigest()}"

    def measure() -> dict[str, object]:
        return train(options.source, choice, options.epochs, options.limit, options.runs / name) | {
            "choice": choice,
            "settings": settings_of(choice),
            "epochs": options.epochs,
            "source": source,
            "limit": options.limit,
        }

    return float(measure_once(options.out / "cells" / f"{name}.json", measure)["knn"])


def as_text(settings: Settings) -> str:
    """Write settings, those of the base as `base`."""
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "base"


def describe(choice: Mapping[str, int]) -> str:
    """Name the settings in which a choice differs from the base."""
    return as_text(settings_of(choice))


def search(options: argparse.Namespace) -> Choice:
    """Go through all stages, write the page after each, and return the best choice."""
    best, lines = Choice(), [
        "# The search of the recipe `sprint`", "",
        "Written by `python benchmarks/sprint.py SOURCE`, whose docstring says how it is done; "
        "cells/ has each training. kNN accuracy on h of images held out of the training split, in "
        f"percent; {options.epochs:g} epochs of two full views, seed 0, or fewer epochs of more "
        "pixels, so that all cost the same. A value is kept if it is better by more than "
        f"{MARGIN:g}.", "",
        f"Network and base: {', '.join(f'{k} {v}' for k, v in NETWORK.items())}.",
    ]  # fmt: skip
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        for number, stage in enumerate(STAGES, 1):
            tried = [(cell, choice) for cell in stage for choice in alternatives(best, cell)]
            choices = [best, *(choice for _, choice in tried)]
            limit, *scores = pool.map(partial(try_choice, options), choices)
            lines += ["", f"## Stage {number}", "", "| cell | value | kNN | |", "|---|---|---|---|"]
            lines += [f"| | {describe(best)} | {limit:.1f} | |"]
            rows = [
                (cell, choice.get(cell, 0), score)
                for (cell, choice), score in zip(tried, scores, strict=True)
            ]
            kept = {  # the best of a cell comes last, and stays
                cell: value
                for cell, value, score in sorted(rows, key=itemgetter(2))
                if score > limit + MARGIN
            }
            for cell, value, score in rows:
                mark = "kept" if kept.get(cell) == value else ""
                lines.append(f"| {cell} | {as_text(CELLS[cell][value])} | {score:.1f} | {mark} |")
            best = change(best, kept)
            write_page(options.out, [*lines, "", f"Best so far: {describe(best)}."])
    return best


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/sprint"))
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    print(f"best: {json.dumps(NETWORK | settings_of(search(options)))}")


if __name__ == "__main__":
    main()
