"""The verb `outliers`: find the images that are least similar to all others."""

import os
from collections.abc import Sequence
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from torch import Tensor

from simsiam.embeddings.cluster import center_and_normalize
from simsiam.embeddings.copies.originals import Originals
from simsiam.embeddings.gallery import write_page
from simsiam.embeddings.search import search_neighbors
from simsiam.embeddings.table import Embeddings, read_embeddings
from simsiam.errors import check_ranges, printable
from simsiam.utils.files import check_writable, write_csv

PAGE_IMAGES = 60  # images on the page


class Outlier(NamedTuple):
    """An image and its distance to its neighbors.

    Attributes:
        path: The path of the image in its source.
        label: Its class name; "" if it has none.
        distance: 1 - the mean cosine with its k nearest neighbors.
    """

    path: str
    label: str
    distance: float


def outliers(
    file: str | os.PathLike[str],
    *,
    k: int = 10,
    out: str | os.PathLike[str] | None = None,
    html: str | os.PathLike[str] | None = None,
) -> list[Outlier]:
    """Sort all embedded images by their distance to their nearest neighbors, the farthest first.

    Distances are between features from which the mean feature was subtracted.

    Args:
        file: A file or folder that `embed` wrote.
        k: The number of nearest neighbors that the distance is averaged over, at least 1.
        out: A .csv file to write, with one row per image: path, label, distance.
        html: A web page to write, which shows the first images.

    Returns:
        All images, the one with the largest distance first.

    Raises:
        UsageError: If `k` is less than 1, the file is not an embedding file or has a single image,
            or `out` or `html` cannot be written.
    """
    check_ranges(SimpleNamespace(k=k), k=(1, inf))
    check_writable(out, html, inputs=[file])
    images = read_embeddings(file)
    distance = neighbor_distances(images, k)
    order = distance.sort(descending=True, stable=True).indices.tolist()
    results = [Outlier(images.paths[i], images.label(i), distance[i].item()) for i in order]
    if html:
        figures = [(i, f"{distance[i]:.3f} {images.caption(i)}") for i in order[:PAGE_IMAGES]]
        note = f"The images, of {len(images)}, that are farthest from their {k} nearest neighbors."
        sections = [("Farthest first", figures)]
        write_page(Path(html), "Outliers", note, sections, images, Originals(images, Path(file)))
    if out:
        rows = ((x.path, x.label, f"{x.distance:.4f}") for x in results)
        write_csv(Path(out), ("path", "label", "distance"), rows)
    return results


def neighbor_distances(images: Embeddings, k: int = 10) -> Tensor:
    """Compute the distance of each image to its nearest neighbors.

    Args:
        images: N embedded images, at least 2.
        k: The number of neighbors.

    Returns:
        (N,): 1 - the mean cosine with the k nearest neighbors, of centered features.
    """
    cosine, _ = search_neighbors(center_and_normalize(images.vectors), k)
    return 1 - cosine.mean(1)


def format_outliers(results: Sequence[Outlier], limit: int = 20) -> str:
    """List the first outliers as text.

    Args:
        results: What `outliers` returned.
        limit: The largest number of lines.

    Returns:
        One line per image: distance, path and label.
    """
    return "\n".join(
        printable(f"{x.distance:6.3f}  {x.path}" + f"  ({x.label})" * bool(x.label))
        for x in results[:limit]
    )
