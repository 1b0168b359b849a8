"""Shards: many images in few tar or Parquet files, on a disk or in any store that fsspec supports.

Shards are read a block at a time. A block is a run of neighboring images in one file: 4 MiB of a
tar, or a row group of Parquet. Reading it takes one request; reading its images one by one would
take forty. This module does not import torch.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simsiam.data.decode import Unreadable
from simsiam.data.storage import MAX_FILE_BYTES, NO_BYTES, Blocks, Indices, Storage, select_rows
from simsiam.errors import UsageError, WorkFailed, printable
from simsiam.utils.system import read_at

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# Bytes of a tar that are read at once. At a latency of 50 ms and 100 MB/s, half of the time is
# then spent on the transfer.
BLOCK_BYTES = 2**22
# What a row group may decompress to: this many bytes, or this multiple of its size in the file.
MIN_UNCOMPRESSED_LIMIT, MAX_COMPRESSION_RATIO = 2**24, 100
ROW_GROUP_STRIDE = 2**32  # Parquet: an image starts at row group * stride + row in the group
MAX_CONCURRENT_READS = 8  # blocks that a process requests at the same time


@dataclass(frozen=True, eq=False)
class ImageLocations:
    """Where the images of a set of shards are, in arrays that belong to a memory-mapped file.

    Attributes:
        files: Paths, or URLs that fsspec understands.
        starts: For each file, int64: the byte at which each image starts. Parquet: its row group *
            ROW_GROUP_STRIDE + its row in the group.
        sizes: For each file, int64: the bytes of each image. Parquet: approximately.
        column: Parquet: the column of image files, such as "image.bytes".
    """

    files: tuple[str, ...]
    starts: Sequence[np.ndarray]
    sizes: Sequence[np.ndarray]
    column: str | None = None

    @cached_property
    def file_offsets(self) -> np.ndarray:
        """The number of images before each file, int64 (files + 1,)."""
        return np.cumsum([0, *map(len, self.starts)])

    @cached_property
    def blocks(self) -> Blocks:
        """The blocks of all images."""
        unit, first = ROW_GROUP_STRIDE if self.column else BLOCK_BYTES, [np.zeros(0, np.int64)]
        for begin, starts in zip(self.file_offsets, self.starts):
            if len(starts):
                first.append(begin + np.flatnonzero(np.diff(starts // unit, prepend=-1)))
        offsets = np.append(np.concatenate(first), self.file_offsets[-1])
        return Blocks(offsets, required=self.column is not None)

    def locate(self, image: int) -> tuple[str, int, int]:
        """Find an image.

        Args:
            image: Its position among all images.

        Returns:
            Its file, where it starts there, and its size in bytes.
        """
        file = int(np.searchsorted(self.file_offsets, image, side="right")) - 1
        row = image - int(self.file_offsets[file])
        return self.files[file], int(self.starts[file][row]), int(self.sizes[file][row])

    def byte_range(self, block: int) -> tuple[str, int, int]:
        """Find a block of a tar.

        Args:
            block: Its number.

        Returns:
            Its file, its first byte, and the byte after its last one.
        """
        file, begin, _ = self.locate(int(self.blocks.offsets[block]))
        _, last, size = self.locate(int(self.blocks.offsets[block + 1]) - 1)
        return file, begin, last + size

    def load_blocks(
        self, blocks: Sequence[int]
    ) -> Sequence[bytes] | Sequence[pa.ChunkedArray | Unreadable]:
        """Read blocks.

        Args:
            blocks: Their numbers.

        Returns:
            For each block: bytes of a tar; for Parquet an array of image files, or Unreadable if
            the row group is damaged.

        Raises:
            WorkFailed: A file can no longer be read.
        """
        if not self.column:
            return read_ranges([self.byte_range(block) for block in blocks])
        places = [self.locate(int(self.blocks.offsets[block])) for block in blocks]
        jobs = [(file, start // ROW_GROUP_STRIDE, self.column) for file, start, _ in places]
        if len(jobs) < 2:
            return [_read_row_group(*job) for job in jobs]
        with ThreadPoolExecutor(MAX_CONCURRENT_READS) as pool:
            return list(pool.map(_read_row_group, *zip(*jobs)))


@dataclass(frozen=True, eq=False)
class Shards(Storage):
    """Images in shards.

    Attributes:
        locations: Where all images of the shards are.
        rows: int64 (N,), a selection of them in any order; None for all.
        loaded_blocks: The blocks that are in memory, as `ImageLocations.load_blocks` returns them,
            by number.
    """

    locations: ImageLocations
    rows: np.ndarray | None = None
    loaded_blocks: Mapping[int, bytes | pa.ChunkedArray | Unreadable] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.locations.file_offsets[-1]) if self.rows is None else len(self.rows)

    @cached_property
    def blocks(self) -> Blocks:
        """The blocks of the selected images, by their positions among these."""
        if self.rows is None:
            return self.locations.blocks
        block = self.locations.blocks.block_of(self.rows)
        offsets = np.append(np.flatnonzero(np.diff(block, prepend=-1)), len(block))
        return Blocks(offsets, self.locations.blocks.required)

    @property
    def block_bytes(self) -> int:
        """The mean size of a block in bytes; for tars at least the bytes that are read at once."""
        total = sum(int(sizes.sum()) for sizes in self.locations.sizes)
        smallest = 0 if self.locations.column else BLOCK_BYTES
        return max(smallest, total // max(1, len(self.locations.blocks)))

    def take(self, indices: Indices) -> "Shards":
        """Return the images at `indices`, in that order; no block is in memory."""
        return Shards(self.locations, select_rows(self.rows, indices, len(self)))

    def file(self, i: int) -> bytes:
        """Return the content of image i, from its block if that is in memory.

        Args:
            i: Position of the image.

        Returns:
            The bytes of its file.

        Raises:
            Unreadable: The shard is damaged there, or a row of Parquet has no image.
            WorkFailed: The shard can no longer be read.
        """
        image = range(len(self))[i] if self.rows is None else int(self.rows[i])
        file, start, size = self.locations.locate(image)
        block = int(self.locations.blocks.block_of(image))
        damaged = f"{printable_name(file)} is damaged here"
        loaded = self.loaded_blocks.get(block)
        if self.locations.column:
            values = self.locations.load_blocks([block])[0] if loaded is None else loaded
            if isinstance(values, Unreadable):
                raise values
            assert not isinstance(values, bytes)
            row = start % ROW_GROUP_STRIDE
            if row >= len(values):
                raise Unreadable(f"{damaged}: {len(values):,} rows, and its footer has more")
            if (data := values[row].as_py()) is None:
                raise Unreadable(NO_BYTES)
            return data
        if loaded is None:
            data = read_ranges([(file, start, start + size)])[0]
        else:
            assert isinstance(loaded, bytes)
            before = start - self.locations.byte_range(block)[1]
            data = loaded[before : before + size]
        if len(data) != size:
            raise Unreadable(f"{damaged}: {len(data):,} of {size:,} bytes")
        return data

    def prefetch(self, indices: np.ndarray, min_fraction: float = 0.0) -> "Shards":
        """Return the same images with only the blocks of those at `indices` in memory.

        Args:
            indices: Positions of the images that will be read next.
            min_fraction: Load a block of a tar only if at least this fraction of its images is at
                `indices`; other images are read one by one. Blocks of Parquet are always loaded.

        Returns:
            The shards to read them from.

        Raises:
            WorkFailed: A file can no longer be read.
        """
        offsets = self.locations.blocks.offsets
        wanted, counts = np.unique(
            self.locations.blocks.block_of(select_rows(self.rows, indices, len(self))),
            return_counts=True,
        )
        if not self.locations.column:
            wanted = wanted[counts >= min_fraction * (offsets[wanted + 1] - offsets[wanted])]
        new = [block for block in wanted.tolist() if block not in self.loaded_blocks]
        loaded = dict(zip(new, self.locations.load_blocks(new)))
        blocks = {b: loaded[b] if b in loaded else self.loaded_blocks[b] for b in wanted.tolist()}
        shards = copy(self)  # not `replace`, which would drop the cached `blocks`
        object.__setattr__(shards, "loaded_blocks", blocks)
        return shards

    @property
    def in_containers(self) -> bool:
        """True: the shards."""
        return True

    def file_stats(self) -> np.ndarray:
        """Return sizes, and unknown times; see `Storage.file_stats`."""
        stats = super().file_stats()
        sizes = np.concatenate([np.zeros(0, np.int64), *self.locations.sizes])
        stats[0] = sizes if self.rows is None else sizes[self.rows]
        return stats


# --- reading local and remote files -------------------------------------------------------------


def is_url(location: str) -> bool:
    """Return whether a location is a URL rather than a path.

    Args:
        location: A path or a URL.

    Returns:
        Whether it contains "://".
    """
    return "://" in location


def printable_name(file: str) -> str:
    """Return the name of a file without its folder, with unprintable characters escaped.

    Args:
        file: A path or a URL.

    Returns:
        Its last component.
    """
    return printable(file.rsplit("/", 1)[-1])


def filesystem(url: str) -> tuple["AbstractFileSystem", str]:
    """Open the file system of a URL.

    Args:
        url: A URL with a protocol that fsspec knows.

    Returns:
        The file system, and the path of the URL in it.

    Raises:
        UsageError: The protocol is unknown, or a package for it is missing.
    """
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"{printable(url)} cannot be opened: {' '.join(str(error).split())[:200]}"
        ) from None


def read_error(file: str, error: Exception) -> WorkFailed:
    """Make the error to raise if a file that existed can no longer be read.

    Args:
        file: A path or a URL.
        error: What reading it raised.

    Returns:
        The error, one line.
    """
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return WorkFailed(printable(f"cannot read {file}: {reason}"))


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Read parts of files; remote ones concurrently.

    Args:
        ranges: (file, start, stop) of each part: the bytes start to stop - 1.

    Returns:
        The bytes of each part; fewer if the file ends before.

    Raises:
        WorkFailed: A file can no longer be read.
    """
    if not ranges:
        return []
    parts = []
    if is_url(ranges[0][0]):
        system, _ = filesystem(ranges[0][0])
        files, starts, stops = (list(column) for column in zip(*ranges))
        for file, part in zip(files, system.cat_ranges(files, starts, stops, on_error="return")):
            if isinstance(part, Exception):
                raise read_error(file, part)
            parts.append(bytes(part))
        return parts
    for file, start, stop in ranges:
        try:
            with open(file, "rb") as opened:
                parts.append(read_at(opened, start, stop - start))
        except OSError as error:
            raise read_error(file, error) from None
    return parts


