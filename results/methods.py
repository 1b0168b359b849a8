"""Run every method at the demo's size: kNN on the test images of `shapes`, gauges and verdict.

    python results/methods.py --runs runs/methods --seeds 0 1 2 --out results/methods

Writes .json and .md. All rows use SimSiam's views and, where it works, its optimizer. Heads, queue
and prototypes are reduced to the demo's size. The base lr was chosen once, by kNN on the val split
(TUNED lists what was tried). Existing runs are reused; with --rows and --seeds two processes can
share the work.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, median, stdev

import simsiam
from simsiam.laboratory.demo import knn_test_accuracy
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import open_source
from simsiam.utils.files import atomic_write

HEADS = {"proj_layers": 2, "proj_hidden": 512}
NORMED = {**HEADS, "dim": 128, "head_bn": ("proj_hidden", "proj_out")}
MOCO = {
    **NORMED,
    "queue": 1024,
    "target_decay": 0.99,
    "base_lr": 0.7,
}  # 0.999 averages over more than the 868 steps
SMALL = {
    "simsiam": {},  # the demo, but for the weight decay
    "byol": {**HEADS, "dim": 256, "pred_dim": 512, "base_lr": 0.7},
    "simclr": {**NORMED, "tau": 0.5, "base_lr": 0.7},
    "moco_v2": MOCO,
    "moco_v2_plus": MOCO,
    "swav": {
        **HEADS, "dim": 128, "prototypes": 128, "freeze_prototypes": 28,
        "sinkhorn_epsilon": 0.02, "base_lr": 0.7,
    },
    "barlow_twins": {
        **HEADS, "dim": 512, "loss_scale": 0.1,
        "optimizer": "lars", "exclude": "bias_and_norm", "weight_decay": 1e-6,
        "warmup_epochs": 1, "base_lr": 0.6,
    },
    "vicreg": {**HEADS, "dim": 512, "base_lr": 0.02},
    "supervised": {"dim": 10},
}  # fmt: skip
# What was tried with seed 0 and 14 epochs: verdict, and kNN on the 1,000 images of the val split.
TUNED = """
byol            lr 0.7: partial collapse, 56.8   0.2: healthy, 48.2
simclr          lr 2: healthy, 86.3   0.7: healthy, 91.7   0.2: healthy, 83.7
moco_v2         its own head, without batch norm, lr 2, 0.7, 0.2, 0.06: collapsed, 27.6 to 29.6
                batch norm at both layers, lr 0.7: not converging, 61.1
swav            its own head, lr 0.2: partial collapse, 28.5; at 2 and 0.06 the loss stays at chance
                batch norm at both layers, lr 0.7: collapsed, 61.8
                the same with epsilon 0.02 for 0.05: healthy, 81.4
                its own head, lr 0.7, epsilon 0.02: partial collapse, 83.4
barlow_twins    sgd, lr 0.2: healthy, 55.3 (lambda 0.08, lr 0.7 and 0.07: collapsed, 37)
                lars, lr 0.6: healthy, 67.5
vicreg          sgd, lr 0.02: healthy, 75.8   lars, lr 0.6: healthy, 68.9
"""
GAUGES = ("loss", "z_rank", "h_rank", "z_std_sqrt_d")


def measure(row: str, seed: int, runs: Path) -> dict:
    out = runs / f"{row}-{seed}"
    if not (out / "summary.json").exists():
        if out.exists():
            simsiam.resume(out)
        else:
            settings = {"weight_decay": 1e-4, **SMALL[row]}
            if row != "simsiam":
                settings |= {"method": row, "equal_terms": True}
            simsiam.pretrain("shapes", out=out, seed=seed, knn_every=28, **settings)
    run = Run(out)
    summary, environment = run.json("summary.json"), run.json("environment.json")
    lines = [line for line in run.metrics() if "loss" in line]
    recent = lines[-max(3, len(lines) // 10) :]
    gauges = {name: round(median(line[name] for line in recent), 3) for name in GAUGES}
    top1 = round(knn_test_accuracy(simsiam.load(out), open_source("shapes"), run.recipe), 2)
    record = {"seed": seed, "knn_top1": top1, "verdict": summary["verdict"], **gauges}
    return record | {
        "seconds": summary["training_seconds"],
        "commit": environment["commit"],
        "threads": environment["threads"],
    }


def table(records: dict[str, list[dict]]) -> str:
    head = ("row", "kNN, %", *GAUGES, "verdicts", "s a run", "n")
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row, results in records.items():
        top1 = [r["knn_top1"] for r in results]
        spread = f" ± {stdev(top1):.1f}" if len(top1) > 1 else ""
        values = [f"{mean(r[name] for r in results):.2f}" for name in GAUGES]
        verdicts = [r["verdict"] for r in results]
        verdict_counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
        seconds = f"{mean(r['seconds'] for r in results):.0f}"
        lines.append(
            " | ".join(
                (
                    f"`{row}`",
                    f"{mean(top1):.1f}{spread}",
                    *values,
                    verdict_counts,
                    seconds,
                    str(len(top1)),
                )
            )
        )
    return "".join(f"| {line} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", required=True, type=Path)
    parser.add_argument("--rows", nargs="+", default=list(SMALL))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", help="without suffix; nothing is written without it")
    options = parser.parse_args()
    records: dict[str, list[dict]] = {row: [] for row in options.rows}
    for seed in options.seeds:
        for row in options.rows:
            records[row].append(measure(row, seed, options.runs))
            print(row, records[row][-1], file=sys.stderr, flush=True)
    print(table(records))
    if options.out:
        for suffix, text in (
            (".md", table(records)),
            (".json", json.dumps({"small": SMALL, "runs": records}, indent=1)),
        ):
            with atomic_write(Path(options.out + suffix)) as part:
                part.write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    main()
