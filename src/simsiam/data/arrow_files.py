"""Arrow files: those that this program keeps in its cache, and the catalogs that come with shards.

Reading a damaged Arrow file may crash the process. So a file in the cache ends with a checksum of
the rest, and is used only if that matches. A catalog that came with shards is read message by
message: nothing in it is unpacked, and its values are checked. This module does not import torch.
"""

import os
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

import pyarrow as pa

from simsiam.utils.files import atomic_write
from simsiam.utils.read_files import open_regular
from simsiam.utils.system import WINDOWS

MARK = b"\nsimsiam"  # after the checksum
DIGEST_BYTES = 16
PIECE = 2**20  # bytes that are digested at a time
MESSAGES_START = 8  # in an Arrow file
# Where the header of a message in an Arrow file says that its buffers are compressed.
HEADER_SLOT, COMPRESSION_SLOT = 2, 3


def write_arrow_file(
    path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], *, checksum: bool = True
) -> None:
    """Write an Arrow file.

    Args:
        path: The file.
        schema: The columns and the metadata.
        batches: The rows.
        checksum: Whether a checksum follows it; only `open_arrow_file` reads the file then.

    Raises:
        WorkFailed: The file cannot be written.
    """
    with atomic_write(path) as part:
        with pa.OSFile(str(part), "wb") as file, pa.ipc.new_file(file, schema) as to:
            for batch in batches:
                to.write_batch(batch.replace_schema_metadata(schema.metadata))
        if checksum:
            digest = blake2b(digest_size=DIGEST_BYTES)
            with open(part, "rb+") as written:
                while piece := written.read(PIECE):
                    digest.update(piece)
                written.write(digest.digest() + MARK)


def open_arrow_file(path: str | os.PathLike[str]) -> pa.RecordBatchFileReader:
    """Open a file that `write_arrow_file` wrote with a checksum, mapped into memory.

    Windows does not replace a mapped file, so it is read there.

    Args:
        path: The file.

    Returns:
        What reads it.

    Raises:
        ValueError: The file does not match its checksum.
        OSError: There is no such file.
        UsageError: It is not a regular file.
    """
    open_regular(path).close()
    with (pa.OSFile if WINDOWS else pa.memory_map)(os.fspath(path)) as file:
        content = file.read_buffer()
    size = content.size - DIGEST_BYTES - len(MARK)
    if size < 0 or content[size + DIGEST_BYTES :].to_pybytes() != MARK:
        raise ValueError("no checksum")
    digest = blake2b(content[:size], digest_size=DIGEST_BYTES).digest()
    if content[size : size + DIGEST_BYTES].to_pybytes() != digest:
        raise ValueError("the file does not match its checksum")
    return pa.ipc.open_file(pa.BufferReader(content[:size]))


def read_foreign_arrow_file(
    path: str | os.PathLike[str], schema: pa.Schema
) -> tuple[dict[bytes, bytes], list[pa.RecordBatch]]:
    """Read an Arrow file of another program, which may have been made to do harm.

    Args:
        path: The file.
        schema: The columns that it must have.

    Returns:
        Its metadata, and its record batches, whose values are valid.

    Raises:
        ValueError: It has other columns, is compressed, or has values that are not valid.
        pa.ArrowException: It is damaged.
        OSError: It cannot be read.
        UsageError: It is not a regular file.
    """
    with open_regular(path) as file:
        file.seek(MESSAGES_START)
        messages = pa.ipc.MessageReader.open_stream(file)
        found = pa.ipc.read_schema(messages.read_next_message())
        if not found.equals(schema):
            raise ValueError("columns")
        batches = list(_read_batches(messages, found))
    return dict(found.metadata or {}), batches


def _read_batches(messages: pa.MessageReader, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    while True:
        try:
            message = messages.read_next_message()
        except StopIteration:
            return
        if message.type != "record batch" or _is_compressed(message.metadata.to_pybytes()):
            raise ValueError("messages")
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate(full=True)
        yield batch


def _is_compressed(metadata: bytes) -> bool:
    """Return whether a message says that its buffers are compressed.

    A message is a table of the format FlatBuffers: it begins with the distance back to a list of
    the positions of its fields.
    """

    def number(position: int, size: int) -> int:
        return int.from_bytes(metadata[position : position + size], "little", signed=size == 4)

    def field(table: int, slot: int) -> int:
        fields = table - number(table, 4)
        place = 4 + 2 * slot
        return number(fields + place, 2) if place < number(fields, 2) else 0

    message = number(0, 4)
    header = message + field(message, HEADER_SLOT)
    return field(header + number(header, 4), COMPRESSION_SLOT) != 0
