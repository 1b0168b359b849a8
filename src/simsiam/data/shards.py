"""Many images in few files, tar or Parquet, read a block at a time, from a disk or from whatever fsspec reaches.

A block is a run of neighbors in one file: 4 MiB of a tar, a row group of Parquet. Reading it takes one request, where
reading its images one by one would take forty. Loads no torch.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simsiam.data.decode import Unreadable
from simsiam.errors import UsageError, WorkFailed, printable

BLOCK_BYTES = (
    2**22
)  # bytes of a tar that are read at once: at 50 ms and 100 MB/s, the half of the time is transfer
MAX_FILE_BYTES = 2**30  # of one image file in a tar or an archive, and of the images in a row group
MIN_UNCOMPRESSED_LIMIT, MAX_COMPRESSION_RATIO = (
    2**24,
    100,
)  # bytes that a row group may unpack to, and how often its own size if that is more
ROW_GROUP_STRIDE = (
    2**32
)  # Parquet: an image's place is its row group times this, plus its row there
MAX_CONCURRENT_READS = 8  # blocks that a process asks for at the same time


@dataclass(frozen=True, eq=False)
class Blocks:
    """Which images lie together: block b holds the images first[b] .. first[b + 1] - 1."""

    offsets: np.ndarray  # int64 (blocks + 1,), increasing from 0 to the number of images

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def block_of(self, images: Any) -> Any:
        """The blocks that these images lie in."""
        return np.searchsorted(self.offsets, images, side="right") - 1


@dataclass(frozen=True, eq=False)
class ImageLocations:
    """Where all images of a set of shards begin and how long they are, in arrays that lie in a mapped file."""

    files: tuple[str, ...]  # paths, or URLs that fsspec understands
    starts: Sequence[
        np.ndarray
    ]  # of each file, int64: where an image begins; Parquet: row group * ROW + row
    sizes: Sequence[np.ndarray]  # of each file, int64: bytes of an image; Parquet: about as many
    column: str | None = None  # Parquet: the column of image files, "image.bytes"

    @cached_property
    def file_offsets(self) -> np.ndarray:
        """How many images there are up to the end of each file, int64, after a zero."""
        return np.cumsum([0, *map(len, self.starts)])

    @cached_property
    def blocks(self) -> Blocks:
        unit, first = ROW_GROUP_STRIDE if self.column else BLOCK_BYTES, [np.zeros(0, np.int64)]
        for begin, starts in zip(self.file_offsets, self.starts):
            if len(starts):
                first.append(begin + np.flatnonzero(np.diff(starts // unit, prepend=-1)))
        return Blocks(np.append(np.concatenate(first), self.file_offsets[-1]))

    def locate(self, image: int) -> tuple[str, int, int]:
        """The file of an image, where it begins there, and its size."""
        file = int(np.searchsorted(self.file_offsets, image, side="right")) - 1
        row = image - int(self.file_offsets[file])
        return self.files[file], int(self.starts[file][row]), int(self.sizes[file][row])

    def byte_range(self, block: int) -> tuple[str, int, int]:
        """A tar's block: the file, and where the bytes begin and end."""
        file, begin, _ = self.locate(int(self.blocks.offsets[block]))
        _, last, size = self.locate(int(self.blocks.offsets[block + 1]) - 1)
        return file, begin, last + size

    def load_blocks(self, blocks: Sequence[int]) -> list[Any]:
        """Tar: bytes. Parquet: an array of files, or Unreadable. Raises WorkFailed."""
        if not self.column:
            return read_ranges([self.byte_range(block) for block in blocks])
        places = [self.locate(int(self.blocks.offsets[block])) for block in blocks]
        jobs = [(file, start // ROW_GROUP_STRIDE, self.column) for file, start, _ in places]
        if len(jobs) < 2:
            return [_read_row_group(*job) for job in jobs]
        with ThreadPoolExecutor(MAX_CONCURRENT_READS) as pool:
            return list(pool.map(_read_row_group, *zip(*jobs)))


@dataclass(frozen=True, eq=False)
class Shards:
    """Images in shards, by position."""

    locations: ImageLocations
    rows: np.ndarray | None = None  # int64: a choice of the images, in any order; None: all
    loaded_blocks: Mapping[int, Any] = field(default_factory=dict)  # blocks in memory

    @cached_property
    def blocks(self) -> Blocks:
        """The blocks of the chosen images, by their positions among these."""
        if self.rows is None:
            return self.locations.blocks
        block = self.locations.blocks.block_of(self.rows)
        return Blocks(np.append(np.flatnonzero(np.diff(block, prepend=-1)), len(block)))

    def __len__(self) -> int:
        return int(self.locations.file_offsets[-1]) if self.rows is None else len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """The bytes of one image, or the images at several positions. Raises Unreadable, and WorkFailed off-line."""
        if isinstance(index, np.ndarray | slice):
            return Shards(self.locations, select_rows(self.rows, index, len(self)))
        image = range(len(self))[index] if self.rows is None else int(self.rows[index])
        file, start, size = self.locations.locate(image)
        block = int(self.locations.blocks.block_of(image))
        if self.locations.column:
            found = (
                self.loaded_blocks[block]
                if block in self.loaded_blocks
                else self.locations.load_blocks([block])[0]
            )
            if isinstance(found, Unreadable):
                raise found
            if start % ROW_GROUP_STRIDE >= len(found):
                raise Unreadable(
                    f"{printable_name(file)} is damaged here: {len(found):,} rows, and its footer has more"
                )
            return found[start % ROW_GROUP_STRIDE].as_py() or b""  # null: a row without an image
        if block in self.loaded_blocks:
            before = start - self.locations.byte_range(block)[1]
            data = self.loaded_blocks[block][before : before + size]
        else:
            data = read_ranges([(file, start, start + size)])[0]
        if len(data) != size:
            raise Unreadable(
                f"{printable_name(file)} is damaged here: {len(data):,} of {size:,} bytes"
            )
        return data

    def prefetch(self, positions: np.ndarray, min_fraction: float = 0.0) -> "Shards":
        """The same images, with the blocks in memory that the images at these positions lie in, and no others.

        Of a tar, only blocks of which these images are at least the share `least`: the rest is read one by one.
        """
        first = self.locations.blocks.offsets
        wanted, counts = np.unique(
            self.locations.blocks.block_of(select_rows(self.rows, positions, len(self))),
            return_counts=True,
        )
        if not self.locations.column:
            wanted = wanted[counts >= min_fraction * (first[wanted + 1] - first[wanted])]
        new = [block for block in wanted.tolist() if block not in self.loaded_blocks]
        loaded = dict(zip(new, self.locations.load_blocks(new)))
        found = copy(self)  # and not `replace`, which would forget the blocks
        object.__setattr__(
            found,
            "loaded_blocks",
            {b: loaded[b] if b in loaded else self.loaded_blocks[b] for b in wanted.tolist()},
        )
        return found


def select_rows(rows: np.ndarray | None, index: Any, total: int) -> np.ndarray:
    """rows[at]; of all `count` images, None, without an array that counts them."""
    if rows is not None:
        return rows[index]
    if isinstance(index, slice):
        return np.arange(*index.indices(total))
    rows = np.asarray(index)
    if rows.dtype.kind == "i" and rows.size and rows.min() >= 0 and rows.max() < total:
        return rows.astype(np.int64)
    return np.arange(total)[index]


# --- reading, here or elsewhere ---------------------------------------------------------------------------------------


def is_url(location: str) -> bool:
    return "://" in location


def printable_name(file: str) -> str:
    """A file's name without its folder, printable."""
    return printable(file.rsplit("/", 1)[-1])


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path there. Raises UsageError where a package for it is missing."""
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"{printable(url)} cannot be opened: {' '.join(str(error).split())[:200]}"
        ) from None


def read_error(file: str, error: Exception) -> WorkFailed:
    """What to say where a file that was there cannot be read any more."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return WorkFailed(f"cannot read {printable(file)}: {reason}")


def read_ranges(spans: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Bytes start .. stop - 1 of files, fewer where a file ends before; many at once from afar. Raises WorkFailed."""
    if not spans:
        return []
    if is_url(spans[0][0]):
        system, _ = filesystem(spans[0][0])
        files, starts, stops = (list(column) for column in zip(*spans))
        found = system.cat_ranges(files, starts, stops, on_error="return")
        for file, data in zip(files, found):
            if isinstance(data, Exception):
                raise read_error(file, data)
        return [bytes(data) for data in found]
    found = []
    for file, start, stop in spans:
        try:
            with open(file, "rb") as opened:
                found.append(os.pread(opened.fileno(), stop - start, start))
        except OSError as error:
            raise read_error(file, error) from None
    return found


def open_file(file: str) -> Any:
    """A file here or elsewhere, to read from."""
    if not is_url(file):
        return open(file, "rb")
    system, path = filesystem(file)
    return system.open(path, "rb")


def is_corruption(error: Exception) -> bool:
    """Whether a file's content is to blame, and not the disk or the network: pyarrow raises OSError for both."""
    return not isinstance(error, OSError) or (type(error) is OSError and error.errno is None)


def _read_row_group(file: str, group: int, column: str) -> Any:
    """The image files of a row group, an array of bytes, equal ones once; Unreadable where it is damaged."""
    try:
        with open_file(file) as opened:
            table = pq.ParquetFile(opened, read_dictionary=[column]).read_row_group(
                group, columns=[column]
            )
        return extract_image_column(table, column)
    except (pa.ArrowException, OSError) as error:
        if not is_corruption(error):
            raise read_error(file, error) from None
        reason = " ".join(str(error).split())[:100]
        return Unreadable(f"row group {group} of {printable_name(file)} is damaged: {reason}")


def uncompressed_sizes(parquet: pq.ParquetFile, column: str, file: str, size: int) -> list[int]:
    """How many bytes the images of each row group of a file of `size` bytes become, as its footer says.

    Raises UsageError before memory is asked for: a gigabyte of zeros, or a million times one image, take few bytes.
    """
    found, rows = list[int](), parquet.metadata.num_rows
    if rows > size:
        raise UsageError(f"{printable_name(file)} claims to hold {rows:,} images in {size:,} bytes")
    place = next(i for i in range(len(parquet.schema)) if parquet.schema.column(i).path == column)
    for group in range(parquet.metadata.num_row_groups):
        part = parquet.metadata.row_group(group).column(place)
        found.append(part.total_uncompressed_size)
        limit = min(
            max(MIN_UNCOMPRESSED_LIMIT, MAX_COMPRESSION_RATIO * part.total_compressed_size),
            MAX_FILE_BYTES,
        )
        if found[-1] > limit:
            what = f"row group {group} of {printable_name(file)}, {part.total_compressed_size:,} bytes, unpacks to {found[-1]:,}"
            raise UsageError(f"{what}; at most {limit:,}: write it with smaller row groups")
    return found


def extract_image_column(table: pa.Table, column: str) -> pa.ChunkedArray:
    """The column "image", or the field "image.bytes" of a column of structs."""
    values = (
        table[column.removesuffix(".bytes")] if column not in table.column_names else table[column]
    )
    return values.flatten()[0] if pa.types.is_struct(values.type) else values
