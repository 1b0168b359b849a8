"""The verb `probe`: predict the label of every image from a few labels, with a confidence."""

import csv
import os
from collections import Counter
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from simsiam.embeddings.table import Embeddings, read_embeddings
from simsiam.errors import UsageError, printable, truncate
from simsiam.monitoring.features import standardization_stats
from simsiam.utils.files import check_writable, plain_text, write_csv
from simsiam.utils.intervals import wilson_interval
from simsiam.utils.names import MAX_LIST_BYTES, UTF16_MARKS
from simsiam.utils.read_files import read_bytes

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

MAX_FOLDS = 5  # folds of cross-validation; fewer if the smallest class has fewer images
# Inverse strengths of the l2 penalty. The one with the smallest cross-validated log loss is chosen,
# so that confidences are not too high; without cross-validation it is the middle one.
INVERSE_PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)


class ProbeResult(NamedTuple):
    """Predicted labels of N images.

    Attributes:
        classes: The class names, sorted.
        predicted: (N,) int, positions in `classes`.
        confidence: (N,) float, 0 to 1, the probability of the predicted class.
        labels: The label of each labeled image, by its position.
        correct: How many labeled images cross-validation predicts correctly; None if a class has
            a single image, which cannot be left out.
    """

    classes: list[str]
    predicted: np.ndarray
    confidence: np.ndarray
    labels: dict[int, str]
    correct: int | None


def probe(
    file: str | os.PathLike[str], labels: str | os.PathLike[str], *, out: str | os.PathLike[str]
) -> ProbeResult:
    """Fit logistic regression on the labeled images, and predict the labels of all.

    Args:
        file: A file or folder that `embed` wrote.
        labels: A .csv file with the columns path and label. Rows without a label are not used, so
            the file that `probe` wrote can be filled in and given again. An image is named by its
            path or by its file name.
        out: The .csv file to write, with one row per image: path, label (if it was labeled),
            predicted, confidence.

    Returns:
        The predictions, in the order of the file.

    Raises:
        UsageError: If the labels cannot be read, name an image that is not embedded, or are of
            fewer than two classes; if the file is not an embedding file; or if `out` cannot be
            written.
    """
    check_writable(out, inputs=[file, labels])
    images = read_embeddings(file)
    label_of = read_labels(Path(labels), images)
    if len(names := set(label_of.values())) < 2:
        raise UsageError(
            f"{labels} has one label, {truncate(names.pop(), repr)}: it needs at least two"
        )
    result = predict_labels(standardize(images), label_of)
    rows = (
        (
            path,
            label_of.get(i, ""),
            result.classes[result.predicted[i]],
            f"{result.confidence[i]:.4f}",
        )
        for i, path in enumerate(images.paths)
    )
    write_csv(Path(out), ("path", "label", "predicted", "confidence"), rows)
    return result


def standardize(images: Embeddings) -> np.ndarray:
    """Standardize features, as protocol few_label does.

    Args:
        images: N embedded images.

    Returns:
        (N, d) float32.
    """
    mean, scale = standardization_stats(images.vectors)
    return ((images.vectors - mean) / scale).numpy()


def predict_labels(x: np.ndarray, label_of: dict[int, str]) -> ProbeResult:
    """Fit logistic regression on the labeled images, and predict the labels of all.

    Args:
        x: Standardized features of all images, (N, d) float32.
        label_of: The label of each labeled image, by its position; two classes or more.

    Returns:
        The predictions.
    """
    classes = sorted(set(label_of.values()))
    indices = np.array(list(label_of))
    y = np.array([classes.index(label) for label in label_of.values()])
    if len(indices) < x.shape[1]:
        # The solution lies in the span of the labeled images: the same fit, and many times faster.
        x = x @ np.linalg.qr(x[indices].T)[0]
    inverse_penalty, correct = cross_validate(x[indices], y)
    model = _logistic_classifier(inverse_penalty).fit(x[indices], y)
    probabilities = model.predict_proba(x)
    return ProbeResult(classes, probabilities.argmax(1), probabilities.max(1), label_of, correct)


