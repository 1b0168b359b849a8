"""Decoded pixels on disk, for images that are too many for memory: an epoch reads them instead of decoding files anew.

One file a source, in the user's cache folder: a .npy whose rows say where the pixels of each image lie behind it. All
workers map it, so they share its pages. It never changes what is trained on: pixels are those that `Images.read`
decodes, each image's are checked by CRC-32 whenever they are read, and whatever is not there or damaged is decoded.
Loads no torch.
"""

import json
import os
import sys
import zlib
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import features

from simsiam.data.decode import Unreadable
from simsiam.data.images import Images
from simsiam.errors import UsageError, WorkFailed, printable
from simsiam.sources.file_index import pixel_cache_dir, source_stamps
from simsiam.utils.files import atomic_write, file_lock, remove_stale_parts
from simsiam.utils.progress_bar import progress_bar
from simsiam.utils.workers import CPU_CORES

PIXEL_CACHE_VERSION = 1  # of the file, and of what `decode` makes of an image
ROW_DTYPE = np.dtype(
    [("start", "<i8"), ("height", "<i4"), ("width", "<i4"), ("crc", "<u4")]
)  # height 0: not in the file
DECODE_CHUNK = 4 * CPU_CORES  # images decoded before they are written
STAMP_CHUNK = 10_000  # stamps held as Python objects at a time


class PixelFile:
    """The pixels in a file that `write` wrote; of none where there is no such file, or it is not whole.

    Pickles as its path, so a worker that is not forked maps the file itself.
    """

    def __init__(self, path: Path, channels: int):
        self.path, self.channels = path, channels
        self.table, self.pixels = np.zeros(0, ROW_DTYPE), np.zeros(0, np.uint8)
        with suppress(OSError, ValueError, EOFError):
            table = np.load(path)
            if table.dtype == ROW_DTYPE:
                start, height, width, _ = table[
                    np.argmax(table["start"])
                ].item()  # of the image that lies last
                if start + height * width * channels == path.stat().st_size:
                    self.table, self.pixels = table, np.asarray(np.memmap(path, np.uint8, "r"))

    def __reduce__(self) -> tuple[Any, ...]:
        return PixelFile, (self.path, self.channels)

    def __len__(self) -> int:
        return int(np.count_nonzero(self.table["height"]))

    def read_row(self, row: int) -> np.ndarray | None:
        """Pixels uint8 (H, W, channels), read-only; None where they are not in the file, or damaged there."""
        if row >= len(self.table) or not self.table[row]["height"]:
            return None
        start, height, width, crc = self.table[row].item()
        size = height * width * self.channels
        found = self.pixels[start : start + size]
        if len(found) == size and _crc(found.reshape(height, width, self.channels)) == crc:
            return found.reshape(height, width, self.channels)
        with suppress(OSError):
            self.path.unlink()  # only one process can, so only that one says it
            words = "was damaged and is deleted; the run decodes what is lost, and the next one writes it anew"
            print(f"simsiam: {printable(str(self.path))} {words}", file=sys.stderr)
        return None


@dataclass(frozen=True, eq=False)
class DiskCachedImages(Images):
    """Images of which some lie decoded in a file."""

    pixel_file: PixelFile = field(kw_only=True)
    rows: np.ndarray = field(kw_only=True)  # int64 (N,): the row of each image there
    min_side: int = field(kw_only=True)  # what they were decoded with

    def read(self, i: int, min_side: int = 0) -> np.ndarray:
        found = self.pixel_file.read_row(int(self.rows[i])) if min_side == self.min_side else None
        return super().read(i, min_side) if found is None else found

    def take(self, indices: Any) -> "DiskCachedImages":
        return replace(super().take(indices), rows=self.rows[indices])  # type: ignore[return-value,call-arg]


