"""Compare a small network that learns from a teacher with one that learns alone, in equal time.

    python benchmarks/distillation.py SOURCE [SOURCE ...] [--minutes N] [--seeds N]
        [--runs FOLDER] [--out FOLDER] [--page]

SOURCE is a folder with labeled images. A ResNet-18 of width 32 with random
weights is trained on views of 64 px for `--minutes` by SimSiam, and by the row `distillation` with
the teacher `lite0`, whose features are computed within this time. Each run is a file in OUT/cells;
what is there is not trained again, so the command can be stopped and started at any time. Start it
with OMP_NUM_THREADS=1 to give each run one core. `--page` writes only the page.
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

OUT = Path(__file__).parents[1] / "results" / "distillation"
NETWORK = {"backbone": "resnet18", "width": 32, "image_size": 64}
METHODS: dict[str, dict[str, Any]] = {
    "simsiam": {"method": "simsiam"},
    "distillation": {"method": "distillation", "teacher": "lite0"},
}


def train(source: str, method: str, seed: int, minutes: float, run: Path) -> dict[str, Any]:
    """Train a run, or the rest of it, and return what its page shows."""
    settings: dict[str, Any] = NETWORK | METHODS[method] | {"seed": seed}
    start, resumed = time.monotonic(), (run / "recipe.yaml").exists()
    if resumed:
        resume(run, source=source, logger="none")
    else:
        pretrain(source, out=run, minutes=minutes, logger="none", **settings)
    summary = Run(run).json("summary.json")
    return {
        "set": Path(source).name, "method": method, "seed": seed, "minutes": minutes,
        "threads": torch.get_num_threads(), "knn": summary["knn_top1"]["last"],
        "steps": summary["steps"], "epochs": summary["epochs"], "verdict": summary["verdict"],
        "seconds": None if resumed else round(time.monotonic() - start),
    }  # fmt: skip


def write_page(out: Path) -> None:
    """Write the table of all sets, with the difference of the two methods of each seed."""
    rows = [json.loads(path.read_text()) for path in sorted((out / "cells").glob("*.json"))]
    lines = [
        "# A network that learns from a teacher, and one that learns alone", "",
        "Written by `python benchmarks/distillation.py`; cells/ has each run. A ResNet-18 of width "
        "32 with random weights, views of 64 px, the recipe of a folder; the teacher is `lite0`. "
        "kNN accuracy on the images that the run holds out of its training images, in percent: "
        "mean ± standard deviation over n seeds. The last "
        "column is the least difference of the two methods with one seed.", "",
        "| set | minutes | threads | n | simsiam | distillation | least difference |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    groups: dict[tuple[Any, ...], dict[str, dict[int, Mapping[str, Any]]]] = {}
    for row in rows:
        group = groups.setdefault((row["set"], row["minutes"], row["threads"]), {})
        group.setdefault(row["method"], {})[row["seed"]] = row
    for (name, minutes, threads), methods in groups.items():
        seeds = sorted(set.intersection(*(set(methods.get(method, ())) for method in METHODS)))
        if not seeds:
            continue
        alone, taught = ([methods[m][seed]["knn"] for seed in seeds] for m in METHODS)
        least = min(b - a for a, b in zip(alone, taught))
        lines.append(
            f"| {name} | {minutes:g} | {threads} | {len(seeds)} | {mean_and_spread(alone)} | "
            f"{mean_and_spread(taught)} | {least:+.1f} |"
        )
    with atomic_write(out / "README.md") as part:
        part.write_text("\n".join(lines) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("sources", nargs="*", metavar="SOURCE")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args(arguments)
    (options.out / "cells").mkdir(parents=True, exist_ok=True)
    for seed in range(0 if options.page else options.seeds):
        for source in options.sources:
            for method in METHODS:
                name = f"{Path(source).name}-{method}-{options.minutes:g}-{seed}"
                path = options.out / "cells" / f"{name}.json"
                if path.exists():
                    continue
                row = train(source, method, seed, options.minutes, options.runs / name)
                with atomic_write(path) as part:
                    part.write_text(json.dumps(row) + "\n")
                print(f"{name}: {row['knn']} % ({row['verdict']})", flush=True)
                write_page(options.out)
    write_page(options.out)


if __name__ == "__main__":
    main()
