"""The protocol few_label: logistic regression on frozen features, from a few labeled images."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from simsiam.config.protocols import Settings
from simsiam.data.images import Images
from simsiam.errors import UsageError, printable, truncate
from simsiam.evaluation.frozen import (
    STANDARDIZATION,
    FrozenNetwork,
    ProtocolResult,
    feature_kinds,
    sample_per_class,
    top5_classes,
)
from simsiam.utils.names import normalize_name, read_list

DEFAULT_AMOUNTS = ("1", "5", "10", "20", "1%", "10%")  # per class, or a share of each class
# Inverse strength of the l2 penalty, on features of norm 1; a few labels are not enough to choose
# it by.
C = 100.0


def evaluate_frozen(frozen: FrozenNetwork, settings: Settings) -> Iterator[ProtocolResult]:
    """Classify test images by logistic regression on each draw of labeled images.

    All kinds of features are given the same labels, and a larger draw contains the smaller ones.

    Args:
        frozen: The network and the images.
        settings: `labels`, `few_label_list`, `draws`, `seed`, `features` and `baselines` are used.

    Yields:
        One result for each number of labels and each kind of features.

    Raises:
        UsageError: If the labels cannot be drawn or read, or are of one class.
    """
    for name, draws in plan_draws(frozen.train, settings).items():
        for kind in feature_kinds(frozen, settings):
            features = frozen.features(kind).standardize()
            predictions = []
            for positions in draws:
                rows = np.flatnonzero(np.isin(features.train_indices, positions))
                predictions.append(
                    logistic_regression(
                        features.train_features[rows],
                        features.train_labels[rows],
                        features.test_features,
                        features.classes,
                    )
                )
            yield ProtocolResult(
                name=name,
                features=kind,
                parameters={
                    "classifier": "logistic regression (scikit-learn, lbfgs)",
                    "C": C,
                    "labels": name,
                    "images": len(rows),
                    "draws": len(draws),
                    "standardized": STANDARDIZATION,
                    "seed": settings.seed,
                },
                predictions=predictions,
            )


def plan_draws(train: Images, settings: Settings) -> dict[str, list[np.ndarray]]:
    """Choose the labeled images of each draw.

    Args:
        train: The training images.
        settings: `labels`, `few_label_list`, `draws` and `seed` are used. The default amounts are
            DEFAULT_AMOUNTS, without those that some class is too small for.

    Returns:
        For each amount, by its name, the positions of the labeled images of each draw.

    Raises:
        UsageError: If a class has too few images, or the list cannot be read.
    """
    if settings.few_label_list is not None:
        path = Path(settings.few_label_list)
        return {f"list {path.name}": [read_label_list(train, path)]}
    assert train.labels is not None
    sizes = np.bincount(train.labels, minlength=len(train.classes))
    smallest = int(sizes.argmin())
    class_name = repr(printable(train.classes[smallest]))
    plan = {}
    for amount in settings.labels or DEFAULT_AMOUNTS:
        if amount.endswith("%"):
            counts = np.maximum(1, np.rint(sizes * float(amount[:-1]) / 100).astype(int))
        else:
            counts = np.full(len(sizes), int(amount))
        if (counts <= sizes).all():
            name = f"{amount[:-1]} %" if amount.endswith("%") else f"{amount} a class"
            plan[name] = [
                sample_per_class(train.labels, counts, [settings.seed, draw])
                for draw in range(settings.draws)
            ]
        elif settings.labels is not None:
            raise UsageError(
                f"labels asks for {amount} and class {class_name} has {sizes[smallest]}"
            )
    if not plan:
        raise UsageError(f"class {class_name} has no training image to label")
    return plan


def read_label_list(train: Images, path: Path) -> np.ndarray:
    """Read a list of the training images that are labeled.

    Args:
        train: The training images.
        path: A text file that names one image per line, by its path in the source or its file name.

    Returns:
        The positions of the listed images.

    Raises:
        UsageError: If the file cannot be read, is empty, or names something else.
    """
    try:
        lines = [os.fsdecode(line).strip() for line in read_list(path)]
    except OSError as error:
        raise UsageError(f"few_label_list {printable(str(path))} cannot be read: {error}") from None
    names = {normalize_name(line): line for line in lines}
    rows, found = list[int](), set[str]()
    for i, key in enumerate(map(normalize_name, train.keys)):
        if named := names.keys() & {key, key.rpartition("/")[2]}:
            rows.append(i)
            found |= named
    missing = names.keys() - found
    if missing or not names:
        first = printable(truncate(names[min(missing)])) if missing else ""
        raise UsageError(
            f"{printable(str(path))} names {len(missing)} files that are not training images: "
            f"{first!r} ..."
        )
    return np.array(rows)


def logistic_regression(x: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """Fit logistic regression and rank the classes of test images.

    Args:
        x: Standardized features of the labeled images, (N, d) float32.
        labels: Their classes, (N,) int64.
        test: Standardized features of the test images, (M, d) float32.
        classes: The number of classes.

    Returns:
        (M, at most 5) int64, the most probable class first; classes without a labeled image come
        last.

    Raises:
        UsageError: If all labeled images are of one class.
    """
    from sklearn.linear_model import LogisticRegression

    known = labels.unique()
    if len(known) == 1:
        raise UsageError("the labeled images are of one class: nothing can be learned from them")
    model = LogisticRegression(C=C, max_iter=1000).fit(x.numpy(), labels.numpy())
    scores = torch.full((len(test), classes), -1.0, dtype=torch.float64)
    scores[:, known] = torch.from_numpy(model.predict_proba(test.numpy())).double()
    return top5_classes(scores)
