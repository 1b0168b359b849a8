"""Fine-tune on few labels of CIFAR-10, pretrained and from scratch, for equal epochs.

    python results/finetune.py SOURCE runs/0 runs/1 runs/2 --labels 500 --epochs 200 \\
        --out results/finetune_500
    python results/finetune.py SOURCE runs/0 runs/1 runs/2 --labels 5000 --epochs 50 \\
        --out results/finetune_5000

The runs are those of results/label_free.py, one per seed. The seed also draws the labels, the head,
the views and, from scratch, the backbone. The curve is measured on 1,000 training images that are
kept apart; the accuracy in the table is that of the last epoch on the test images. If it is
stopped, the same command continues.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

from simsiam.data.images import hold_out
from simsiam.evaluation.finetune import finetune, plot_accuracy_curves
from simsiam.sources.open_source import open_source
from simsiam.utils.files import atomic_write


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source")
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--labels", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--out", required=True, help="without suffix: .json and .png are written")
    options = parser.parse_args()
    source = open_source([options.source])
    assert source.test is not None, "a source with a test split"
    train, val = hold_out(source.train, 1000, 0)
    settings = {"val": val, "epochs": options.epochs, "labels": options.labels}
    records: dict[str, list[dict]] = {"pretrained": [], "from scratch": []}
    for seed, run in enumerate(options.runs):
        for start, results in records.items():
            out = Path(run) / "finetuning" / f"{options.labels} {start}"
            scratch = start == "from scratch"
            results.append(
                finetune(
                    run, train, source.test, out=out, seed=seed, from_scratch=scratch, **settings
                )
            )
            print(
                f"{options.labels} labels, seed {seed}, {start}: {results[-1]['top1']:.2f}",
                flush=True,
            )
    top1 = {start: [result["top1"] for result in results] for start, results in records.items()}
    for start, scores in top1.items():
        spread = f" ± {stdev(scores):.2f}" if len(scores) > 1 else ""
        print(f"{start}: {mean(scores):.2f}{spread}, n = {len(scores)}")
    title = f"CIFAR-10 (JPEG), {options.labels:,} labels"
    plot_accuracy_curves(
        {k: [r["val_top1"] for r in rs] for k, rs in records.items()},
        f"{options.out}.png",
        title=title,
    )
    with atomic_write(Path(f"{options.out}.json")) as part:
        part.write_text(json.dumps({"test_top1": top1, "runs": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
