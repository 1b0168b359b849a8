"""Signals of features that need no labels: their spread, how well views match, what changed.

h, a and b are features (N, d) of N images, N at least 2; a and b are those of two views of the same
images. Everything is computed in at least float32, on the device of the features. `chunk` bounds
the memory: at most chunk * N similarities are held at a time.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from simsiam.model.precision import at_least_float32


def rankme(h: Tensor) -> float:
    """Compute RankMe: exp of the entropy of the singular values of h over their sum.

    Source: Garrido et al. (2023), equation 1; h is not centered. A zero singular value contributes
    nothing, so no epsilon is needed.

    Args:
        h: (N, d) features.

    Returns:
        1 for a line or a point, at most min(N, d).
    """
    sigma = torch.linalg.svdvals(at_least_float32(h))
    return torch.special.entr(sigma / sigma.sum().clamp_min(1e-30)).sum().exp().item()


def spectrum_auc(h: Tensor) -> float:
    """Compute the area under the cumulative spectrum of h.

    Source: Li et al. (2022), equation 2: of the singular values (not their squares), largest first,
    the share of their sum that the first j hold, averaged over j = 1..d. Rows are normalized, then
    columns are centered. The scale of h along its directions is therefore lost; a spread that is no
    wider than rounding counts as a point.

    Args:
        h: (N, d) features.

    Returns:
        1 for a collapse to a point or a line, (d + 1) / 2d for an isotropic spread.
    """
    unit = F.normalize(at_least_float32(h), dim=1)
    sigma = torch.linalg.svdvals(unit - unit.mean(0))
    sigma = F.threshold(sigma, 4 * torch.finfo(unit.dtype).eps * math.sqrt(len(h)), 0)
    share = sigma / sigma.sum().clamp_min(1e-30)
    # Share k, counted from 0, is in all cumulative sums except the first k. In this form the result
    # is also right if N < d or if all shares are 0.
    return 1 - (share * torch.arange(len(share), device=share.device)).sum().item() / h.shape[1]


def _cosine_chunks(a: Tensor, b: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the cosines of `chunk` rows of a with all rows of b, and the diagonal (row i, row i).

    The diagonal is a view into the cosines. Cosines are int64 multiples of 1e-6, about ten times
    the rounding of float32, so that rows that differ only by rounding tie.
    """
    a, b = F.normalize(at_least_float32(a), dim=1), F.normalize(at_least_float32(b), dim=1)
    for start, part in zip(range(0, len(a), chunk), a.split(chunk)):
        cosine = (part @ b.T).mul_(1e6).round_().long()
        yield cosine, cosine.diagonal(start)


def view_retrieval(a: Tensor, b: Tensor, *, chunk: int = 512) -> float:
    """Compute how often the nearest row of b (cosine) is the other view of the same image.

    Args:
        a: (N, d) features of the first views.
        b: (N, d) features of the second views.
        chunk: Rows of a that are compared at a time.

    Returns:
        Percent of rows i of a that are more similar to row i of b than to any other row of b. A tie
        (within 1e-6) is a miss, so a constant representation scores 0. Chance is 100 / N.
    """
    hits = [(cosine >= own[:, None]).sum(1) == 1 for cosine, own in _cosine_chunks(a, b, chunk)]
    return 100 * torch.cat(hits).float().mean().item()


def nearest_neighbors(h: Tensor, k: int = 10, *, chunk: int = 512) -> Tensor:
    """Find the k other rows that are most similar (cosine) to each row.

    Args:
        h: (N, d) features.
        k: Number of neighbors, capped at N - 1.
        chunk: Rows that are compared with all others at a time.

    Returns:
        (N, k) int64 positions, nearest first. Of equally similar rows (within 1e-6) the one with
        the smaller position comes first.
    """
    n, neighbors = len(h), []
    for cosine, own in _cosine_chunks(h, h, chunk):
        own.fill_(-2_000_000)  # below any cosine
        # The keys of a row are all different, so the result of topk is unique.
        keys = cosine.mul_(n).sub_(torch.arange(n, device=h.device))
        neighbors.append(keys.topk(min(k, n - 1), dim=1).indices)
    return torch.cat(neighbors)


