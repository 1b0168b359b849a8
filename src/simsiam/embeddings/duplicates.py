"""The verb `duplicates`: find copies of one picture, also if they were resized or recompressed.

Pixels are compared, not features. A network that is trained to ignore crops and colors cannot tell
a copy from a similar picture, and a network with little training finds all images similar.

Thumbnails say which pairs may be copies, and the image files, read again, which ones are (see
`copies/distance.py`). A group is an image to keep and its copies: none is farther from that image
than the threshold.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from simsiam.embeddings.copies.distance import FLAT_CONTRAST, FLOOR, Detail, Match, tile_distance
from simsiam.embeddings.copies.facts import file_facts, format_facts
from simsiam.embeddings.copies.originals import Originals
from simsiam.embeddings.gallery import write_page
from simsiam.embeddings.search import search_neighbors
from simsiam.embeddings.table import Embeddings, read_embeddings
from simsiam.errors import UsageError, check_ranges, printable
from simsiam.sources.open_source import source_names
from simsiam.utils.files import check_writable, write_csv
from simsiam.utils.progress_bar import progress_bar
from simsiam.utils.workers import CPU_CORES

# Thumbnails are averaged down to this side, in pixels; this removes what compression and resizing
# change.
REDUCED_SIDE = 12
NUM_CANDIDATES = 20  # nearest thumbnails that each thumbnail is compared with
CANDIDATE_DISTANCE = 0.4  # of the reduced thumbnails; copies had at most 0.31
CONTRAST_FLOOR = 4.0  # gray levels; contrast of a reduced thumbnail below this is noise
THRESHOLD = 0.28  # the largest distance of copies; results/duplicates has what it finds
CHUNK_SIZE = 128  # pairs that are compared at a time

ONE_COLOR = "one color"  # the note of images without content


class Duplicate(NamedTuple):
    """An image in a group of near-duplicates.

    Attributes:
        path: The path of the image in its source.
        distance: The distance to the first image of the group, which is the one to keep.
        position: The position of the image in the file.
        note: "" for an ordinary copy; "crop", "mirrored" or "mirrored, crop"; "one color" for an
            image without content. "by thumbnail" is added if a file could not be read again, so
            that the thumbnails were compared.
    """

    path: str
    distance: float
    position: int
    note: str = ""


def duplicates(
    file: str | os.PathLike[str],
    *,
    threshold: float = THRESHOLD,
    crops: bool = False,
    source: str | os.PathLike[str] | Sequence[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    html: str | os.PathLike[str] | None = None,
) -> list[list[Duplicate]]:
    """Find groups of near-duplicates.

    The first image of a group is the one to keep: a RAW photograph, else the image with the most
    pixels, then one in a format that keeps all pixels, then the largest file. None of the others is
    farther from it than the threshold. An image is in one group at most. Images of one color are
    compared by their color, among themselves.

    The files of images that may be copies are read again. Where that is not possible, thumbnails
    are compared, which do not show text; a line on stderr and the notes say so.

    Args:
        file: A file or folder that `embed` wrote.
        threshold: The largest distance between an image and its copy (see `tile_distance`), at
            least 0.
        crops: Whether to find crops and mirrored copies as well. All images are read again.
        source: Where the images are; by default where `file` says, if you have named these places
            before.
        out: A .csv file to write, with one row per image of a group: group, path, distance, note.
        html: A web page to write, which shows the groups.

    Returns:
        Groups of two or more images, the largest group first; then the groups of images of one
        color.

    Raises:
        UsageError: If the threshold is out of range, the file is not an embedding file or has no
            thumbnails, `out` or `html` cannot be written, or crops are to be found and OpenCV is
            not installed.
    """
    check_ranges(SimpleNamespace(threshold=threshold), threshold=(0, inf))
    check_writable(out, html, inputs=[file, *source_names(source or ())])
    images = read_embeddings(file)
    originals = Originals(images, Path(file), source)
    found = find_duplicates(images, originals, threshold, crops)
    if out:
        rows = [
            (number, copy.path, f"{copy.distance:.4f}", copy.note)
            for number, group in enumerate(found, 1)
            for copy in group
        ]
        write_csv(Path(out), ("group", "path", "distance", "note"), rows)
    if html:
        _write_duplicates_page(Path(html), found, images, originals)
    return found


def find_duplicates(
    images: Embeddings, originals: Originals, threshold: float = THRESHOLD, crops: bool = False
) -> list[list[Duplicate]]:
    """Find groups of near-duplicates; see `duplicates`.

    Args:
        images: The images.
        originals: Their files.
        threshold: The largest distance between an image and its copy.
        crops: Whether to find crops and mirrored copies as well.

    Returns:
        The groups.
    """
    x = downsample_thumbnails(images)
    comparison = Comparison(images, originals, threshold)
    flat = comparison.find_flat(x)
    groups = [*comparison.find_groups(x, flat, crops), *comparison.find_flat_groups(flat)]
    comparison.say_what_was_not_read()
    return [
        [Duplicate(images.paths[i], match.distance, i, match.note) for i, match in group.items()]
        for group in groups
    ]


def downsample_thumbnails(images: Embeddings) -> Tensor:
    """Average the thumbnails down to REDUCED_SIDE x REDUCED_SIDE pixels.

    Args:
        images: N embedded images.

    Returns:
        (N, 3 * REDUCED_SIDE ** 2) float32, in gray levels 0 to 255.

    Raises:
        UsageError: If the embeddings have no thumbnails.
    """
    if images.thumbnails is None:
        raise UsageError(
            "the file has no thumbnails to compare: use a file that `simsiam embed` wrote"
        )

    def reduce(i: int) -> np.ndarray:
        image = Image.fromarray(images.thumbnail(i))
        return np.asarray(image.resize((REDUCED_SIDE, REDUCED_SIDE), Image.Resampling.BOX))

    with ThreadPoolExecutor(CPU_CORES) as pool:
        pixels = np.stack(list(pool.map(reduce, range(len(images)))))
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2)).flatten(1).float()


def contrast_distance(a: Tensor, b: Tensor) -> Tensor:
    """Compute the root mean square of a - b, relative to the contrast of a and b.

    Args:
        a: Images, (N, D) float32.
        b: Images to compare them with, (N, D) float32.

    Returns:
        (N,): 0 for equal images, about 1.4 for two unrelated ones.
    """
    contrast_a = (a.var(1, correction=0) + CONTRAST_FLOOR**2).sqrt()
    contrast_b = (b.var(1, correction=0) + CONTRAST_FLOOR**2).sqrt()
    return ((a - b).square().mean(1) / (contrast_a * contrast_b)).sqrt()


def candidate_pairs(x: Tensor, mirrored: bool = False) -> list[tuple[int, int]]:
    """Find pairs of images that may be copies.

    Args:
        x: Reduced thumbnails, (N, D) float32.
        mirrored: Whether to compare each image with the others mirrored.

    Returns:
        Pairs of positions, the smaller one first, in increasing order.
    """
    if len(x) < 2:
        return []
    n, sides = len(x), (-1, REDUCED_SIDE, REDUCED_SIDE)
    if mirrored:
        x = torch.cat([x, x.unflatten(1, sides).flip(3).flatten(1)])
    # The constant column gives pictures of one plain color, whose other values are 0, a direction.
    floor = x.new_full((len(x), 1), CONTRAST_FLOOR * x.shape[1] ** 0.5)
    centered = torch.cat([x - x.mean(1, keepdim=True), floor], dim=1)
    _, index = search_neighbors(centered, NUM_CANDIDATES)
    a, b = torch.arange(len(x)).repeat_interleave(index.shape[1]), index.flatten()
    distances = [contrast_distance(x[i], x[j]) for i, j in zip(a.split(2**16), b.split(2**16))]
    near = torch.stack([a, b], dim=1)[torch.cat(distances) <= CANDIDATE_DISTANCE]
    if mirrored:
        near = near[(near[:, 0] < n) & (near[:, 1] >= n)] - torch.tensor([0, n])
    return sorted({(min(i, j), max(i, j)) for i, j in near.tolist() if i != j})


class Comparison:
    """Compares embedded images in detail, and remembers what was compared.

    Args:
        images: The images.
        originals: Their files.
        threshold: The largest distance of copies.
    """

    def __init__(self, images: Embeddings, originals: Originals, threshold: float):
        self.images, self.originals, self.threshold = images, originals, threshold
        self.matches: dict[tuple[int, int], Match] = {}
        self.edited: dict[tuple[int, int], Match] = {}  # a picture and a part or a mirrored copy
        self.parts: set[int] = set()  # the images that are parts of others

    def find_flat(self, x: Tensor) -> dict[int, Detail]:
        """Find images of one color; give others a row of x that shows what a thumbnail does not.

        Args:
            x: Reduced thumbnails, (N, D); changed where the thumbnail is empty or the image is
                transparent.

        Returns:
            The detail of each image of one color, reduced to that color, by position.
        """
        flat: dict[int, Detail] = {}
        contrast = x.unflatten(1, (3, -1)).std(2).amax(1)
        empty = (contrast < FLAT_CONTRAST).nonzero().flatten().tolist()
        rows = sorted({*empty, *self.originals.rows_with_alpha()})
        for start in range(0, len(rows), CHUNK_SIZE):
            for i, detail in self.originals.read(rows[start : start + CHUNK_SIZE]).items():
                shown = detail or self.originals.thumbnail(i)
                color, alpha = shown.pixels[:-1].float(), shown.pixels[-1:].float()
                if shown.is_flat:
                    flat[i] = shown._replace(pixels=shown.pixels.float().mean((1, 2)))
                elif len(color) == 3 and detail and (i in empty or alpha.amin() < 255):
                    # White is the lightest color only where the image is transparent.
                    visible = (color + 255 - alpha) / 2
                    x[i] = TF.resize(visible, [REDUCED_SIDE] * 2, antialias=True).flatten()
        return flat

    def find_groups(
        self, x: Tensor, flat: Iterable[int], crops: bool = False
    ) -> list[dict[int, Match]]:
        """Find groups of copies.

        Args:
            x: Reduced thumbnails, (N, D).
            flat: Positions of images to leave out.
            crops: Whether to find crops and mirrored copies as well.

        Returns:
            For each group the match of each image with the first one, by position; the largest
            group first.
        """
        rows = np.setdiff1d(np.arange(len(x)), list(flat))
        pairs = [(int(rows[i]), int(rows[j])) for i, j in candidate_pairs(x[rows])]
        self.compare(pairs)
        linked = [pair for pair in pairs if self.matches[pair].distance <= self.threshold]
        if crops:
            self.find_edited(x, rows)
            linked += self.edited
        groups = list[dict[int, Match]]()
        for component in connected_components(linked):
            kept = list[int]()
            for i in sorted(component, key=self._best_first):
                if not self.find_copies(i, kept, x):
                    kept.append(i)
            copies: dict[int, dict[int, Match]] = {i: {} for i in kept}
            for i in set(component) - set(kept):
                matches = self.find_copies(i, kept, x)
                nearest = min(matches, key=lambda k: (matches[k].distance, k))
                copies[nearest][i] = matches[nearest]
            groups += [
                {i: Match(0.0)} | dict(sorted(found.items(), key=lambda item: (item[1], item[0])))
                for i, found in copies.items()
                if found
            ]
        return sorted(groups, key=lambda group: (-len(group), min(group)))

    def find_edited(self, x: Tensor, rows: np.ndarray) -> None:
        """Find crops and mirrored copies; see `edited`.

        Args:
            x: Reduced thumbnails, (N, D).
            rows: Positions of images to compare.
        """
        from simsiam.embeddings.copies.crops import find_crops

        self.edited = find_crops(self.originals, rows.tolist(), self.threshold)
        self.parts = {part for (_, part), match in self.edited.items() if "crop" in match.note}
        for i, j in candidate_pairs(x[rows], mirrored=True):
            pair = int(rows[i]), int(rows[j])
            (a, b), note = self.originals.read_or_thumbnails(pair)
            distance = tile_distance(a.pixels, b.pixels.flip(2), self.threshold)
            if distance <= self.threshold:
                match = Match(distance, ", ".join(["mirrored", note] if note else ["mirrored"]))
                self.edited |= {pair: match, pair[::-1]: match}

    def find_copies(self, row: int, others: Sequence[int], x: Tensor) -> dict[int, Match]:
        """Find the copies of one image among others.

        Args:
            row: The position of the image.
            others: The positions of the others.
            x: Reduced thumbnails, (N, D).

        Returns:
            The match of each copy, by its position.
        """
        if not others:
            return {}
        near = contrast_distance(x[[row]], x[list(others)]) <= CANDIDATE_DISTANCE
        pairs = {i: (min(row, i), max(row, i)) for i, is_near in zip(others, near) if is_near}
        self.compare([*pairs.values()])
        edited = {i: self.edited[i, row] for i in others if (i, row) in self.edited}
        matches = {i: self.matches[pair] for i, pair in pairs.items()}
        copies = {i: match for i, match in matches.items() if match.distance <= self.threshold}
        return edited | copies

    def compare(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Compare pairs of images, unless this was done before; see `matches`.

        Args:
            pairs: Pairs of positions, the smaller one first.
        """
        new = [pair for pair in pairs if pair not in self.matches]
        with progress_bar("comparing" if len(new) > CHUNK_SIZE else "", len(new)) as advance:
            for start in range(0, len(new), CHUNK_SIZE):
                chunk = new[start : start + CHUNK_SIZE]
                self.originals.read(sorted({i for pair in chunk for i in pair}))  # in threads
                for pair in chunk:
                    (a, b), note = self.originals.read_or_thumbnails(pair)
                    self.matches[pair] = Match(
                        tile_distance(a.pixels, b.pixels, self.threshold), note
                    )
                advance(len(chunk))

    def find_flat_groups(self, flat: dict[int, Detail]) -> list[dict[int, Match]]:
        """Group images of one color.

        Args:
            flat: What `find_flat` returned.

        Returns:
            Like `find_groups`; the distance of two colors is that of their most different channel,
            divided by FLOOR.
        """
        groups = list[dict[int, Match]]()
        rest = sorted(flat, key=self._best_first)
        while len(rest) > 1:
            colors = torch.stack([flat[i].pixels for i in rest])
            distances = ((colors - colors[0]).abs().amax(1) / FLOOR).tolist()
            near = {i: Match(d, ONE_COLOR) for i, d in zip(rest, distances) if d <= self.threshold}
            groups += [near] * (len(near) > 1)
            rest = [i for i in rest if i not in near]
        return sorted(groups, key=lambda group: (-len(group), min(group)))

    def say_what_was_not_read(self) -> None:
        """Print a line on stderr about images that were compared by their thumbnails alone."""
        compared = "thumbnails were compared, which do not show text or small changes"
        if self.originals.missing:
            text = f"the images cannot be read again ({self.originals.missing}): {compared}"
        elif self.originals.unreadable:
            count = f"{len(self.originals.unreadable)} of {len(self.images)} images"
            row, reason = next(iter(self.originals.unreadable.items()))
            text = (
                f"{count} cannot be read again (the first, "
                f"{printable(self.images.paths[row])}: {reason}): their {compared}"
            )
        else:
            return
        print(f"{text}; look at the groups before you delete anything", file=sys.stderr)

    def _best_first(self, row: int) -> tuple[int, ...]:
        quality = self.originals.quality(row)
        name = self.images.paths[row].rpartition("/")[2]  # "a.jpg" rather than "a (1).jpg"
        return row in self.parts, *(-value for value in quality), len(name), row


