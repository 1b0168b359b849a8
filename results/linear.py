"""Compare the cached linear protocol with scikit-learn's logistic regression.

    python results/linear.py RUN [SOURCE] --out results/linear.json

Both learn from the same features of all training images and are tested on the test split. C is
chosen as the protocol chooses its cell, on a fifth of each class. The best C on the test images (an
oracle) is reported too.
"""

import argparse
import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from simsiam.config.protocols import Settings
from simsiam.data.images import load_into_memory
from simsiam.evaluation.frozen import (
    UNTRAINED_NETWORK,
    FrozenNetwork,
    sample_per_class,
    split_train_test,
)
from simsiam.evaluation.protocol_linear import train_on_cached_features
from simsiam.model.precision import Compute
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import open_source
from simsiam.utils.files import atomic_write

CS = [10.0**n for n in range(-2, 6)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("source", nargs="?")
    parser.add_argument("--features", nargs="+", default=["h", UNTRAINED_NETWORK])
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    run, settings = Run(options.run), Settings()
    train, test, _ = split_train_test(
        open_source([options.source] if options.source else run.recipe.source), require_labels=True
    )
    (train, _), (test, _) = load_into_memory(train, 2**31), load_into_memory(test, 2**31)
    compute = Compute.pick("cpu")
    frozen = FrozenNetwork(run, "last", train, replace(test, labels=None), compute=compute)
    rows = {}
    for kind in options.features:
        features = frozen.features(kind).standardize()
        truth = test.labels[frozen.test_indices]
        ours = 100 * float(
            (
                train_on_cached_features(features, kind, settings, compute.device)
                .predictions[0][:, 0]
                .numpy()
                == truth
            ).mean()
        )
        x, y = features.train_features.numpy(), features.train_labels.numpy()
        held_out = sample_per_class(y, np.ceil(np.bincount(y) / 5).astype(int), [settings.seed])
        kept = np.setdiff1d(np.arange(len(x)), held_out)
        val_scores = [
            LogisticRegression(C=c, max_iter=500)
            .fit(x[kept], y[kept])
            .score(x[held_out], y[held_out])
            for c in CS
        ]
        test_scores = [
            100
            * LogisticRegression(C=c, max_iter=500)
            .fit(x, y)
            .score(features.test_features.numpy(), truth)
            for c in CS
        ]
        best = int(np.argmax(val_scores))
        row = {
            "cached": ours,
            "scikit_learn": test_scores[best],
            "C": CS[best],
            "best_C_on_test": max(test_scores),
        }
        rows[kind] = {k: round(v, 3) for k, v in row.items()}
        print(kind, rows[kind], flush=True)
    with atomic_write(Path(options.out)) as part:
        part.write_text(json.dumps({"n": len(truth), "top1": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
