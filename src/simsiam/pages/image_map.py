"""The map of a report: images in the plane by their features, with neighbors and clusters."""

from typing import TypedDict

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam.data.images import Images
from simsiam.data.transform import Transform
from simsiam.embeddings.cluster import center_and_normalize, cluster_distinct
from simsiam.embeddings.search import search_neighbors
from simsiam.errors import WorkFailed, printable
from simsiam.model.precision import Compute
from simsiam.monitoring.features import extract_features

MIN_MAP_IMAGES, MAX_MAP_IMAGES = 5, 20_000  # images on a map
NUM_NEIGHBORS = 8  # neighbors listed for each image
NUM_COMPONENTS = 50  # principal components that the layout is computed from


class MapData(TypedDict):
    """A map as the page reads it; N images, in the order of their gallery."""

    layout: str  # the algorithm that placed the images
    dim: int  # of the features
    x: list[float]  # N, from 0 to 1
    y: list[float]
    clusters: list[int]  # N; 0 is the largest cluster
    neighbors: list[list[int]]  # N rows of NUM_NEIGHBORS positions, nearest first
    cosines: list[list[float]]  # their cosine similarities


def map_images(encoder: nn.Module, transform: Transform, images: Images) -> MapData:
    """Place images in the plane by their features, and find their neighbors and clusters.

    Args:
        encoder: A backbone: normalized images in, features h (N, d) out.
        transform: The preprocessing that the backbone expects.
        images: The images, all readable.

    Raises:
        WorkFailed: There are too few images, or one can no longer be read.
    """
    if len(images) < MIN_MAP_IMAGES:
        raise WorkFailed(
            f"a map needs at least {MIN_MAP_IMAGES} images, and there are {len(images)}"
        )
    compute = Compute.pick("auto", "float32")  # float32, since the cosines lie close together
    features = extract_features(
        encoder.to(compute.device), images, transform, compute=compute, progress_label="mapping"
    )
    if features.skipped:
        key, reason = features.skipped[0]
        raise WorkFailed(f"{printable(key)} was readable before and is not any more: {reason}")
    return place_images(features.matrices[0], len(images.classes))


def place_images(h: Tensor, num_classes: int) -> MapData:
    """Place images in the plane by features, and find their neighbors and clusters.

    Args:
        h: Features (N, d), N at least MIN_MAP_IMAGES.
        num_classes: The number of classes of the images, 0 if unknown.
    """
    clusters = cluster_features(h, num_classes)  # of the raw features, as `simsiam cluster` does
    h = F.normalize(h, dim=1)
    cosine, nearest = search_neighbors(h, NUM_NEIGHBORS)
    layout, xy = project_to_2d(reduce_dimensions(h))
    return {
        "layout": layout,
        "dim": h.shape[1],
        "x": [round(v, 4) for v in xy[:, 0].tolist()],
        "y": [round(v, 4) for v in xy[:, 1].tolist()],
        "clusters": clusters,
        "neighbors": nearest.tolist(),
        "cosines": [[round(v, 3) for v in row] for row in cosine.tolist()],
    }


def reduce_dimensions(h: Tensor) -> np.ndarray:
    """Project features to their first principal components, so that the layout is fast.

    Args:
        h: Features (N, d).

    Returns:
        (N, k) with k = min(50, N, d).
    """
    from sklearn.decomposition import PCA

    return PCA(min(NUM_COMPONENTS, *h.shape), random_state=0).fit_transform(h.numpy())


def project_to_2d(x: np.ndarray) -> tuple[str, np.ndarray]:
    """Place points in the plane: with PaCMAP or UMAP if installed, otherwise with t-SNE.

    Points on a line or in one place, as after a collapse, are left to t-SNE, which alone handles
    them.

    Args:
        x: Points (N, k), their principal components.

    Returns:
        The name of the algorithm, and the points (N, 2) in the unit square.
    """
    spreads_in_two_dimensions = x.shape[1] > 1 and x[:, 1].std() > 1e-6
    name, xy = (spreads_in_two_dimensions and (_pacmap(x) or _umap(x))) or _tsne(x)
    xy = xy - xy.min(0)
    return name, xy / (xy.max() or 1)


def _pacmap(x: np.ndarray) -> tuple[str, np.ndarray] | None:
    try:
        from pacmap import PaCMAP
    except ImportError:
        return None
    return "PaCMAP", PaCMAP(random_state=0).fit_transform(x, init="pca")


def _umap(x: np.ndarray) -> tuple[str, np.ndarray] | None:
    try:
        from umap import UMAP
    except ImportError:
        return None
    return "UMAP", UMAP(random_state=0).fit_transform(x)


def _tsne(x: np.ndarray) -> tuple[str, np.ndarray]:
    """Start from two principal components, which keeps distant groups apart, or at random."""
    from sklearn.manifold import TSNE

    init = "pca" if x[:, 0].std() > 1e-6 and x.shape[1] > 1 else "random"
    perplexity = min(30, (len(x) - 1) / 3)
    return "t-SNE", TSNE(perplexity=perplexity, init=init, random_state=0).fit_transform(x)


def cluster_features(h: Tensor, num_classes: int) -> list[int]:
    """Cluster features as `simsiam cluster` does.

    Args:
        h: Features (N, d).
        num_classes: The number of classes of the images, 0 if unknown.

    Returns:
        The cluster of each image. There are as many clusters as classes, or ten if the classes
        are unknown, and at most as many as there are different images.
    """
    return cluster_distinct(center_and_normalize(h).numpy(), num_classes or 10).tolist()