def connected_components(pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Find the connected components of a graph.

    Args:
        pairs: Its edges.

    Returns:
        The nodes of each component.
    """
    from scipy.sparse import coo_array, csgraph

    if not pairs:
        return []
    nodes, ends = np.unique(np.array(pairs), return_inverse=True)
    ends = ends.reshape(-1, 2)
    graph = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(len(nodes),) * 2)
    _, component = csgraph.connected_components(graph, directed=False)
    order = np.argsort(component, kind="stable")
    groups = np.split(nodes[order], np.flatnonzero(np.diff(component[order])) + 1)
    return [group.tolist() for group in groups]


def _caption(copy: Duplicate, text: str) -> str:
    return f"{copy.distance:.3f}  {text}" + f"  ({copy.note})" * bool(copy.note)


def _write_duplicates_page(
    path: Path,
    groups: Sequence[Sequence[Duplicate]],
    images: Embeddings,
    originals: Originals,
) -> None:
    sections = []
    for number, group in enumerate(groups, 1):
        figures = []
        for copy in group:
            facts = format_facts(file_facts(originals, copy.position))
            caption = _caption(copy, images.caption(copy.position))
            figures.append((copy.position, f"{caption} {facts}".rstrip()))
        sections.append((f"Group {number}", figures))
    note = (
        f"{len(groups)} groups among {len(images)} images. The first image of a group is the one "
        "to keep; the number below an image is its distance to that image."
    )
    write_page(path, "Near-duplicates", note, sections, images, originals)


def format_duplicates(groups: Sequence[Sequence[Duplicate]]) -> str:
    """List groups of near-duplicates as text.

    Args:
        groups: What `duplicates` returned.

    Returns:
        A line with the numbers of groups and of copies, then one line per image.
    """
    num_copies = sum(map(len, groups)) - len(groups)
    lines = [f"{len(groups)} groups of near-duplicates, {num_copies} images to spare"]
    for number, group in enumerate(groups, 1):
        lines += [f"{number:>4}  {_caption(copy, printable(copy.path))}" for copy in group]
    return "\n".join(lines)
