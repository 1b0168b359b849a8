"""The label-free monitor: signals of a frozen backbone that ask for no label, and what they say about when to stop."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from simsiam.config.recipes import Recipe
from simsiam.data.batches import views_of
from simsiam.data.images import Images, glance
from simsiam.data.transform import Transform
from simsiam.distributed.collectives import gather
from simsiam.distributed.process_group import by_first, count, share
from simsiam.model.precision import autocast
from simsiam.model.siamese import Siamese
from simsiam.monitoring.features import extract
from simsiam.monitoring.signals import neighbor_stability, neighbors, rankme, spectrum_auc, view_retrieval

LOOKED_AT = 2000  # images, spread evenly over the training set: the same ones every time
STEP = 2**63  # whose views they take, the same every time; no run gets there
K = 10  # neighbors
# What the advice goes by, with a unit: signals that rose and fell with kNN accuracy in docs/label_free.md.
FOLLOWED = {"knn_top1": "kNN (%)", "view_retrieval": "views that find each other (%)"}
ENOUGH = 6  # measurements
STILL = 0.1  # a share of the whole gain, in the last third of the measurements, that counts as still rising


class LabelFree(NamedTuple):
    values: dict[str, float]  # view_retrieval (%), h_rankme, h_spectrum_auc, and neighbor_stability (%) since `before`
    neighbors: Tensor  # (N, K) int32, to be given as `before` the next time
    skipped: list[tuple[str, str]]


def label_free_monitor(
    model: Siamese,
    images: Images,
    recipe: Recipe,
    transform: Transform,
    before: Tensor | None,
    *,
    device: torch.device,
    precision: str,
) -> LabelFree:
    """Signals on h of the same images and views whenever it is asked; a function of the weights and `before`."""
    looked_at = glance(images, LOOKED_AT)
    found = extract(model.backbone, looked_at, transform, device=device, precision=precision)
    h = found.matrices[0].to(device)
    training = model.training
    model.eval()
    try:
        shown = looked_at.take(found.kept)
        a, b = both_views(model.backbone, shown, recipe, device=device, precision=precision)
    finally:
        model.train(training)
    values, now = read(h, a, b, before)
    return LabelFree({k: round(v, 4) for k, v in values.items()}, now, found.skipped)


@by_first
def read(h: Tensor, a: Tensor, b: Tensor, before: Tensor | None) -> tuple[dict[str, float], Tensor]:
    """The signals, and the neighbors of each row of h now, on the CPU."""
    now = neighbors(h, K)
    values = {"view_retrieval": view_retrieval(a, b), "h_rankme": rankme(h), "h_spectrum_auc": spectrum_auc(h)}
    if before is not None and before.shape == now.shape:
        values["neighbor_stability"] = neighbor_stability(before.to(now.device), now)
    return values, now.int().cpu()


def both_views(
    network: nn.Module, images: Images, recipe: Recipe, *, device: torch.device, precision: str
) -> tuple[Tensor, Tensor]:
    """Features (N, d), float32, of two views of each image, the same two every time; `network` is in eval mode.

    Of several processes each makes its share of them, and all get all.
    """
    parts = np.array_split(np.arange(len(images)), max(len(images) // 250 + 1, min(count(), len(images))))
    pairs = []
    for index in parts[share(len(parts))]:
        views = views_of(images, index, recipe, STEP, device)[:2]
        with torch.no_grad(), autocast(device, precision):
            pairs.append([network(x).float() for x in views])
    a, b = (gather(torch.cat(side)) for side in zip(*pairs, strict=True))
    return a, b


def advise(lines: Sequence[Mapping[str, Any]]) -> str:
    """Whether more epochs would help, with the reasons, from the lines of metrics.jsonl that have measurements.

    A schedule that ends levels everything off, so a level says that this run is over, not that a longer one is no use.
    """
    reasons, rising, falling = [], False, False
    for name, words in FOLLOWED.items():
        values = [line[name] for line in lines if line.get(name) is not None]
        if len(values) < ENOUGH:
            continue
        first, before, last, best, least = (
            values[0],
            values[-1 - len(values) // 3],
            values[-1],
            max(values),
            min(values),
        )
        reasons.append(f"{words}: {first:.1f} first, {before:.1f} at two thirds, {last:.1f} at the end")
        rising |= last > first and last - before > STILL * (best - least)
        falling |= best - last > 0.5 * (best - least)
    if not reasons:
        return f"Fewer than {ENOUGH} measurements say nothing about when to stop: a smaller --knn-every takes more."
    if rising:
        advice = "Still rising at the end: more epochs are likely to help."
    elif falling:
        advice = "Past its best: fewer epochs, a lower --base-lr, or an earlier checkpoint."
    else:
        advice = "Leveled off: stop here, or plan a new run several times as long."
    return f"{advice} {'; '.join(reasons)}."
