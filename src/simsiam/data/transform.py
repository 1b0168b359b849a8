"""The preprocessing of evaluation: from an image to the input of a backbone, without randomness."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from simsiam.data.decode import AnyImage, Unreadable, to_pixels
from simsiam.data.images import PREFETCH_CHUNK, Images
from simsiam.errors import UsageError, printable
from simsiam.utils.workers import CPU_CORES

T = TypeVar("T")
MIN_DECODED_SIDE = (
    192  # pixels; so that thumbnails can be made of what encoders for small images see
)
_IMAGE_TYPES = (str, os.PathLike, bytes, Image.Image, np.ndarray, Tensor)


@dataclass(frozen=True)
class Transform:
    """Resize the shorter side of an image to `resize` pixels, crop its center, and normalize it.

    Attributes:
        size: Side of the result in pixels.
        mean: Mean of each channel, of pixels from 0 to 1.
        std: Standard deviation of each channel.
        interpolation: How images are resized: "bilinear" or "bicubic", with antialiasing.
        shorter_side: Pixels to resize to; None chooses (see `resize`).
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    shorter_side: int | None = None

    @property
    def resize(self) -> int:
        """Pixels that the shorter side is resized to.

        By default 256 for a crop of 224, in proportion for others; equal to `size` up to 64 pixels.
        Appendices A and D of the paper: small images are not cropped.
        """
        if self.shorter_side is not None:
            return self.shorter_side
        return self.size if self.size <= 64 else round(self.size * 256 / 224)

    @property
    def min_side(self) -> int:
        """Pixels that the shorter side of a JPEG keeps when it is decoded at a reduced size."""
        return max(2 * self.resize, MIN_DECODED_SIDE)

    def __call__(self, image: AnyImage | Tensor | Iterable[AnyImage | Tensor]) -> Tensor:
        """Transform images, each exactly as its file is for embedding and evaluation.

        Args:
            image: One image or several. An image is a path, the bytes of a file, a Pillow image
                (which is rotated as EXIF data in it says), or an array or tensor as in a NumPy
                file: (H, W, C), (C, H, W) or (H, W), of uint8, uint16 or floats from 0 to 1.

        Returns:
            (N, C, size, size) float32.

        Raises:
            UsageError: An image is missing, damaged or not supported.
        """
        images = [image] if isinstance(image, _IMAGE_TYPES) else image
        return self.normalize(
            torch.cat([self.crop(image_to_tensor(self._read(i))) for i in images])
        )

    def _read(self, image: AnyImage | Tensor) -> np.ndarray:
        if not isinstance(image, _IMAGE_TYPES):
            raise UsageError(
                "an image is a path, the bytes of a file, a Pillow image, an array or a tensor, "
                f"not {type(image).__name__}"
            )
        array = image.numpy(force=True) if isinstance(image, Tensor) else image
        try:
            return to_pixels(array, len(self.mean), self.min_side)
        except Unreadable as error:
            name = str(image) if isinstance(image, str | os.PathLike) else "the image"
            reason = str(error).partition("; give --channels")[0]  # the encoder has its own number
            raise UsageError(f"{printable(name)} cannot be read: {reason}") from None

    def crop(self, pixels: Tensor) -> Tensor:
        """Resize images and crop their centers.

        Args:
            pixels: uint8 (N, C, H, W).

        Returns:
            uint8 (N, C, size, size).
        """
        if pixels.shape[-2:] == (self.size, self.size) == (self.resize, self.resize):
            return pixels
        mode = TF.InterpolationMode(self.interpolation)
        resized = TF.resize(pixels, [self.resize], interpolation=mode, antialias=True)
        return TF.center_crop(resized, [self.size, self.size])

    def normalize(self, pixels: Tensor) -> Tensor:
        """Normalize crops: (x / 255 - mean) / std.

        Args:
            pixels: uint8 (N, C, size, size).

        Returns:
            float32, of the same shape.
        """
        mean, std = (
            torch.tensor(v, device=pixels.device).view(-1, 1, 1) for v in (self.mean, self.std)
        )
        return (pixels.float() / 255 - mean) / std


def image_to_tensor(pixels: np.ndarray) -> Tensor:
    """Convert an image to a batch of one.

    Args:
        pixels: uint8 (H, W, C).

    Returns:
        uint8 (1, C, H, W).
    """
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]


def iter_crops(
    images: Images,
    transform: Transform,
    skipped: list[tuple[str, str]],
    chunk_size: int = PREFETCH_CHUNK,
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Read and crop all images, a chunk at a time.

    Args:
        images: The images.
        transform: Crops them; does not normalize.
        skipped: A list to which the (key, reason) of each unreadable image is appended.
        chunk_size: Number of images in a chunk.

    Yields:
        Positions (n,) of the readable images of a chunk, and their pixels, uint8 (n, C, size,
        size).

    Raises:
        WorkFailed: A shard can no longer be read.
    """
    if images.pixels is not None:
        for start in range(0, len(images), chunk_size):
            chunk = torch.from_numpy(images.pixels[start : start + chunk_size])
            yield np.arange(start, start + len(chunk)), transform.crop(chunk)
        return
    for index, crops in iter_processed(
        images, transform.crop, transform.min_side, skipped, chunk_size
    ):
        yield index, torch.cat(crops)


def iter_processed(
    images: Images,
    process: Callable[[Tensor], T],
    min_side: int,
    skipped: list[tuple[str, str]],
    chunk_size: int,
) -> Iterator[tuple[np.ndarray, list[T]]]:
    """Read all images in several threads, a chunk at a time, and process each.

    Args:
        images: The images.
        process: What is done with an image, uint8 (1, C, H, W).
        min_side: See `Images.read`.
        skipped: A list to which the (key, reason) of each unreadable image is appended, in order.
        chunk_size: Number of images in a chunk.

    Yields:
        Positions (n,) of the readable images of a chunk, and what became of each.

    Raises:
        WorkFailed: A shard can no longer be read.
    """

    def read(i: int) -> T | Unreadable:
        try:
            return process(image_to_tensor(loaded.read(i, min_side)))
        except Unreadable as error:
            return error

    loaded, ahead = images, 0
    with ThreadPoolExecutor(CPU_CORES) as pool:
        for start in range(0, len(images), chunk_size):
            index = range(start, min(start + chunk_size, len(images)))
            if index.stop > ahead:  # a block is read if enough of it is needed
                ahead = min(start + max(chunk_size, PREFETCH_CHUNK), len(images))
                loaded = loaded.prefetch(np.arange(start, ahead), 0.25)
            positions, results = [], []
            for i, result in zip(index, pool.map(read, index), strict=True):
                if isinstance(result, Unreadable):
                    skipped.append((images.keys[i], str(result)))
                else:
                    positions.append(i)
                    results.append(result)
            if positions:
                yield np.array(positions), results
