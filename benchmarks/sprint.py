"""Search a recipe that learns fast (`--recipe sprint`), and make the page results/sprint.

    python benchmarks/sprint.py SOURCE [--candidates N] [--rungs 2:1 6:1 12:3] [--limit N]
        [--runs FOLDER] [--out FOLDER] [--page]

Candidates are drawn once, with a fixed seed, from the grid CELLS; the recipe of SOURCE comes
first. They race by successive halving: rung EPOCHS:SEEDS trains each of the candidates that are
left with SEEDS seeds, and a third goes on. All candidates of a rung cost the same: EPOCHS are those
of two full views, and whoever encodes more pixels per image gets fewer epochs. The score is the kNN
accuracy on h of images held out of the training split; the test split is not opened. Each training
is a file in OUT/cells; what is there is not trained again, so the command can be stopped and
started at any time.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from simsiam.config.method import SECOND_ENCODER_TARGETS
from simsiam.config.recipes import Recipe
from simsiam.laboratory.time_to_accuracy.race import mean_and_spread
from simsiam.runs.compose import compose_recipe
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import open_source
from simsiam.training.launch import pretrain, resume
from simsiam.utils.files import atomic_write

OUT = Path(__file__).parents[1] / "results" / "sprint"
Settings = dict[str, Any]
NETWORK: Settings = {"backbone": "resnet18", "width": 16, "batch_size": 256, "base_lr": 0.2}
SIMCLR: Settings = {
    "method": "simclr", "equal_terms": True, "dim": 128, "proj_layers": 2, "tau": 0.5,
}  # fmt: skip
# The first value of each cell is the base's.
CELLS: dict[str, tuple[Settings, ...]] = {
    "method": ({}, SIMCLR, {"predictor": "direct"}, {"target": "momentum", "target_decay": 0.9}),
    "lr": ({}, {"base_lr": 0.1}, {"base_lr": 0.4}),
    "predictor lr": ({}, {"predictor_lr_scale": 5.0}),
    "decay": ({}, {"weight_decay": 1e-4}, {"weight_decay": 2e-3}),
    "predictor decay": ({}, {"predictor_weight_decay": 2.5e-3}),  # see results/plateau
    "schedule": ({}, {"lr_schedule": "constant_decay"}),
    "batch": ({}, {"batch_size": 128}),
    "start": ({}, {"cut_init": 3.0}),
    "views": ({}, {"num_views": 4}, {"small_crops": 4, "small_crop_scale": (0.08, 0.3)}),
    "crops": ({}, {"crop_min": 0.08}, {"crop_min": 0.4}),
    "average": ({}, {"average_weights": 0.99}),
}
KEEP = 3  # one of so many candidates goes on to the next rung


def draw_candidates(count: int) -> list[dict[str, int]]:
    """Draw candidates: the base, then choices of about a third of the cells.

    Args:
        count: How many.

    Returns:
        For each candidate the position of its value in each cell that is not the base's.
    """
    rng, found = np.random.default_rng(0), [dict[str, int]()]
    while len(found) < count:
        changed = [cell for cell in CELLS if rng.random() < 1 / 3]
        choice = {cell: int(rng.integers(1, len(CELLS[cell]))) for cell in changed}
        if choice not in found and is_possible(choice):
            found.append(choice)
    return found


def settings_of(choice: Mapping[str, int]) -> Settings:
    """Return the settings of a candidate; the cells that it changes, in the order of CELLS."""
    settings: Settings = {}
    for cell in CELLS:
        settings |= CELLS[cell][choice.get(cell, 0)]
    return settings


def is_possible(choice: Mapping[str, int]) -> bool:
    """Tell whether a candidate's settings all have an effect and do not contradict each other."""
    settings = settings_of(choice)
    no_predictor = settings.get("method") == "simclr" or settings.get("predictor") == "direct"
    return not (no_predictor and settings.keys() & {"predictor_lr_scale", "predictor_weight_decay"})


def cost(recipe: Recipe) -> float:
    """Return the pixels that a step encodes per image, of two full views through one encoder."""
    assert recipe.image_size is not None
    pixels: float = sum(size**2 for size in recipe.view_sizes)
    if recipe.method.target in SECOND_ENCODER_TARGETS:  # without a backward pass: a third
        pixels += recipe.method.full_view_count * recipe.image_size**2 / 3
    return pixels / (2 * recipe.image_size**2)


