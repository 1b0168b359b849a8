"""simsiam outliers: the images that are least like any other."""

import os
from collections.abc import Sequence
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from simsiam.embeddings.cluster import center_and_normalize
from simsiam.embeddings.gallery import write_page
from simsiam.embeddings.search import search_neighbors
from simsiam.embeddings.table import read_embeddings
from simsiam.errors import check_ranges
from simsiam.utils.files import check_writable, write_csv

PAGE_IMAGES = 60  # images on the page


class Outlier(NamedTuple):
    path: str
    label: str  # "" without one
    distance: float  # 1 - mean cosine with the k nearest others


def outliers(
    file: str | os.PathLike[str],
    *,
    k: int = 10,
    out: str | os.PathLike[str] | None = None,
    html: str | os.PathLike[str] | None = None,
) -> list[Outlier]:
    """All images, the loneliest first; `out` is a .csv of them, `html` a page of the first.

    Distances are between features less their mean. Raises UsageError.
    """
    check_ranges(SimpleNamespace(k=k), k=(1, inf))
    check_writable(out, html)
    images = read_embeddings(file)
    cosine, _ = search_neighbors(center_and_normalize(images.vectors), k)
    distance = 1 - cosine.mean(1)
    order = distance.sort(descending=True, stable=True).indices.tolist()
    found = [Outlier(images.paths[i], images.label(i), distance[i].item()) for i in order]
    if html:
        figures = [(i, f"{distance[i]:.3f} {images.caption(i)}") for i in order[:PAGE_IMAGES]]
        note = f"Of {len(images)} images, those farthest from their {k} nearest."
        write_page(Path(html), "Outliers", note, [("Loneliest first", figures)], images)
    if out:
        lines = ((x.path, x.label, f"{x.distance:.4f}") for x in found)
        write_csv(Path(out), ("path", "label", "distance"), lines)
    return found


def format_outliers(results: Sequence[Outlier], limit: int = 20) -> str:
    return "\n".join(
        f"{x.distance:6.3f}  {x.path}" + f"  ({x.label})" * bool(x.label) for x in results[:limit]
    )
