"""Storage: where the files or the pixels of images are kept, and how image i is read from there.

`Storage` is the protocol that all kinds share: files in a folder, members of an archive, a column
of encoded bytes, and decoded pixels are defined here, shards in `data/shards.py`, and pixels cached
on disk in `sources/disk_cache.py`. To add a kind, write one class that inherits from `Storage`.
This module does not import torch.
"""

import io
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
from PIL import Image

from simsiam.data.decode import (
    MAX_FILE_BYTES,
    ImageHeader,
    Unreadable,
    decode_image,
    read_file,
    read_header,
)
from simsiam.data.parquet_files import byte_lengths
from simsiam.errors import UsageError, printable
from simsiam.utils.names import find_spelling
from simsiam.utils.read_files import open_regular
from simsiam.utils.workers import parallel_map

# Of a null in Parquet.
NO_BYTES = "no image in this row: Parquet needs the bytes of image files, not only their paths"
STATUS_CHUNK = 10_000  # file names that are Python objects at the same time

Indices: TypeAlias = np.ndarray | slice | Sequence[int]  # what selects rows of a NumPy array
T = TypeVar("T", covariant=True)
ColumnType = TypeVar("ColumnType", bound="Column")


@dataclass(frozen=True, eq=False)
class Blocks:
    """Groups of neighboring images that one read fetches.

    Attributes:
        offsets: int64 (blocks + 1,), increasing from 0 to the number of images; block b holds the
            images offsets[b] to offsets[b + 1] - 1.
        required: Whether an image can only be read together with its whole block.
    """

    offsets: np.ndarray
    required: bool = False

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def block_of(self, images: np.ndarray | int) -> np.ndarray:
        """Return the block of each image.

        Args:
            images: Positions of images, of any shape.

        Returns:
            Block numbers, int64, of the same shape.
        """
        return np.searchsorted(self.offsets, images, side="right") - 1


class Storage(Protocol):
    """N images by position, encoded or decoded; the base class of every kind of storage.

    A new kind must define `__len__`, `take` and `file`. The other members have defaults that suit
    encoded files that can be read equally fast in any order. A storage is immutable and picklable,
    and `take` copies no image.
    """

    pixels: np.ndarray | None = None  # uint8 (N, channels, H, W) if all images are in memory

    def __len__(self) -> int: ...

    def take(self, indices: Indices) -> "Storage":
        """Return the images at `indices`, in that order."""
        ...

    def file(self, i: int) -> str | bytes:
        """Return the path of image i, or the content of its file."""
        ...

    def read_bytes(self, i: int) -> bytes:
        """Return the content of the file of image i."""
        file = self.file(i)
        return file if isinstance(file, bytes) else read_file(file)

    def read(self, i: int, channels: int, min_side: int = 0) -> np.ndarray:
        """Decode image i to uint8 (H, W, channels); see `decode_image`."""
        return decode_image(self.file(i), channels, min_side)

    def read_header(self, i: int, channels: int) -> ImageHeader:
        """Return the stored size and the format of image i without decoding it."""
        return read_header(self.file(i), channels)

    @property
    def blocks(self) -> Blocks | None:
        """The groups of images that one read fetches; None if images are read one by one."""
        return None

    @property
    def block_bytes(self) -> int:
        """The approximate size of a block in bytes; 0 without blocks."""
        return 0

    def prefetch(self, indices: np.ndarray, min_fraction: float = 0.0) -> "Storage":
        """Return the same images with the blocks of those at `indices` in memory.

        Args:
            indices: Positions of the images that will be read next.
            min_fraction: Load a block only if at least this fraction of its images is at `indices`.

        Returns:
            The storage to read them from; the same object if there are no blocks.
        """
        return self

    @property
    def in_containers(self) -> bool:
        """Whether images lie inside larger files, whose modification times are theirs as well."""
        return False

    def file_stats(self) -> np.ndarray:
        """Return what shows whether image files have changed.

        Returns:
            int64 (2, N): sizes in bytes and modification times in ns; -1 where the time is unknown.
        """
        return np.stack([np.zeros(len(self), np.int64), np.full(len(self), -1)])