def with_disk_cache(
    images: Images, source_names: Sequence[str], all_images: Images, min_side: int, limit_bytes: int
) -> Images:
    """The images, to be read from the file of their decoded pixels, which is written first where it is not there.

    `names` opened the source, `every` are its training images as they were opened, and `images` some of them. The
    file's name is a digest of all that determines its pixels: what has changed makes a new one, and the old one of this
    source is deleted. Where it cannot be written, one line says why, and the images are returned as they are.
    """
    if images.pixels is not None or not limit_bytes:
        return images
    folder = pixel_cache_dir()
    source = blake2b(json.dumps(list(source_names)).encode(), digest_size=16).hexdigest()
    path = (
        folder
        / f"{source}-{_cache_digest(images, source_names, all_images, min_side, limit_bytes)}.npy"
    )
    try:
        with file_lock(
            folder / "lock", wait=True
        ):  # others that want the same wait, and find it written
            decoded = PixelFile(path, images.channels)
            if not len(decoded):
                remove_stale_parts(folder)
                for old in folder.glob(f"{source}-*.npy"):
                    old.unlink()
                write_pixel_file(images, path, min_side, limit_bytes)
                decoded = PixelFile(path, images.channels)
    except (OSError, UsageError, WorkFailed) as error:
        print(f"simsiam: images are not kept decoded on disk: {error}", file=sys.stderr)
        return images
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one of the processes on this host
        size = f"{len(decoded.pixels) / 2**30:,.2f} GiB"
        print(
            f"on disk  {len(decoded):,} of {len(images):,} images, {size}: {printable(str(path))}",
            file=sys.stderr,
        )
    return with_pixel_file(images, decoded, min_side)


def with_pixel_file(images: Images, pixel_file: PixelFile, min_side: int) -> DiskCachedImages:
    """The images that `write` wrote with this `least`."""
    fields: dict[str, Any] = vars(images)
    return DiskCachedImages(
        **fields, pixel_file=pixel_file, rows=np.arange(len(images)), min_side=min_side
    )


def _cache_digest(
    images: Images, source_names: Sequence[str], all_images: Images, min_side: int, limit_bytes: int
) -> str:
    """A digest of what the file holds: which images, as the file system knows them, and how they are decoded."""
    containers, stamps = source_stamps(source_names, all_images)
    libraries = [PIL.__version__, features.version("libjpeg_turbo"), features.version("jpg")]
    how = json.dumps(
        [PIXEL_CACHE_VERSION, images.channels, min_side, limit_bytes, libraries, containers]
    )
    about = blake2b(how.encode(), digest_size=16)
    for batch in stamps.to_batches(STAMP_CHUNK):
        about.update(repr(batch.to_pydict()).encode())
    if images.keys.rows is not None:
        about.update(images.keys.rows.tobytes())
    return about.hexdigest()


def write_pixel_file(images: Images, path: Path, min_side: int, limit_bytes: int) -> None:
    """Decode images, in order, into a file of at most `limit_bytes`; unreadable ones are left out."""
    table = np.zeros(len(images), ROW_DTYPE)
    with (
        atomic_write(path) as part,
        open(part, "wb") as file,
        progress_bar("decoding to disk", len(images)) as done,
        closing(_decode_in_order(images, min_side)) as found,
    ):
        np.lib.format.write_array(file, table)  # its place; the rows come last
        end = file.tell()
        for i, pixels in enumerate(found):
            done(1)
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
    """The pixels of each image in order, None where it is unreadable; a few are held at a time."""

    def read(i: int) -> np.ndarray | None:
        with suppress(Unreadable):
            return np.ascontiguousarray(images.read(i, min_side))
        return None

    with ThreadPoolExecutor(CPU_CORES) as pool:  # threads suffice: Pillow decodes without the GIL
        for start in range(0, len(images), DECODE_CHUNK):
            chunk = np.arange(start, min(start + DECODE_CHUNK, len(images)))
            yield from pool.map(read, chunk)


def _crc(pixels: np.ndarray) -> int:
    """Of the shape (H, W, channels) and the bytes."""
    return zlib.crc32(pixels.data, zlib.crc32(np.array(pixels.shape, "<i4").data))
