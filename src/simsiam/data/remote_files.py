"""Read files from a disk, or from any store that fsspec supports.

A stranger's server may end in the middle of a file. Whatever the client of a store raises then
becomes one line. This module does not import torch.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, cast

from simsiam.errors import UsageError, WorkFailed, printable
from simsiam.utils.read_files import open_regular
from simsiam.utils.system import read_at

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


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
    text = str(error.strerror if isinstance(error, OSError) and error.strerror else error)
    kind = "" if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: "
    reason = printable(" ".join(f"{kind}{text}".split()))[:200]
    return WorkFailed(f"cannot read {printable(file)}: {reason}")


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
        try:
            answers = system.cat_ranges(files, starts, stops, on_error="return")
        except Exception as error:  # the client of a store may raise anything
            raise read_error(files[0], error) from None
        for file, part in zip(files, answers):
            if isinstance(part, Exception):
                raise read_error(file, part)
            parts.append(bytes(part))
        return parts
    for file, start, stop in ranges:
        try:
            with open_regular(file) as opened:
                parts.append(read_at(opened, start, stop - start))
        except (OSError, UsageError) as error:
            raise read_error(file, error) from None
    return parts


def open_file(file: str) -> BinaryIO:
    """Open a local or remote file to read from.

    Args:
        file: A path or a URL.

    Returns:
        The open file. Whatever goes wrong when it is read is an OSError with a number.

    Raises:
        OSError: It cannot be opened.
        UsageError: The protocol of the URL is not supported, or the path is no regular file.
    """
    if not is_url(file):
        return open_regular(file)
    system, path = filesystem(file)
    with _client_errors():
        return cast(BinaryIO, _RemoteFile(system.open(path, "rb")))


class _RemoteFile:
    """A file of a store, whose client may raise anything."""

    def __init__(self, file: BinaryIO):
        self.file = file

    def __enter__(self) -> "_RemoteFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, size: int = -1) -> bytes:
        with _client_errors():
            return self.file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with _client_errors():
            return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def close(self) -> None:
        with _client_errors():
            self.file.close()


@contextmanager
def _client_errors() -> Iterator[None]:
    """Turn every error into an OSError with a number, which no damaged file causes."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        text = f"{type(error).__name__}: {error}"
        raise OSError(errno.EIO, " ".join(text.split())) from error


def is_corruption(error: Exception) -> bool:
    """Tell a damaged file from a failing disk or network; pyarrow raises OSError for both.

    Args:
        error: What reading a file raised.

    Returns:
        Whether the content of the file is the cause.
    """
    return not isinstance(error, OSError) or (type(error) is OSError and error.errno is None)
