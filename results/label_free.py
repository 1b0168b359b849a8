"""Measure which label-free signals follow kNN accuracy, over the checkpoints of finished runs.

    simsiam pretrain CIFAR10 --recipe cifar --backbone resnet18 --width 16 --batch-size 256 \\
        --base-lr 0.2 --epochs 12 --save-every 1 --holdout 0 --log-every 25 --seed S --out runs/S
    (S = 0, 1, 2)
    python results/label_free.py runs/0 runs/1 runs/2 --out results/label_free.json

Prints Spearman's correlations. kNN: 10,000 training images vote on 5,000 test images, with k at
most a sixth of a class. Every signal is a function of one checkpoint (neighbor stability: of two in
a row). The loss and the other measurements of a step are the run's own, logged last before it.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, stdev

import torch
from scipy.stats import spearmanr

from simsiam.data.images import load_into_memory, sample
from simsiam.monitoring.label_free_monitor import label_free_monitor
from simsiam.monitoring.nearest_neighbors import knn_monitor
from simsiam.runs.encoder import eval_transform
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import open_source
from simsiam.training.prepare import build_training_setup
from simsiam.utils.files import atomic_write

GAUGES = ("loss", "z_std_sqrt_d", "z_rank", "z_cosine_squared", "h_rank")


def curves(path: str, until: int | None) -> list[dict]:
    """Measure each kept checkpoint: epoch, kNN, signals, gauges."""
    run = Run(path)
    source = open_source(run.recipe.source, run.recipe.channels)
    assert source.test is not None and source.train.labels is not None, (
        "a labeled source with a test split"
    )
    bank, queries = (
        load_into_memory(sample(s, n), 2**31)[0]
        for s, n in ((source.train, 10_000), (source.test, 5_000))
    )
    setup, transform, previous, rows = (
        build_training_setup(run.recipe),
        eval_transform(run.recipe),
        None,
        [],
    )
    compute = setup.compute
    for file in sorted((run.path / "checkpoints").glob("epoch-*.pt"))[:until]:
        state = torch.load(file, weights_only=True)
        setup.model.load_state_dict(state["model"])
        free = label_free_monitor(
            setup.model, bank, run.recipe, transform, previous, compute=compute
        )
        previous = free.neighbors
        knn, _ = knn_monitor(setup.model, bank, queries, transform, compute=compute)
        logged = [
            line for line in run.metrics() if line["step"] <= state["step"] and "loss" in line
        ][-1]
        rows.append(
            {"epoch": int(file.stem[6:])}
            | knn
            | free.values
            | {name: logged[name] for name in GAUGES}
        )
        print(path, rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--out", required=True)
    parser.add_argument("--until", type=int, help="use the first so many checkpoints")
    options = parser.parse_args()
    curves_by_run = {Path(path).name: curves(path, options.until) for path in options.runs}
    names = [
        name for name in next(iter(curves_by_run.values()))[-1] if name not in ("epoch", "knn_top1")
    ]
    table = {}
    print(
        "| signal | "
        + " | ".join(curves_by_run)
        + " | mean ± std |\n|"
        + "---|" * (len(curves_by_run) + 2)
    )
    for name in names:
        rhos = []
        for rows in curves_by_run.values():
            pairs = [(row[name], row["knn_top1"]) for row in rows if name in row]
            rhos.append(spearmanr(*zip(*pairs, strict=True)).statistic)
        table[name] = {"spearman": [round(r, 3) for r in rhos], "mean": round(mean(rhos), 3)}
        table[name] |= {"std": round(stdev(rhos), 3)} if len(rhos) > 1 else {}
        spread = f" ± {stdev(rhos):.2f}" if len(rhos) > 1 else ""
        print(
            f"| `{name}` | "
            + " | ".join(f"{r:.2f}" for r in rhos)
            + f" | {mean(rhos):.2f}{spread} |"
        )
    with atomic_write(Path(options.out)) as part:
        part.write_text(
            json.dumps(
                {"command": sys.argv, "spearman_with_knn": table, "curves": curves_by_run}, indent=1
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
