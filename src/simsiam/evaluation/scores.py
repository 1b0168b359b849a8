"""Where answers meet the truth: percent right, and how sure that is."""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from simsiam.utils.intervals import wilson_interval


def score_predictions(predictions: Sequence[Tensor], truth: Any, classes: int) -> dict[str, Any]:
    """Of each draw's `ranked` (M, at most 5), percent of the M whose class comes first, and comes at all."""
    right = [answer == torch.from_numpy(truth)[:, None] for answer in predictions]
    top1 = [100 * hits[:, 0].float().mean().item() for hits in right]
    top5 = [100 * hits.any(1).float().mean().item() for hits in right]
    return summarize_accuracy(top1, top5, len(truth), classes)


def summarize_accuracy(
    top1: Sequence[float], top5: Sequence[float], n: int, classes: int
) -> dict[str, Any]:
    """Percents of one draw with a 95 % Wilson interval, of several as mean and standard deviation.

    Among five classes to be one of five is no feat, so there is no top-5.
    """
    result = {
        "top1": round(mean(top1), 3),
        "top5": round(mean(top5), 3) if classes > 5 else None,
        "n": n,
    }
    if len(top1) == 1:
        return result | {
            "interval": [
                round(100 * end, 3) for end in wilson_interval(round(top1[0] * n / 100), n)
            ]
        }
    return result | {
        "top1_std": round(stdev(top1), 3),
        "draws": [round(value, 3) for value in top1],
    }
