"""simsiam cluster: images in groups of similar ones, without labels."""

import os
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from simsiam.embeddings.gallery import write_page
from simsiam.embeddings.table import Embeddings, read_embeddings
from simsiam.errors import UsageError, check_ranges
from simsiam.utils.files import check_writable, write_csv

PAGE_IMAGES_PER_CLUSTER = 12  # images of a cluster on the page
NUM_INITS = 4  # of k-means; the best is kept


class Clusters(NamedTuple):
    assignments: np.ndarray  # int (N,): 0 is the largest cluster
    distances: np.ndarray  # (N,), to the cluster's center
    nmi: float | None  # with the labels: normalized mutual information, 0 to 1; None without labels


def cluster(
    file: str | os.PathLike[str],
    *,
    clusters: int = 10,
    out: str | os.PathLike[str] | None = None,
    html: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Clusters:
    """k-means of `spread_out(h)`; `out` is a .csv with a line an image, `html` a page of what lies next to each center.

    Raises UsageError.
    """
    check_ranges(
        SimpleNamespace(clusters=clusters, seed=seed), clusters=(2, inf), seed=(0, 2**32 - 1)
    )
    check_writable(out, html)
    images = read_embeddings(file)
    if clusters > len(images):
        raise UsageError(f"clusters is {clusters}, and there are {len(images)} images")
    found = kmeans(center_and_normalize(images.vectors).numpy(), clusters, seed)
    found = found._replace(nmi=normalized_mutual_info(images, found.assignments))
    if html:
        sections = []
        for name in range(clusters):
            members = np.flatnonzero(found.assignments == name)
            central = members[np.argsort(found.distances[members], kind="stable")][
                :PAGE_IMAGES_PER_CLUSTER
            ].tolist()
            heading = f"Cluster {name}: {len(members)} images"
            sections.append((heading, [(i, images.caption(i)) for i in central]))
        note = f"{len(images)} images in {clusters} clusters; of each, those nearest to its center."
        write_page(Path(html), "Clusters", note, sections, images)
    if out:
        lines = (
            (images.paths[i], found.assignments[i], f"{found.distances[i]:.4f}")
            for i in range(len(images))
        )
        write_csv(Path(out), ("path", "cluster", "distance"), lines)
    return found


def center_and_normalize(h: Tensor) -> Tensor:
    """h less its mean, at length 1: what all images share says nothing about which belong together."""
    return F.normalize(h - h.mean(0), dim=1)


def kmeans(x: np.ndarray, clusters: int, seed: int) -> Clusters:
    from sklearn.cluster import KMeans

    model = KMeans(clusters, n_init=NUM_INITS, random_state=seed).fit(x)
    rank = np.argsort(np.argsort(-np.bincount(model.labels_, minlength=clusters), kind="stable"))
    distances = np.linalg.norm(x - model.cluster_centers_[model.labels_], axis=1)
    return Clusters(rank[model.labels_], distances, None)


def normalized_mutual_info(images: Embeddings, assignments: np.ndarray) -> float | None:
    from sklearn.metrics import normalized_mutual_info_score

    if images.labels is None:
        return None
    known = [i for i, label in enumerate(images.labels) if label is not None]
    return float(
        normalized_mutual_info_score([images.labels[i] for i in known], assignments[known])
    )


def format_cluster(result: Clusters) -> str:
    sizes = np.bincount(result.assignments)
    lines = [f"{len(sizes)} clusters of {', '.join(map(str, sizes))} images"]
    if result.nmi is not None:
        lines.append(f"agreement with the labels: {result.nmi:.3f} (normalized mutual information)")
    return "\n".join(lines)
