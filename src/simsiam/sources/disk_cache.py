"""A disk cache of decoded pixels, for images that do not fit into memory.

With it, every epoch after the first reads pixels instead of decoding files again. Each source has
one file in the user's cache folder: a .npy table that says where the pixels of each image are,
followed by the pixels. All workers map the file, so they share its pages.

The cache never changes what a model is trained on. Its pixels are those that `Images.read` decodes,
their CRC-32 is checked whenever they are read, and an image that is missing or damaged in the file
is decoded. This module does not import torch.
"""

import json
import os
import sys
import zlib
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import PIL
from PIL import features

from simsiam.data.decode import Unreadable
from simsiam.data.images import Images
from simsiam.data.storage import Blocks, Indices, Storage
from simsiam.errors import UsageError, WorkFailed, printable
from simsiam.sources.file_index import pixel_cache_dir, source_stamps, update_with_stamps
from simsiam.utils.files import atomic_write, file_lock, remove_stale_parts
from simsiam.utils.progress_bar import progress_bar
from simsiam.utils.read_files import open_regular
from simsiam.utils.workers import CPU_CORES

PIXEL_CACHE_VERSION = 1  # of the file format, and of what `decode_image` returns
# One row per image; height 0: the image is not in the file.
ROW_DTYPE = np.dtype([("start", "<i8"), ("height", "<i4"), ("width", "<i4"), ("crc", "<u4")])
DECODE_CHUNK = 4 * CPU_CORES  # images that are decoded before they are written


class PixelFile:
    """The pixels in a file that `write_pixel_file` wrote; no pixels if it is missing or incomplete.

    Pickles as its path, so a worker that is not forked maps the file itself.

    Args:
        path: The file.
        channels: Channels of each image.
    """

    def __init__(self, path: Path, channels: int):
        self.path, self.channels = path, channels
        self.table, self.pixels = np.zeros(0, ROW_DTYPE), np.zeros(0, np.uint8)
        with suppress(OSError, UsageError, ValueError, EOFError, OverflowError):
            open_regular(path).close()
            table = np.array(np.load(path, mmap_mode="r"))  # mapped, it is not larger than the file
            if table.dtype == ROW_DTYPE and table.ndim == 1:
                start, height, width, _ = table[np.argmax(table["start"])].item()  # the last image
                if start + height * width * channels == path.stat().st_size:
                    self.table, self.pixels = table, np.asarray(np.memmap(path, np.uint8, "r"))

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path, int]]:
        return PixelFile, (self.path, self.channels)

    def __len__(self) -> int:
        return int(np.count_nonzero(self.table["height"]))

    def read_row(self, row: int) -> np.ndarray | None:
        """Read the pixels of one image. A file that turns out to be damaged is deleted.

        Args:
            row: Row of the image in the table.

        Returns:
            uint8 (H, W, channels), read-only; None if they are not in the file, or damaged.
        """
        if row >= len(self.table) or not self.table[row]["height"]:
            return None
        start, height, width, crc = self.table[row].item()
        size = max(0, height) * max(0, width) * self.channels
        pixels = self.pixels[max(0, start) : start + size]
        if 0 < len(pixels) == size and _crc(pixels.reshape(height, width, self.channels)) == crc:
            return pixels.reshape(height, width, self.channels)
        with suppress(OSError):
            self.path.unlink()  # only one process succeeds, so only one prints the message
            print(
                f"simsiam: {printable(str(self.path))} was damaged and is deleted; this run "
                "decodes the images that were in it, and the next run writes it again",
                file=sys.stderr,
            )
        return None


@dataclass(frozen=True, eq=False)
class DiskCache(Storage):
    """Images in another storage, of which some are also decoded in a file.

    Attributes:
        source: Where the image files are.
        pixel_file: The decoded images.
        rows: int64 (N,), the row of each image in the pixel file.
        min_side: The `min_side` that they were decoded with.
    """

    source: Storage
    pixel_file: PixelFile
    rows: np.ndarray
    min_side: int

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Indices) -> "DiskCache":
        """Return the images at `indices`, in that order."""
        return replace(self, source=self.source.take(indices), rows=self.rows[indices])

    def file(self, i: int) -> str | bytes:
        """Return the path of image i, or the content of its file."""
        return self.source.file(i)

    def read(self, i: int, channels: int, min_side: int = 0) -> np.ndarray:
        """Read the pixels of image i from the pixel file if they are there; decode it otherwise."""
        cached = self.pixel_file.read_row(int(self.rows[i])) if min_side == self.min_side else None
        return self.source.read(i, channels, min_side) if cached is None else cached

    @property
    def blocks(self) -> Blocks | None:
        """The blocks of the other storage."""
        return self.source.blocks

    @property
    def block_bytes(self) -> int:
        """The size of a block of the other storage."""
        return self.source.block_bytes

    def prefetch(self, indices: np.ndarray, min_fraction: float = 0.0) -> "DiskCache":
        """Return the same images with their blocks in memory; see `Storage.prefetch`."""
        return replace(self, source=self.source.prefetch(indices, min_fraction))


