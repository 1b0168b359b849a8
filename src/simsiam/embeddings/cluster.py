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
from simsiam.embeddings.table import Embeddings, read
from simsiam.errors import UsageError, within
from simsiam.utils.files import writable, write_csv

SHOWN = 12  # images of a cluster on the page
STARTS = 4  # of k-means; the best is kept


class Clusters(NamedTuple):
    names: np.ndarray  # int (N,): 0 is the largest cluster
    distances: np.ndarray  # (N,), to the cluster's center
    agreement: float | None  # with the labels: normalized mutual information, 0 to 1; None without labels


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
    within(SimpleNamespace(clusters=clusters, seed=seed), clusters=(2, inf), seed=(0, 2**32 - 1))
    writable(out, html)
    images = read(file)
    if clusters > len(images):
        raise UsageError(f"clusters is {clusters}, and there are {len(images)} images")
    found = kmeans(spread_out(images.vectors).numpy(), clusters, seed)
    found = found._replace(agreement=agreement(images, found.names))
    if html:
        sections = []
        for name in range(clusters):
            members = np.flatnonzero(found.names == name)
            central = members[np.argsort(found.distances[members], kind="stable")][:SHOWN].tolist()
            heading = f"Cluster {name}: {len(members)} images"
            sections.append((heading, [(i, images.caption(i)) for i in central]))
        note = f"{len(images)} images in {clusters} clusters; of each, those nearest to its center."
        write_page(Path(html), "Clusters", note, sections, images)
    if out:
        lines = ((images.paths[i], found.names[i], f"{found.distances[i]:.4f}") for i in range(len(images)))
        write_csv(Path(out), ("path", "cluster", "distance"), lines)
    return found


def spread_out(h: Tensor) -> Tensor:
    """h less its mean, at length 1: what all images share says nothing about which belong together."""
    return F.normalize(h - h.mean(0), dim=1)


def kmeans(x: np.ndarray, clusters: int, seed: int) -> Clusters:
    from sklearn.cluster import KMeans

    model = KMeans(clusters, n_init=STARTS, random_state=seed).fit(x)
    rank = np.argsort(np.argsort(-np.bincount(model.labels_, minlength=clusters), kind="stable"))
    distances = np.linalg.norm(x - model.cluster_centers_[model.labels_], axis=1)
    return Clusters(rank[model.labels_], distances, None)


def agreement(images: Embeddings, names: np.ndarray) -> float | None:
    from sklearn.metrics import normalized_mutual_info_score

    if images.labels is None:
        return None
    known = [i for i, label in enumerate(images.labels) if label is not None]
    return float(normalized_mutual_info_score([images.labels[i] for i in known], names[known]))


def told(found: Clusters) -> str:
    sizes = np.bincount(found.names)
    lines = [f"{len(sizes)} clusters of {', '.join(map(str, sizes))} images"]
    if found.agreement is not None:
        lines.append(f"agreement with the labels: {found.agreement:.3f} (normalized mutual information)")
    return "\n".join(lines)