class Column(Sequence[T], Generic[T]):
    """Values by position in Arrow memory: one object, so forked workers share its pages.

    Args:
        values: An Arrow array.
        rows: int64 (N,), the rows that are used; None for all of them.
    """

    def __init__(self, values: pa.Array | pa.ChunkedArray, rows: np.ndarray | None = None):
        self.values = values
        self.rows = rows

    def __len__(self) -> int:
        return len(self.values) if self.rows is None else len(self.rows)

    def __getitem__(self, index: int) -> T:  # type: ignore[override]  # no slices: see `take`
        row = range(len(self.values))[index] if self.rows is None else self.rows[index]
        return self._to_python(self.values[int(row)])

    def take(self: ColumnType, indices: Indices) -> ColumnType:
        """Return the values at `indices`, in that order; copies no value."""
        return type(self)(self.values, select_rows(self.rows, indices, len(self.values)))

    def _to_python(self, scalar: pa.Scalar) -> T:
        return scalar.as_py()


class Names(Column[str]):
    """File names by position: stored as bytes, returned as str by `os.fsdecode`."""

    def _to_python(self, scalar: pa.Scalar) -> str:
        return os.fsdecode(scalar.as_py())


class EncodedColumn(Column[bytes | None], Storage):
    """Image files in memory, as values of an Arrow column of bytes."""

    def file(self, i: int) -> bytes:
        """Return the content of image i. Raises Unreadable for a row without an image."""
        if (data := self[i]) is None:
            raise Unreadable(NO_BYTES)
        return data

    @property
    def in_containers(self) -> bool:
        """True: the files were read from Parquet."""
        return True

    def file_stats(self) -> np.ndarray:
        """Return sizes, and unknown times; see `Storage.file_stats`."""
        stats = super().file_stats()
        sizes = byte_lengths(self.values).fill_null(0).to_numpy()
        stats[0] = sizes if self.rows is None else sizes[self.rows]
        return stats


@dataclass(frozen=True, eq=False)
class FolderFiles(Storage):
    """Image files in a folder."""

    folder: Path
    names: Names  # paths relative to the folder, or absolute ones

    def __len__(self) -> int:
        return len(self.names)

    def take(self, indices: Indices) -> "FolderFiles":
        """Return the files at `indices`, in that order."""
        return FolderFiles(self.folder, self.names.take(indices))

    def file(self, i: int) -> str:
        """Return the path of image i, as it is spelled on the disk."""
        return find_spelling(os.path.join(self.folder, self.names[i]))

    def file_stats(self) -> np.ndarray:
        """Return sizes and times from the file system; 0 and -1 for a file that is not there."""
        names = self.names.values
        names = names if self.names.rows is None else names.take(pa.array(self.names.rows))
        chunks = [names[i : i + STATUS_CHUNK] for i in range(0, len(names), STATUS_CHUNK)]
        stats = parallel_map(_stat_files, [(self.folder, chunk) for chunk in chunks])
        return np.concatenate([np.zeros((2, 0), np.int64), *stats], axis=1)


@dataclass(frozen=True, eq=False)
class ArchiveMembers(Storage):
    """The files inside an archive, read in place; no file stays open between two reads.

    Attributes:
        path: The archive.
        entries: int64 (N, 5): where the bytes of a file begin, their number, the number of bytes
            they decompress to, 1 if they are deflated or 0, and their CRC-32 or -1.
    """

    path: Path
    entries: np.ndarray

    def __len__(self) -> int:
        return len(self.entries)

    def take(self, indices: Indices) -> "ArchiveMembers":
        """Return the files at `indices`, in that order."""
        return ArchiveMembers(self.path, self.entries[indices])

    def file(self, i: int) -> bytes:
        """Return the content of image i.

        Args:
            i: Position of the image.

        Returns:
            The bytes of its file.

        Raises:
            Unreadable: The file is too large or damaged.
        """
        start, packed, size, deflated, checksum = self.entries[i].tolist()
        if max(packed, size) > MAX_FILE_BYTES:
            raise Unreadable(f"{size:,} bytes in the archive; at most {MAX_FILE_BYTES:,}")
        damaged = f"{printable(self.path.name)} is damaged here"
        try:
            with open_regular(self.path) as file:
                file.seek(start)
                data = file.read(packed)
            if deflated:  # stop one byte after the announced size, however much there is
                data = zlib.decompressobj(-15).decompress(data, size + 1)
        except (OSError, UsageError, ValueError, zlib.error) as error:
            raise Unreadable(f"{damaged}: {error}") from error
        if len(data) != size:
            raise Unreadable(f"{damaged}: {len(data):,} of {size:,} bytes")
        if checksum >= 0 and zlib.crc32(data) != checksum:
            raise Unreadable(f"{damaged}: the bytes do not match their checksum")
        return data

    @property
    def in_containers(self) -> bool:
        """True: the archive."""
        return True

    def file_stats(self) -> np.ndarray:
        """Return sizes, and unknown times; see `Storage.file_stats`."""
        stats = super().file_stats()
        stats[0] = self.entries[:, 2]
        return stats


