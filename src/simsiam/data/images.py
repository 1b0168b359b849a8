"""Images by position, wherever they are stored; labels are used where there are any and never required.

What follows never asks where an image came from, only for the i-th one. Loads no torch.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from simsiam.data.decode import ImageHeader, Unreadable, decode_image, read_header
from simsiam.data.shards import Blocks, Shards, select_rows
from simsiam.data.storage import ArchiveMembers, Column, numbered_keys
from simsiam.errors import UsageError, WorkFailed, printable
from simsiam.utils.workers import CPU_CORES

RUN_LENGTH = 16  # neighbors that are looked at together


PREFETCH_CHUNK = 256  # images that are brought near at a time


@dataclass(frozen=True, eq=False)
class Images:
    """N images, by position. Picklable, and cheap to fork into the workers of a DataLoader."""

    keys: Column  # what to call each image: its path in the source, "dog/7.jpg", or its split and row, "train#17"
    encoded: Column | ArchiveMembers | Shards | Path | None = (
        None  # files' bytes, or the folder of `keys`; None with `pixels`
    )
    labels: np.ndarray | None = (
        None  # int64 (N,), positions in `classes`; None where any image has none
    )
    classes: tuple[str, ...] = ()  # class names; () without labels
    pixels: np.ndarray | None = None  # uint8 (N, channels, H, W) when decoded and in memory
    channels: int = 3

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, i: int, min_side: int = 0) -> np.ndarray:
        """Image i as uint8 (H, W, channels), upright, the first frame of an animation. Raises Unreadable.

        A large JPEG may be decoded at reduced size, its shorter side keeping at least `least` pixels.
        """
        if self.pixels is not None:
            return self.pixels[i].transpose(1, 2, 0)
        return decode_image(self.file(i), self.channels, min_side)

    def read_header(self, i: int) -> ImageHeader:
        """Size and format of image i as stored, before any EXIF rotation; decodes nothing. Raises Unreadable."""
        if self.pixels is not None:
            return ImageHeader(self.pixels.shape[2], self.pixels.shape[3], "pixels")
        return read_header(self.file(i), self.channels)

    def file(self, i: int) -> str | bytes:
        """The path of image i, or the bytes of its file."""
        if isinstance(self.encoded, Path):
            return os.path.join(self.encoded, self.keys[i])
        assert self.encoded is not None, "images are either encoded or pixels"
        return self.encoded[i] or b""  # Parquet's null: a row without an image

    @property
    def blocks(self) -> Blocks | None:
        """The images that are read together, where they lie in shards; None where each is as near as any other."""
        return self.encoded.blocks if isinstance(self.encoded, Shards) else None

    def prefetch(self, indices: np.ndarray, min_fraction: float = 0.0) -> "Images":
        """The same images, with those at `indices` in memory where they lie in shards: see `Shards.near`."""
        return (
            replace(self, encoded=self.encoded.prefetch(indices, min_fraction))
            if isinstance(self.encoded, Shards)
            else self
        )

    def drop_labels(self) -> "Images":
        """The same images without their labels."""
        return replace(self, labels=None, classes=())

    def take(self, indices: Any) -> "Images":
        """The images at `indices` (whatever indexes a NumPy array), in that order. Encoded bytes are not copied."""
        rows = select_rows(None, indices, len(self))
        return replace(
            self,
            keys=self.keys[rows],
            encoded=self.encoded[rows]
            if isinstance(self.encoded, Column | ArchiveMembers | Shards)
            else self.encoded,
            labels=None if self.labels is None else self.labels[rows],
            pixels=None if self.pixels is None else self.pixels[rows],
        )


def from_arrays(
    split: str, pixels: np.ndarray, labels: Any = None, classes: Sequence[str] = ()
) -> Images:
    """Images already decoded: pixels uint8 (N, C, H, W), perhaps labels (N,); the keys are "split#0", "split#1", ..."""
    assert pixels.dtype == np.uint8 and pixels.ndim == 4, (pixels.dtype, pixels.shape)
    pixels = np.require(pixels, requirements=["C", "W"])
    found = None if labels is None else np.asarray(labels, np.int64)
    return Images(
        numbered_keys(split, len(pixels)), None, found, tuple(classes), pixels, pixels.shape[1]
    )


def load_into_memory(
    images: Images, limit_bytes: int, threads: int = CPU_CORES
) -> tuple[Images, list[tuple[str, str]]]:
    """Images decoded into one uint8 array (N, channels, H, W), and the (key, reason) of each unreadable one left out.

    Returns the images as they are, to be streamed, if they differ in size or would take more than `limit_bytes`.
    Raises WorkFailed if not one can be read.
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
        reasons, near = {}, images.prefetch(positions)
        for i in positions:
            try:
                image = near.read(i)
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
        raise WorkFailed(
            f"none of the {n} images can be read; the first, {printable(left_out[0][0])}: {left_out[0][1]}"
        )
    if left_out:
        for to, i in enumerate(kept):  # close the gaps in place: a copy would need the memory twice
            pixels[to] = pixels[i]
    return replace(images.take(kept), encoded=None, pixels=pixels[: len(kept)]), left_out


