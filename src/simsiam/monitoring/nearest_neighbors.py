"""The weighted k-nearest-neighbor classifier of Wu et al. (2018), and the kNN monitor.

The paper monitors the progress of training with it (Figure 2).
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam.data.images import Images
from simsiam.data.transform import Transform
from simsiam.distributed.collectives import all_gather
from simsiam.distributed.process_group import local_slice
from simsiam.model.average import WeightAverage
from simsiam.model.precision import Compute
from simsiam.model.siamese import Siamese
from simsiam.monitoring.features import extract_features

IMAGENET_K = 200  # neighbors that vote on ImageNet
MAX_SIMILARITY_BYTES = 2**28  # of similarities at a time; resolving ties takes as much again


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
    """Compute the votes of the k nearest rows of the bank for each query.

    A vote has the weight exp(cosine / tau), relative to that of the nearest row of the query, so
    that no tau overflows. The search is exhaustive; of equally similar rows of the bank the first
    ones vote. The bank is not copied.

    Args:
        bank: (N, d) features that vote.
        labels: (N,) int64, their classes.
        queries: (M, d) features to classify.
        classes: Number of classes.
        k: Number of neighbors that vote.
        tau: Temperature of the weights.
        chunk: Queries that are compared with the bank at a time. By default their similarities fill
            MAX_SIMILARITY_BYTES.

    Returns:
        (M, classes) sums of votes.
    """
    votes = []
    for cosine, index in iter_nearest(bank, queries, k, chunk):
        weight = ((cosine - cosine.amax(1, keepdim=True)) / tau).exp()
        votes.append(weight.new_zeros(len(cosine), classes).scatter_add_(1, labels[index], weight))
    return torch.cat(votes)


def iter_nearest(
    bank: Tensor, queries: Tensor, k: int, chunk: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Find the k rows of the bank that are most similar (cosine) to each query, chunk by chunk.

    Args:
        bank: (N, d) features to search in.
        queries: (M, d) features to search for.
        k: Number of rows to find, capped at N.
        chunk: Queries to take at a time; see `knn_scores`.

    Yields:
        Cosines and positions, both (chunk, k), for all queries in order. The k are in no particular
        order; of equally similar rows the first ones are taken.
    """
    k, norms = min(k, len(bank)), bank.norm(dim=1).clamp_min(1e-12)
    chunk = chunk or max(1, MAX_SIMILARITY_BYTES // (len(bank) * bank.element_size()))
    for part in F.normalize(queries, dim=1).split(chunk):
        # One extra row: a product with a single row takes another code path, in which equal rows of
        # the bank can be rounded differently.
        yield stable_topk((torch.cat([part, part[:1]]) @ bank.T)[:-1].div_(norms), k)


def stable_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k largest values of each row; of equal values the first ones are taken.

    Args:
        values: (M, N).
        k: How many, at most N.

    Returns:
        The values and their positions, both (M, k).
    """
    largest, index = grouped_topk(values, min(k + 1, values.shape[1]))
    if k < values.shape[1]:  # ties matter only if the last value taken equals the first one left
        tied = (largest[:, k - 1] == largest[:, k]).nonzero().flatten()
        for rows in tied.split(len(values) // 8 + 1):  # an eighth at a time, to limit memory
            tied_values, smallest = values[rows], largest[rows, k - 1 : k]
            above, equal = tied_values > smallest, tied_values == smallest
            taken = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
            index[rows, :k] = taken.nonzero()[:, 1].view(-1, k)
            largest[rows, :k] = tied_values[taken].view(-1, k)
    return largest[:, :k], index[:, :k]


def grouped_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k largest values of each row like `values.topk(k)`, but faster for long rows.

    Columns are divided into groups. The k groups with the largest maxima contain the k largest
    values of a row: no other group has a value above the smallest of these maxima. With sqrt(N / k)
    columns in a group the two small searches, among the maxima and within these groups, take
    equally long.

    Args:
        values: (M, N).
        k: How many, at most N.

    Returns:
        The values and their positions, both (M, k). Of equal values, others than those of `topk`
        may be taken.
    """
    n = values.shape[1]
    size = math.isqrt(n // k)
    if size < 4:
        return values.topk(k, dim=1)
    count = n // size
    maxima = values[:, : size * count].unflatten(1, (size, count)).amax(1)
    groups = maxima.topk(k, dim=1, sorted=False).indices
    members = torch.arange(0, size * count, count, device=values.device)
    left_over = torch.arange(size * count, n, device=values.device).expand(len(values), -1)
    columns = torch.cat([(groups[:, None] + members[:, None]).flatten(1), left_over], dim=1)
    largest, index = values.gather(1, columns).topk(k, dim=1)
    return largest, columns.gather(1, index)


def cap_k(bank_size: int, class_count: int, k: int = IMAGENET_K) -> int:
    """Limit k to a sixth of the average class of the bank.

    This is the share that k = 200 has on ImageNet. In a small set, 200 neighbors would reach far
    beyond the class of an image.

    Args:
        bank_size: Number of images in the bank.
        class_count: Number of classes.
        k: The number of neighbors to limit.

    Returns:
        The limited number, at least 1.
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
    """Compute the top-1 accuracy of the kNN classifier with k limited by `cap_k`.

    Each process classifies its share of the queries.

    Args:
        bank: (N, d) features that vote.
        labels: (N,) int64, their classes.
        queries: (M, d) features to classify.
        query_labels: (M,) int64, their true classes.
        classes: Number of classes.
        k: Number of neighbors before the limit.

    Returns:
        Percent of all queries.
    """
    k, share = cap_k(len(bank), classes, k), local_slice(len(queries))
    predicted = knn_scores(bank, labels, queries[share], classes=classes, k=k).argmax(1)
    return 100 * all_gather((predicted == query_labels[share]).float()).mean().item()


def labeled_features(
    model: nn.Module,
    images: Images,
    transform: Transform,
    *,
    compute: Compute,
    forward: Callable[[Tensor], tuple[Tensor, ...]] | None = None,
) -> tuple[list[Tensor], Tensor, list[tuple[str, str]]]:
    """Compute the features of the labeled images that can be read, and their labels.

    Args:
        model: The network; its training mode is restored afterwards.
        images: M labeled images that can be read, and others.
        transform: The preprocessing.
        compute: Where to compute, and in which precision.
        forward: As for `extract_features`.

    Returns:
        One matrix (M, d) for each output and (M,) int64 labels, both on the device, and key and
        reason of each image that could not be read.
    """
    assert images.labels is not None
    found = extract_features(model, images, transform, compute=compute, forward=forward)
    labels = torch.from_numpy(images.labels[found.kept_indices]).to(compute.device)
    return [matrix.to(compute.device) for matrix in found.matrices], labels, found.skipped


def encoder_knn_top1(
    encoder: nn.Module, bank: Images, queries: Images, transform: Transform, *, compute: Compute
) -> float:
    """Measure the accuracy of `knn_top1` on the features of an encoder.

    Args:
        encoder: Normalized images (N, C, size, size) to features (N, d).
        bank: Labeled images that vote.
        queries: Labeled images to classify.
        transform: The preprocessing.
        compute: Where to compute, and in which precision.

    Returns:
        Percent of the queries that can be read.
    """
    (votes, labels, _), (rows, truth, _) = (
        labeled_features(encoder, images, transform, compute=compute) for images in (bank, queries)
    )
    return knn_top1(votes[0], labels, rows[0], truth, classes=len(bank.classes))


def knn_monitor(
    model: Siamese | WeightAverage,
    bank: Images,
    queries: Images,
    transform: Transform,
    *,
    compute: Compute,
) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """Measure the kNN accuracy of a model on h and on z.

    Args:
        model: The model; its training mode is restored afterwards.
        bank: Labeled images that vote.
        queries: Labeled images to classify.
        transform: The preprocessing.
        compute: Where to compute, and in which precision.

    Returns:
        `knn_top1` (on h) and `knn_top1_z` (on z) in percent, and key and reason of each image that
        could not be read.
    """

    def h_and_z(x: Tensor) -> tuple[Tensor, Tensor]:
        h = model.backbone(x)
        return h, model.projector(h)

    (bank_features, bank_labels, bank_skipped), (query_features, query_labels, query_skipped) = (
        labeled_features(model, images, transform, compute=compute, forward=h_and_z)
        for images in (bank, queries)
    )
    classes = len(bank.classes)
    values = {
        name: round(knn_top1(votes, bank_labels, rows, query_labels, classes=classes), 3)
        for name, votes, rows in zip(
            ("knn_top1", "knn_top1_z"), bank_features, query_features, strict=True
        )
    }
    return values, bank_skipped + query_skipped