def train(
    source: str, choice: Mapping[str, int], epochs: int, seed: int, limit: int | None, run: Path
) -> dict[str, object]:
    """Train a candidate and return its kNN accuracy on held-out images, and what it took."""
    settings = NETWORK | settings_of(choice) | {"seed": seed, "limit": limit}
    recipe = compose_recipe(source, None, settings)[0]
    # The step is the unit: steps of a smaller batch are more, and of more pixels fewer.
    images = len(open_source(source).train) if limit is None else limit
    images -= min(images // 10, 5000)
    steps = max(2, round(epochs * images / recipe.batch_size / cost(recipe)))
    settings |= {"steps": steps, "knn_every": 10**6, "log_every": max(1, steps // 20)}
    if (run / "recipe.yaml").exists():
        resume(run, source=source, logger="none")
    else:
        pretrain(source, out=run, logger="none", **settings)
    summary, trained = Run(run).json("summary.json"), Run(run).recipe
    return {
        "knn": summary["knn_top1"]["last"],
        "verdict": summary["verdict"],
        "steps": steps,
        "images": steps * trained.batch_size,
        "seconds": summary["training_seconds"],
    }


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """Read all trainings."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def rank(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[float]]]:
    """Sort the candidates of a rung by their mean score, the best first."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        scores.setdefault(json.dumps(row["choice"], sort_keys=True), []).append(row["knn"])
    return sorted(scores.items(), key=lambda item: -fmean(item[1]))


def describe(choice: Mapping[str, int]) -> str:
    """Name the settings in which a candidate differs from the base."""
    settings = settings_of(choice)
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "base"


def write_page(out: Path) -> None:
    """Write the table of all rungs, and the settings of the best candidate of the last one."""
    rows = read_cells(out / "cells")
    if not rows:
        return
    rungs = sorted({row["epochs"] for row in rows})
    lines = [
        "# The search of the recipe `sprint`", "",
        "Written by `python benchmarks/sprint.py`; cells/ has each training. kNN accuracy on h of "
        "images held out of the training split, in percent: mean ± standard deviation over n "
        "seeds. Epochs are those of two full views; all trainings of a rung cost the same.", "",
        f"Network and base: {', '.join(f'{k} {v}' for k, v in NETWORK.items())}.",
    ]  # fmt: skip
    for epochs in rungs:
        of_rung = [row for row in rows if row["epochs"] == epochs]
        lines += ["", f"## {epochs} epochs", "", "| candidate | n | kNN | minutes |"]
        lines.append("|---|---|---|---|")
        for key, scores in rank(of_rung):
            choice = json.loads(key)
            minutes = [row["seconds"] / 60 for row in of_rung if row["choice"] == choice]
            lines.append(
                f"| {describe(choice)} | {len(scores)} | {mean_and_spread(scores)} | "
                f"{fmean(minutes):.1f} |"
            )
    with atomic_write(out / "README.md") as part:
        part.write_text("\n".join(lines) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, rung after rung, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source")
    parser.add_argument("--candidates", type=int, default=27)
    parser.add_argument(
        "--rungs", nargs="+", default=["2:1", "6:1", "12:3"], metavar="EPOCHS:SEEDS"
    )
    parser.add_argument("--limit", type=int)
    parser.add_argument("--runs", type=Path, default=Path("runs/sprint"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args(arguments)
    cells, candidates = options.out / "cells", draw_candidates(options.candidates)
    cells.mkdir(parents=True, exist_ok=True)
    for rung in () if options.page else options.rungs:
        epochs, seeds = map(int, rung.split(":"))
        for seed in range(seeds):
            for choice in candidates:
                key = json.dumps([choice, options.source, options.limit], sort_keys=True)
                name = f"{epochs}-{blake2b(key.encode(), digest_size=4).hexdigest()}-{seed}"
                path = cells / f"{name}.json"
                if path.exists():
                    continue
                start = time.monotonic()
                run = options.runs / name
                content = train(options.source, choice, epochs, seed, options.limit, run)
                content |= {"choice": choice, "settings": settings_of(choice), "epochs": epochs}
                content |= {"seed": seed, "source": options.source, "limit": options.limit}
                with atomic_write(path) as part:
                    part.write_text(json.dumps(content) + "\n")
                seconds = time.monotonic() - start
                print(
                    f"{name}: {describe(choice)}: {content['knn']} %, {seconds:.0f} s", flush=True
                )
                write_page(options.out)
        wanted = [json.dumps(choice, sort_keys=True) for choice in candidates]
        of_rung = [
            row
            for row in read_cells(cells)
            if row["epochs"] == epochs
            and (row["source"], row["limit"]) == (options.source, options.limit)
            and json.dumps(row["choice"], sort_keys=True) in wanted
        ]
        candidates = [json.loads(key) for key, _ in rank(of_rung)][: max(1, len(wanted) // KEEP)]
    write_page(options.out)
    if not options.page:
        print(f"best: {json.dumps(NETWORK | settings_of(candidates[0]))}")


if __name__ == "__main__":
    main()
