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
from simsiam.errors import UsageError, WorkFailed, shown
from simsiam.sources.file_index import pixels_folder, stamped
from simsiam.utils.files import clear, locked, whole
from simsiam.utils.progress_bar import bar
from simsiam.utils.workers import CORES

VERSION = 1  # of the file, and of what `decode` makes of an image
ROW = np.dtype([("start", "<i8"), ("height", "<i4"), ("width", "<i4"), ("crc", "<u4")])  # height 0: not in the file
AT_ONCE = 4 * CORES  # images decoded before they are written
ROWS = 10_000  # stamps held as Python objects at a time


class Decoded:
    """The pixels in a file that `write` wrote; of none where there is no such file, or it is not whole.

    Pickles as its path, so a worker that is not forked maps the file itself.
    """

    def __init__(self, path: Path, channels: int):
        self.path, self.channels = path, channels
        self.table, self.pixels = np.zeros(0, ROW), np.zeros(0, np.uint8)
        with suppress(OSError, ValueError, EOFError):
            table = np.load(path)
            if table.dtype == ROW:
                start, height, width, _ = table[np.argmax(table["start"])].item()  # of the image that lies last
                if start + height * width * channels == path.stat().st_size:
                    self.table, self.pixels = table, np.asarray(np.memmap(path, np.uint8, "r"))

    def __reduce__(self) -> tuple[Any, ...]:
        return Decoded, (self.path, self.channels)

    def __len__(self) -> int:
        return int(np.count_nonzero(self.table["height"]))

    def read(self, row: int) -> np.ndarray | None:
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
            print(f"simsiam: {shown(str(self.path))} {words}", file=sys.stderr)
        return None


@dataclass(frozen=True, eq=False)
class Cached(Images):
    """Images of which some lie decoded in a file."""

    decoded: Decoded = field(kw_only=True)
    rows: np.ndarray = field(kw_only=True)  # int64 (N,): the row of each image there
    least: int = field(kw_only=True)  # what they were decoded with

    def read(self, i: int, least: int = 0) -> np.ndarray:
        found = self.decoded.read(int(self.rows[i])) if least == self.least else None
        return super().read(i, least) if found is None else found

    def take(self, indices: Any) -> "Cached":
        return replace(super().take(indices), rows=self.rows[indices])  # type: ignore[return-value,call-arg]


def on_disk(images: Images, names: Sequence[str], every: Images, least: int, limit_bytes: int) -> Images:
    """The images, to be read from the file of their decoded pixels, which is written first where it is not there.

    `names` opened the source, `every` are its training images as they were opened, and `images` some of them. The
    file's name is a digest of all that determines its pixels: what has changed makes a new one, and the old one of this
    source is deleted. Where it cannot be written, one line says why, and the images are returned as they are.
    """
    if images.pixels is not None or not limit_bytes:
        return images
    folder = pixels_folder()
    source = blake2b(json.dumps(list(names)).encode(), digest_size=16).hexdigest()
    path = folder / f"{source}-{_contents(images, names, every, least, limit_bytes)}.npy"
    try:
        with locked(folder / "lock", wait=True):  # others that want the same wait, and find it written
            decoded = Decoded(path, images.channels)
            if not len(decoded):
                clear(folder)
                for old in folder.glob(f"{source}-*.npy"):
                    old.unlink()
                write(images, path, least, limit_bytes)
                decoded = Decoded(path, images.channels)
    except (OSError, UsageError, WorkFailed) as error:
        print(f"simsiam: images are not kept decoded on disk: {error}", file=sys.stderr)
        return images
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one of the processes on this host
        size = f"{len(decoded.pixels) / 2**30:,.2f} GiB"
        print(f"on disk  {len(decoded):,} of {len(images):,} images, {size}: {shown(str(path))}", file=sys.stderr)
    return cached(images, decoded, least)


def cached(images: Images, decoded: Decoded, least: int) -> Cached:
    """The images that `write` wrote with this `least`."""
    fields: dict[str, Any] = vars(images)
    return Cached(**fields, decoded=decoded, rows=np.arange(len(images)), least=least)


def _contents(images: Images, names: Sequence[str], every: Images, least: int, limit_bytes: int) -> str:
    """A digest of what the file holds: which images, as the file system knows them, and how they are decoded."""
    containers, stamps = stamped(names, every)
    libraries = [PIL.__version__, features.version("libjpeg_turbo"), features.version("jpg")]
    how = json.dumps([VERSION, images.channels, least, limit_bytes, libraries, containers])
    about = blake2b(how.encode(), digest_size=16)
    for batch in stamps.to_batches(ROWS):
        about.update(repr(batch.to_pydict()).encode())
    if images.keys.rows is not None:
        about.update(images.keys.rows.tobytes())
    return about.hexdigest()


def write(images: Images, path: Path, least: int, limit_bytes: int) -> None:
    """Decode images, in order, into a file of at most `limit_bytes`; unreadable ones are left out."""
    table = np.zeros(len(images), ROW)
    with (
        whole(path) as part,
        open(part, "wb") as file,
        bar("decoding to disk", len(images)) as done,
        closing(_decode(images, least)) as found,
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


def _decode(images: Images, least: int) -> Generator[np.ndarray | None]:
    """The pixels of each image in order, None where it is unreadable; a few are held at a time."""

    def read(i: int) -> np.ndarray | None:
        with suppress(Unreadable):
            return np.ascontiguousarray(images.read(i, least))
        return None

    with ThreadPoolExecutor(CORES) as pool:  # threads suffice: Pillow decodes without the GIL
        for start in range(0, len(images), AT_ONCE):
            chunk = np.arange(start, min(start + AT_ONCE, len(images)))
            yield from pool.map(read, chunk)


def _crc(pixels: np.ndarray) -> int:
    """Of the shape (H, W, channels) and the bytes."""
    return zlib.crc32(pixels.data, zlib.crc32(np.array(pixels.shape, "<i4").data))
