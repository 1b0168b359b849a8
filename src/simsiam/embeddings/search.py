"""The nearest others of every image: exact, and by faiss where that is installed and the images are many."""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from simsiam.errors import UsageError
from simsiam.monitoring.nearest_neighbors import iter_nearest

FAISS_THRESHOLD = 100_000  # images; for fewer, comparing each with each takes minutes at most
HNSW_LINKS, HNSW_EF_SEARCH = (
    32,
    128,
)  # of faiss's HNSW graph: edges of a node, candidates a search keeps


def search_neighbors(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and positions, both (N, k), of the k other rows most similar to each row of x (N, d), nearest first.

    k is capped at N - 1. Exact, and of equally similar rows the first; approximate where faiss does it.
    """
    if len(x) < 2:
        raise UsageError("there is only one image: it has no neighbors")
    k = min(k, len(x) - 1)
    large = len(x) > FAISS_THRESHOLD and find_spec("faiss") is not None
    cosine, index = (
        _search_neighbors_faiss(x, k + 1)
        if large
        else map(torch.cat, zip(*iter_nearest(x, x, k + 1)))
    )
    cosine = cosine.masked_fill(
        index == torch.arange(len(x))[:, None], -2
    )  # itself comes last, and is left out
    cosine, order = cosine.sort(dim=1, descending=True, stable=True)
    return cosine[:, :k], index.gather(1, order)[:, :k]


def _search_neighbors_faiss(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    import faiss

    unit = F.normalize(x, dim=1).numpy()
    graph = faiss.IndexHNSWFlat(unit.shape[1], HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efSearch = max(HNSW_EF_SEARCH, 2 * k)
    graph.add(unit)
    cosine, index = graph.search(unit, k)
    return torch.from_numpy(cosine), torch.from_numpy(index)
