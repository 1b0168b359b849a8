"""From images to features of a frozen backbone, with the preprocessing of evaluation: no randomness at all."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from simsiam.data.images import Images
from simsiam.data.transform import Transform, iter_crops
from simsiam.distributed.collectives import all_gather, all_gather_objects
from simsiam.distributed.process_group import local_slice, rank, world_size
from simsiam.errors import WorkFailed
from simsiam.model.precision import Compute
from simsiam.utils.progress_bar import progress_bar


class Features(NamedTuple):
    """What came out for M of N images."""

    matrices: list[Tensor]  # each (M, dim), float32, on the CPU
    kept_indices: np.ndarray  # int64 (M,), the positions of the images that could be read
    skipped: list[tuple[str, str]]  # key and reason of the others


def extract_features(
    model: nn.Module,
    images: Images,
    transform: Transform,
    *,
    compute: Compute,
    forward: Callable[[Tensor], tuple[Tensor, ...]] | None = None,
    progress_label: str = "",
) -> Features:
    """Features of each readable image from `model` in eval mode (its mode is restored).

    One matrix for each tensor that `forward` returns; by default the model's own output. Of several processes each goes
    through its share of the images, and all get the features of all. `words` stand before the bar that shows how far
    the first one is; without them there is none.
    """
    training = model.training
    model.eval()
    rows: list[list[Tensor]] = []
    kept: list[np.ndarray] = []
    skipped: list[tuple[str, str]] = []
    mine = local_slice(len(images))
    try:
        looked_at = images if world_size() == 1 else images.take(mine)
        with progress_bar(progress_label if rank() == 0 else "", len(looked_at)) as advance:
            for index, pixels in iter_crops(looked_at, transform, skipped):
                rows.append(
                    compute_outputs(forward or (lambda x: (model(x),)), pixels, transform, compute)
                )
                kept.append(index + mine.start)
                advance(len(index))
    finally:
        model.train(training)
    skipped, widths = (
        all_gather_objects(skipped),
        all_gather_objects([[m.shape[1] for m in matrices] for matrices in rows[:1]]),
    )
    if not widths:
        raise WorkFailed(
            f"none of the {len(images)} images can be read; the first, {skipped[0][0]}: {skipped[0][1]}"
        )
    columns = zip(
        [torch.empty(0, d) for d in widths[0]], *rows, strict=True
    )  # a share may have no readable image
    positions = torch.from_numpy(np.concatenate([np.arange(0), *kept]))
    return Features(
        [all_gather(torch.cat(column)) for column in columns],
        all_gather(positions).numpy(),
        skipped,
    )


def compute_outputs(
    forward: Callable[[Tensor], tuple[Tensor, ...]],
    pixels: Tensor,
    transform: Transform,
    compute: Compute,
) -> list[Tensor]:
    """What `forward` returns for cropped pixels, uint8 (N, C, size, size): float32, on the CPU, without gradients."""
    x = transform.normalize(pixels.to(compute.device)).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), compute.autocast():
        return [h.float().cpu() for h in forward(x)]


def standardization_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """What to subtract from features x (N, d) and what to divide by, so that they are STANDARDIZED."""
    mean, std = x.mean(0), x.std(0)
    std = torch.where(std > 1e-6 * x.abs().max(), std, 1)  # a constant feature stays one
    return mean, std * x.shape[1] ** 0.5
