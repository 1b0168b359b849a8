"""The one way to read small files: bounded, and only from regular files.

A pipe or a device would block, or never end. Images are read by `simsiam.data.decode` instead.
"""

import os
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from simsiam.errors import UsageError, printable
from simsiam.utils.system import NamedFile, check_regular, find_guarded, open_nonblocking, open_own

MAX_BYTES = 2**26  # of a file that is read as a whole: no JSON of this size needs 3 GiB of memory


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading; wait for nothing.

    Args:
        path: The file, or a link to it. Below a guarded folder no link is followed.

    Returns:
        The open file, to be closed by the caller.

    Raises:
        OSError: There is no such file, or the system refuses.
        UsageError: It is a folder, a pipe, a device or a socket, or behind a link in a run folder.
    """
    if find_guarded(path) is not None:
        return BufferedReader(open_own(Path(path), "rb"))
    check_regular(path, os.stat(path))  # before it is opened: opening a device may do something
    file = NamedFile(os.fspath(path), "rb", opener=open_nonblocking)
    try:
        check_regular(path, os.fstat(file.fileno()))
    except UsageError:
        file.close()
        raise
    return BufferedReader(file)


def read_bytes(path: str | os.PathLike[str], limit: int = MAX_BYTES) -> bytes:
    """Read a regular file as a whole.

    Args:
        path: The file, or a link to it.
        limit: The most bytes that it may have.

    Returns:
        Its content.

    Raises:
        OSError: There is no such file, or the system refuses.
        UsageError: It is not a regular file, or it is too large.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(limit + 1) if size <= limit else b""
    if max(size, len(data)) > limit:
        raise UsageError(
            f"{printable(os.fspath(path))} is too large to be read here: it has "
            f"{max(size, len(data)):,} bytes; at most {limit:,} are allowed"
        )
    return data


def read_text(
    path: str | os.PathLike[str], limit: int = MAX_BYTES, *, errors: str = "strict"
) -> str:
    """Read a regular file as text in UTF-8, with line breaks as in Python.

    Args:
        path: The file, or a link to it.
        limit: The most bytes that it may have.
        errors: What happens to bytes that are not UTF-8, as in `bytes.decode`.

    Returns:
        The text.

    Raises:
        OSError: There is no such file, or the system refuses.
        UsageError: It is not a regular file, it is too large, or it is not in UTF-8.
    """
    try:
        text = read_bytes(path, limit).decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{printable(os.fspath(path))} is not a text in UTF-8: {error.reason} at byte "
            f"{error.start:,}"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
