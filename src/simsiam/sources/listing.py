"""List the image files of a folder or an archive, and count what is passed over.

This module does not import torch, and reads no image, except the first bytes of files whose names
do not say what they are.
"""

import errno
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from simsiam.data.decode import EXTENSIONS, SIGNATURE_BYTES, Unreadable, open_regular_file
from simsiam.errors import UsageError, WorkFailed, printable
from simsiam.sources.catalog import TAR_ERRORS, iter_tar_members, normalize_member_path
from simsiam.sources.file_kinds import (
    HIDDEN,
    LINK,
    OUTSIDE,
    SPECIAL,
    TOO_LONG,
    FileCounts,
    join_kinds,
)
from simsiam.sources.splits import NAME_CHUNK
from simsiam.utils.read_files import open_regular

# What zipfile and tarfile raise.
ARCHIVE_ERRORS = (*TAR_ERRORS, struct.error, zipfile.BadZipFile, zlib.error)
UTF8_FLAG = 0x800  # of a member of a .zip: its name is in UTF-8
# Where the content of a member of an archive is; see `ArchiveMembers`.
Entry: TypeAlias = tuple[int, int, int, int, int]


def list_folder(folder: Path, visited: set[tuple[int, int]], counts: FileCounts) -> pa.Array:
    """List the images below a folder.

    Args:
        folder: The folder.
        visited: Device and inode of the folders that have been visited; updated. Each folder is
            visited once, so links do not loop. Links are followed last, so the images of a folder
            that is reached both ways have its real path.
        counts: Counts the other files.

    Returns:
        Paths relative to the folder, with "/", in bytewise order; bytes, as the system has them.

    Raises:
        WorkFailed: A folder cannot be read.
    """

    def iter_paths() -> Iterator[bytes]:
        root, folders, links = os.fsencode(folder), [b""], list[bytes]()
        while folders or links:
            if not folders:
                links.sort(reverse=True)  # in an order that does not depend on the file system
            below = (folders or links).pop()
            try:
                status = os.stat(os.path.join(root, below))
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:
                    raise
                counts.passed_over[TOO_LONG] += 1
                continue
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(os.path.join(root, below)) as entries:
                for entry in entries:
                    if entry.name.startswith(b".") and os.path.isdir(entry.path):
                        counts.passed_over[HIDDEN] += sum(len(f) for *_, f in os.walk(entry.path))
                    elif entry.is_dir(follow_symlinks=False):
                        folders.append(below + entry.name + b"/")
                    elif entry.is_symlink() and os.path.isdir(entry.path):
                        links.append(below + entry.name + b"/")
                    elif not (entry.is_symlink() or entry.is_file()):
                        counts.passed_over[SPECIAL] += 1
                    # A link without a target is listed, and is then unreadable.
                    elif counts.is_image(below + entry.name, partial(_read_start, entry.path)):
                        yield below + entry.name

    try:
        keys = to_arrow(iter_paths())
    except OSError as error:
        place = printable(os.fsdecode(error.filename or folder))
        raise WorkFailed(f"cannot read the folder {place}: {error.strerror}") from error
    return keys.take(pc.sort_indices(keys))


def _read_start(path: bytes) -> bytes:
    """Read the first bytes of a file; b"" if it cannot be read."""
    try:
        with open_regular_file(os.fsdecode(path)) as file:
            return file.read(SIGNATURE_BYTES)
    except (OSError, Unreadable):
        return b""


def to_arrow(values: Iterable[bytes | None]) -> pa.Array:
    """Convert bytes to large_binary in chunks: a million Python objects would take 100 MB.

    Args:
        values: The values; None becomes null.

    Returns:
        A large_binary array.
    """
    values, chunks = iter(values), [pa.array([], pa.large_binary())]
    while chunk := list(islice(values, NAME_CHUNK)):
        chunks.append(pa.array(chunk, pa.large_binary()))
    array = pa.concat_arrays(chunks)
    chunks.clear()
    pa.default_memory_pool().release_unused()  # half of it: the chunks grew by doubling
    return array


