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

import numpy as np
import pyarrow as pa

from simsiam.data.decode import Unreadable
from simsiam.data.parquet_files import ParquetReader, open_parquet
from simsiam.data.remote_files import is_corruption, printable_name, read_error, read_ranges
from simsiam.data.storage import NO_BYTES, Blocks, Indices, Storage, select_rows
from simsiam.errors import UsageError

# Bytes of a tar that are read at once. At a latency of 50 ms and 100 MB/s, half of the time is
# then spent on the transfer.
BLOCK_BYTES = 2**22
# What a row group may decompress to: this many bytes, or this multiple of its size in the file.
MIN_UNCOMPRESSED_LIMIT, MAX_COMPRESSION_RATIO = 2**24, 100
MAX_GROUP_BYTES = 2**30  # of a row group
ROW_BYTES = 16  # of a row in memory, besides its image
# What all row groups of a file may decompress to: many of them are in memory together.
MIN_FILE_LIMIT, MAX_FILE_RATIO = 2**30, 8
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


# --- Parquet ---


def _read_row_group(file: str, group: int, column: str) -> pa.ChunkedArray | Unreadable:
    """Read the image files of a row group, equal ones once; Unreadable if it is damaged."""
    try:
        with open_parquet(file) as parquet:
            return read_image_column(parquet, group, column)
    except (pa.ArrowException, OSError, UsageError) as error:
        if not is_corruption(error):
            raise read_error(file, error) from None
        reason = " ".join(str(error).split())[:200]
        return Unreadable(f"row group {group} of {printable_name(file)} is damaged: {reason}")


def read_image_column(parquet: ParquetReader, group: int, column: str) -> pa.ChunkedArray:
    """Read the image files of a row group, equal ones once.

    Args:
        parquet: The file.
        group: The number of the row group.
        column: The column of images, such as "image.bytes".

    Returns:
        The image files as bytes.

    Raises:
        UsageError: They take more memory than a row group may.
        pa.ArrowException: The row group is damaged.
        OSError: The file cannot be read.
    """
    part = parquet.metadata.row_group(group).column(_place_of(parquet, column))
    limit = _group_limit(part.total_compressed_size) + ROW_BYTES * part.num_values
    return extract_image_column(parquet.read_row_group(group, [column], limit), column)


def uncompressed_sizes(parquet: ParquetReader, column: str) -> list[int]:
    """Read from a Parquet footer how many bytes the images of each row group decompress to.

    A gigabyte of zeros takes few bytes in a file. So this is checked before anything is read.

    Args:
        parquet: The file.
        column: Its column of images.

    Returns:
        Bytes of each row group.

    Raises:
        UsageError: A row group is too large, or all of them together are.
    """
    sizes, place = list[int](), _place_of(parquet, column)
    for group in range(parquet.metadata.num_row_groups):
        part = parquet.metadata.row_group(group).column(place)
        packed, size = part.total_compressed_size, part.total_uncompressed_size
        limit = _group_limit(packed)
        if not 0 <= size <= limit:
            raise UsageError(
                f"row group {group} of {parquet.name}, {packed:,} bytes, unpacks to {size:,}; "
                f"at most {limit:,}: write it with smaller row groups"
            )
        sizes.append(size)
    if sum(sizes) > (limit := max(MIN_FILE_LIMIT, MAX_FILE_RATIO * parquet.num_bytes)):
        raise UsageError(
            f"{parquet.name}, {parquet.num_bytes:,} bytes, unpacks to {sum(sizes):,}; at most "
            f"{limit:,}: write it with less compression"
        )
    return sizes


def _place_of(parquet: ParquetReader, column: str) -> int:
    schema = parquet.metadata.schema
    return next(i for i in range(len(schema)) if schema.column(i).path == column)


def _group_limit(packed: int) -> int:
    """Return the bytes that a row group of so many bytes may decompress to."""
    return min(max(MIN_UNCOMPRESSED_LIMIT, MAX_COMPRESSION_RATIO * packed), MAX_GROUP_BYTES)


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
