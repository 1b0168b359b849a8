"""The label-free monitor: signals of a frozen backbone that ask for no label, and what they say about when to stop."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from simsiam.batches import views_of
from simsiam.features import Transform, extract
from simsiam.images import Images, sample
from simsiam.precision import autocast
from simsiam.recipes import Recipe
from simsiam.siamese import Siamese
from simsiam.signals import neighbor_stability, neighbors, rankme, spectrum_auc, view_retrieval

LOOKED_AT = 2000  # images, spread evenly over the training set: the same ones every time
STEP = 2**63  # whose views they take, the same every time; no run gets there
K = 10  # neighbors


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
    looked_at = sample(images, LOOKED_AT)
    found = extract(model.backbone, looked_at, transform, device=device, precision=precision)
    h = found.matrices[0].to(device)
    training, pairs = model.training, []
    model.eval()
    try:
        for index in np.array_split(found.kept, len(found.kept) // 250 + 1):
            views = views_of(looked_at, index, recipe, STEP, device)[:2]
            with torch.no_grad(), autocast(device, precision):
                pairs.append([model.backbone(x).float() for x in views])
    finally:
        model.train(training)
    a, b = (torch.cat(side) for side in zip(*pairs, strict=True))
    now = neighbors(h, K)
    values = {"view_retrieval": view_retrieval(a, b), "h_rankme": rankme(h), "h_spectrum_auc": spectrum_auc(h)}
    if before is not None and before.shape == now.shape:
        values["neighbor_stability"] = neighbor_stability(before.to(device), now)
    return LabelFree({k: round(v, 4) for k, v in values.items()}, now.int().cpu(), found.skipped)
