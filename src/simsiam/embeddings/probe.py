"""simsiam probe: a few labels in, a prediction for every image out, and how far to trust it."""

import csv
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simsiam.embeddings.table import Embeddings, read_embeddings
from simsiam.errors import UsageError, printable
from simsiam.monitoring.features import standardization_stats
from simsiam.utils.files import check_writable, write_csv
from simsiam.utils.intervals import wilson_interval

MAX_FOLDS = 5  # of cross-validation, or as many as the smallest class has images
# Inverse strengths of the l2 penalty. That with the least cross-validated log loss is taken, for then confidence is as
# high as it may be; without cross-validation the middle one.
INVERSE_PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)


class ProbeResult(NamedTuple):
    classes: list[str]
    predicted: np.ndarray  # int (N,), positions in classes
    confidence: np.ndarray  # (N,), 0 to 1: the probability of the predicted class
    labels: dict[int, str]  # positions of the labeled images, and their labels
    correct: (
        int | None
    )  # of the labeled images, predicted without their own label; None where none can be left out


def probe(
    file: str | os.PathLike[str], labels: str | os.PathLike[str], *, out: str | os.PathLike[str]
) -> ProbeResult:
    """Logistic regression on the images that the .csv `labels` names (columns path and label), asked about all.

    `out` is a .csv: path, label as given, predicted, confidence. A name is a path or a file's name. Raises UsageError.
    """
    check_writable(out)
    if os.path.realpath(out) == os.path.realpath(labels):
        raise UsageError(
            f"--out {printable(str(out))} would write over the labels given: choose another"
        )
    images = read_embeddings(file)
    given = read_labels(Path(labels), images)
    classes = sorted(set(given.values()))
    if len(classes) < 2:
        raise UsageError(
            f"{labels} has one label, {classes[0]!r}: it takes two to tell images apart"
        )
    rows, y = np.array(list(given)), np.array([classes.index(label) for label in given.values()])
    mean, scale = standardization_stats(images.vectors)  # as in protocol few_label
    x = ((images.vectors - mean) / scale).numpy()
    strength, right = cross_validate(x[rows], y)
    chances = logistic_classifier(strength).fit(x[rows], y).predict_proba(x)
    predicted = chances.argmax(1)
    found = ProbeResult(classes, predicted, chances.max(1), given, right)
    lines = (
        (images.paths[i], given.get(i, ""), classes[predicted[i]], f"{found.confidence[i]:.4f}")
        for i in range(len(images))
    )
    write_csv(Path(out), ("path", "label", "predicted", "confidence"), lines)
    return found


def read_labels(path: Path, images: Embeddings) -> dict[int, str]:
    """Positions of the labeled images, and their labels. Raises UsageError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    given: dict[int, str] = {}
    for number, line in enumerate(lines, 2):
        if not line.get("path") or not line.get("label"):
            raise UsageError(
                f"{path}, line {number}: each line has a path and a label, under a heading path,label"
            )
        i = images.find(line["path"])
        if given.setdefault(i, line["label"]) != line["label"]:
            raise UsageError(
                f"{path}, line {number}: {printable(line['path'])} has another label already: {given[i]!r}"
            )
    if not given:
        raise UsageError(
            f"{path} labels no image: it takes a heading, path,label, and a line an image"
        )
    return given


def logistic_classifier(inverse_penalty: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=inverse_penalty, max_iter=1000)


def cross_validate(x: np.ndarray, y: np.ndarray) -> tuple[float, int | None]:
    """The best of STRENGTHS, and how many of y (N,) it tells from what the others teach, in FOLDS rounds.

    None where a class has one image, which then nothing else teaches.
    """
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    folds = min(MAX_FOLDS, min(Counter(y.tolist()).values()))
    if folds < 2:
        return INVERSE_PENALTIES[len(INVERSE_PENALTIES) // 2], None
    rounds = StratifiedKFold(folds, shuffle=True, random_state=0)
    tried = [
        cross_val_predict(logistic_classifier(c), x, y, cv=rounds, method="predict_proba")
        for c in INVERSE_PENALTIES
    ]
    best = min(
        range(len(tried)), key=lambda i: -np.log(tried[i][np.arange(len(y)), y] + 1e-12).mean()
    )
    return INVERSE_PENALTIES[best], int((tried[best].argmax(1) == y).sum())


def format_probe(result: ProbeResult) -> str:
    n = len(result.labels)
    counts = Counter(result.classes[c] for c in result.predicted.tolist())
    lines = [
        f"{n} labels of {len(result.classes)} classes: "
        + ", ".join(printable(name) for name in result.classes)
    ]
    if result.correct is None:
        lines.append("accuracy unknown: cross-validation takes two images of each class")
    else:
        low, high = (100 * end for end in wilson_interval(result.correct, n))
        share = 100 * result.correct / n
        lines.append(
            f"cross-validated accuracy {share:.1f} %, {low:.0f} to {high:.0f} with 95 % confidence (n = {n})"
        )
    lines.append(
        "predicted: "
        + ", ".join(f"{printable(name)} {count}" for name, count in counts.most_common())
    )
    return "\n".join(lines)
