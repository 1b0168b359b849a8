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

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cells import argument_parser, measure_once, train_or_resume, write_page

from simsiam.laboratory.time_to_accuracy.race import mean_and_spread

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
    source: str, name: str, way: Mapping[str, Any], seed: int, minutes: float, run: Path
) -> dict[str, Any]:
    """Train a run, or the rest of it, and return what its page shows."""
    resumed = (run / "recipe.yaml").exists()
    trained = train_or_resume(source, run, minutes=minutes, seed=seed, **way)
    summary, recipe = trained.json("summary.json"), trained.recipe
    return {
        "image_size": recipe.image_size, "width": recipe.width, "stem": recipe.stem,
        "batch_size": recipe.batch_size,
        "set": Path(source).name, "method": name, "seed": seed, "minutes": minutes,
        "knn": summary["knn_top1"]["last"], "steps": summary["steps"],
        "epochs": summary["epochs"], "verdict": summary["verdict"],
        **({"seconds": None} if resumed else {}),
    }  # fmt: skip


def in_range(values: Sequence[float]) -> str:
    """Format the least and the largest of some numbers."""
    return f"{min(values):,.4g} to {max(values):,.4g}" if values else "not known"


def make_page(out: Path, name: str) -> None:
    """Write the table of all sets, with the least difference of the two ways."""
    rows = [json.loads(path.read_text()) for path in sorted((out / "cells").glob("*.json"))]
    comparison = COMPARISONS[name]
    ways = comparison.ways
    lines = [
        f"# {comparison.title}", "",
        f"Written by `python benchmarks/equal_time.py {name} --page` from cells/, which has each "
        f"run; the same command with `SOURCE ... --minutes N` trains what is missing. "
        f"{comparison.network} kNN accuracy on the images that the run holds out of its training "
        "images, in percent: mean ± standard deviation over n seeds; then the least difference of "
        "the two with one seed. `--minutes` chooses the number of steps at the start, for the "
        "speed at that moment, so what a run took is given besides, from start to end.", "",
        f"| set | `--minutes` | threads | n | {' | '.join(ways)} | least difference | "
        f"{' | '.join(f'steps, minutes of {way}' for way in ways)} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    groups: dict[tuple[Any, ...], dict[str, dict[int, Mapping[str, Any]]]] = {}
    for row in rows:
        group = groups.setdefault((row["set"], row["minutes"], row["threads"]), {})
        group.setdefault(row["method"], {})[row["seed"]] = row
    for (source, minutes, threads), by_way in groups.items():
        seeds = sorted(set.intersection(*(set(by_way.get(way, ())) for way in ways)))
        if not seeds:
            continue
        pairs = [[by_way[way][seed] for seed in seeds] for way in ways]
        first, second = ([row["knn"] for row in rows] for rows in pairs)
        least = min(b - a for a, b in zip(first, second))
        cost = [
            f"{in_range([row['steps'] for row in rows])}, "
            f"{in_range([round(row['seconds'] / 60, 1) for row in rows if row['seconds']])}"
            for rows in pairs
        ]
        lines.append(
            f"| {source} | {minutes:g} | {threads} | {len(seeds)} | {mean_and_spread(first)} | "
            f"{mean_and_spread(second)} | {least:+.1f} | {' | '.join(cost)} |"
        )
    write_page(out, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, and write the page."""
    parser = argument_parser(__doc__)
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("sources", nargs="*", metavar="SOURCE")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    comparison = COMPARISONS[options.comparison]
    out = options.out or comparison.folder
    runs = options.runs or Path("runs") / options.comparison
    for seed in range(0 if options.page else options.seeds):
        for source in options.sources:
            for name, way in comparison.ways.items():
                cell = f"{Path(source).name}-{name}-{options.minutes:g}-{seed}"
                measure = partial(train, source, name, way, seed, options.minutes, runs / cell)
                measure_once(out / "cells" / f"{cell}.json", measure)
    make_page(out, options.comparison)


if __name__ == "__main__":
    main()