def with_disk_cache(
    images: Images, source_names: Sequence[str], all_images: Images, min_side: int, limit_bytes: int
) -> Images:
    """Make images be read from a file of their decoded pixels, which is first written if needed.

    The file name is a digest of everything that determines the pixels. If any of it changes, a new
    file is written and the old file of the source is deleted. If the file cannot be written, one
    line on stderr says why.

    Args:
        images: The images that will be read, a selection of `all_images`.
        source_names: The names that opened their source.
        all_images: The training images of the source as it was opened.
        min_side: See `Images.read`.
        limit_bytes: Largest size of the file; 0 for no file.

    Returns:
        The images with the disk cache; `images` if they are in memory, or there is no file.
    """
    if images.pixels is not None or not limit_bytes:
        return images
    folder = pixel_cache_dir()
    source = blake2b(json.dumps(list(source_names)).encode(), digest_size=16).hexdigest()
    digest = _cache_digest(images, source_names, all_images, min_side, limit_bytes)
    path = folder / f"{source}-{digest}.npy"
    try:
        # Other processes that need the same file wait, and then use it.
        with file_lock(folder / "lock", wait=True):
            pixel_file = PixelFile(path, images.channels)
            if not len(pixel_file):
                remove_stale_parts(folder)
                for old in folder.glob(f"{source}-*.npy"):
                    with suppress(PermissionError):  # Windows, if another run has mapped it
                        old.unlink()
                write_pixel_file(images, path, min_side, limit_bytes)
                pixel_file = PixelFile(path, images.channels)
    except (OSError, UsageError, WorkFailed) as error:
        print(f"simsiam: decoded images are not cached on disk: {error}", file=sys.stderr)
        return images
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one of the processes on this host
        size = f"{len(pixel_file.pixels) / 2**30:,.2f} GiB"
        print(
            f"on disk  {len(pixel_file):,} of {len(images):,} images, {size}: "
            f"{printable(str(path))}",
            file=sys.stderr,
        )
    return with_pixel_file(images, pixel_file, min_side)


def with_pixel_file(images: Images, pixel_file: PixelFile, min_side: int) -> Images:
    """Make images be read from a pixel file.

    Args:
        images: The images that were written to the file.
        pixel_file: The file.
        min_side: The `min_side` that it was written with.

    Returns:
        The same images; `Images.read` uses the file when called with the same `min_side`.
    """
    rows = np.arange(len(images))
    return replace(images, storage=DiskCache(images.storage, pixel_file, rows, min_side))


def _cache_digest(
    images: Images, source_names: Sequence[str], all_images: Images, min_side: int, limit_bytes: int
) -> str:
    """Digest which images the file contains, as the file system sees them, and the decoding."""
    containers, stamps = source_stamps(source_names, [all_images])
    libraries = [PIL.__version__, features.version("libjpeg_turbo"), features.version("jpg")]
    decoding = [PIXEL_CACHE_VERSION, images.channels, min_side, limit_bytes, libraries, containers]
    digest = blake2b(json.dumps(decoding).encode(), digest_size=16)
    update_with_stamps(digest, stamps)
    if images.keys.rows is not None:
        digest.update(images.keys.rows.tobytes())
    return digest.hexdigest()


def write_pixel_file(images: Images, path: Path, min_side: int, limit_bytes: int) -> None:
    """Decode images, in order, into a file. Unreadable images are left out.

    Args:
        images: The images.
        path: The file to write; it appears when it is complete.
        min_side: See `Images.read`.
        limit_bytes: Size of the file at which writing stops.

    Raises:
        OSError: The file cannot be written.
        WorkFailed: A shard can no longer be read.
    """
    table = np.zeros(len(images), ROW_DTYPE)
    with (
        atomic_write(path) as part,
        open(part, "wb") as file,
        progress_bar("decoding to disk", len(images)) as advance,
        closing(_decode_in_order(images, min_side)) as decoded,
    ):
        np.lib.format.write_array(file, table)  # reserves the space; the rows are written last
        end = file.tell()
        for i, pixels in enumerate(decoded):
            advance(1)
            if pixels is None:
                continue
            if end + pixels.nbytes > limit_bytes:
                break
            table[i] = end, *pixels.shape[:2], _crc(pixels)
            file.write(pixels.data)
            end += pixels.nbytes
        file.seek(0)
        np.lib.format.write_array(file, table)


def _decode_in_order(images: Images, min_side: int) -> Generator[np.ndarray | None]:
    """Yield the pixels of each image in order, None if it is unreadable; few are in memory."""

    def read(i: int) -> np.ndarray | None:
        with suppress(Unreadable):
            return np.ascontiguousarray(images.read(i, min_side))
        return None

    with ThreadPoolExecutor(CPU_CORES) as pool:  # threads suffice: Pillow decodes without the GIL
        for start in range(0, len(images), DECODE_CHUNK):
            chunk = np.arange(start, min(start + DECODE_CHUNK, len(images)))
            yield from pool.map(read, chunk)


def _crc(pixels: np.ndarray) -> int:
    """Compute the CRC-32 of the shape (H, W, channels) and the bytes."""
    return zlib.crc32(pixels.data, zlib.crc32(np.array(pixels.shape, "<i4").data))
