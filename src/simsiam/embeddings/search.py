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
    if len(x) > FAISS_THRESHOLD and find_spec("faiss") is not None:
        cosine, index = _search_with_faiss(x, k + 1)
    else:
        cosine, index = map(torch.cat, zip(*iter_nearest(x, x, k + 1)))
    is_self = index == torch.arange(len(x))[:, None]
    cosine = cosine.masked_fill(is_self, -2)  # the row itself is sorted last and cut off
    cosine, order = cosine.sort(dim=1, descending=True, stable=True)
    return cosine[:, :k], index.gather(1, order)[:, :k]


def _search_with_faiss(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    import faiss

    unit = F.normalize(x, dim=1).numpy()
    graph = faiss.IndexHNSWFlat(unit.shape[1], HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efSearch = max(HNSW_EF_SEARCH, 2 * k)
    graph.add(unit)
    cosine, index = graph.search(unit, k)
    return torch.from_numpy(cosine), torch.from_numpy(index)
