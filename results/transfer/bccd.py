"""Detect blood cells (BCCD, 364 photographs, a Pascal VOC folder) from several starting weights.

    python results/transfer/bccd.py list BCCD/ --out bccd.txt       # photographs of train and val
    simsiam pretrain bccd.txt --out RUN --backbone resnet18 --image-size 128 --epochs 100 \\
        --batch-size 32 --base-lr 0.2
    python results/transfer/bccd.py run BCCD/ RUN --steps 300 1000 --seeds 2
    python results/transfer/bccd.py table RUN                       # the results so far

`run` fine-tunes from the run's backbone, from random weights, and from whatever else --only names,
on train and val, and tests on test: one row for each start, number of steps and seed. If it is
stopped, the same command continues. `table` writes bccd.json next to this file.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from simsiam.detection.annotations import open_annotated
from simsiam.detection.transfer import transfer
from simsiam.runs.run_folder import Run
from simsiam.utils.files import atomic_write

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    listing = verbs.add_parser("list")
    listing.add_argument("source", type=Path)
    listing.add_argument("--out", type=Path, required=True)
    running = verbs.add_parser("run")
    running.add_argument("source", type=Path)
    running.add_argument("run")
    running.add_argument("--steps", type=int, nargs="+", required=True)
    running.add_argument("--seeds", type=int, default=2)
    running.add_argument(
        "--only",
        nargs="+",
        default=["scratch", "run"],
        help="scratch, run, or weights as for --init",
    )
    telling = verbs.add_parser("table")
    telling.add_argument("run")
    options = parser.parse_args()
    if options.verb == "list":
        splits = open_annotated(options.source).splits
        keys = sorted(key for split in ("train", "val") for key in splits[split].images.keys)
        options.out.write_text("".join(f"{options.source.resolve() / key}\n" for key in keys))
    elif options.verb == "run":
        for steps in options.steps:
            for seed in range(options.seeds):
                for start in options.only:
                    own = {"scratch": {"from_scratch": True}, "run": {}}.get(start, {"init": start})
                    transfer(options.run, options.source, steps=steps, seed=seed, **own)
    if options.verb != "list":
        table(Run(options.run))


def table(run: Run) -> None:
    """Print a row for each start and number of steps; write every record without its paths."""
    groups = defaultdict(list)
    records = sorted(
        run.transfers(), key=lambda r: (r["parameters"]["steps"], r["init"]["from"], r["seed"])
    )
    for record in records:
        groups[record["parameters"]["steps"], record["init"]["from"]].append(record)
    print(
        "| steps | from | AP50 | "
        + " | ".join(f"AP50 of {name}" for name in records[0]["classes"])
        + " | AP | seeds |"
    )
    for (steps, start), runs in groups.items():
        of_class = [
            [r["metrics"]["coco_box"]["AP50_of_class"][name] for r in runs]
            for name in records[0]["classes"]
        ]
        numbers = [[r["metrics"]["coco_box"]["AP50"] for r in runs], *of_class]
        numbers.append([r["metrics"]["coco_box"]["AP"] for r in runs])
        print(f"| {steps} | {start} | " + " | ".join(map(spread, numbers)) + f" | {len(runs)} |")
    for record in records:
        record["asked"].pop("source")
    with atomic_write(HERE / "bccd.json") as part:
        part.write_text(json.dumps(records, indent=1) + "\n")


def spread(numbers: list[float]) -> str:
    return f"{mean(numbers):.1f}" + (f" ± {stdev(numbers):.1f}" if len(numbers) > 1 else "")


if __name__ == "__main__":
    main()
