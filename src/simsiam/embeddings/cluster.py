"""The verb `cluster`: group similar images without labels."""

import os
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from simsiam.embeddings.copies.originals import Originals
from simsiam.embeddings.gallery import write_page
from simsiam.embeddings.table import Embeddings, read_embeddings
from simsiam.errors import UsageError, check_ranges
from simsiam.utils.files import check_writable, write_csv

PAGE_IMAGES_PER_CLUSTER = 12  # images of a cluster on the page
NUM_INITS = 4  # initializations of k-means; the result with the smallest inertia is kept


class Clusters(NamedTuple):
    """A partition of N images into clusters.

    Attributes:
        assignments: (N,) int, the cluster of each image; cluster 0 is the largest.
        distances: (N,) float, the distance of each image to the center of its cluster.
        nmi: Normalized mutual information with the labels, 0 to 1; None without labels.
    """

    assignments: np.ndarray
    distances: np.ndarray
    nmi: float | None


def cluster(
    file: str | os.PathLike[str],
    *,
    clusters: int = 10,
    out: str | os.PathLike[str] | None = None,
    html: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Clusters:
    """Group embedded images by k-means on centered, normalized features.

    Args:
        file: A file or folder that `embed` wrote.
        clusters: The number of clusters, at least 2.
        out: A .csv file to write, with one row per image: path, cluster, distance.
        html: A web page to write, which shows the images nearest to each center.
        seed: Seed of the initial centers.

    Returns:
        The cluster and the distance of each image, in the order of the file.

    Raises:
        UsageError: If an argument is out of range, the file is not an embedding file, there are
            fewer images than clusters, or `out` or `html` cannot be written.
    """
    check_ranges(
        SimpleNamespace(clusters=clusters, seed=seed), clusters=(2, inf), seed=(0, 2**32 - 1)
    )
    check_writable(out, html, inputs=[file])
    images = read_embeddings(file)
    if clusters > len(images):
        raise UsageError(f"clusters is {clusters}, and there are {len(images)} images")
    result = kmeans(center_and_normalize(images.vectors).numpy(), clusters, seed)
    result = result._replace(nmi=_normalized_mutual_info(images, result.assignments))
    if html:
        _write_cluster_page(Path(html), result, images, Originals(images, Path(file)))
    if out:
        rows = (
            (images.paths[i], result.assignments[i], f"{result.distances[i]:.4f}")
            for i in range(len(images))
        )
        write_csv(Path(out), ("path", "cluster", "distance"), rows)
    return result


def center_and_normalize(h: Tensor) -> Tensor:
    """Subtract the mean feature and scale each row to length 1.

    The component that all images share says nothing about which of them are similar.

    Args:
        h: Features, (N, d) float32.

    Returns:
        (N, d) float32, rows of length 1.
    """
    return F.normalize(h - h.mean(0), dim=1)


def kmeans(x: np.ndarray, clusters: int, seed: int) -> Clusters:
    """Run scikit-learn's k-means and number the clusters by size, the largest first.

    Args:
        x: Features, (N, d) float32.
        clusters: The number of clusters, at most N.
        seed: Seed of the initial centers.

    Returns:
        The clusters, with `nmi` None.
    """
    from sklearn.cluster import KMeans

    model = KMeans(clusters, n_init=NUM_INITS, random_state=seed).fit(x)
    rank = np.argsort(np.argsort(-np.bincount(model.labels_, minlength=clusters), kind="stable"))
    distances = np.linalg.norm(x - model.cluster_centers_[model.labels_], axis=1)
    return Clusters(rank[model.labels_], distances, None)


def cluster_distinct(x: np.ndarray, clusters: int) -> np.ndarray:
    """Run k-means with seed 0, and no more clusters than there are different rows.

    Args:
        x: Features, (N, d) float32.
        clusters: The largest number of clusters.

    Returns:
        (N,) int, the cluster of each row; 0 is the largest.
    """
    count = min(clusters, len(np.unique(x.round(6), axis=0)))
    return kmeans(x, count, seed=0).assignments


def _normalized_mutual_info(images: Embeddings, assignments: np.ndarray) -> float | None:
    from sklearn.metrics import normalized_mutual_info_score

    if images.labels is None:
        return None
    labeled = [i for i, label in enumerate(images.labels) if label is not None]
    labels = [images.labels[i] for i in labeled]
    return float(normalized_mutual_info_score(labels, assignments[labeled]))


def _write_cluster_page(
    path: Path, result: Clusters, images: Embeddings, originals: Originals
) -> None:
    sections, clusters = [], int(result.assignments.max()) + 1
    for number in range(clusters):
        members = np.flatnonzero(result.assignments == number)
        nearest_first = members[np.argsort(result.distances[members], kind="stable")].tolist()
        figures = [(i, images.caption(i)) for i in nearest_first[:PAGE_IMAGES_PER_CLUSTER]]
        sections.append((f"Cluster {number}: {len(members)} images", figures))
    note = (
        f"{len(images)} images in {clusters} clusters. "
        "Each section shows the images nearest to the center of the cluster."
    )
    write_page(path, "Clusters", note, sections, images, originals)


def format_cluster(result: Clusters) -> str:
    """Describe clusters as text: their sizes, and the agreement with the labels.

    Args:
        result: The clusters.

    Returns:
        One or two lines.
    """
    sizes = np.bincount(result.assignments)
    lines = [f"{len(sizes)} clusters of {', '.join(map(str, sizes))} images"]
    if result.nmi is not None:
        lines.append(f"agreement with the labels: {result.nmi:.3f} (normalized mutual information)")
    return "\n".join(lines)
