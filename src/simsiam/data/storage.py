"""Image files by position, wherever they are stored: columns of bytes in memory, and archives read in place."""

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from simsiam.data.decode import Unreadable
from simsiam.data.shards import MAX_FILE_BYTES, select_rows
from simsiam.errors import printable


class Column(Sequence):
    """Bytes by position, in Arrow memory: one object rather than N, so forked workers share its pages.

    `column[i]` is one value; `column[indices]` is a column of those rows that copies no value.
    """

    def __init__(self, values: pa.Array | pa.ChunkedArray, rows: np.ndarray | None = None):
        self.values = values
        self.rows = rows  # int64; None: all, without an array that says so

    def __len__(self) -> int:
        return len(self.values) if self.rows is None else len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int | np.integer):
            row = range(len(self.values))[index] if self.rows is None else self.rows[index]
            return self._to_python(self.values[int(row)])
        return type(self)(self.values, select_rows(self.rows, index, len(self.values)))

    def _to_python(self, scalar: pa.Scalar) -> Any:
        return scalar.as_py()


class Names(Column):
    """File names by position: bytes, as the system has them, that come as the str of `os.fsdecode`."""

    def _to_python(self, scalar: pa.Scalar) -> str:
        return os.fsdecode(scalar.as_py())


@dataclass(frozen=True, eq=False)
class ArchiveMembers:
    """The files inside an archive, read in place: no unpacking, and nothing open between two reads."""

    path: Path
    # int64 (N, 5): where a file's bytes begin, how many, how many they become, 1 if deflated or 0, CRC-32 or -1
    entries: np.ndarray

    def __getitem__(self, index: Any) -> Any:
        places = self.entries[index]
        if places.ndim == 2:
            return ArchiveMembers(self.path, places)
        start, packed, size, deflated, checksum = places.tolist()
        if max(packed, size) > MAX_FILE_BYTES:
            raise Unreadable(f"{size:,} bytes in the archive; at most {MAX_FILE_BYTES:,}")
        try:
            with open(self.path, "rb") as file:
                file.seek(start)
                data = file.read(packed)
            if deflated:
                data = zlib.decompressobj(-15).decompress(
                    data, size + 1
                )  # never more than was announced
        except (OSError, ValueError, zlib.error) as error:
            raise Unreadable(f"{printable(self.path.name)} is damaged here: {error}") from error
        if len(data) != size:
            raise Unreadable(
                f"{printable(self.path.name)} is damaged here: {len(data):,} of {size:,} bytes"
            )
        if checksum >= 0 and zlib.crc32(data) != checksum:
            raise Unreadable(
                f"{printable(self.path.name)} is damaged here: the bytes do not match their checksum"
            )
        return data


def numbered_keys(split: str, n: int) -> Names:
    return Names(pa.array([f"{split}#{i}".encode() for i in range(n)], pa.large_binary()))
