"""Protocol few_label: logistic regression on frozen features, from a few labeled images."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from simsiam.config.protocols import Settings
from simsiam.data.images import Images
from simsiam.errors import UsageError, printable
from simsiam.evaluation.frozen import (
    STANDARDIZATION,
    FrozenNetwork,
    ProtocolResult,
    feature_kinds,
    sample_per_class,
    top5_classes,
)

DEFAULT_AMOUNTS = ("1", "5", "10", "20", "1%", "10%")
C = 100.0  # inverse strength of the l2 penalty on features of norm 1: few labels leave none to choose it by


def evaluate_few_label(frozen: FrozenNetwork, settings: Settings) -> Iterator[ProtocolResult]:
    """The same labels for all features, and in each draw the few among the many."""
    for name, draws in plan_draws(frozen.train, settings).items():
        for kind in feature_kinds(settings):
            known, ranked = frozen.features(kind).standardize(), []
            for positions in draws:
                rows = np.flatnonzero(np.isin(known.train_indices, positions))
                ranked.append(
                    logistic_regression(
                        known.train_features[rows],
                        known.train_labels[rows],
                        known.test_features,
                        known.classes,
                    )
                )
            yield ProtocolResult(
                name=name,
                features=kind,
                parameters={
                    "classifier": "logistic regression (scikit-learn, lbfgs)", "C": C, "labels": name,
                    "images": len(rows), "draws": len(draws), "standardized": STANDARDIZATION,
                    "seed": settings.seed,
                },
                predictions=ranked,
            )  # fmt: skip


def plan_draws(train: Images, settings: Settings) -> dict[str, list[np.ndarray]]:
    """Positions of the images that are labeled, a draw at a time, by what to call them.

    By default the USUAL amounts, but for those that some class cannot give. Raises UsageError where none can be given.
    """
    if settings.few_label_list is not None:
        return {
            f"list {Path(settings.few_label_list).name}": [
                read_label_list(train, Path(settings.few_label_list))
            ]
        }
    assert train.labels is not None
    sizes = np.bincount(train.labels, minlength=len(train.classes))
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
            least = int(sizes.argmin())
            raise UsageError(
                f"labels asks for {amount} and class {printable(train.classes[least])!r} has {sizes[least]}"
            )
    if not plan:
        raise UsageError(
            f"class {printable(train.classes[int(sizes.argmin())])!r} has no training image to label"
        )
    return plan


def read_label_list(train: Images, path: Path) -> np.ndarray:
    """Positions of the images that a file names, one a line: by their path in the source, or by its last part."""
    try:
        names = set(path.read_text().split())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"few_label_list {printable(str(path))} cannot be read: {error}") from None
    found = {
        i: key
        for i, key in enumerate(train.keys)
        if key in names or key.rpartition("/")[2] in names
    }
    missing = names - set(found.values()) - {key.rpartition("/")[2] for key in found.values()}
    if missing or not found:
        some = printable(min(missing, default=""))
        raise UsageError(
            f"{printable(str(path))} names {len(missing)} files that are no training images: {some!r} ..."
        )
    return np.array(list(found))


def logistic_regression(x: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """Classes (M, at most 5) of test (M, d), likeliest first; one without a labeled image is the least likely."""
    from sklearn.linear_model import LogisticRegression

    scores = torch.full((len(test), classes), -1.0, dtype=torch.float64)
    seen = labels.unique()
    if len(seen) == 1:
        raise UsageError("the labeled images are of one class: nothing can be learned from them")
    model = LogisticRegression(C=C, max_iter=1000).fit(x.numpy(), labels.numpy())
    scores[:, seen] = torch.from_numpy(model.predict_proba(test.numpy())).double()
    return top5_classes(scores)
