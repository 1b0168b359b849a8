"""Add runs on CIFAR-10 to runs.json and README.md.

    python results/appendix_d/collect.py [RUN ...]

Without a run it writes only the page. The commands of the runs are in run.sh.
"""

import json
import sys
from pathlib import Path
from typing import Any

from simsiam.laboratory import drawing
from simsiam.runs.run_folder import Run

HERE = Path(__file__).parent
EPOCHS = 5  # epochs between two points of a curve
CURVES = ("loss", "z_std_sqrt_d", "z_rank", "view_retrieval", "images_per_second", "data_wait")


def record(run: Run) -> dict[str, Any]:
    """Collect what the page needs and its provenance, without the paths of a machine."""
    per_epoch = EPOCHS * run.metrics()[-1]["step"] / run.metrics()[-1]["epoch"]
    lines = [line for line in run.metrics() if line["step"] % per_epoch == 0]
    keys = (
        "protocol",
        "features",
        "checkpoint",
        "top1",
        "top5",
        "n",
        "interval",
        "parameters",
        "chosen",
    )
    return {
        "recipe": run.recipe.replace(source=("cifar10-jpeg",)).to_dict(),
        "summary": run.json("summary.json"),
        "environment": {k: v for k, v in run.json("environment.json").items() if k != "command"},
        "curve": [{k: line[k] for k in ("step", "epoch", *CURVES) if k in line} for line in lines],
        "evaluations": [{k: r[k] for k in keys if k in r} for r in run.evaluations()],
    }


def row(name: str, run: dict[str, Any]) -> list[str]:
    recipe, summary = run["recipe"], run["summary"]
    top1 = {
        r["protocol"]: (r["top1"], r["interval"])
        for r in run["evaluations"]
        if r["features"] == "h"
    }
    accuracies = [
        f"{value:.1f} ({low:.1f} to {high:.1f})"
        for value, (low, high) in (top1[p] for p in ("knn", "linear"))
    ]
    time = f"{summary['training_seconds'] / 60:.1f} at {summary['images_per_second']:,.0f}/s"
    return [
        name,
        f"{recipe['epochs']}",
        f"{recipe['batch_size']}",
        *accuracies,
        summary["verdict"],
        time,
    ]


def table(runs: dict[str, Any]) -> str:
    heads = ["run", "epochs", "batch", "kNN, %", "linear, %", "verdict", "minutes of training"]
    lines = [heads, ["---"] * len(heads), *(row(name, run) for name, run in runs.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    path, page = HERE / "runs.json", HERE / "README.md"
    runs = json.loads(path.read_text()) if path.exists() else {}
    runs |= {Path(folder).name: record(Run(folder)) for folder in sys.argv[1:]}
    path.write_text(json.dumps(runs, indent=1) + "\n")
    curves = {
        metric: {
            name: [[(line["epoch"], line[metric]) for line in run["curve"]]]
            for name, run in runs.items()
        }
        for metric in ("loss", "z_std_sqrt_d")
    }
    drawing.plot_curves(curves, HERE / "curves", "CIFAR-10 (JPEG), one seed each")
    before, _, rest = page.read_text().partition("<!-- runs -->\n")
    after = rest.partition("<!-- / -->")[2]
    page.write_text(f"{before}<!-- runs -->\n\n{table(runs)}\n\n<!-- / -->{after}")


if __name__ == "__main__":
    main()
