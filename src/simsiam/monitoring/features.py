"""Features of a frozen network for a set of images, with the preprocessing of evaluation."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from simsiam.data.images import Images
from simsiam.data.transform import Transform, iter_crops
from simsiam.distributed.collectives import all_gather, all_gather_objects
from simsiam.distributed.process_group import local_slice, rank, world_size
from simsiam.errors import none_readable
from simsiam.model.precision import Compute
from simsiam.utils.progress_bar import progress_bar


class Features(NamedTuple):
    """Features of the M images out of N that could be read.

    Attributes:
        matrices: One matrix (M, d) for each output, float32, on the CPU.
        kept_indices: (M,) int64, the positions of these images in the set.
        skipped: Key and reason of each image that could not be read.
    """

    matrices: list[Tensor]
    kept_indices: np.ndarray
    skipped: list[tuple[str, str]]


def extract_features(
    model: nn.Module,
    images: Images,
    transform: Transform,
    *,
    compute: Compute,
    forward: Callable[[Tensor], tuple[Tensor, ...]] | None = None,
    progress_label: str = "",
) -> Features:
    """Compute the features of every readable image, with the model in eval mode.

    Each process computes the features of its share of the images; all processes get all features.

    Args:
        model: The network; its training mode is restored afterwards.
        images: The images.
        transform: The preprocessing.
        compute: Where to compute, and in which precision.
        forward: Returns a tuple of tensors (n, d) for normalized images (n, C, H, W). The default
            is the output of `model` alone.
        progress_label: The text before a progress bar; "" shows no bar.

    Returns:
        One matrix for each tensor that `forward` returns, and which images they belong to.

    Raises:
        WorkFailed: No image can be read.
    """
    rows: list[list[Tensor]] = []
    kept_indices: list[np.ndarray] = []
    skipped: list[tuple[str, str]] = []
    share = local_slice(len(images))
    local_images = images if world_size() == 1 else images.take(share)
    training = model.training
    model.eval()
    try:
        with progress_bar(progress_label if rank() == 0 else "", len(local_images)) as advance:
            for index, pixels in iter_crops(local_images, transform, skipped):
                rows.append(
                    compute_outputs(forward or (lambda x: (model(x),)), pixels, transform, compute)
                )
                kept_indices.append(index + share.start)
                advance(len(index))
    finally:
        model.train(training)
    skipped = all_gather_objects(skipped)
    widths = all_gather_objects([[matrix.shape[1] for matrix in row] for row in rows[:1]])
    if not widths:
        raise none_readable(len(images), *skipped[0])
    empty = [torch.empty(0, width) for width in widths[0]]  # a share may have no readable image
    columns = zip(empty, *rows, strict=True)
    positions = torch.from_numpy(np.concatenate([np.arange(0), *kept_indices]))
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
    """Compute the outputs of a network for cropped images, without gradients.

    Args:
        forward: Returns a tuple of tensors for normalized images (N, C, size, size).
        pixels: (N, C, size, size) uint8.
        transform: The preprocessing; it normalizes the pixels.
        compute: Where to compute, and in which precision.

    Returns:
        The tensors as float32 on the CPU.
    """
    x = compute.place(transform.normalize(pixels.to(compute.device)))
    with torch.no_grad(), compute.autocast():
        return [h.float().cpu() for h in forward(x)]


def standardization_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what standardizes features: (x - mean) / scale.

    Args:
        x: (N, d).

    Returns:
        The mean (d,) and the scale (d,). The scale is the standard deviation times √d, so that rows
        have a norm of about 1; a feature that is constant over the rows is not scaled up.
    """
    mean, std = x.mean(0), x.std(0)
    std = torch.where(std > 1e-6 * x.abs().max(), std, 1)
    return mean, std * x.shape[1] ** 0.5
