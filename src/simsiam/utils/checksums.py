"""Checksums of what the program writes, against accidents: bad disks, cut copies, wrong edits.

Whoever can write a file can also write its checksum, so they protect from nobody.
"""

import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from zlib import crc32

from simsiam.errors import UsageError, printable
from simsiam.utils.files import atomic_write, write_text
from simsiam.utils.read_files import open_regular, read_bytes, read_text

CHECKSUM_KEY = "crc32"  # in a JSON object: one more key
SUMS_FILE = "SHA256SUMS"  # of all files in a folder, as the program sha256sum reads it


# --- JSON objects ---------------------------------------------------------------------------------


def seal(record: Mapping[str, object]) -> dict[str, object]:
    """Add its checksum to a record.

    Args:
        record: What JSON can express.

    Returns:
        The record with one more key at its end.
    """
    return {**record, CHECKSUM_KEY: record_checksum(record)}


def record_checksum(record: Mapping[str, object]) -> str:
    """Compute the checksum of a record, whatever the order of its keys and the spaces in the file.

    Args:
        record: What JSON can express.

    Returns:
        A CRC-32 in eight hexadecimal digits.
    """
    return _digest(json.loads(json.dumps(record)))  # its keys are texts


def is_intact(record: dict[str, object]) -> bool:
    """Take the checksum out of a record, and tell whether the record matches it.

    Args:
        record: The record as it was read, which is changed.

    Returns:
        Whether it matches; True if there is no checksum, as in files of older versions.
    """
    if CHECKSUM_KEY in record:
        return record.pop(CHECKSUM_KEY) == _digest(record)
    if record:
        key, value = record.popitem()
        if value != _digest(record):  # else the name of the checksum alone is damaged
            record[key] = value
    return True


def _digest(record: Mapping[str, object]) -> str:
    return f"{crc32(json.dumps(record, sort_keys=True).encode()):08x}"


# --- other files ----------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    """Compute the sha256 of a file, in hexadecimal digits.

    Args:
        path: The file.
    """
    digest = sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_with_checksum(path: Path, data: bytes) -> None:
    """Write a file, and NAME.sha256 beside it, as the program sha256sum reads it.

    Whenever the process is killed, the file matches a line of NAME.sha256.

    Args:
        path: The file.
        data: Its content.

    Raises:
        WorkFailed: It cannot be written.
    """
    digests = [sha256(data).hexdigest(), *([file_sha256(path)] if path.is_file() else [])]
    for number in (2, 1):
        lines = [f"{digest}  {path.name}\n" for digest in dict.fromkeys(digests[:number])]
        write_text(_checksum_path(path), "".join(lines))
        if number == 2:
            with atomic_write(path) as part:
                part.write_bytes(data)


def read_with_checksum(path: Path) -> bytes:
    """Read what `write_with_checksum` wrote.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        UsageError: It does not match NAME.sha256. Files of older versions do not have one.
    """
    data, sums = read_bytes(path), _checksum_path(path)
    if sums.exists():
        line = f"{sha256(data).hexdigest()}  {path.name}"
        if line not in read_text(sums, errors="replace").split("\n"):
            name = printable(str(path))
            raise UsageError(
                f"{name} is damaged: it does not match {sums.name}; restore it, or delete both, "
                f"or only {sums.name} if you have changed the file on purpose"
            )
    return data


def _checksum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS into a folder: the sha256 of each file in it.

    Args:
        folder: The folder.
    """
    files: Iterable[Path] = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS_FILE).write_text("".join(lines), "utf-8", newline="\n")
