"""The image files behind an embedding file, read again for comparisons in detail."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np

from simsiam.data.decode import Unreadable, has_alpha
from simsiam.data.images import Images
from simsiam.data.storage import FolderFiles
from simsiam.embeddings.copies.distance import SIDE, Detail, make_detail
from simsiam.embeddings.table import Embeddings
from simsiam.errors import UsageError, WorkFailed, printable
from simsiam.sources.open_source import open_source
from simsiam.sources.own_marks import is_mark_of, unnamed_places_error
from simsiam.utils.names import utf8_name
from simsiam.utils.workers import CPU_CORES

CACHE_SIZE = 512  # images in memory, of at most 1 MiB each
BY_THUMBNAIL = "by thumbnail"  # the note of images whose thumbnails were compared
WITHOUT_ALPHA = (".jpg", ".jpeg", ".jpe", ".jfif")  # formats that have no alpha channel

LOSSY = ("JPEG", "JPEG2000", "WEBP", "GIF", "HEIF", "AVIF")  # formats that change pixels

Quality: TypeAlias = tuple[bool, int, bool, int]
T = TypeVar("T")


class Originals:
    """The images that the rows of an embedding file were made of, where they can still be read.

    Args:
        embeddings: The rows, with thumbnails.
        file: Their file.
        source: Where the images are; by default where the file says, if you have named these places
            before.
        command: The words of the command that takes such a source, for the message.

    Attributes:
        missing: Why no image can be read again; "" if the source could be opened.
        unreadable: The reason for each row whose image was needed and could not be read.
    """

    def __init__(
        self,
        embeddings: Embeddings,
        file: Path,
        source: str | os.PathLike[str] | Sequence[str] | None = None,
        command: tuple[str, str] = ("duplicates", "--source"),
    ):
        self.embeddings = embeddings
        self.missing = ""
        self.unreadable: dict[int, str] = {}
        self._splits: list[Images] = []
        self._places: dict[str, list[tuple[int, int]]] = {}  # split and position of each name
        self._details: dict[int, Detail | None] = {}
        self._qualities: dict[int, Quality] = {}
        metadata: Mapping[str, Any] = embeddings.metadata
        if not {"sources", "channels", "splits"} <= metadata.keys():
            self.missing = "the file does not say where they are: embed them again"
            return
        places = [str(name) for name in metadata["sources"]]
        if not source and not is_mark_of(str(metadata.get("own_mark")), "sources", places):
            words = [command[0], str(file), command[1], *places]
            self.missing = str(unnamed_places_error(file, "images", words))
            return
        try:
            opened = open_source(
                source or places,
                metadata["channels"],
                no_labels=True,
                splits=metadata["splits"],
            )
        except (UsageError, WorkFailed, OSError) as error:
            self.missing = printable(str(error))
            return
        self._splits = list(opened.splits.values())
        for split, images in enumerate(self._splits):
            for i, key in enumerate(images.keys):
                self._places.setdefault(utf8_name(key), []).append((split, i))

    def read(self, rows: Sequence[int]) -> dict[int, Detail | None]:
        """Read images, in several threads.

        Args:
            rows: Their rows.

        Returns:
            The detail of each image; None for one that cannot be read, see `unreadable`.
        """
        new = [i for i in rows if i not in self._details]
        if len(self._details) + len(new) > CACHE_SIZE:
            self._details = {i: self._details[i] for i in rows if i in self._details}
        self._details |= dict.fromkeys(new)
        for i, (detail, quality) in self._map(_read_detail, new).items():
            self._details[i], self._qualities[i] = detail, quality
        return {i: self._details[i] for i in rows}

    def read_or_thumbnails(self, rows: Sequence[int]) -> tuple[list[Detail], str]:
        """Read images that are compared with each other.

        Args:
            rows: Their rows.

        Returns:
            Their details, and ""; if any cannot be read, the details of their thumbnails, and
            BY_THUMBNAIL.
        """
        details = [detail for detail in self.read(rows).values() if detail is not None]
        if len(details) < len(rows):
            return [self.thumbnail(row) for row in rows], BY_THUMBNAIL
        return details, ""

    def locate(self, row: int) -> tuple[Images, int]:
        """Find the image of a row.

        Args:
            row: Its row.

        Returns:
            The images of its split, and its position there.

        Raises:
            Unreadable: It is not there; the message says why.
        """
        place = None if self.missing else self._place(row)
        if place is None:
            raise Unreadable(self.missing or self.unreadable.get(row, "it is gone"))
        return self._splits[place[0]], place[1]

    def find_file(self, row: int) -> tuple[FolderFiles, int] | None:
        """Find the file of a row.

        Args:
            row: Its row.

        Returns:
            The files of its split, and its position there; None if it is gone, or no file of a
            folder.
        """
        try:
            images, position = self.locate(row)
        except Unreadable:
            return None
        return (images.storage, position) if isinstance(images.storage, FolderFiles) else None

    def quality(self, row: int) -> Quality:
        """Return what tells the better of two copies; the larger value is better.

        Args:
            row: A row that has been read.

        Returns:
            Whether it is a RAW photograph, of which only a preview is read; the number of pixels;
            whether the format keeps all pixels; and the number of bytes.
        """
        return self._qualities.get(row, (False, 0, False, 0))

    def thumbnail(self, row: int) -> Detail:
        """Return the detail of a thumbnail.

        Args:
            row: Its row.
        """
        return make_detail(self.embeddings.thumbnail(row))

    def rows_with_alpha(self) -> list[int]:
        """Find the images that have an alpha channel; the header of each file is read."""
        paths = self.embeddings.paths
        rows = [i for i, path in enumerate(paths) if not path.lower().endswith(WITHOUT_ALPHA)]
        found = list[int]()
        for start in range(0, len(rows), CACHE_SIZE):
            part = self._map(_has_alpha, rows[start : start + CACHE_SIZE])
            found += [i for i, is_transparent in part.items() if is_transparent]
        return found

    def _map(self, function: Callable[[Images, int], T], rows: Sequence[int]) -> dict[int, T]:
        """Call a function with the images and the position of each row, where it can be read."""
        places = {i: place for i in rows if (place := self._place(i)) is not None}
        by_split: dict[int, list[int]] = {}
        for i, (split, _) in places.items():
            by_split.setdefault(split, []).append(i)
        loaded = {  # with their blocks in memory, where they are stored in blocks
            split: self._splits[split].prefetch(np.array([places[i][1] for i in members]))
            for split, members in by_split.items()
        }

        def call(i: int) -> tuple[int, T] | None:
            split, position = places[i]
            try:
                return i, function(loaded[split], position)
            except (Unreadable, OSError) as error:
                self.unreadable[i] = str(error)
                return None

        with ThreadPoolExecutor(CPU_CORES) as pool:
            return dict(result for result in pool.map(call, places) if result is not None)

    def _place(self, row: int) -> tuple[int, int] | None:
        """The split that a row belongs to, and its position there; None if that is unknown."""
        places = self._places.get(self.embeddings.paths[row], [])
        if len(places) == 1:
            return places[0]
        if not self.missing:
            count = "several images have" if places else "no image of the source has"
            self.unreadable[row] = f"{count} this name"
        return None


def _has_alpha(images: Images, i: int) -> bool:
    return images.pixels is None and has_alpha(images.file(i))


def _read_detail(images: Images, i: int) -> tuple[Detail, Quality]:
    """Read an image, and what tells the better of two copies; see `quality`."""
    file, header = images.file(i), images.read_header(i)
    num_bytes = len(file) if isinstance(file, bytes) else Path(file).stat().st_size
    num_pixels, is_lossless = header.height * header.width, header.format not in LOSSY
    quality = (header.format == "RAW", num_pixels, is_lossless, num_bytes)
    return make_detail(_read_with_alpha(images, i)), quality


def _read_with_alpha(images: Images, i: int) -> np.ndarray:
    """Decode an image with its alpha channel; arrays of other than four channels have none."""
    if images.pixels is None and images.channels in (1, 3):
        try:
            return replace(images, channels=4).read(i, SIDE)
        except Unreadable:
            pass
    return images.read(i, SIDE)
