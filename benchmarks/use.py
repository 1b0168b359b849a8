"""From a folder of photographs to answers: every verb a user needs, timed, and what it found held against the truth.

    python benchmarks/use.py IMAGENETTE/train --work runs/use --out results/use.json

IMAGENETTE/train has a folder a class. 200 images of each of its ten classes and 20 copies of some, resized and
compressed again, go into one folder without labels; then the commands below run as a user would type them. The truth is
used to write the few labels that `probe` gets, and to judge. Stopped and started again, it goes on.
"""

import argparse
import csv
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from simsiam.runs.run_folder import Run
from simsiam.utils.files import atomic_write, write_csv

EACH, COPIES, LABELS = 200, 20, 5  # images of a class; copies in all; labels of a class
TRAINING = [
    "--backbone",
    "resnet18",
    "--width",
    "32",
    "--image-size",
    "96",
    "--batch-size",
    "128",
    "--workers",
    "1",
]


def plant(classes: Path, photos: Path) -> dict[str, str]:
    """Fill the folder; returns the class of every file in it. Copies are named so that their original can be told."""
    rng, truth = np.random.default_rng(0), {}
    photos.mkdir(parents=True)
    for folder in sorted(path for path in classes.iterdir() if path.is_dir()):
        for path in sorted(folder.iterdir())[:EACH]:
            shutil.copy(path, photos / path.name)
            truth[path.name] = folder.name
    for name in rng.choice(sorted(truth), COPIES, replace=False):
        side, quality = int(rng.integers(64, 449)), int(rng.integers(10, 96))
        image = (
            Image.open(photos / name).convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        )
        copy = f"{Path(name).stem} copy {side}px q{quality}.jpg"
        image.save(photos / copy, quality=quality)
        truth[copy] = truth[name]
    return truth


def simsiam(*words: object) -> dict[str, object]:
    """Run a verb; returns its command, seconds on the wall and of processor time, memory at its peak, and last line."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "simsiam", *map(str, words)], capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"simsiam {words[0]} failed: {done.stderr}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    about = {
        "command": " ".join(["simsiam", *map(str, words)]),
        "seconds": round(time.monotonic() - start, 1),
    }
    about |= {"processor_seconds": round(used, 1), "said": done.stdout.strip().splitlines()[-1]}
    print(json.dumps(about), flush=True)
    return about


def rows(path: str) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("classes", type=Path)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--work", type=Path, default=Path("runs/use"), help="a new folder")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    out, classes = asked.out.absolute(), asked.classes.absolute()
    asked.work.mkdir(parents=True, exist_ok=True)
    os.chdir(asked.work)
    if not Path("truth.csv").exists():
        shutil.rmtree("photos", ignore_errors=True)
        write_csv(Path("truth.csv"), ("path", "label"), plant(classes, Path("photos")).items())
    truth = {row["path"]: row["label"] for row in rows("truth.csv")}
    names = sorted(name for name in truth if " copy " not in name)
    few = [
        n
        for c in sorted(set(truth.values()))
        for n in [n for n in names if truth[n] == c][:: EACH // LABELS]
    ]
    write_csv(Path("labels.csv"), ("path", "label"), [(n, truth[n]) for n in few])

    begun = Path("run/recipe.yaml").exists()
    Path("photos.parquet").unlink(missing_ok=True)
    verbs = [
        simsiam("resume", "run")
        if begun
        else simsiam("pretrain", "photos", "--out", "run", "--epochs", asked.epochs, *TRAINING),
        simsiam("embed", "run", "--out", "photos.parquet"),
        simsiam("duplicates", "photos.parquet", "--out", "copies.csv", "--html", "copies.html"),
        simsiam("neighbors", "photos.parquet", names[0], "--html", "near.html"),
        simsiam("cluster", "photos.parquet", "--out", "clusters.csv", "--html", "clusters.html"),
        simsiam("outliers", "photos.parquet", "--out", "odd.csv", "--html", "odd.html"),
        simsiam("probe", "photos.parquet", "labels.csv", "--out", "all.csv"),
        simsiam("report", "run"),
    ]
    groups: dict[str, set[str]] = {}
    for row in rows("copies.csv"):
        groups.setdefault(row["group"], set()).add(
            row["path"].split(" copy ")[0].removesuffix(".JPEG")
        )
    planted = {name.split(" copy ")[0] for name in truth if " copy " in name}
    found = {next(iter(stems)) for stems in groups.values() if len(stems) == 1} & planted
    given = set(few)
    told = [
        (float(r["confidence"]), r["predicted"] == truth[r["path"]])
        for r in rows("all.csv")
        if r["path"] not in given
    ]
    summary = Run("run").json("summary.json")
    judged = {
        "images": len(truth),
        "verdict": summary["verdict"],
        "steps": summary["steps"],
        "training_seconds": round(summary["training_seconds"], 1),
        "copies_planted": len(planted),
        "copies_found": len(found),
        "false_groups": sum(len(stems) > 1 or not stems <= planted for stems in groups.values()),
        "probe_top1_unlabeled": round(100 * sum(right for _, right in told) / len(told), 1),
        "probe_mean_confidence": round(100 * sum(sure for sure, _ in told) / len(told), 1),
        "report_megabytes": round(Path("run/report.html").stat().st_size / 1e6, 1),
    }
    print(json.dumps(judged, indent=1))
    here = Run("run").json("environment.json")
    machine = {
        "device": here["device"],
        "commit": here["commit"],
        "python": platform.python_version(),
    }
    with atomic_write(out) as part:
        part.write_text(
            json.dumps({"machine": machine, "judged": judged, "verbs": verbs}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
