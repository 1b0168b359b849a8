"""The nearest neighbors of every image: exact, or by faiss if it is installed and N is large."""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from simsiam.errors import UsageError
from simsiam.monitoring.nearest_neighbors import iter_nearest

FAISS_THRESHOLD = 100_000  # images; up to here, comparing all pairs takes minutes at most
HNSW_LINKS = 32  # edges per node of faiss's HNSW graph
HNSW_EF_SEARCH = 128  # candidates that a search in the graph keeps


def search_neighbors(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find, for each row, the k other rows with the largest cosine.

    The search is exact, and of rows with equal cosine the first is taken. With more than
    FAISS_THRESHOLD rows and faiss installed, the search is approximate.

    Args:
        x: Features, (N, d) float32, N at least 2.
        k: The number of neighbors; at most N - 1 are returned.

    Returns:
        Cosines, (N, k) float32, and row numbers, (N, k) int64; the nearest first.

    Raises:
        UsageError: If there is only one row.
    """
    if len(x) < 2:
        raise UsageError("there is only one image: it has no neighbors")
    k = min(k, len(x) - 1)
    cosine, index = nearest_rows(x, x, k + 1)
    is_self = index == torch.arange(len(x))[:, None]
    cosine = cosine.masked_fill(is_self, -2)  # the row itself is sorted last and cut off
    cosine, order = cosine.sort(dim=1, descending=True, stable=True)
    return cosine[:, :k], index.gather(1, order)[:, :k]


def nearest_rows(queries: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find, for each query, the k rows with the largest cosine; see `search_neighbors`.

    Args:
        queries: (M, d) float32.
        x: (N, d) float32.
        k: The number of rows; at most N are returned.

    Returns:
        Cosines, (M, k) float32, and row numbers, (M, k) int64, in no particular order.
    """
    if len(x) > FAISS_THRESHOLD and find_spec("faiss") is not None:
        return _search_with_faiss(queries, x, k)
    cosine, index = zip(*iter_nearest(x, queries, k))
    return torch.cat(cosine), torch.cat(index)


def _search_with_faiss(queries: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    import faiss

    graph = faiss.IndexHNSWFlat(x.shape[1], HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efSearch = max(HNSW_EF_SEARCH, 2 * k)
    graph.add(F.normalize(x, dim=1).numpy())
    cosine, index = graph.search(F.normalize(queries, dim=1).numpy(), k)
    return torch.from_numpy(cosine), torch.from_numpy(index)
