"""The label-free monitor: signals of a frozen backbone that ask for no label, and what they say about when to stop."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from simsiam.config.recipes import ResolvedRecipe
from simsiam.data.batches import make_training_views
from simsiam.data.images import Images, quick_sample
from simsiam.data.transform import Transform
from simsiam.distributed.collectives import all_gather
from simsiam.distributed.process_group import local_slice, rank_zero_only, world_size
from simsiam.model.precision import Compute
from simsiam.model.siamese import Siamese
from simsiam.monitoring.features import extract_features
from simsiam.monitoring.signals import (
    nearest_neighbors,
    neighbor_stability,
    rankme,
    spectrum_auc,
    view_retrieval,
)

MONITOR_SAMPLE_SIZE = 2000  # images, spread evenly over the training set: the same ones every time
MONITOR_STEP = 2**63  # whose views they take, the same every time; no run gets there
NEIGHBOR_COUNT = 10  # neighbors
# What the advice goes by, with a unit: signals that rose and fell with kNN accuracy in docs/label_free.md.
ADVICE_SIGNALS = {"knn_top1": "kNN (%)", "view_retrieval": "views that find each other (%)"}
MIN_MEASUREMENTS = 6  # measurements
RISING_FRACTION = 0.1  # a share of the whole gain, in the last third of the measurements, that counts as still rising


class LabelFreeSignals(NamedTuple):
    values: dict[
        str, float
    ]  # view_retrieval (%), h_rankme, h_spectrum_auc, and neighbor_stability (%) since `before`
    neighbors: Tensor  # (N, K) int32, to be given as `before` the next time
    skipped: list[tuple[str, str]]


def label_free_monitor(
    model: Siamese,
    images: Images,
    recipe: ResolvedRecipe,
    transform: Transform,
    previous_neighbors: Tensor | None,
    *,
    compute: Compute,
) -> LabelFreeSignals:
    """Signals on h of the same images and views whenever it is asked; a function of the weights and `before`."""
    looked_at = quick_sample(images, MONITOR_SAMPLE_SIZE)
    found = extract_features(model.backbone, looked_at, transform, compute=compute)
    h = found.matrices[0].to(compute.device)
    training = model.training
    model.eval()
    try:
        shown = looked_at.take(found.kept_indices)
        a, b = two_view_features(model.backbone, shown, recipe, compute=compute)
    finally:
        model.train(training)
    values, now = compute_signals(h, a, b, previous_neighbors)
    return LabelFreeSignals({k: round(v, 4) for k, v in values.items()}, now, found.skipped)


@rank_zero_only
def compute_signals(
    h: Tensor, a: Tensor, b: Tensor, previous_neighbors: Tensor | None
) -> tuple[dict[str, float], Tensor]:
    """The signals, and the neighbors of each row of h now, on the CPU."""
    now = nearest_neighbors(h, NEIGHBOR_COUNT)
    values = {
        "view_retrieval": view_retrieval(a, b),
        "h_rankme": rankme(h),
        "h_spectrum_auc": spectrum_auc(h),
    }
    if previous_neighbors is not None and previous_neighbors.shape == now.shape:
        values["neighbor_stability"] = neighbor_stability(previous_neighbors.to(now.device), now)
    return values, now.int().cpu()


def two_view_features(
    network: nn.Module, images: Images, recipe: ResolvedRecipe, *, compute: Compute
) -> tuple[Tensor, Tensor]:
    """Features (N, d), float32, of two views of each image, the same two every time; `network` is in eval mode.

    Of several processes each makes its share of them, and all get all.
    """
    parts = np.array_split(
        np.arange(len(images)), max(len(images) // 250 + 1, min(world_size(), len(images)))
    )
    pairs = []
    for index in parts[local_slice(len(parts))]:
        views = make_training_views(images, index, recipe, MONITOR_STEP, compute.device)[:2]
        with torch.no_grad(), compute.autocast():
            pairs.append([network(x).float() for x in views])
    a, b = (all_gather(torch.cat(side)) for side in zip(*pairs, strict=True))
    return a, b


def advise_training_length(lines: Sequence[Mapping[str, Any]]) -> str:
    """Whether more epochs would help, with the reasons, from the lines of metrics.jsonl that have measurements.

    A schedule that ends levels everything off, so a level says that this run is over, not that a longer one is no use.
    """
    reasons, rising, falling = [], False, False
    for name, words in ADVICE_SIGNALS.items():
        values = [line[name] for line in lines if line.get(name) is not None]
        if len(values) < MIN_MEASUREMENTS:
            continue
        first, before, last, best, least = (
            values[0],
            values[-1 - len(values) // 3],
            values[-1],
            max(values),
            min(values),
        )
        reasons.append(
            f"{words}: {first:.1f} first, {before:.1f} at two thirds, {last:.1f} at the end"
        )
        rising |= last > first and last - before > RISING_FRACTION * (best - least)
        falling |= best - last > 0.5 * (best - least)
    if not reasons:
        return f"Fewer than {MIN_MEASUREMENTS} measurements say nothing about when to stop: a smaller --knn-every takes more."
    if rising:
        advice = "Still rising at the end: more epochs are likely to help."
    elif falling:
        advice = "Past its best: fewer epochs, a lower --base-lr, or an earlier checkpoint."
    else:
        advice = "Leveled off: stop here, or plan a new run several times as long."
    return f"{advice} {'; '.join(reasons)}."
