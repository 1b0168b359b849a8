"""Which files of a folder or an archive are images, and what the others are, counted by kind.

The extension decides. A file whose extension says nothing is an image if its first bytes are those
of one: many downloads and caches have no extension, or a made-up one. This module does not import
torch.
"""

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from simsiam.data.decode import EXTENSIONS, OPTIONAL_EXTENSIONS, find_format

HIDDEN, NO_EXTENSION, NO_SPLIT = "hidden", "without extension", "in no split"
LINK, SPECIAL = "links", "pipes or devices"
OUTSIDE = "with paths that lead outside"
TOO_LONG = "folders with paths that are too long for the system"
REPLACED = "replaced by a later file of the same name"
EXTENSION = re.compile(r"(?<=[^/])\.\w{1,12}$")
# Formats that the first bytes show for certain.
SIGNED_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "JPEG 2000")
VIDEOS = {
    ".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mts", ".m2ts", ".mpg", ".mpeg", ".wmv",
    ".3gp", ".flv",
}  # fmt: skip
# Files of these extensions are never opened to find out what they are.
OTHER_EXTENSIONS = {
    ".aae", ".arrow", ".bz2", ".c", ".cfg", ".cls", ".conf", ".cpp", ".css", ".csv", ".db",
    ".doc", ".docx", ".eps", ".exe", ".gz", ".h5", ".hdf5", ".htm", ".html", ".ini", ".ipynb",
    ".js", ".json", ".jsonl", ".log", ".m4a", ".mat", ".md", ".mp3", ".npz", ".ods", ".odt",
    ".onnx", ".parquet", ".pdf", ".pickle", ".pkl", ".ppt", ".pptx", ".ps", ".pt", ".pth",
    ".py", ".rar", ".rst", ".rtf", ".safetensors", ".sh", ".sqlite", ".svg", ".tar", ".tex",
    ".tgz", ".toml", ".tsv", ".txt", ".wav", ".xls", ".xlsx", ".xml", ".xmp", ".xz", ".yaml",
    ".yml", ".zip", ".zst", ".7z",
}  # fmt: skip
IMAGE_SUFFIXES = tuple(extension.encode() for extension in EXTENSIONS)
KNOWN_EXTENSIONS = VIDEOS | OTHER_EXTENSIONS | OPTIONAL_EXTENSIONS.keys()


@dataclass
class FileCounts:
    """How many files of a source are no images, by kind, and how many are despite their names.

    Attributes:
        passed_over: Number of files that are not read, by kind: an extension, or one of the kinds
            at the top of this module.
        by_content: Number of images that were recognized by their first bytes, by extension.
    """

    passed_over: Counter[str] = field(default_factory=Counter)
    by_content: Counter[str] = field(default_factory=Counter)

    def is_image(self, path: bytes, read_start: Callable[[], bytes]) -> bool:
        """Return whether a file is an image; count it.

        Args:
            path: Its path in the source, with "/".
            read_start: Reads its first bytes; is called only if its extension says nothing.
        """
        if is_image_path(path):
            return True
        if is_hidden(path):
            self.passed_over[HIDDEN] += 1
            return False
        match = EXTENSION.search(os.fsdecode(path).lower())
        extension = match[0] if match else ""
        found = extension not in KNOWN_EXTENSIONS and find_format(read_start()) in SIGNED_FORMATS
        counter = self.by_content if found else self.passed_over
        counter[extension or NO_EXTENSION] += 1
        return found

    def notes(self, images: int) -> list[str]:
        """Say what is not read and why, and what is read despite its name.

        Args:
            images: The number of images.

        Returns:
            At most two lines.
        """
        lines = []
        kinds = Counter({kind: n for kind, n in self.passed_over.items() if kind != NO_SPLIT})
        if total := kinds.total():
            lines.append(
                f"files that are not read: {total:,} of {images + total:,}: {join_kinds(kinds)}"
            )
        if total := self.by_content.total():
            lines.append(
                f"files that are images although their names do not say so, and are read: {total:,}"
                f": {join_kinds(self.by_content)}"
            )
        return lines


def join_kinds(counts: Counter[str] | dict[str, int], most: int = 8) -> str:
    """List numbers of files by kind, the largest first.

    Args:
        counts: Number of files by kind.
        most: How many kinds are listed; the others are counted together.

    Returns:
        The list, with what reads a kind if a package is missing.
    """
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    texts = [f"{count:,} {kind}{_explain(kind)}" for kind, count in ordered[:most]]
    if others := sum(count for _, count in ordered[most:]):
        texts.append(f"{others:,} of {len(ordered) - most} other kinds")
    return ", ".join(texts)


def _explain(kind: str) -> str:
    if kind in VIDEOS:
        return " (videos)"
    if kind in OPTIONAL_EXTENSIONS and kind not in EXTENSIONS:
        return f" (pip install {OPTIONAL_EXTENSIONS[kind][0]} to read them)"
    return ""


def is_image_path(name: bytes) -> bool:
    """Return whether a path is that of an image file that is not hidden.

    Args:
        name: The path, with "/".

    Returns:
        Whether it has an extension of an image, and no part starts with a dot.
    """
    return name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(name)


def is_hidden(path: bytes) -> bool:
    """Return whether a file is hidden, or in a hidden folder.

    Args:
        path: Its path, with "/".
    """
    return any(part.startswith(b".") for part in path.split(b"/"))
