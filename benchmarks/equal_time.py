"""Compare two ways to train a network in equal time, and make the page results/COMPARISON.

    python benchmarks/equal_time.py COMPARISON SOURCE [SOURCE ...] [--minutes N] [--seeds N]
        [--runs FOLDER] [--out FOLDER] [--page]

COMPARISON is `distillation` (SimSiam, and learning from the teacher `lite0`, whose features are
computed within the time) or `sprint` (the recipe of a folder, and `--recipe sprint`). SOURCE is a
folder with labeled images. A ResNet-18 of width 32 with random weights is trained on views of 64
px. Each run is a file in OUT/cells; what is there is not trained again, so the command can be
stopped and started at any time. Start it with OMP_NUM_THREADS=1 to give each run one core. `--page`
writes only the page.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from simsiam.laboratory.time_to_accuracy.race import mean_and_spread
from simsiam.runs.run_folder import Run
from simsiam.training.launch import pretrain, resume
from simsiam.utils.files import atomic_write

RESULTS = Path(__file__).parents[1] / "results"
NETWORK: dict[str, Any] = {"backbone": "resnet18", "width": 32, "image_size": 64}
Ways = dict[str, dict[str, Any]]  # two, by name: what `pretrain` is given
COMPARISONS: dict[str, Ways] = {
    "distillation": {
        "simsiam": {"method": "simsiam"},
        "distillation": {"method": "distillation", "teacher": "lite0"},
    },
    "sprint": {"folder": {}, "sprint": {"recipe": "sprint"}},
}
FOLDERS = {"distillation": "distillation", "sprint": "sprint/equal_time"}
TITLES = {
    "distillation": "A network that learns from a teacher, and one that learns alone",
    "sprint": "The recipe `sprint`, and the recipe of a folder",
}


def train(source: str, way: Mapping[str, Any], seed: int, minutes: float, run: Path) -> Any:
    """Train a run, or the rest of it, and return what its page shows."""
    start, resumed = time.monotonic(), (run / "recipe.yaml").exists()
    if resumed:
        resume(run, source=source, logger="none")
    else:
        pretrain(source, out=run, minutes=minutes, logger="none", seed=seed, **NETWORK, **way)
    summary = Run(run).json("summary.json")
    return {
        "set": Path(source).name, "seed": seed, "minutes": minutes,
        "threads": torch.get_num_threads(), "knn": summary["knn_top1"]["last"],
        "steps": summary["steps"], "epochs": summary["epochs"], "verdict": summary["verdict"],
        "seconds": None if resumed else round(time.monotonic() - start),
    }  # fmt: skip


def write_page(out: Path, comparison: str) -> None:
    """Write the table of all sets, with the least difference of the two ways."""
    rows = [json.loads(path.read_text()) for path in sorted((out / "cells").glob("*.json"))]
    ways = COMPARISONS[comparison]
    lines = [
        f"# {TITLES[comparison]}", "",
        f"Written by `python benchmarks/equal_time.py {comparison}`; cells/ has each run. A "
        "ResNet-18 of width 32 with random weights, views of 64 px, and equal minutes. "
        "kNN accuracy on the images that the run holds out of its training images, in percent: "
        "mean ± standard deviation over n seeds. The last "
        "column is the least difference of the two with one seed.", "",
        f"| set | minutes | threads | n | {' | '.join(ways)} | least difference |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    groups: dict[tuple[Any, ...], dict[str, dict[int, Mapping[str, Any]]]] = {}
    for row in rows:
        group = groups.setdefault((row["set"], row["minutes"], row["threads"]), {})
        group.setdefault(row["method"], {})[row["seed"]] = row
    for (name, minutes, threads), by_way in groups.items():
        seeds = sorted(set.intersection(*(set(by_way.get(way, ())) for way in ways)))
        if not seeds:
            continue
        first, second = ([by_way[way][seed]["knn"] for seed in seeds] for way in ways)
        least = min(b - a for a, b in zip(first, second))
        lines.append(
            f"| {name} | {minutes:g} | {threads} | {len(seeds)} | {mean_and_spread(first)} | "
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
    comparison = options.comparison
    out = options.out or RESULTS / FOLDERS[comparison]
    runs = options.runs or Path("runs") / comparison
    (out / "cells").mkdir(parents=True, exist_ok=True)
    for seed in range(0 if options.page else options.seeds):
        for source in options.sources:
            for name, way in COMPARISONS[comparison].items():
                cell = f"{Path(source).name}-{name}-{options.minutes:g}-{seed}"
                path = out / "cells" / f"{cell}.json"
                if path.exists():
                    continue
                row = train(source, way, seed, options.minutes, runs / cell) | {"method": name}
                with atomic_write(path) as part:
                    part.write_text(json.dumps(row) + "\n")
                print(f"{cell}: {row['knn']} % ({row['verdict']})", flush=True)
                write_page(out, comparison)
    write_page(out, comparison)


if __name__ == "__main__":
    main()
