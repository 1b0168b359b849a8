"""Accuracy of predictions, in percent, with its uncertainty."""

from collections.abc import Sequence
from statistics import mean, stdev

import numpy as np
import torch
from torch import Tensor

from simsiam.utils.intervals import wilson_interval


def score_predictions(
    predictions: Sequence[Tensor], labels: np.ndarray, classes: int
) -> dict[str, object]:
    """Compute top-1 and top-5 accuracy.

    Args:
        predictions: For each draw, the most probable classes of each image, the most probable
            first: (M, at most 5) int64.
        labels: The true classes, (M,) int64.
        classes: The number of classes.

    Returns:
        What `summarize_accuracy` returns.
    """
    matches = [ranked == torch.from_numpy(labels)[:, None] for ranked in predictions]
    top1 = [100 * match[:, 0].float().mean().item() for match in matches]
    top5 = [100 * match.any(1).float().mean().item() for match in matches]
    return summarize_accuracy(top1, top5, len(labels), classes)


def summarize_accuracy(
    top1: Sequence[float], top5: Sequence[float], n: int, classes: int
) -> dict[str, object]:
    """Summarize the accuracies of one or several draws of labels.

    Args:
        top1: Top-1 accuracy of each draw, in percent.
        top5: Top-5 accuracy of each draw, in percent.
        n: The number of test images.
        classes: The number of classes.

    Returns:
        `top1` and `top5`, means over the draws, and `n`; of one draw also `interval`, a 95 % Wilson
        interval, of several `top1_std` and `draws`. `top5` is None with at most five classes, where
        it would always be 100.
    """
    result: dict[str, object] = {
        "top1": round(mean(top1), 3),
        "top5": round(mean(top5), 3) if classes > 5 else None,
        "n": n,
    }
    if len(top1) == 1:
        low, high = wilson_interval(round(top1[0] * n / 100), n)
        return result | {"interval": [round(100 * low, 3), round(100 * high, 3)]}
    return result | {
        "top1_std": round(stdev(top1), 3),
        "draws": [round(value, 3) for value in top1],
    }
