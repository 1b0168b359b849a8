"""The label-free monitor: signals of a frozen backbone, and advice on how long to train."""

from collections.abc import Mapping, Sequence
from math import sqrt
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from simsiam.config.recipes import ResolvedRecipe
from simsiam.data.batches import make_training_views
from simsiam.data.images import Images, quick_sample
from simsiam.data.transform import Transform
from simsiam.distributed.collectives import all_gather
from simsiam.distributed.process_group import local_slice, rank_zero_only, world_size
from simsiam.model.average import WeightAverage
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

MONITOR_SAMPLE_SIZE = 2000  # images, spread evenly over the training set: always the same ones
MONITOR_STEP = 2**63  # the views are those of this step, which no run reaches: always the same ones
NEIGHBOR_COUNT = 10  # nearest neighbors of each image whose stability is measured
# The signals that the advice is based on, with their units. They rose and fell with kNN accuracy in
# docs/label_free.md.
ADVICE_SIGNALS = {"knn_top1": "kNN (%)", "view_retrieval": "views that find each other (%)"}
MIN_MEASUREMENTS = 6  # fewer give no advice
RISING_FRACTION = 0.1  # "still rising": this share of the range, in the last third of measurements


class LabelFreeSignals(NamedTuple):
    """What the monitor measured.

    Attributes:
        values: `view_retrieval` (percent), `h_rankme`, `h_spectrum_auc`, and `neighbor_stability`
            (percent) if there were previous neighbors.
        neighbors: (N, NEIGHBOR_COUNT) int32, the previous neighbors of the next measurement.
        skipped: Key and reason of each image that could not be read.
    """

    values: dict[str, float]
    neighbors: Tensor
    skipped: list[tuple[str, str]]


def label_free_monitor(
    model: Siamese | WeightAverage,
    images: Images,
    recipe: ResolvedRecipe,
    transform: Transform,
    previous_neighbors: Tensor | None,
    *,
    compute: Compute,
) -> LabelFreeSignals:
    """Measure the signals on h, always of the same images and the same views.

    The result is a function of the weights and `previous_neighbors` alone.

    Args:
        model: The model; its training mode is restored afterwards.
        images: The training images, of which a sample is taken.
        recipe: The recipe; its augmentations make the views.
        transform: The preprocessing of evaluation.
        previous_neighbors: `neighbors` of the previous measurement, or None.
        compute: Where to compute, and in which precision.

    Returns:
        The signals.
    """
    sampled = quick_sample(images, MONITOR_SAMPLE_SIZE)
    features = extract_features(model.backbone, sampled, transform, compute=compute)
    h = features.matrices[0].to(compute.device)
    readable = sampled.take(features.kept_indices)
    training = model.training
    model.eval()
    try:
        a, b = two_view_features(model.backbone, readable, recipe, compute=compute)
    finally:
        model.train(training)
    values, neighbors = compute_signals(h, a, b, previous_neighbors)
    rounded = {name: round(value, 4) for name, value in values.items()}
    return LabelFreeSignals(rounded, neighbors, features.skipped)


@rank_zero_only
def compute_signals(
    h: Tensor, a: Tensor, b: Tensor, previous_neighbors: Tensor | None
) -> tuple[dict[str, float], Tensor]:
    """Compute the signals from features.

    Args:
        h: (N, d) features of the images.
        a: (N, d) features of the first views.
        b: (N, d) features of the second views.
        previous_neighbors: (N, NEIGHBOR_COUNT) positions, or None. They are ignored if the number
            of images has changed.

    Returns:
        The values, and the neighbors of each row of h, int32, on the CPU.
    """
    neighbors = nearest_neighbors(h, NEIGHBOR_COUNT)
    values = {
        "view_retrieval": view_retrieval(a, b),
        "h_rankme": rankme(h),
        "h_spectrum_auc": spectrum_auc(h),
    }
    if previous_neighbors is not None and previous_neighbors.shape == neighbors.shape:
        previous = previous_neighbors.to(neighbors.device)
        values["neighbor_stability"] = neighbor_stability(previous, neighbors)
    return values, neighbors.int().cpu()


def two_view_features(
    network: nn.Module, images: Images, recipe: ResolvedRecipe, *, compute: Compute
) -> tuple[Tensor, Tensor]:
    """Compute the features of two views of each image, always the same two.

    Each process computes its share; all processes get all features.

    Args:
        network: The backbone, in eval mode.
        images: N images that can be read.
        recipe: The recipe; its augmentations make the views.
        compute: Where to compute, and in which precision.

    Returns:
        Two matrices (N, d), float32.
    """
    num_parts = max(len(images) // 250 + 1, min(world_size(), len(images)))
    parts = np.array_split(np.arange(len(images)), num_parts)
    pairs = []
    for index in parts[local_slice(len(parts))]:
        views = make_training_views(images, index, recipe, MONITOR_STEP, compute.device)[:2]
        with torch.no_grad(), compute.autocast():
            pairs.append([network(x).float() for x in views])
    a, b = (all_gather(torch.cat(side)) for side in zip(*pairs, strict=True))
    return a, b


def advise_training_length(
    lines: Sequence[Mapping[str, float]], counts: Mapping[str, int] = MappingProxyType({})
) -> str:
    """Say whether more epochs would help, and why.

    A difference is ignored if it is smaller than 1.64 standard errors of a percentage.

    A learning rate schedule that ends makes every curve level off. So a level curve says that this
    run is complete, not that a longer run is useless.

    Args:
        lines: The records of metrics.jsonl. Those with measurements are read.
        counts: Number of images that each of ADVICE_SIGNALS is measured on.

    Returns:
        One line of advice.
    """
    reasons, rising, falling = [], False, False
    for name, label in ADVICE_SIGNALS.items():
        values = [record[name] for record in lines if record.get(name) is not None]
        if len(values) < MIN_MEASUREMENTS:
            continue
        first, at_two_thirds, last = values[0], values[-1 - len(values) // 3], values[-1]
        best, value_range = max(values), max(values) - min(values)
        reasons.append(
            f"{label}: {first:.1f} at first, {at_two_thirds:.1f} at two thirds, "
            f"{last:.1f} at the end"
        )
        noise = 0.0
        if count := counts.get(name):
            noise = 1.64 * sqrt(max(0.0, best * (100 - best)) / count)
        rising |= last > first and last - at_two_thirds > max(RISING_FRACTION * value_range, noise)
        falling |= best - last > max(0.5 * value_range, noise)
    if not reasons:
        return (
            f"No advice on when to stop: it takes at least {MIN_MEASUREMENTS} measurements, and a "
            "smaller --knn-every makes more."
        )
    if rising:
        advice = "Still rising at the end: more epochs are likely to help."
    elif falling:
        advice = "Past its best: use fewer epochs, a lower --base-lr, or an earlier checkpoint."
    else:
        advice = "Leveled off: stop here, or plan a new run several times as long."
    return f"{advice} {'; '.join(reasons)}."
