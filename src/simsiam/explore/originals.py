"""The image files behind the rows of an embedding: full size, and what is known about each file."""

import io
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import TypedDict

import numpy as np
from PIL import Image

from simsiam.data.decode import Unreadable
from simsiam.data.storage import FolderFiles
from simsiam.embeddings.copies.originals import LOSSY, Originals


class FileFacts(TypedDict):
    """What the page says about the file of an image."""

    width: int
    height: int
    format: str
    bytes: int
    modified: str  # "2026-11-29"; "" if unknown
    error: str  # why the file cannot be read; then the other values are 0 or ""


def encode_for_browser(pixels: np.ndarray) -> bytes:
    """Encode decoded pixels in a format that every browser shows.

    Args:
        pixels: uint8 (H, W, C). One channel is shown as gray; of more than three, the first three.

    Returns:
        A JPEG file.
    """
    shown = pixels[..., 0] if pixels.shape[2] < 3 else pixels[..., :3]
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(shown)).save(file, "JPEG", quality=92)
    return file.getvalue()


def read_original(originals: Originals, row: int) -> bytes:
    """Read the image of a row in full size.

    Args:
        originals: The files of the embedding.
        row: The row.

    Returns:
        A JPEG file.

    Raises:
        Unreadable: The image is gone or damaged.
    """
    images, position = originals.locate(row)
    return encode_for_browser(images.read(position))


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


def path_in_folder(originals: Originals, row: int) -> str | None:
    """Find where the file of a row is below the folder of its source.

    Args:
        originals: The files of the embedding.
        row: The row.

    Returns:
        The path, relative to the folder of the source; None if the image is no file below it.
    """
    try:
        images, position = originals.locate(row)
    except Unreadable:
        return None
    if not isinstance(images.storage, FolderFiles):
        return None
    path = os.path.normpath(images.storage.names[position])
    return None if os.path.isabs(path) or path.split(os.sep)[0] == ".." else path


def why_best(best: FileFacts, others: list[FileFacts]) -> str:
    """Say why the first image of a group of copies is the one to keep.

    Args:
        best: The facts of the first image.
        others: The facts of the others.

    Returns:
        The reason, in a few words.
    """
    if best["error"] or any(other["error"] for other in others):
        return "the first; not all files can be read again"
    if best["format"] == "RAW" and any(other["format"] != "RAW" for other in others):
        return "the RAW photograph"
    pixels = best["width"] * best["height"]
    if pixels > max(other["width"] * other["height"] for other in others):
        return "the most pixels"
    if best["format"] not in LOSSY and any(other["format"] in LOSSY for other in others):
        return "a format that keeps all pixels"
    if best["bytes"] > max(other["bytes"] for other in others):
        return "the largest file of these sizes"
    return "equal to the others; the first in the folder"
