"""The one way to read Parquet: what a file can make a reader do is bounded before it is done.

The footer is read first, up to a size. Of each column that is needed, the headers of its pages are
then read: they say how much memory its values take, also if the footer says something else. A few
bytes of a page may stand for millions of values, or for one long text many times. So texts are read
as dictionaries, and are counted before they are written out. This module does not import torch.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from simsiam.data.remote_files import open_file, printable_name
from simsiam.errors import UsageError, truncate

MAX_FOOTER_BYTES = 2**23
MAX_FOOTER_ITEMS = 2**17  # of a list in a footer
MAX_PAGE_HEADER_BYTES = 2**20
# What a table may take in memory: this many bytes, or this multiple of its size in the file.
MIN_TABLE_LIMIT, MAX_TABLE_RATIO = 2**28, 20
LEVEL_BYTES = 4  # of a value, for what says where it is in a list and whether it is null
WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
TEXT_WIDTH = 8  # of a text, besides its characters
# Encodings: lengths before all texts; and each text repeats the beginning of the one before it.
DELTA_LENGTH_BYTE_ARRAY, DELTA_BYTE_ARRAY = 6, 7
DICTIONARY_ENCODINGS, DICTIONARY_PAGE = (2, 8), -1
MAGIC = b"PAR1"
ThriftStruct: TypeAlias = "dict[int, int | ThriftStruct]"


@contextmanager
def open_parquet(file: str | os.PathLike[str]) -> Iterator["ParquetReader"]:
    """Open a Parquet file, and read and check its footer.

    Args:
        file: A path or a URL.

    Yields:
        What reads its columns.

    Raises:
        UsageError: The file claims what is not plausible, or is no regular file.
        pa.ArrowException: It is damaged.
        OSError: It cannot be read.
    """
    with open_file(os.fspath(file)) as opened:
        yield ParquetReader(opened, printable_name(os.fspath(file)))


def read_parquet(file: str | os.PathLike[str], columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file into memory; the checksums of its pages are checked where it has them.

    Args:
        file: A path or a URL.
        columns: The columns to read, of which it may lack some; None for all.

    Returns:
        The table, which takes at most MIN_TABLE_LIMIT bytes or MAX_TABLE_RATIO times the file.

    Raises:
        UsageError: It is larger, or is no regular file.
        pa.ArrowException: It is damaged.
        OSError: It cannot be read.
    """
    with open_parquet(file) as parquet:
        return parquet.read(columns)


def read_parquet_schema(file: str | os.PathLike[str]) -> pa.Schema:
    """Read the columns and the metadata of a Parquet file; raises what `open_parquet` does.

    Args:
        file: A path or a URL.
    """
    with open_parquet(file) as parquet:
        return parquet.schema


def count_parquet_rows(file: str | os.PathLike[str]) -> int:
    """Read the number of rows of a Parquet file; raises what `open_parquet` does.

    Args:
        file: A path or a URL.
    """
    with open_parquet(file) as parquet:
        return parquet.metadata.num_rows