def neighbor_stability(previous: Tensor, current: Tensor) -> float:
    """Compute how many of the previous neighbors are still neighbors, in any order.

    Args:
        previous: (N, k) positions of the neighbors of each row, at an earlier time.
        current: (N, k) positions now.

    Returns:
        Percent of `previous`.
    """
    both = torch.cat([previous, current], dim=1).sort(dim=1).values
    return 100 * (both[:, 1:] == both[:, :-1]).sum().item() / previous.numel()


def alignment(a: Tensor, b: Tensor, alpha: float = 2) -> float:
    """Compute the mean distance of the two views of an image on the unit sphere.

    Source: Wang & Isola (2020). With alpha = 2 it is 2 minus twice the mean cosine.

    Args:
        a: (N, d) features of the first views.
        b: (N, d) features of the second views.
        alpha: The power of the distance.

    Returns:
        The mean of distance^alpha; 0 if all views agree.
    """
    a, b = F.normalize(at_least_float32(a), dim=1), F.normalize(at_least_float32(b), dim=1)
    return (a - b).norm(dim=1).pow(alpha).mean().item()


def uniformity(h: Tensor, t: float = 2, *, chunk: int = 512) -> float:
    """Compute the log of the mean of exp(-t * squared distance) over all pairs of different rows.

    Source: Wang & Isola (2020); distances are on the unit sphere.

    Args:
        h: (N, d) features.
        t: The scale of the squared distance.
        chunk: Rows that are compared with all others at a time.

    Returns:
        0 if all rows are one point, about -2t for an isotropic spread in many dimensions.
    """
    unit, n, sums = F.normalize(at_least_float32(h), dim=1), len(h), []
    for start, part in zip(range(0, n, chunk), unit.split(chunk)):
        energy = torch.cdist(part, unit).square() * -t
        energy.diagonal(start).fill_(-math.inf)
        sums.append(energy.logsumexp(1))
    return (torch.cat(sums).logsumexp(0) - math.log(n * (n - 1))).item()


def view_agreement(a: Tensor, b: Tensor, k: int = 10) -> Tensor:
    """Measure, image by image, how well two views agree on the image and on its neighborhood.

    The first number asks whether the features still recognize an image: 1 / (1 + the number of
    other images that are nearer to its first view than its second view is). The second asks whether
    they arrange images alike: the k nearest neighbors of an image are found among the first views,
    and the number says how near they are among the second views, in standard deviations above the
    mean of all images. Both are averaged over the two directions. A network that has learned
    classes can fail at the first and a closed form at the second (docs/closed_form.md).

    Args:
        a: (N, d) features of the first views.
        b: (N, d) features of the second views.
        k: Number of neighbors, capped at N // 4.

    Returns:
        (2, N): reciprocal ranks, and nearness of the neighbors.
    """
    a, b = F.normalize(at_least_float32(a), dim=1), F.normalize(at_least_float32(b), dim=1)
    n = len(a)
    others = ~torch.eye(n, dtype=torch.bool, device=a.device)

    def one_direction(a: Tensor, b: Tensor) -> Tensor:
        across = a @ b.T
        rank = (across > across.diagonal()[:, None]).sum(1)
        first, second = (((x @ x.T)[others]).view(n, n - 1) for x in (a, b))
        neighbors = first.topk(max(1, min(k, n // 4)), dim=1).indices
        spread = second.std(1).clamp_min(1e-12)
        nearness = (second.gather(1, neighbors).mean(1) - second.mean(1)) / spread
        return torch.stack([1 / (1 + rank), nearness])

    return (one_direction(a, b) + one_direction(b, a)) / 2
