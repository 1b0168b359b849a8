"""Compare two ways to train a network in equal time, and make the page results/COMPARISON.

    python benchmarks/equal_time.py COMPARISON SOURCE [SOURCE ...] [--minutes N] [--seeds N]
        [--runs FOLDER] [--out FOLDER] [--page]

COMPARISON is `distillation` (SimSiam, and learning from the teacher `lite0`, whose features are
computed within the time; a ResNet-18 of width 32 on views of 64 px) or `sprint` (the recipe of a
folder with SimSiam, and `--recipe sprint`; the network is what `--minutes` chooses). SOURCE is a
folder with labeled images. Each run is a file in OUT/cells; what is there is not trained again, so
the command can be stopped and started at any time. Start it with OMP_NUM_THREADS=1 to give each run
one core. `--page` writes only the page.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from simsiam.laboratory.time_to_accuracy.race import mean_and_spread
from simsiam.runs.run_folder import Run
from simsiam.training.launch import pretrain, resume
from simsiam.utils.files import atomic_write

RESULTS = Path(__file__).parents[1] / "results"
RESNET18 = {"backbone": "resnet18", "width": 32, "image_size": 64, "stem": "small"}


@dataclass(frozen=True)
class Comparison:
    """Two ways to train, by name: what `pretrain` is given."""

    title: str
    network: str
    ways: dict[str, dict[str, Any]]
    folder: Path


COMPARISONS = {
    "distillation": Comparison(
        "A network that learns from a teacher, and one that learns alone",
        "A ResNet-18 of width 32 with random weights, and views of 64 px; the teacher is `lite0`.",
        {
            "simsiam": RESNET18 | {"method": "simsiam"},
            "distillation": RESNET18 | {"method": "distillation", "teacher": "lite0"},
        },
        RESULTS / "distillation",
    ),
    "sprint": Comparison(
        "The recipe `sprint`, and the recipe of a folder with SimSiam",
        "The network and the size of views are what `--minutes` chooses.",
        {"folder": {"method": "simsiam"}, "sprint": {"recipe": "sprint"}},
        RESULTS / "sprint" / "equal_time",
    ),
}


def train(
    source: str, way: Mapping[str, Any], seed: int, minutes: float, run: Path
) -> dict[str, Any]:
    """Train a run, or the rest of it, and return what its page shows."""
    start, resumed = time.monotonic(), (run / "recipe.yaml").exists()
    if resumed:
        resume(run, source=source, logger="none")
    else:
        pretrain(source, out=run, minutes=minutes, logger="none", seed=seed, **way)
    summary, recipe = Run(run).json("summary.json"), Run(run).recipe
    return {
        "image_size": recipe.image_size, "width": recipe.width, "stem": recipe.stem,
        "batch_size": recipe.batch_size,
        "set": Path(source).name, "seed": seed, "minutes": minutes,
        "threads": torch.get_num_threads(), "knn": summary["knn_top1"]["last"],
        "steps": summary["steps"], "epochs": summary["epochs"], "verdict": summary["verdict"],
        "seconds": None if resumed else round(time.monotonic() - start),
    }  # fmt: skip


def write_page(out: Path, name: str) -> None:
    """Write the table of all sets, with the least difference of the two ways."""
    rows = [json.loads(path.read_text()) for path in sorted((out / "cells").glob("*.json"))]
    comparison = COMPARISONS[name]
    ways = comparison.ways
    lines = [
        f"# {comparison.title}", "",
        f"Written by `python benchmarks/equal_time.py {name}`; cells/ has each run. "
        f"{comparison.network} kNN accuracy on the images that the run holds out of its training "
        "images, in percent: mean ± standard deviation over n seeds. The last column is the least "
        "difference of the two with one seed.", "",
        f"| set | minutes | threads | n | {' | '.join(ways)} | least difference |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    groups: dict[tuple[Any, ...], dict[str, dict[int, Mapping[str, Any]]]] = {}
    for row in rows:
        group = groups.setdefault((row["set"], row["minutes"], row["threads"]), {})
        group.setdefault(row["method"], {})[row["seed"]] = row
    for (source, minutes, threads), by_way in groups.items():
        seeds = sorted(set.intersection(*(set(by_way.get(way, ())) for way in ways)))
        if not seeds:
            continue
        first, second = ([by_way[way][seed]["knn"] for seed in seeds] for way in ways)
        least = min(b - a for a, b in zip(first, second))
        lines.append(
            f"| {source} | {minutes:g} | {threads} | {len(seeds)} | {mean_and_spread(first)} | "
            f"{mean_and_spread(second)} | {least:+.1f} |"
        )
    with atomic_write(out / "README.md") as part:
        part.write_text("\n".join(lines) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("sources", nargs="*", metavar="SOURCE")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args(arguments)
    comparison = COMPARISONS[options.comparison]
    out = options.out or comparison.folder
    runs = options.runs or Path("runs") / options.comparison
    (out / "cells").mkdir(parents=True, exist_ok=True)
    for seed in range(0 if options.page else options.seeds):
        for source in options.sources:
            for name, way in comparison.ways.items():
                cell = f"{Path(source).name}-{name}-{options.minutes:g}-{seed}"
                path = out / "cells" / f"{cell}.json"
                if path.exists():
                    continue
                row = train(source, way, seed, options.minutes, runs / cell) | {"method": name}
                with atomic_write(path) as part:
                    part.write_text(json.dumps(row) + "\n")
                print(f"{cell}: {row['knn']} % ({row['verdict']})", flush=True)
                write_page(out, options.comparison)
    write_page(out, options.comparison)


if __name__ == "__main__":
    main()
