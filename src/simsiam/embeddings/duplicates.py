"""The verb `duplicates`: find copies of one picture, also if they were resized or recompressed.

Thumbnails are compared, not features. A network that is trained to ignore crops and colors cannot
tell a copy from a similar picture, and a network with little training finds all images similar.
"""

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simsiam.embeddings.gallery import write_page
from simsiam.embeddings.search import search_neighbors
from simsiam.embeddings.table import Embeddings, read_embeddings
from simsiam.errors import UsageError, check_ranges, printable
from simsiam.utils.files import check_writable, write_csv
from simsiam.utils.workers import CPU_CORES

# Thumbnails are averaged down to this side, in pixels; this removes what compression and resizing
# change.
REDUCED_SIDE = 12
NUM_CANDIDATES = 20  # nearest thumbnails that each thumbnail is compared with
# Gray levels. Contrast below this is noise, so pictures of one plain color count as copies.
CONTRAST_FLOOR = 4.0
# The largest `contrast_distance` of copies. Among 2,000 Imagenette images no two were nearer than
# 0.39; of 200 copies at JPEG quality 10 to 90 and 0.08 to 4 times the pixels, none was farther than
# 0.21 from its original.
THRESHOLD = 0.28


class Duplicate(NamedTuple):
    """An image in a group of near-duplicates.

    Attributes:
        path: The path of the image in its source.
        distance: The distance to the first image of the group.
        position: The position of the image in the file.
    """

    path: str
    distance: float
    position: int


def duplicates(
    file: str | os.PathLike[str],
    *,
    threshold: float = THRESHOLD,
    out: str | os.PathLike[str] | None = None,
    html: str | os.PathLike[str] | None = None,
) -> list[list[Duplicate]]:
    """Find groups of near-duplicates.

    Two images whose distance is at most the threshold are in one group, and so are two images that
    a chain of such pairs connects.

    Args:
        file: A file or folder that `embed` wrote.
        threshold: The largest distance between two copies (see `contrast_distance`), at least 0.
        out: A .csv file to write, with one row per image of a group: group, path, distance.
        html: A web page to write, which shows the groups.

    Returns:
        Groups of two or more images, the largest group first.

    Raises:
        UsageError: If the threshold is out of range, the file is not an embedding file or has no
            thumbnails, or `out` or `html` cannot be written.
    """
    check_ranges(SimpleNamespace(threshold=threshold), threshold=(0, inf))
    check_writable(out, html)
    images = read_embeddings(file)
    x = downsample_thumbnails(images)
    groups = [
        [
            Duplicate(images.paths[i], contrast_distance(x[group[:1]], x[[i]]).item(), i)
            for i in group
        ]
        for group in connected_groups(x, threshold)
    ]
    if out:
        rows = [
            (number, copy.path, f"{copy.distance:.4f}")
            for number, group in enumerate(groups, 1)
            for copy in group
        ]
        write_csv(Path(out), ("group", "path", "distance"), rows)
    if html:
        _write_duplicates_page(Path(html), groups, images)
    return groups


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
    thumbnails = images.thumbnails

    def reduce(i: int) -> np.ndarray:
        image = Image.open(io.BytesIO(thumbnails[i])).convert("RGB")
        return np.asarray(image.resize((REDUCED_SIDE, REDUCED_SIDE), Image.Resampling.BOX))

    with ThreadPoolExecutor(CPU_CORES) as pool:
        pixels = np.stack(list(pool.map(reduce, range(len(images)))))
    return torch.from_numpy(pixels).flatten(1).float()


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


def connected_groups(x: Tensor, threshold: float) -> list[list[int]]:
    """Find the connected components of the graph that links images at most `threshold` apart.

    Args:
        x: Reduced thumbnails, (N, D) float32.
        threshold: The largest distance of two linked images.

    Returns:
        Positions of the images of each component of two or more; the largest component first.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if len(x) < 2:
        return []
    # The constant column gives pictures of one plain color, whose other values are 0, a direction.
    floor = x.new_full((len(x), 1), CONTRAST_FLOOR * x.shape[1] ** 0.5)
    centered = torch.cat([x - x.mean(1, keepdim=True), floor], dim=1)
    _, index = search_neighbors(centered, NUM_CANDIDATES)
    a, b = torch.arange(len(x)).repeat_interleave(index.shape[1]), index.flatten()
    distances = [contrast_distance(x[i], x[j]) for i, j in zip(a.split(2**16), b.split(2**16))]
    linked = torch.cat(distances) <= threshold
    edges = (a[linked].numpy(), b[linked].numpy())
    graph = coo_array((np.ones(int(linked.sum())), edges), shape=(len(x), len(x)))
    _, component = connected_components(graph, directed=False)
    order = np.argsort(component, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(component[order])) + 1)
    return sorted((g.tolist() for g in groups if len(g) > 1), key=lambda g: (-len(g), g))


def _write_duplicates_page(
    path: Path, groups: Sequence[Sequence[Duplicate]], images: Embeddings
) -> None:
    sections = []
    for number, group in enumerate(groups, 1):
        figures = [
            (copy.position, f"{copy.distance:.3f} {images.caption(copy.position)}")
            for copy in group
        ]
        sections.append((f"Group {number}", figures))
    note = (
        f"{len(groups)} groups among {len(images)} images. "
        "The number below an image is its distance to the first image of its group."
    )
    write_page(path, "Near-duplicates", note, sections, images)


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
        lines += [f"{number:>4}  {copy.distance:.3f}  {printable(copy.path)}" for copy in group]
    return "\n".join(lines)