class PixelArray(Storage):
    """Decoded images of one size, in memory.

    Args:
        pixels: uint8 (N, channels, H, W).
    """

    pixels: np.ndarray

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, indices: Indices) -> "PixelArray":
        """Return the images at `indices`, in that order; copies their pixels."""
        return PixelArray(self.pixels[indices])

    def file(self, i: int) -> bytes:
        """Return image i, encoded without loss."""
        return encode_pixels(self.pixels[i].transpose(1, 2, 0))

    def read(self, i: int, channels: int, min_side: int = 0) -> np.ndarray:
        """Return a view of the pixels of image i, uint8 (H, W, channels)."""
        return self.pixels[i].transpose(1, 2, 0)

    def read_header(self, i: int, channels: int) -> ImageHeader:
        """Return the size of image i; its format is "pixels"."""
        return ImageHeader(self.pixels.shape[2], self.pixels.shape[3], "pixels")

    def file_stats(self) -> np.ndarray:
        """Return the bytes of the pixels of an image, and unknown times."""
        stats = super().file_stats()
        stats[0] = int(np.prod(self.pixels.shape[1:]))
        return stats


def numbered_keys(split: str, n: int) -> Names:
    """Name images that have no file names.

    Args:
        split: Name of the split.
        n: Number of images.

    Returns:
        The names "split#0", "split#1", ...
    """
    return Names(pa.array([f"{split}#{i}".encode() for i in range(n)], pa.large_binary()))


def select_rows(rows: np.ndarray | None, indices: Indices, total: int) -> np.ndarray:
    """Apply a selection to a selection.

    Args:
        rows: int64, the selection so far; None for all rows, without an array that lists them.
        indices: The rows to select from it.
        total: The number of all rows.

    Returns:
        rows[indices], int64; `indices` itself if it is int64 and `rows` is None.

    Raises:
        IndexError: An index is out of range.
    """
    if rows is not None:
        return rows[indices]
    if isinstance(indices, slice):
        return np.arange(*indices.indices(total))
    selected = np.asarray(indices)
    is_integer = selected.dtype.kind == "i" and selected.size > 0
    if is_integer and selected.min() >= 0 and selected.max() < total:
        return selected.astype(np.int64, copy=False)
    return np.arange(total)[indices]


def encode_pixels(pixels: np.ndarray) -> bytes:
    """Encode decoded pixels without loss.

    Args:
        pixels: uint8 (H, W, channels).

    Returns:
        A PNG file; a NumPy file if PNG does not support this number of channels.
    """
    file = io.BytesIO()
    if pixels.shape[2] in (1, 3, 4):
        Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    else:
        np.save(file, pixels)
    return file.getvalue()


def _stat_files(folder: Path, names: pa.ChunkedArray) -> np.ndarray:
    """Return bytes and mtimes in ns of files, int64 (2, N); 0 and -1 where there is none."""
    stats = []
    for name in names.to_pylist():
        try:
            path = os.path.join(folder, os.fsdecode(name))
            status = os.stat(find_spelling(path))
            stats.append((status.st_size, status.st_mtime_ns))
        except (OSError, ValueError):  # ValueError: there is a zero byte in the name
            stats.append((0, -1))
    return np.array(stats, np.int64).T
