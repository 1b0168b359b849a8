"""What can be read from features without labels: how far they spread, whether views find each other, what changed.

h, a and b are features (N, d), row by row of N images, N at least 2; a and b are those of two views of the same images.
All is computed in at least float32, where the features are, and `chunk` bounds the memory to chunk * N similarities.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from simsiam.model.precision import at_least_float32


def rankme(h: Tensor) -> float:
    """RankMe: exp of the entropy of h's singular values over their sum; 1 for a line or a point, min(N, d) at most.

    Garrido et al. (2023), equation 1, h not centered; a zero singular value adds nothing, so there is no epsilon.
    """
    sigma = torch.linalg.svdvals(at_least_float32(h))
    return torch.special.entr(sigma / sigma.sum().clamp_min(1e-30)).sum().exp().item()


def spectrum_auc(h: Tensor) -> float:
    """Area under the cumulative spectrum of h: 1 is collapse, to a point or a line; (d + 1) / 2d is isotropic.

    Li et al. (2022), equation 2: singular values, not their squares, largest first; the share of their sum that the
    first j hold, averaged over j = 1..d. Rows have norm 1 and columns mean 0. Scale is lost, so how wide h spreads
    along its directions does not show; what is no wider than rounding counts as a point.
    """
    unit = F.normalize(at_least_float32(h), dim=1)
    sigma = torch.linalg.svdvals(unit - unit.mean(0))
    sigma = F.threshold(sigma, 4 * torch.finfo(unit.dtype).eps * math.sqrt(len(h)), 0)
    share = sigma / sigma.sum().clamp_min(1e-30)
    # The k-th share, from 0, is in all sums but the first k: right as well where N < d, or where all shares are 0.
    return 1 - (share * torch.arange(len(share), device=share.device)).sum().item() / h.shape[1]


def _cosine_chunks(a: Tensor, b: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cosines of `chunk` rows of a at a time with all rows of b, and a view of those of row i with row i.

    They are int64 millionths, ten times the rounding of float32: rows equal but for rounding tie.
    """
    a, b = F.normalize(at_least_float32(a), dim=1), F.normalize(at_least_float32(b), dim=1)
    for start, part in zip(range(0, len(a), chunk), a.split(chunk)):
        cosine = (part @ b.T).mul_(1e6).round_().long()
        yield cosine, cosine.diagonal(start)


def view_retrieval(a: Tensor, b: Tensor, *, chunk: int = 512) -> float:
    """Percent of rows i of a that are more similar (cosine) to row i of b than to any other row of b.

    A tie (to a millionth) is a miss, so a constant representation scores 0; chance is 100 / N.
    """
    hits = [(cosine >= own[:, None]).sum(1) == 1 for cosine, own in _cosine_chunks(a, b, chunk)]
    return 100 * torch.cat(hits).float().mean().item()


def nearest_neighbors(h: Tensor, k: int = 10, *, chunk: int = 512) -> Tensor:
    """Positions (N, k), int64, of the k other rows most similar (cosine) to each row, nearest first.

    Of equally similar rows (to a millionth) the first comes first. k is capped at N - 1.
    """
    n, found = len(h), []
    for cosine, own in _cosine_chunks(h, h, chunk):
        own.fill_(-2_000_000)  # below any cosine
        keys = cosine.mul_(n).sub_(
            torch.arange(n, device=h.device)
        )  # no two alike in a row, so topk has one answer
        found.append(keys.topk(min(k, n - 1), dim=1).indices)
    return torch.cat(found)


def neighbor_stability(previous: Tensor, current: Tensor) -> float:
    """Percent of the neighbors `before` (N, k) that are still neighbors `now` (N, k), in whatever order."""
    both = torch.cat([previous, current], dim=1).sort(dim=1).values
    return 100 * (both[:, 1:] == both[:, :-1]).sum().item() / previous.numel()


def alignment(a: Tensor, b: Tensor, alpha: float = 2) -> float:
    """Mean distance, to the power alpha, of the two views of an image on the unit sphere; 0 where all views agree.

    Wang & Isola (2020). With alpha = 2 it is 2 minus twice the mean cosine.
    """
    a, b = F.normalize(at_least_float32(a), dim=1), F.normalize(at_least_float32(b), dim=1)
    return (a - b).norm(dim=1).pow(alpha).mean().item()


def uniformity(h: Tensor, t: float = 2, *, chunk: int = 512) -> float:
    """log of the mean of exp(-t * squared distance) over all pairs of different rows on the unit sphere.

    Wang & Isola (2020). 0 where all rows are one point, about -2t in many dimensions when isotropic.
    """
    unit, n, sums = F.normalize(at_least_float32(h), dim=1), len(h), []
    for start, part in zip(range(0, n, chunk), unit.split(chunk)):
        energy = torch.cdist(part, unit).square() * -t
        energy.diagonal(start).fill_(-math.inf)
        sums.append(energy.logsumexp(1))
    return (torch.cat(sums).logsumexp(0) - math.log(n * (n - 1))).item()
