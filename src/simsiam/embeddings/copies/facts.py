"""Facts about the file of an image: dimensions, format, bytes, date; and where it is."""

import os
from datetime import datetime, timezone
from pathlib import Path
from typing import TypedDict
from urllib.parse import quote

from simsiam.data.decode import Unreadable
from simsiam.data.storage import FolderFiles
from simsiam.embeddings.copies.originals import Originals


class FileFacts(TypedDict):
    """What the page says about the file of an image."""

    width: int
    height: int
    format: str
    bytes: int
    modified: str  # "2026-11-29"; "" if unknown
    error: str  # why the file cannot be read; then the other values are 0 or ""


def file_facts(originals: Originals, row: int) -> FileFacts:
    """Read what is known about the file of a row, without decoding it.

    Args:
        originals: The files of the embedding.
        row: The row.
    """
    try:
        images, position = originals.locate(row)
        header, file = images.read_header(position), images.file(position)
        modified = ""
        if isinstance(file, bytes):
            size = len(file)
        else:
            status = Path(file).stat()
            size = status.st_size
            modified = datetime.fromtimestamp(status.st_mtime, timezone.utc).date().isoformat()
    except (Unreadable, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return FileFacts(
            width=0, height=0, format="", bytes=0, modified="", error=reason or "it is gone"
        )
    return FileFacts(
        width=header.width,
        height=header.height,
        format=header.format,
        bytes=size,
        modified=modified,
        error="",
    )


def format_facts(facts: FileFacts) -> str:
    """Write facts in one line.

    Args:
        facts: The facts.

    Returns:
        Such as "224 × 224, PNG, 93 kB"; "" if the file cannot be read.
    """
    if facts["error"]:
        return ""
    size = f"{facts['width']} × {facts['height']}, {facts['format']}"
    return f"{size}, {max(1, round(facts['bytes'] / 1000)):,} kB"


def relative_link(originals: Originals, row: int, page: Path) -> str:
    """Make the link from a page to the file of an image, so that both can move together.

    Args:
        originals: The files of the embedding.
        row: The row of the image.
        page: The page.

    Returns:
        The link, relative to the folder of the page; "" if there is no such file, or it is on
        another drive.
    """
    try:
        images, position = originals.locate(row)
        if not isinstance(images.storage, FolderFiles):
            return ""
        path = os.path.relpath(images.storage.file(position), page.resolve().parent)
    except (Unreadable, OSError, ValueError):
        return ""
    return "./" + quote(os.fsencode(path.replace(os.sep, "/")))