def open_file(file: str) -> BinaryIO:
    """Open a local or remote file to read from.

    Args:
        file: A path or a URL.

    Returns:
        The open file.

    Raises:
        OSError: It cannot be opened; fsspec may raise other errors for URLs.
        UsageError: The protocol of the URL is not supported.
    """
    if not is_url(file):
        return open(file, "rb")
    system, path = filesystem(file)
    return system.open(path, "rb")


def is_corruption(error: Exception) -> bool:
    """Tell a damaged file from a failing disk or network; pyarrow raises OSError for both.

    Args:
        error: What reading a file raised.

    Returns:
        Whether the content of the file is the cause.
    """
    return not isinstance(error, OSError) or (type(error) is OSError and error.errno is None)


def _read_row_group(file: str, group: int, column: str) -> pa.ChunkedArray | Unreadable:
    """Read the image files of a row group, equal ones once; Unreadable if it is damaged."""
    try:
        with open_file(file) as opened:
            parquet = pq.ParquetFile(opened, read_dictionary=[column])
            return extract_image_column(parquet.read_row_group(group, columns=[column]), column)
    except (pa.ArrowException, OSError) as error:
        if not is_corruption(error):
            raise read_error(file, error) from None
        reason = " ".join(str(error).split())[:100]
        return Unreadable(f"row group {group} of {printable_name(file)} is damaged: {reason}")