class ParquetReader:
    """An open Parquet file.

    Args:
        opened: The file.
        name: What errors call it.

    Attributes:
        metadata: Its footer.
        schema: Its columns.
    """

    def __init__(self, opened: BinaryIO, name: str):
        self.opened, self.name = opened, name
        self.num_bytes = opened.seek(0, os.SEEK_END)
        limits = {
            "thrift_string_size_limit": MAX_FOOTER_BYTES,
            "thrift_container_size_limit": MAX_FOOTER_ITEMS,
        }
        footer = pq.ParquetFile(pa.BufferReader(self._read_footer()), **limits)
        self.metadata: pq.FileMetaData = footer.metadata
        self.schema: pa.Schema = footer.schema_arrow
        groups = [self.metadata.row_group(i).num_rows for i in range(footer.num_row_groups)]
        if self.metadata.num_rows != sum(groups) or min(groups, default=0) < 0:
            raise pa.ArrowInvalid("the numbers of rows in its footer contradict each other")
        if self.metadata.num_rows > self.num_bytes:
            raise UsageError(
                f"{name} claims to hold {self.metadata.num_rows:,} rows in {self.num_bytes:,} bytes"
            )

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read all rows; see `read_parquet`."""
        fields = [field for field in self.schema if columns is None or field.name in columns]
        wanted = [field.name for field in fields]
        for place in range(len(self.metadata.schema)):
            leaf = self.metadata.schema.column(place)
            inside = leaf.path.partition(".")[0] in wanted and leaf.path not in wanted
            if inside and leaf.physical_type == "BYTE_ARRAY":
                raise pa.ArrowInvalid(
                    f"the column {truncate(leaf.path, repr)} has texts inside of other values"
                )
        types = [f.type.value_type if pa.types.is_dictionary(f.type) else f.type for f in fields]
        schema = pa.schema(zip(wanted, types), self.schema.metadata)
        tables, left = (
            [schema.empty_table()],
            max(MIN_TABLE_LIMIT, MAX_TABLE_RATIO * self.num_bytes),
        )
        for group in range(self.metadata.num_row_groups):
            table = self._write_out(self.read_row_group(group, wanted, left), left)
            left -= table.nbytes
            tables.append(table.cast(schema))
        return pa.concat_tables(tables)

    def read_row_group(self, group: int, columns: Sequence[str], limit: int) -> pa.Table:
        """Read columns of a row group.

        Args:
            group: Its number.
            columns: Names of columns, or of a field of a struct as in "image.bytes".
            limit: Bytes that they may take in memory.

        Returns:
            The columns; those of texts or bytes are dictionaries, in which equal values are once,
            unless their encoding does not allow it.

        Raises:
            UsageError: They take more memory.
            pa.ArrowException: The row group is damaged.
            OSError: It cannot be read.
        """
        chunks, texts, needed = _Chunks(self.num_bytes), list[str](), 0
        row_group = self.metadata.row_group(group)
        for place in range(row_group.num_columns if row_group.num_rows else 0):
            chunk = row_group.column(place)
            path = chunk.path_in_schema
            if not any(f"{path}.".startswith(f"{column}.") for column in columns):
                continue
            start, data = self._read_chunk(chunk)
            chunks.parts[start] = data
            width = WIDTHS.get(chunk.physical_type, TEXT_WIDTH)
            if chunk.physical_type == "FIXED_LEN_BYTE_ARRAY":
                width = self.metadata.schema.column(place).length
            size, is_plain = _decoded_size(data, width)
            needed += size
            if chunk.physical_type == "BYTE_ARRAY" and not is_plain:
                texts.append(path)
        if needed > limit:
            raise UsageError(
                f"row group {group} of {self.name} may take {needed:,} bytes in memory; at most "
                f"{limit:,}: write it with less compression"
            )
        file = pq.ParquetFile(
            chunks,
            metadata=self.metadata,
            read_dictionary=texts,
            page_checksum_verification=True,
            pre_buffer=False,  # which would read what is between the chunks as well
        )
        # A thread of Arrow's may still hold bytes of Python's when the read has ended. If the
        # interpreter ends then, the process aborts.
        return file.read_row_groups(
            [group] if row_group.num_rows else [], columns=list(columns), use_threads=False
        )

    def _write_out(self, table: pa.Table, limit: int) -> pa.Table:
        """Replace dictionaries by their values, if these take at most `limit` bytes."""
        for place, name in enumerate(table.column_names):
            column = table.column(place)
            if pa.types.is_dictionary(column.type):
                needed = pc.sum(byte_lengths(column)).as_py() or 0
                if needed > limit:
                    raise UsageError(
                        f"the column {truncate(name, repr)} of {self.name} may take {needed:,} "
                        f"bytes in memory; at most {limit:,}: write it with less compression"
                    )
                table = table.set_column(place, name, column.cast(column.type.value_type))
        return table

    def _read_footer(self) -> bytes:
        """Read the footer, as a Parquet file without rows."""
        self.opened.seek(max(0, self.num_bytes - 8))
        end = self.opened.read(8)
        size = int.from_bytes(end[:4], "little")
        if end[4:] != MAGIC or size > self.num_bytes - 12:
            raise pa.ArrowInvalid("not a Parquet file, or cut off")
        if size > MAX_FOOTER_BYTES:
            raise UsageError(
                f"{self.name} has a footer of {size:,} bytes; at most {MAX_FOOTER_BYTES:,}: write "
                "it as several files"
            )
        self.opened.seek(self.num_bytes - 8 - size)
        return MAGIC + self.opened.read(size) + end

    def _read_chunk(self, chunk: pq.ColumnChunkMetaData) -> tuple[int, bytes]:
        """Read a column of a row group; return where it is in the file, and its bytes."""
        start, size = chunk.data_page_offset, chunk.total_compressed_size
        if chunk.has_dictionary_page and 0 < (first := chunk.dictionary_page_offset) < start:
            start = first
        if not 0 <= start <= start + size <= self.num_bytes:
            raise pa.ArrowInvalid("a column that is not in the file")
        self.opened.seek(start)
        data = self.opened.read(size)
        if len(data) < size:
            raise pa.ArrowInvalid(f"{len(data):,} of {size:,} bytes of a column")
        return start, data


def byte_lengths(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Return the bytes of each value; a dictionary may have equal values once for many rows.

    Args:
        values: Texts, bytes, or a dictionary of them.

    Returns:
        Their lengths, int64.
    """
    if isinstance(values, pa.ChunkedArray):
        return pa.chunked_array([byte_lengths(chunk) for chunk in values.chunks], pa.int64())
    if pa.types.is_dictionary(values.type):
        return byte_lengths(values.dictionary).take(values.indices)
    return pc.binary_length(values).cast(pa.int64())


