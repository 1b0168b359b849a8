"""The distance of two images: the largest difference between two tiles at the same place.

An average over the whole image would not do: pages of one book, forms that are filled in
differently, and two frames of a camera that does not move differ in a few places only.
"""

from math import inf
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

SIDE = 512  # the largest side of what is compared, in pixels
TILE = 8  # side of a tile, in pixels; tiles of colors are twice as large, of softened colors
# Gray levels from dark to bright. Contrast below this is noise: compression alone changes flat
# tiles by a part of it.
FLOOR = 28.0  # of brightness and alpha together
COLOR_FLOOR = 56.0  # of the colors together
FLAT_CONTRAST = 4.0  # gray levels; an image with less contrast everywhere has one color
LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in JPEG's brightness


class Match(NamedTuple):
    """The comparison of two images: their distance, and a note for the user (see `Duplicate`)."""

    distance: float
    note: str = ""


class Detail(NamedTuple):
    """An image at the size at which it is compared; its proportions are not kept.

    Attributes:
        pixels: (C + 1, h, w) uint8, at most SIDE pixels a side; the colors, blended with white
            where the image is transparent, and its alpha channel.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
    """

    pixels: Tensor
    height: int
    width: int

    @property
    def is_flat(self) -> bool:
        """Whether the image has one color."""
        x = self.pixels.float()
        within_tiles = tile_variance(x, _count_tiles(*x.shape[1:])).max().sqrt().item()
        return max(within_tiles, x.std((1, 2), correction=0).max().item()) < FLAT_CONTRAST


def make_detail(pixels: np.ndarray) -> Detail:
    """Prepare an image for comparisons.

    Args:
        pixels: (H, W, C) uint8; with 4 channels the last one is alpha.

    Returns:
        The detail.
    """
    height, width, channels = pixels.shape
    x = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    color, alpha = (x[:3], x[3:]) if channels == 4 else (x, torch.full_like(x[:1], 255))
    color = color.expand(3, -1, -1) if channels == 1 else color
    if alpha.amin() < 255:
        share = alpha.float() / 255
        color = (color * share + 255 * (1 - share)).round().byte()
    sides = [min(height, SIDE), min(width, SIDE)]
    return Detail(TF.resize(torch.cat([color, alpha]), sides, antialias=True), height, width)


def tile_distance(a: Tensor, b: Tensor, limit: float = inf) -> float:
    """Compute the largest difference of two tiles, relative to their contrast.

    The larger image is reduced to the size of the smaller one, and both are blurred a little: the
    finest detail is what compression and resizing change. Colors are compared at a quarter of the
    resolution, because JPEG stores them coarsely.

    Args:
        a: The pixels of an image, (C, h, w), its alpha channel last; see `Detail`.
        b: Those of another, with as many channels.
        limit: Above this, any distance between it and the true one may be returned, which is
            faster.

    Returns:
        The root mean square of the difference of two tiles, divided by their contrast, of at least
        FLOOR: 0 for equal images, about 0.47 or more for unrelated ones. Contrast is three standard
        deviations of the brightness in a tile, a little more than from minimum to maximum of a
        sine wave.
    """
    height, width = (min(a.shape[axis], b.shape[axis]) for axis in (1, 2))
    a, b = (TF.resize(x, [height, width], antialias=True).float() for x in (a, b))
    rows, columns = _count_tiles(height, width)
    c, d = (F.adaptive_avg_pool2d(x[:-1], (2 * rows, 2 * columns)) for x in (a, b))
    colors = _tile_distance(c, d, (-(-rows // 2), -(-columns // 2)), COLOR_FLOOR)
    if colors > limit:
        return colors
    a, b = (_soften(brightness(x)) for x in (a, b))
    return max(colors, _tile_distance(a, b, (rows, columns), FLOOR))


def tile_variance(x: Tensor, tiles: tuple[int, int]) -> Tensor:
    """Compute the variance within each tile, summed over channels.

    Args:
        x: (C, h, w).
        tiles: Numbers of tiles in a column and in a row.

    Returns:
        (tiles[0], tiles[1]).
    """
    mean = F.adaptive_avg_pool2d(x, tiles)
    return (F.adaptive_avg_pool2d(x.square(), tiles) - mean.square()).clamp_min(0).sum(0)


def _tile_distance(a: Tensor, b: Tensor, tiles: tuple[int, int], floor: float) -> float:
    difference = F.adaptive_avg_pool2d((a - b).square(), tiles).sum(0)
    variance = (tile_variance(a, tiles) + tile_variance(b, tiles)) / 2
    contrast = 9 * variance + floor**2  # squared
    return (difference / contrast).max().sqrt().item()


def _count_tiles(height: int, width: int) -> tuple[int, int]:
    return max(1, round(height / TILE)), max(1, round(width / TILE))


def _soften(x: Tensor) -> Tensor:
    """The mean of an image and of the same image blurred over 3 x 3 pixels."""
    blurred = F.avg_pool2d(x[None], 3, stride=1, padding=1, count_include_pad=False)[0]
    return (x + blurred) / 2


def brightness(x: Tensor) -> Tensor:
    """Reduce the colors of an image to their brightness.

    Args:
        x: (C, h, w) float32, the alpha channel last.

    Returns:
        (2, h, w): brightness and alpha.
    """
    color, alpha = x[:-1], x[-1:]
    weights = x.new_tensor(LUMA) if len(color) == 3 else x.new_full((len(color),), 1 / len(color))
    return torch.cat([torch.einsum("c,chw->hw", weights, color)[None], alpha])
