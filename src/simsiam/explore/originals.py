"""The image files behind the rows of an embedding: full size, and what is known about each file."""

import io
import os

import numpy as np
from PIL import Image

from simsiam.embeddings.copies.facts import FileFacts
from simsiam.embeddings.copies.originals import LOSSY, Originals


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


def path_in_folder(originals: Originals, row: int) -> str | None:
    """Find where the file of a row is below the folder of its source.

    Args:
        originals: The files of the embedding.
        row: The row.

    Returns:
        The path, relative to the folder of the source; None if the image is no file below it.
    """
    if (found := originals.find_file(row)) is None:
        return None
    files, position = found
    path = os.path.normpath(files.names[position])
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
    return "equal to the others; the shortest name, or the first of these"
