"""simsiam duplicates: copies of one picture, be they resized or compressed again.

Thumbnails are compared, not features: a network that was trained to be blind to crops and colors is blind to the
difference between a copy and a similar picture too, and one that was hardly trained finds everything alike.
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
from simsiam.errors import UsageError, check_ranges
from simsiam.utils.files import check_writable, write_csv
from simsiam.utils.workers import CPU_CORES

REDUCED_SIDE = 12  # pixels to which a thumbnail is averaged down; that hides what compression and resizing change
NUM_CANDIDATES = 20  # thumbnails that each is compared with
CONTRAST_FLOOR = (
    4.0  # gray levels: a contrast below this is noise, so plain pictures of one color are copies
)
# Of `distance`. Among 2,000 Imagenette images no two were nearer than 0.39, and of 200 copies at JPEG quality 10 to 90
# and 0.08 to 4 times the pixels, none was farther than 0.21 from its original.
THRESHOLD = 0.28


class Duplicate(NamedTuple):
    path: str
    distance: float  # to the first of its group
    position: int


def duplicates(
    file: str | os.PathLike[str],
    *,
    threshold: float = THRESHOLD,
    out: str | os.PathLike[str] | None = None,
    html: str | os.PathLike[str] | None = None,
) -> list[list[Duplicate]]:
    """Groups of near-duplicates, the largest first; `out` is a .csv and `html` a page to write.

    Images whose distance is at most `threshold` are in one group, and so are those that others link. Raises UsageError.
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
        lines = [
            (n, c.path, f"{c.distance:.4f}") for n, group in enumerate(groups, 1) for c in group
        ]
        write_csv(Path(out), ("group", "path", "distance"), lines)
    if html:
        sections = [
            (
                f"Group {n}",
                [(c.position, f"{c.distance:.3f} {images.caption(c.position)}") for c in group],
            )
            for n, group in enumerate(groups, 1)
        ]
        note = f"{len(groups)} groups among {len(images)} images; below each, its distance to the first of its group."
        write_page(Path(html), "Near-duplicates", note, sections, images)
    return groups


def downsample_thumbnails(images: Embeddings) -> Tensor:
    """Thumbnails averaged down to SIDE x SIDE, float32 (N, 3 SIDE²). Raises UsageError where there are none."""
    if images.thumbnails is None:
        raise UsageError("the file has no thumbnails to compare: `simsiam embed` writes them")
    column = images.thumbnails

    def pixels(i: int) -> np.ndarray:
        return np.asarray(
            Image.open(io.BytesIO(column[i]))
            .convert("RGB")
            .resize((REDUCED_SIDE, REDUCED_SIDE), Image.Resampling.BOX)
        )

    with ThreadPoolExecutor(CPU_CORES) as pool:
        return (
            torch.from_numpy(np.stack(list(pool.map(pixels, range(len(images))))))
            .flatten(1)
            .float()
        )


def contrast_distance(a: Tensor, b: Tensor) -> Tensor:
    """How much a and b (N, D) differ for each unit of contrast: the root mean square of a - b over that of contrasts.

    0 of equal ones, about 1.4 of two that have nothing to do with each other.
    """
    contrast = (a.var(1, correction=0) + CONTRAST_FLOOR**2).sqrt() * (
        b.var(1, correction=0) + CONTRAST_FLOOR**2
    ).sqrt()
    return ((a - b).square().mean(1) / contrast).sqrt()


def connected_groups(x: Tensor, threshold: float) -> list[list[int]]:
    """Positions of the groups of two and more of x (N, D) that links hold together."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if len(x) < 2:
        return []
    floor = x.new_full(
        (len(x), 1), CONTRAST_FLOOR * x.shape[1] ** 0.5
    )  # gives plain pictures a direction
    _, index = search_neighbors(
        torch.cat([x - x.mean(1, keepdim=True), floor], dim=1), NUM_CANDIDATES
    )
    a, b = torch.arange(len(x)).repeat_interleave(index.shape[1]), index.flatten()
    near = (
        torch.cat([contrast_distance(x[i], x[j]) for i, j in zip(a.split(2**16), b.split(2**16))])
        <= threshold
    )
    links = coo_array(
        (np.ones(int(near.sum())), (a[near].numpy(), b[near].numpy())), shape=(len(x), len(x))
    )
    _, names = connected_components(links, directed=False)
    order = np.argsort(names, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(names[order])) + 1)
    return sorted((g.tolist() for g in groups if len(g) > 1), key=lambda g: (-len(g), g))


def format_duplicates(groups: Sequence[Sequence[Duplicate]]) -> str:
    lines = [
        f"{len(groups)} groups of near-duplicates, {sum(map(len, groups)) - len(groups)} images to spare"
    ]
    for n, group in enumerate(groups, 1):
        lines += [f"{n:>4}  {copy.distance:.3f}  {copy.path}" for copy in group]
    return "\n".join(lines)