def evenly_spaced(n: int, limit: int | None) -> np.ndarray:
    """`limit` positions spread evenly over range(n), int64 and increasing; all n if `limit` is None or at least n."""
    return np.arange(n) if limit is None or limit >= n else np.arange(limit) * n // limit


def sample(images: Images, limit: int | None) -> Images:
    """`limit` images spread evenly over the source, in order, each class in proportion; all if `limit` is None."""
    if limit is None or limit >= len(images):
        return images
    order = (
        np.arange(len(images))
        if images.labels is None
        else np.argsort(images.labels, kind="stable")
    )
    return images.take(np.sort(order[evenly_spaced(len(images), limit)]))


def quick_sample(images: Images, limit: int) -> Images:
    """`limit` images to look at, spread evenly; runs of neighbors where reading one means reading its row group."""
    if (
        isinstance(images.encoded, Shards)
        and images.encoded.locations.column
        and limit < len(images)
    ):
        runs = evenly_spaced(len(images) // RUN_LENGTH, -(-limit // RUN_LENGTH))
        return images.take((runs[:, None] * RUN_LENGTH + np.arange(RUN_LENGTH)).ravel()[:limit])
    return sample(images, limit)


def hold_out(images: Images, count: int, seed: int = 0) -> tuple[Images, Images]:
    """(the rest, `count` images held out): a function of (labels, count, seed), in order, each class in proportion.

    Raises UsageError unless 0 < count < N.
    """
    if not 0 < count < len(images):
        raise UsageError(
            f"cannot hold out {count} of {len(images)} images: give 1 to {len(images) - 1}"
        )
    order = np.random.default_rng(seed).permutation(len(images))
    if images.labels is not None:
        order = order[np.argsort(images.labels[order], kind="stable")]  # shuffled within each class
    held = np.sort(order[evenly_spaced(len(images), count)])
    return images.take(np.setdiff1d(order, held)), images.take(held)


def measure_sizes(images: Images, sample_size: int | None = 200) -> np.ndarray:
    """(height, width) of `sample` evenly spread images, int64 (M, 2), from headers alone; skips unreadable ones."""
    some, sizes = (
        images if sample_size is None else quick_sample(images.drop_labels(), sample_size),
        [],
    )
    for i in range(len(some)):
        if i % PREFETCH_CHUNK == 0:
            some = some.prefetch(np.arange(i, min(i + PREFETCH_CHUNK, len(some))), 0.25)
        with suppress(Unreadable):
            sizes.append(some.read_header(i)[:2])
    return np.array(sizes, np.int64).reshape(-1, 2)


def fingerprint(splits: Sequence[Images]) -> str:
    """What changes when an image comes, goes, moves, or is renamed."""
    digest = blake2b(digest_size=16)
    for images in splits:
        for key in images.keys:
            digest.update(os.fsencode(key) + b"\0")
    return digest.hexdigest()


class _SizeMismatch(Exception):
    """An image that is not the size of the first."""