def read_labels(path: Path, images: Embeddings) -> dict[int, str]:
    """Read a .csv file of labels.

    Args:
        path: A .csv file with the columns path and label, separated by commas, semicolons or
            tabs, in UTF-8 or UTF-16; rows without a label are passed over.
        images: The embedded images that it names.

    Returns:
        The label of each labeled image, by its position.

    Raises:
        UsageError: If the file cannot be read, has no such columns, names an image that is not
            embedded, or gives an image two labels.
    """
    try:
        data = read_bytes(path, MAX_LIST_BYTES)
        text = data.decode("utf-16" if data.startswith(UTF16_MARKS) else "utf-8-sig")
        separator = max(",;\t", key=text.partition("\n")[0].count)  # that of the first line
        reader = csv.DictReader(StringIO(text, newline=""), delimiter=separator)
        # Tables from spreadsheets have spaces around headings and labels, and capitals.
        header = [name.strip().lower() for name in reader.fieldnames or ()]
        reader.fieldnames = header
        rows = list(reader)
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not a text in UTF-8: save it as CSV in UTF-8") from None
    except (OSError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if missing := [name for name in ("path", "label") if name not in header]:
        raise UsageError(
            f"{path} has no column {missing[0]!r}: its first line is path,label, and each other "
            "line has the path of an image and its label"
        )
    label_of: dict[int, str] = {}
    for number, row in enumerate(rows, 2):
        name, label = row["path"], plain_text((row["label"] or "").strip())
        if not label:  # as in the table that `probe` writes
            continue
        if not name:
            raise UsageError(
                f"{path}, line {number}: the label {truncate(label, repr)} has no path"
            )
        written = (plain_text(name), name, name.strip())
        try:
            i = images.find(
                next((text for text in written if images.positions(text)), name.strip())
            )
        except UsageError as error:
            raise UsageError(f"{path}, line {number}: {error}") from None
        if label_of.setdefault(i, label) != label:
            raise UsageError(
                f"{path}, line {number}: {printable(truncate(name))} already has another label, "
                f"{truncate(label_of[i], repr)}"
            )
    if not label_of:
        raise UsageError(f"{path} labels no image: fill in the column label of a few lines")
    return label_of


def _logistic_classifier(inverse_penalty: float) -> "LogisticRegression":
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=inverse_penalty, max_iter=1000)


def cross_validate(x: np.ndarray, y: np.ndarray) -> tuple[float, int | None]:
    """Choose one of INVERSE_PENALTIES by stratified cross-validation.

    Args:
        x: Standardized features of the labeled images, (N, d) float32.
        y: Their classes, (N,) int.

    Returns:
        The inverse penalty with the smallest log loss, and how many images it classifies correctly
        when they are left out; the middle one and None if a class has a single image.
    """
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    num_folds = min(MAX_FOLDS, min(Counter(y.tolist()).values()))
    if num_folds < 2:
        return INVERSE_PENALTIES[len(INVERSE_PENALTIES) // 2], None
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=0)
    probabilities = [
        cross_val_predict(_logistic_classifier(c), x, y, cv=folds, method="predict_proba")
        for c in INVERSE_PENALTIES
    ]
    best = min(
        range(len(INVERSE_PENALTIES)),
        key=lambda i: -np.log(probabilities[i][np.arange(len(y)), y] + 1e-12).mean(),
    )
    return INVERSE_PENALTIES[best], int((probabilities[best].argmax(1) == y).sum())


def format_probe(result: ProbeResult) -> str:
    """Describe predictions as text: the labels, the accuracy, and how many images each class has.

    Args:
        result: What `probe` returned.

    Returns:
        Three lines.
    """
    n = len(result.labels)
    names = ", ".join(map(printable, result.classes))
    rest = f"; {len(result.predicted) - n} images have no label"
    lines = [f"{n} labels of {len(result.classes)} classes: {names}{rest}"]
    if result.correct is None:
        lines.append("accuracy unknown: cross-validation needs two images of each class")
    else:
        low, high = (100 * end for end in wilson_interval(result.correct, n))
        lines.append(
            f"cross-validated accuracy {100 * result.correct / n:.1f} %, "
            f"{low:.0f} to {high:.0f} with 95 % confidence (n = {n})"
        )
    counts = Counter(result.classes[c] for c in result.predicted.tolist())
    predicted = [f"{printable(name)} {count}" for name, count in counts.most_common()]
    lines.append(f"predicted: {', '.join(predicted)}")
    return "\n".join(lines)
