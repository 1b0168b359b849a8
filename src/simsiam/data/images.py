"""Images by position, wherever they are stored; labels are optional.

The code that uses `Images` never asks where an image came from: it asks for image i. This module
does not import torch.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from simsiam.data.decode import ImageHeader, Unreadable
from simsiam.data.storage import (
    Blocks,
    Indices,
    Names,
    PixelArray,
    Storage,
    numbered_keys,
    select_rows,
)
from simsiam.errors import UsageError, WorkFailed, none_readable
from simsiam.utils.workers import CPU_CORES

RUN_LENGTH = 16  # neighboring images that are inspected together
PREFETCH_CHUNK = 256  # images whose blocks are loaded at a time
SAMPLE_SIZE = 200  # images whose sizes are measured


@dataclass(frozen=True, eq=False)
class Images:
    """N images by position; picklable, and cheap to share with forked DataLoader workers.

    Attributes:
        keys: The name of each image: its path in the source, "dog/7.jpg", or its split and row,
            "train#17".
        storage: Where the images are kept.
        labels: int64 (N,), positions in `classes`; None if any image has no label.
        classes: Class names; () without labels.
        channels: Number of channels that images are decoded to.
    """

    keys: Names
    storage: Storage
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    channels: int = 3

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def pixels(self) -> np.ndarray | None:
        """All images, uint8 (N, channels, H, W), if they are decoded and in memory."""
        return self.storage.pixels

    @property
    def blocks(self) -> Blocks | None:
        """The groups of images that one read fetches; None if images are read one by one."""
        return self.storage.blocks

    def read(self, i: int, min_side: int = 0) -> np.ndarray:
        """Decode image i: upright, and the first frame of an animation.

        Args:
            i: Position of the image.
            min_side: A JPEG may be decoded at a reduced size whose shorter side has at least this
                many pixels; 0 decodes it at full size.

        Returns:
            uint8 (H, W, channels).

        Raises:
            Unreadable: The file is missing, damaged or not supported.
        """
        return self.storage.read(i, self.channels, min_side)

    def read_header(self, i: int) -> ImageHeader:
        """Read the stored size, before any EXIF rotation, and the format of image i.

        Args:
            i: Position of the image.

        Returns:
            The header; nothing is decoded.

        Raises:
            Unreadable: The file is missing, damaged or not supported.
        """
        return self.storage.read_header(i, self.channels)

    def file(self, i: int) -> str | bytes:
        """Return the path of image i, or the content of its file.

        Args:
            i: Position of the image.

        Returns:
            A path where images are files in a folder; bytes elsewhere.

        Raises:
            Unreadable: The file is damaged inside its archive or shard.
        """
        return self.storage.file(i)

    def prefetch(self, indices: np.ndarray, min_fraction: float = 0.0) -> "Images":
        """Return the same images with the blocks of those at `indices` in memory.

        Args:
            indices: Positions of the images that will be read next.
            min_fraction: See `Storage.prefetch`.

        Returns:
            The images to read them from.
        """
        storage = self.storage.prefetch(indices, min_fraction)
        return self if storage is self.storage else replace(self, storage=storage)

    def drop_labels(self) -> "Images":
        """Return the same images without their labels."""
        return replace(self, labels=None, classes=())

    def take(self, indices: Indices) -> "Images":
        """Select images; encoded bytes are not copied.

        Args:
            indices: Whatever indexes a NumPy array.

        Returns:
            The images at `indices`, in that order.
        """
        rows = np.array(select_rows(None, indices, len(self)))  # a copy, shared by what follows
        return replace(
            self,
            keys=self.keys.take(rows),
            storage=self.storage.take(rows),
            labels=None if self.labels is None else self.labels[rows],
        )


def from_arrays(
    split: str,
    pixels: np.ndarray,
    labels: np.ndarray | Sequence[int] | None = None,
    classes: Sequence[str] = (),
) -> Images:
    """Make `Images` of decoded pixels.

    Args:
        split: Name of the split; the keys are "split#0", "split#1", ...
        pixels: uint8 (N, channels, H, W).
        labels: (N,), positions in `classes`.
        classes: Class names.

    Returns:
        The images, in memory.
    """
    assert pixels.dtype == np.uint8 and pixels.ndim == 4, (pixels.dtype, pixels.shape)
    pixels = np.require(pixels, requirements=["C", "W"])
    codes = None if labels is None else np.asarray(labels, np.int64)
    keys = numbered_keys(split, len(pixels))
    return Images(keys, PixelArray(pixels), codes, tuple(classes), pixels.shape[1])


def load_into_memory(
    images: Images, limit_bytes: int, threads: int = CPU_CORES
) -> tuple[Images, list[tuple[str, str]]]:
    """Decode images into one array, if they have one size and fit.

    Args:
        images: The images to decode.
        limit_bytes: The largest allowed size of the array.
        threads: Number of threads that decode.

    Returns:
        The images in memory, without the unreadable ones, and the (key, reason) of each unreadable
        one. If sizes differ or the array would be too large: the images as they were given, which
        are then read one by one in training, and [].

    Raises:
        WorkFailed: None of the images can be read.
    """
    if images.pixels is not None or not len(images):
        return images, []
    sizes = measure_sizes(images)
    if not len(sizes):
        sizes = measure_sizes(images, None)
    n, (height, width) = len(images), sizes[0] if len(sizes) else (0, 0)
    if (sizes != (height, width)).any() or n * images.channels * height * width > limit_bytes:
        return images, []

    pixels = np.empty((n, images.channels, height, width), np.uint8)

    def decode(positions: np.ndarray) -> dict[int, str]:
        reasons, loaded = {}, images.prefetch(positions)
        for i in positions:
            try:
                image = loaded.read(i)
            except Unreadable as error:
                reasons[i] = str(error)
                continue
            if image.shape[:2] != (height, width):
                raise _SizeMismatch
            pixels[i] = image.transpose(2, 0, 1)
        return reasons

    unreadable: dict[int, str] = {}
    try:
        with ThreadPoolExecutor(threads) as pool:  # threads suffice: Pillow decodes without the GIL
            for reasons in pool.map(decode, np.array_split(np.arange(n), n // 256 + 1)):
                unreadable |= reasons
    except _SizeMismatch:
        return images, []
    left_out = [(images.keys[i], reason) for i, reason in unreadable.items()]
    kept = np.setdiff1d(np.arange(n), list(unreadable))
    if not len(kept):
        raise none_readable(n, *left_out[0])
    if left_out:
        for to, i in enumerate(kept):  # close the gaps in place: a copy would need the memory twice
            pixels[to] = pixels[i]
    return replace(images.take(kept), storage=PixelArray(pixels[: len(kept)])), left_out


def evenly_spaced(n: int, limit: int | None) -> np.ndarray:
    """Spread positions evenly over range(n).

    Args:
        n: Number of positions to choose from.
        limit: Number of positions to choose; None for all.

    Returns:
        min(n, limit) positions, int64 and increasing.
    """
    return np.arange(n) if limit is None or limit >= n else np.arange(limit) * n // limit


def sample(images: Images, limit: int | None) -> Images:
    """Choose images that are spread evenly over the source, each class in proportion.

    Args:
        images: The images to choose from.
        limit: Number of images to choose; None for all.

    Returns:
        The chosen images, in their order.
    """
    if limit is None or limit >= len(images):
        return images
    if images.labels is None:
        order = np.arange(len(images))
    else:
        order = np.argsort(images.labels, kind="stable")
    return images.take(np.sort(order[evenly_spaced(len(images), limit)]))


def quick_sample(images: Images, limit: int) -> Images:
    """Choose images to inspect that are quick to read.

    Args:
        images: The images to choose from.
        limit: Number of images to choose.

    Returns:
        Images spread evenly over the source; runs of neighbors if reading one means reading the
        whole block that it is in.
    """
    if images.blocks is not None and images.blocks.required and limit < len(images):
        runs = evenly_spaced(len(images) // RUN_LENGTH, -(-limit // RUN_LENGTH))
        return images.take((runs[:, None] * RUN_LENGTH + np.arange(RUN_LENGTH)).ravel()[:limit])
    return sample(images, limit)


def check_hold_out(count: int, total: int) -> None:
    """Check that some images can be held out, and that some are left.

    Args:
        count: Number of images to hold out.
        total: Number of images.

    Raises:
        UsageError: Unless 0 < count < total.
    """
    if not 0 < count < total:
        raise UsageError(f"cannot hold out {count} of {total} images: give 1 to {total - 1}")


def hold_out(images: Images, count: int, seed: int = 0) -> tuple[Images, Images]:
    """Split off images, each class in proportion.

    Args:
        images: The images to split.
        count: Number of images to hold out.
        seed: Seed of the choice, which depends on labels, count and seed alone.

    Returns:
        The rest, and the images held out, both in their order.

    Raises:
        UsageError: Unless 0 < count < N.
    """
    check_hold_out(count, len(images))
    order = np.random.default_rng(seed).permutation(len(images))
    if images.labels is not None:
        order = order[np.argsort(images.labels[order], kind="stable")]  # shuffled within each class
    chosen = np.sort(order[evenly_spaced(len(images), count)])
    return images.take(np.setdiff1d(order, chosen)), images.take(chosen)


def measure_sizes(images: Images, sample_size: int | None = SAMPLE_SIZE) -> np.ndarray:
    """Read the sizes of some images from their headers.

    Args:
        images: The images to choose from.
        sample_size: Number of images to inspect, spread evenly; None for all.

    Returns:
        (height, width) in pixels of the readable ones, int64 (M, 2).
    """
    some = images if sample_size is None else quick_sample(images.drop_labels(), sample_size)
    sizes = []
    for i in range(len(some)):
        if i % PREFETCH_CHUNK == 0:
            some = some.prefetch(np.arange(i, min(i + PREFETCH_CHUNK, len(some))), 0.25)
        with suppress(Unreadable):
            sizes.append(some.read_header(i)[:2])
    return np.array(sizes, np.int64).reshape(-1, 2)


def sampled_error(images: Images) -> WorkFailed:
    """Make the error for images of whose sample `measure_sizes` can read none.

    Args:
        images: The images.

    Returns:
        The error, with the reason for the first image, which is in each sample.
    """
    reason = "it changed while it was read"
    try:
        images.read_header(0)
    except Unreadable as error:
        reason = str(error)
    kind = "images" if len(images) <= SAMPLE_SIZE else "images of a sample"
    return none_readable(min(len(images), SAMPLE_SIZE), images.keys[0], reason, kind)


class _SizeMismatch(Exception):
    """An image does not have the size of the first one."""