def iter_archive_images(path: Path, counts: FileCounts) -> Iterator[tuple[bytes, Entry]]:
    """List the images in a .zip or .tar.

    Args:
        path: The archive.
        counts: Counts the other files.

    Yields:
        The path and the place of each image.

    Raises:
        UsageError: A .zip is encrypted, or compressed with another method than deflate.
        tarfile.TarError: A .tar is damaged.
    """
    iter_images = _iter_zip_images if path.suffix.lower() == ".zip" else _iter_tar_images
    yield from iter_images(path, counts)


def _iter_zip_images(path: Path, counts: FileCounts) -> Iterator[tuple[bytes, Entry]]:
    with (
        open_regular(path) as opened,
        zipfile.ZipFile(opened) as archive,
        open_regular(path) as file,
    ):
        for info in archive.infolist():
            name = _zip_name(info)
            member = normalize_member_path(name)
            if name.endswith("/"):
                continue
            if member is None or stat.S_ISLNK(info.external_attr >> 16):
                counts.passed_over[OUTSIDE if member is None else LINK] += 1
                continue
            methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            supported = info.compress_type in methods and not info.flag_bits & 1

            def read_start(info: zipfile.ZipInfo = info, supported: bool = supported) -> bytes:
                if not supported:
                    return b""
                try:
                    with archive.open(info) as opened:
                        return opened.read(SIGNATURE_BYTES)
                except ARCHIVE_ERRORS:  # it is damaged, and its name is not that of an image
                    return b""

            if not counts.is_image(member, read_start):
                continue
            if not supported:
                raise UsageError(
                    f"{printable(str(path))} is encrypted or compressed with a method "
                    "that is not supported: unpack it"
                )
            # At byte 26 are the lengths of the local header's two variable fields.
            file.seek(info.header_offset + 26)
            start = info.header_offset + 30 + sum(struct.unpack("<2H", file.read(4)))
            deflated = info.compress_type == zipfile.ZIP_DEFLATED
            yield member, (start, info.compress_size, info.file_size, deflated, info.CRC)


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Return the path of a member of a .zip as the program that wrote it meant it."""
    name = info.filename
    # macOS writes UTF-8 without saying so, and zipfile takes that for the characters of DOS.
    if not info.flag_bits & UTF8_FLAG and name == info.orig_filename:
        with suppress(UnicodeError):
            name = name.encode("cp437").decode()
    # Some programs for Windows, system 0, separate folders by backslashes.
    return name.replace("\\", "/") if info.create_system == 0 else name


def _iter_tar_images(path: Path, counts: FileCounts) -> Iterator[tuple[bytes, Entry]]:
    with open_regular(path) as file, open_regular(path) as second:
        for info in iter_tar_members(file):
            member = normalize_member_path(info.name)
            if info.isdir():
                continue
            if member is None or not info.isreg() or info.issparse():
                counts.passed_over[OUTSIDE if member is None else LINK] += 1
            elif counts.is_image(member, partial(_read_at, second, info.offset_data)):
                yield member, (info.offset_data, info.size, info.size, False, -1)


def _read_at(file: BinaryIO, position: int) -> bytes:
    file.seek(position)
    return file.read(SIGNATURE_BYTES)


def no_image_error(paths: Sequence[str], counts: FileCounts) -> UsageError:
    """Make the error for places without an image; it counts the files that are there.

    Args:
        paths: The places.
        counts: The files in them.

    Returns:
        The error, for the caller to raise.
    """
    there = join_kinds(counts.passed_over)
    there = f"; the files there: {there}" if there else ""
    place, formats = ", ".join(map(printable, paths)), " ".join(sorted(EXTENSIONS))
    return UsageError(f"no image in {place}: looked for {formats}{there}")
