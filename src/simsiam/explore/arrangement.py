"""Where the images are on the map, which clusters they form, and how typical each one is."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simsiam.data.images import evenly_spaced
from simsiam.embeddings.cluster import center_and_normalize, cluster_distinct
from simsiam.embeddings.search import nearest_rows
from simsiam.pages.image_map import project_to_2d, reduce_dimensions

MAX_ARRANGED = 2500  # images that t-SNE places; the others are placed beside these
MAX_REFERENCES = 2000  # images that say how dense a region is
NUM_DENSITY_NEIGHBORS = 20  # among the references
NUM_CLUSTERS = 10  # as `simsiam cluster` has by default
MAX_CLUSTERED = 20_000  # images that k-means sees; the others join the nearest center
CHUNK_SIZE = 8192  # images at a time, in products of large matrices


def first_positions(vectors: Tensor) -> np.ndarray:
    """Place images by their first two principal components, which takes a moment.

    Args:
        vectors: Features, (N, d).

    Returns:
        (N, 2) float32, from 0 to 1.
    """
    from sklearn.decomposition import PCA

    x = F.normalize(vectors, dim=1).numpy()
    sample = x[evenly_spaced(len(x), MAX_ARRANGED)]
    rank = min(2, *sample.shape)
    model = PCA(rank, svd_solver="randomized", random_state=0).fit(sample)
    xy = np.zeros((len(x), 2), np.float32)
    xy[:, :rank] = (x - sample.mean(0)) @ model.components_.T
    return _unit_square(xy)


def arrange(vectors: Tensor) -> tuple[str, np.ndarray]:
    """Place images in the plane so that similar ones are close together.

    Of many images, an evenly spaced sample is arranged; the others are placed between their three
    nearest images of the sample.

    Args:
        vectors: Features, (N, d).

    Returns:
        The name of the algorithm, and (N, 2) float32, from 0 to 1.
    """
    x = F.normalize(vectors, dim=1)
    if len(x) < 5:
        return "principal components", first_positions(vectors)
    rows = evenly_spaced(len(x), MAX_ARRANGED)
    name, placed = project_to_2d(reduce_dimensions(x[rows]))
    if len(rows) == len(x):
        return name, placed.astype(np.float32)
    cosine, index = nearest_rows(x, x[rows], 3)
    weight = ((cosine - 1) * 50).exp()[..., None]
    near = torch.from_numpy(placed).float()[index]
    xy = (near * weight).sum(1) / weight.sum(1)
    noise = np.random.default_rng(0).normal(0, 0.002, xy.shape)
    positions = (xy.numpy() + noise).astype(np.float32)
    positions[rows] = placed
    return f"{name} of {len(rows):,} images, the others beside them", _unit_square(positions)


def _unit_square(xy: np.ndarray) -> np.ndarray:
    xy = xy - xy.min(0)
    return (xy / (xy.max() or 1)).astype(np.float32)


def find_clusters(vectors: Tensor) -> np.ndarray:
    """Cluster images as `simsiam cluster` does.

    Args:
        vectors: Features, (N, d).

    Returns:
        (N,) int, the cluster of each image; 0 is the largest.
    """
    x = center_and_normalize(vectors).numpy()
    rows = evenly_spaced(len(x), MAX_CLUSTERED)
    found = cluster_distinct(x[rows], NUM_CLUSTERS)
    if len(rows) == len(x):
        return found
    centers = np.stack([x[rows][found == number].mean(0) for number in np.unique(found)])
    bias = (centers**2).sum(1) / 2
    parts = [x[i : i + CHUNK_SIZE] @ centers.T - bias for i in range(0, len(x), CHUNK_SIZE)]
    return np.concatenate([part.argmax(1) for part in parts])


def measure_density(x: Tensor) -> Tensor:
    """Measure how typical images are of their region.

    Args:
        x: Centered features of length 1, (N, d).

    Returns:
        (N,) float32: the mean cosine with the nearest of a sample of images.
    """
    references = x[evenly_spaced(len(x), MAX_REFERENCES)]
    k = min(NUM_DENSITY_NEIGHBORS, len(references))
    return torch.cat([(part @ references.T).topk(k).values.mean(1) for part in x.split(CHUNK_SIZE)])
