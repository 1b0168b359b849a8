"""How many labels the queue of `explore` saves: a simulated person answers right.

    python benchmarks/explore_queue.py FILE.parquet [...] [--seeds 5]

FILE.parquet is an embedding with labels. For each seed, 100 random images are labeled; the mean
accuracy of the predictions for the other images is the target. Then a person labels in the order of
the queue, in steps of 5, until the predictions are as accurate. Prints the number of labels.
"""

import argparse
import time

import numpy as np

from simsiam.embeddings.probe import predict_labels, standardize
from simsiam.embeddings.table import read_embeddings
from simsiam.explore.queue import Teacher

STEP, TARGET = 5, 100


def accuracy(x, labels, rows):
    """Fit to some rows; return the accuracy on the others, and the confidences."""
    result = predict_labels(x, {row: labels[row] for row in rows})
    predicted = np.array(result.classes)[result.predicted]
    others = np.setdiff1d(np.arange(len(labels)), rows)
    return (predicted[others] == labels[others]).mean(), result.confidence


def summary(targets, needed, missed):
    """Say what was measured: accuracies of random labels, and labels of the queue, by seed."""
    note = f" ({missed} of {len(needed)} seeds stop at {2 * TARGET} without it)" if missed else ""
    spread = np.std(targets, ddof=1) if len(targets) > 1 else 0.0
    return (
        f"{TARGET} random labels reach {100 * np.mean(targets):.1f} % "
        f"± {100 * spread:.1f}; the queue takes {needed} labels{note}, "
        f"mean {np.mean(needed):.0f}: {100 - np.mean(needed):.0f} % fewer"
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    for file in options.files:
        images = read_embeddings(file)
        if images.labels:
            labels = np.array(images.labels)
        else:  # as in names like n01440764-7.jpg
            labels = np.array([path.split("-")[0] for path in images.paths])
        x, teacher = standardize(images), Teacher(images.vectors)
        targets, needed, missed = [], [], 0
        start = time.perf_counter()
        for seed in range(options.seeds):
            rng = np.random.default_rng(seed)
            target, _ = accuracy(x, labels, rng.choice(len(x), TARGET, replace=False))
            targets.append(target)
            rows, confidence, reached = [int(rng.integers(len(x)))], None, 0
            while len(rows) < 2 * TARGET and reached < target:
                rows += teacher.choose(rows, confidence, STEP - len(rows) % STEP)
                if len(set(labels[rows])) > 1:
                    reached, confidence = accuracy(x, labels, rows)
            needed.append(len(rows))
            missed += reached < target
        seconds = time.perf_counter() - start
        print(f"{file}: {summary(targets, needed, missed)} ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
