"""The weighted k-nearest-neighbor classifier of Wu et al. (2018), the paper's monitor of progress (Figure 2)."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from simsiam.data.images import Images
from simsiam.data.transform import Transform
from simsiam.distributed.collectives import all_gather
from simsiam.distributed.process_group import local_slice
from simsiam.model.precision import Compute
from simsiam.model.siamese import Siamese
from simsiam.monitoring.features import extract_features

IMAGENET_K = 200  # neighbors, on ImageNet
MAX_SIMILARITY_BYTES = (
    2**28
)  # bytes of similarities held at a time; breaking ties takes as much again


def knn_scores(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    classes: int,
    k: int = IMAGENET_K,
    tau: float = 0.1,
    chunk: int | None = None,
) -> Tensor:
    """Votes (M, classes) of the k nearest of `bank` (N, d) for each of `queries` (M, d), weighted exp(cosine / tau).

    `labels` (N,) are int64. The search is exhaustive, and of equally similar rows of the bank the first are taken.
    Weights are relative to that of a query's nearest row, so no tau overflows. Queries are taken `chunk` at a time, by
    default so many that their similarities fill AT_ONCE bytes, and no copy is made of the bank.
    """
    votes = []
    for cosine, index in iter_nearest(bank, queries, k, chunk):
        weight = ((cosine - cosine.amax(1, keepdim=True)) / tau).exp()
        votes.append(weight.new_zeros(len(cosine), classes).scatter_add_(1, labels[index], weight))
    return torch.cat(votes)


def iter_nearest(
    bank: Tensor, queries: Tensor, k: int, chunk: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cosines and positions, both (m, k), of the k rows of `bank` that are most similar to each of m queries.

    All queries come in turn, `chunk` at a time. The k are in no order; of equally similar rows the first are taken.
    """
    k, norms = min(k, len(bank)), bank.norm(dim=1).clamp_min(1e-12)
    for part in F.normalize(queries, dim=1).split(
        chunk or max(1, MAX_SIMILARITY_BYTES // (len(bank) * bank.element_size()))
    ):
        # A row more, for one row alone is multiplied in another way, in which equal rows of the bank may round apart.
        yield stable_topk((torch.cat([part, part[:1]]) @ bank.T)[:-1].div_(norms), k)


def stable_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of `values` (M, N), of equal ones the first; they and their positions, both (M, k)."""
    largest, index = grouped_topk(values, min(k + 1, values.shape[1]))
    if k < values.shape[1]:  # ties matter where the last one taken equals the first one left out
        tied = (largest[:, k - 1] == largest[:, k]).nonzero().flatten()
        for rows in tied.split(len(values) // 8 + 1):  # an eighth at a time, for the memory's sake
            some, least = values[rows], largest[rows, k - 1 : k]
            above, equal = some > least, some == least
            taken = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
            index[rows, :k] = taken.nonzero()[:, 1].view(-1, k)
            largest[rows, :k] = some[taken].view(-1, k)
    return largest[:, :k], index[:, :k]


def grouped_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`values.topk(k)` of each row, faster for long rows: those of equal values it takes may be others.

    Columns are dealt into groups. The k groups of the largest maxima hold k values that are the row's k largest, for a
    group left out could give none that is larger than the least of those maxima. sqrt(N / k) in a group makes the two
    small searches, among the maxima and in these groups, equally long.
    """
    n = values.shape[1]
    size = math.isqrt(n // k)
    if size < 4:
        return values.topk(k, dim=1)
    count = n // size
    groups = (
        values[:, : size * count]
        .unflatten(1, (size, count))
        .amax(1)
        .topk(k, dim=1, sorted=False)
        .indices
    )
    members = torch.arange(0, size * count, count, device=values.device)
    left_over = torch.arange(size * count, n, device=values.device).expand(len(values), -1)
    columns = torch.cat([(groups[:, None] + members[:, None]).flatten(1), left_over], dim=1)
    largest, index = values.gather(1, columns).topk(k, dim=1)
    return largest, columns.gather(1, index)


def cap_k(bank_size: int, class_count: int, k: int = IMAGENET_K) -> int:
    """k, but at most a sixth of an average class of the bank.

    That is the share k = 200 has on ImageNet; on a small set 200 neighbors would reach far beyond an image's own kind.
    """
    return max(1, min(k, bank_size // (6 * class_count)))


def knn_top1(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    classes: int,
    k: int = IMAGENET_K,
) -> float:
    """Top-1 accuracy in percent, with the usual k; of several processes each classifies its share of the queries."""
    k, mine = cap_k(len(bank), classes, k), local_slice(len(queries))
    predicted = knn_scores(bank, labels, queries[mine], classes=classes, k=k).argmax(1)
    return 100 * all_gather((predicted == query_labels[mine]).float()).mean().item()


def knn_monitor(
    model: Siamese,
    bank: Images,
    queries: Images,
    transform: Transform,
    *,
    compute: Compute,
) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """Accuracy on h (`knn_top1`) and on z (`knn_top1_z`), in percent, and the files that could not be read.

    `bank` votes on `queries`, both labeled.
    """

    def h_and_z(x: Tensor) -> tuple[Tensor, Tensor]:
        h = model.backbone(x)
        return h, model.projector(h)

    def features(images: Images) -> tuple[list[Tensor], Tensor, list[tuple[str, str]]]:
        found = extract_features(model, images, transform, compute=compute, forward=h_and_z)
        assert images.labels is not None
        return (
            [m.to(compute.device) for m in found.matrices],
            torch.from_numpy(images.labels[found.kept_indices]),
            found.skipped,
        )

    known, labels, skipped = features(bank)
    asked, truth, more = features(queries)
    top1 = [
        knn_top1(
            b, labels.to(compute.device), q, truth.to(compute.device), classes=len(bank.classes)
        )
        for b, q in zip(known, asked, strict=True)
    ]
    return dict(
        zip(("knn_top1", "knn_top1_z"), (round(v, 3) for v in top1), strict=True)
    ), skipped + more