class _Chunks:
    """A file of which only the chunks that have been checked can be read."""

    closed = False

    def __init__(self, num_bytes: int):
        self.num_bytes, self.position = num_bytes, 0
        self.parts: dict[int, bytes] = {}

    def read(self, size: int = -1) -> bytes:
        for start, data in self.parts.items():
            if start <= self.position < start + len(data):
                first = self.position - start
                part = data[first : first + size] if size >= 0 else data[first:]
                self.position += len(part)
                return part
        return b""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        before = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.num_bytes}
        self.position = before[whence] + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True


# --- the headers of pages -----------------------------------------------------------------------


def _decoded_size(chunk: bytes, width: int) -> tuple[int, bool]:
    """Return the bytes of memory that the values of a column chunk take at most.

    Also return whether it has an encoding of texts that Arrow cannot read as a dictionary.
    """
    position = size = dictionary_size = from_dictionary = 0
    is_plain = False
    try:
        while position < len(chunk):
            page, start = _read_struct(chunk, position)
            unpacked, packed, count, encoding = _page_facts(page)
            too_long = start - position > MAX_PAGE_HEADER_BYTES or packed > len(chunk) - start
            if too_long or min(unpacked, packed, count) < 0:
                raise ValueError
            size += unpacked + count * (width + LEVEL_BYTES)
            is_plain |= encoding in (DELTA_LENGTH_BYTE_ARRAY, DELTA_BYTE_ARRAY)
            if encoding == DELTA_BYTE_ARRAY:
                size += unpacked * count
            elif encoding == DICTIONARY_PAGE:
                dictionary_size = unpacked
            elif encoding in DICTIONARY_ENCODINGS:
                from_dictionary += count
            position = start + packed
    except (IndexError, KeyError, ValueError):
        raise pa.ArrowInvalid(f"a damaged page at byte {position:,} of a column") from None
    return size + is_plain * from_dictionary * dictionary_size, is_plain


def _page_facts(page: ThriftStruct) -> tuple[int, int, int, int]:
    """Return the unpacked bytes of a page, the packed ones, its values, and their encoding.

    The encoding of a dictionary is DICTIONARY_PAGE.
    """
    # By the type of the page: the field that describes its values, and the encoding in that.
    kind = _number(page[1])
    place = {0: (5, 2), 2: (7, 2), 3: (8, 4)}.get(kind)
    count = encoding = 0
    if place is not None:
        values = page[place[0]]
        if isinstance(values, int):
            raise ValueError
        count, encoding = _number(values[1]), _number(values[place[1]])
        encoding = DICTIONARY_PAGE if kind == 2 else encoding
    return _number(page[2]), _number(page[3]), count, encoding


def _number(value: "int | ThriftStruct") -> int:
    if not isinstance(value, int):
        raise ValueError
    return value


def _read_struct(data: bytes, position: int, depth: int = 0) -> tuple[ThriftStruct, int]:
    """Read a struct in Thrift's compact protocol, by the numbers of its fields, and where it ends.

    Headers of pages have numbers, texts, which are passed over, and structs of these.
    """
    if depth > 4:
        raise ValueError
    fields: ThriftStruct = {}
    number = 0
    while head := data[position]:
        position += 1
        kind = head & 15
        if head >> 4:
            number += head >> 4
        else:
            number, position = _read_integer(data, position)
        if kind in (1, 2):  # true, false
            fields[number] = kind
        elif kind in (4, 5, 6):  # integers
            fields[number], position = _read_integer(data, position)
        elif kind == 8:  # a text
            size, position = _read_varint(data, position)
            position += size
        elif kind == 12:
            fields[number], position = _read_struct(data, position, depth + 1)
        else:
            raise ValueError
    return fields, position + 1


def _read_integer(data: bytes, position: int) -> tuple[int, int]:
    """Read a signed integer: 0, -1, 1, -2, ... are stored as 0, 1, 2, 3, ..."""
    value, position = _read_varint(data, position)
    return (value >> 1) ^ -(value & 1), position


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
        if shift > 63:
            raise ValueError
