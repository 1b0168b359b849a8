"""Protocol few_label: logistic regression on frozen features, from a few labeled images."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from simsiam.config.protocols import Settings
from simsiam.data.images import Images
from simsiam.errors import UsageError, shown
from simsiam.evaluation.frozen import STANDARDIZED, Answer, Frozen, drawn, kinds, likeliest

USUAL = ("1", "5", "10", "20", "1%", "10%")
C = 100.0  # inverse strength of the l2 penalty on features of norm 1: few labels leave none to choose it by


def with_few_labels(frozen: Frozen, how: Settings) -> Iterator[Answer]:
    """The same labels for all features, and in each draw the few among the many."""
    for name, draws in planned(frozen.train, how).items():
        for kind in kinds(how):
            known, ranked = frozen.features(kind).standardized(), []
            for positions in draws:
                rows = np.flatnonzero(np.isin(known.positions, positions))
                ranked.append(logistic(known.train[rows], known.labels[rows], known.test, known.classes))
            yield Answer(
                name=name,
                features=kind,
                parameters={
                    "classifier": "logistic regression (scikit-learn, lbfgs)", "C": C, "labels": name,
                    "images": len(rows), "draws": len(draws), "standardized": STANDARDIZED,
                    "seed": how.seed,
                },
                ranked=ranked,
            )  # fmt: skip


def planned(train: Images, how: Settings) -> dict[str, list[np.ndarray]]:
    """Positions of the images that are labeled, a draw at a time, by what to call them.

    By default the USUAL amounts, but for those that some class cannot give. Raises UsageError where none can be given.
    """
    if how.few_label_list is not None:
        return {f"list {Path(how.few_label_list).name}": [listed(train, Path(how.few_label_list))]}
    assert train.labels is not None
    sizes = np.bincount(train.labels, minlength=len(train.classes))
    plan = {}
    for amount in how.labels or USUAL:
        if amount.endswith("%"):
            counts = np.maximum(1, np.rint(sizes * float(amount[:-1]) / 100).astype(int))
        else:
            counts = np.full(len(sizes), int(amount))
        if (counts <= sizes).all():
            name = f"{amount[:-1]} %" if amount.endswith("%") else f"{amount} a class"
            plan[name] = [drawn(train.labels, counts, [how.seed, draw]) for draw in range(how.draws)]
        elif how.labels is not None:
            least = int(sizes.argmin())
            raise UsageError(f"labels asks for {amount} and class {shown(train.classes[least])!r} has {sizes[least]}")
    if not plan:
        raise UsageError(f"class {shown(train.classes[int(sizes.argmin())])!r} has no training image to label")
    return plan


def listed(train: Images, path: Path) -> np.ndarray:
    """Positions of the images that a file names, one a line: by their path in the source, or by its last part."""
    try:
        names = set(path.read_text().split())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"few_label_list {shown(str(path))} cannot be read: {error}") from None
    found = {i: key for i, key in enumerate(train.keys) if key in names or key.rpartition("/")[2] in names}
    missing = names - set(found.values()) - {key.rpartition("/")[2] for key in found.values()}
    if missing or not found:
        some = shown(min(missing, default=""))
        raise UsageError(f"{shown(str(path))} names {len(missing)} files that are no training images: {some!r} ...")
    return np.array(list(found))


def logistic(x: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """Classes (M, at most 5) of test (M, d), likeliest first; one without a labeled image is the least likely."""
    from sklearn.linear_model import LogisticRegression

    scores = torch.full((len(test), classes), -1.0, dtype=torch.float64)
    seen = labels.unique()
    if len(seen) == 1:
        raise UsageError("the labeled images are of one class: nothing can be learned from them")
    model = LogisticRegression(C=C, max_iter=1000).fit(x.numpy(), labels.numpy())
    scores[:, seen] = torch.from_numpy(model.predict_proba(test.numpy())).double()
    return likeliest(scores)