def uncompressed_sizes(
    parquet: pq.ParquetFile, column: str, file: str, file_bytes: int
) -> list[int]:
    """Read from a Parquet footer how many bytes the images of each row group decompress to.

    A gigabyte of zeros, or one image a million times, takes few bytes in a file. So this is checked
    before any memory is allocated.

    Args:
        parquet: The open file.
        column: Its column of images.
        file: Its path or URL.
        file_bytes: Its size in bytes.

    Returns:
        Bytes of each row group.

    Raises:
        UsageError: The file claims an implausible number of images, or a row group is too large.
    """
    sizes, rows = list[int](), parquet.metadata.num_rows
    name = printable_name(file)
    if rows > file_bytes:
        raise UsageError(f"{name} claims to hold {rows:,} images in {file_bytes:,} bytes")
    place = next(i for i in range(len(parquet.schema)) if parquet.schema.column(i).path == column)
    for group in range(parquet.metadata.num_row_groups):
        part = parquet.metadata.row_group(group).column(place)
        packed, size = part.total_compressed_size, part.total_uncompressed_size
        allowed = max(MIN_UNCOMPRESSED_LIMIT, MAX_COMPRESSION_RATIO * packed)
        limit = min(allowed, MAX_FILE_BYTES)
        if size > limit:
            raise UsageError(
                f"row group {group} of {name}, {packed:,} bytes, unpacks to {size:,}; "
                f"at most {limit:,}: write it with smaller row groups"
            )
        sizes.append(size)
    return sizes


def extract_image_column(table: pa.Table, column: str) -> pa.ChunkedArray:
    """Get the column of images from a table.

    Args:
        table: A table with the column.
        column: Its name: "image", or "image.bytes" for the field of a column of structs.

    Returns:
        The image files as bytes.
    """
    name = column if column in table.column_names else column.removesuffix(".bytes")
    values = table[name]
    return values.flatten()[0] if pa.types.is_struct(values.type) else values
