"""Is the cached linear protocol a good optimizer? Beside scikit-learn's logistic regression, on the same features.

    python results/linear.py RUN [SOURCE] --out results/linear.json

Both learn from all training images' features and are tested on the test split; C is chosen as the protocol chooses its
cell, on a fifth of each class kept out, and the best C on the test images (an oracle) is given beside it.
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
from simsiam.evaluation.linear import train_on_cached_features
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
    asked = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    run, how = Run(asked.run), Settings()
    train, test, _ = split_train_test(
        open_source([asked.source] if asked.source else run.recipe.source), require_labels=True
    )
    (train, _), (test, _) = load_into_memory(train, 2**31), load_into_memory(test, 2**31)
    where = {"device": "cpu", "precision": "auto"}
    frozen = FrozenNetwork(run, "last", train, replace(test, labels=None), **where)
    rows = {}
    for kind in asked.features:
        known = frozen.features(kind).standardize()
        truth = test.labels[frozen.test_indices]
        ours = 100 * float(
            (
                train_on_cached_features(known, kind, how, frozen.device)
                .predictions[0][:, 0]
                .numpy()
                == truth
            ).mean()
        )
        x, y = known.train_features.numpy(), known.train_labels.numpy()
        held = sample_per_class(y, np.ceil(np.bincount(y) / 5).astype(int), [how.seed])
        rest = np.setdiff1d(np.arange(len(x)), held)
        chosen = [
            LogisticRegression(C=c, max_iter=500).fit(x[rest], y[rest]).score(x[held], y[held])
            for c in CS
        ]
        tested = [
            100
            * LogisticRegression(C=c, max_iter=500)
            .fit(x, y)
            .score(known.test_features.numpy(), truth)
            for c in CS
        ]
        best = int(np.argmax(chosen))
        row = {
            "cached": ours,
            "scikit_learn": tested[best],
            "C": CS[best],
            "best_C_on_test": max(tested),
        }
        rows[kind] = {k: round(v, 3) for k, v in row.items()}
        print(kind, rows[kind], flush=True)
    with atomic_write(Path(asked.out)) as part:
        part.write_text(json.dumps({"n": len(truth), "top1": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
