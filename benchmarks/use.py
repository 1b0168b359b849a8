"""Time every verb that a new user needs, and compare the results with the truth.

    python benchmarks/use.py IMAGENETTE/train --work runs/use --out results/use.json

IMAGENETTE/train has one folder per class. 200 images of each of its ten classes and 20 copies of
some of them, resized and compressed again, go into one folder without labels. Then the commands
below run as a user would type them. The truth is used only to write the few labels for `probe`, and
to judge the results. If it is stopped, the same command continues.
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
from simsiam.utils.files import write_csv, write_text

EACH, COPIES, LABELS = 200, 20, 5  # images per class; copies in all; labels per class
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
    """Fill the folder; return the class of every file. A copy's name says what its original is."""
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


def simsiam(*arguments: object) -> dict[str, object]:
    """Run a verb; return its command, wall-clock and processor seconds, and its last line."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = subprocess.run(
        [sys.executable, "-m", "simsiam", *map(str, arguments)], capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        sys.exit(f"simsiam {arguments[0]} failed: {process.stderr}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    record = {
        "command": " ".join(["simsiam", *map(str, arguments)]),
        "seconds": round(time.monotonic() - start, 1),
    }
    record |= {"processor_seconds": round(used, 1), "said": process.stdout.strip().splitlines()[-1]}
    print(json.dumps(record), flush=True)
    return record


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
    options = parser.parse_args()
    out, classes = options.out.absolute(), options.classes.absolute()
    options.work.mkdir(parents=True, exist_ok=True)
    os.chdir(options.work)
    if not Path("truth.csv").exists():
        shutil.rmtree("photos", ignore_errors=True)
        write_csv(Path("truth.csv"), ("path", "label"), plant(classes, Path("photos")).items())
    truth = {row["path"]: row["label"] for row in rows("truth.csv")}
    names = sorted(name for name in truth if " copy " not in name)
    labeled_names = [
        n
        for c in sorted(set(truth.values()))
        for n in [n for n in names if truth[n] == c][:: EACH // LABELS]
    ]
    write_csv(Path("labels.csv"), ("path", "label"), [(n, truth[n]) for n in labeled_names])

    is_started = Path("run/recipe.yaml").exists()
    Path("photos.parquet").unlink(missing_ok=True)
    verbs = [
        simsiam("resume", "run")
        if is_started
        else simsiam("pretrain", "photos", "--out", "run", "--epochs", options.epochs, *TRAINING),
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
    found_copies = {next(iter(stems)) for stems in groups.values() if len(stems) == 1} & planted
    labeled = set(labeled_names)
    results = [
        (float(r["confidence"]), r["predicted"] == truth[r["path"]])
        for r in rows("all.csv")
        if r["path"] not in labeled
    ]
    summary = Run("run").json("summary.json")
    judgment = {
        "images": len(truth),
        "verdict": summary["verdict"],
        "steps": summary["steps"],
        "training_seconds": round(summary["training_seconds"], 1),
        "copies_planted": len(planted),
        "copies_found": len(found_copies),
        "false_groups": sum(len(stems) > 1 or not stems <= planted for stems in groups.values()),
        "probe_top1_unlabeled": round(100 * sum(right for _, right in results) / len(results), 1),
        "probe_mean_confidence": round(100 * sum(sure for sure, _ in results) / len(results), 1),
        "report_megabytes": round(Path("run/report.html").stat().st_size / 1e6, 1),
    }
    print(json.dumps(judgment, indent=1))
    environment = Run("run").json("environment.json")
    machine = {
        "device": environment["device"],
        "commit": environment["commit"],
        "python": platform.python_version(),
    }
    report = {"machine": machine, "judged": judgment, "verbs": verbs}
    write_text(out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
