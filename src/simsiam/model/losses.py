"""D(p, t): what a pair of views pays for disagreeing. Each is a function of p and t, both (N, d), to a scalar.

Those that compare the images of a batch take the batch of all processes: `gather` fetches it, with its gradient. The
mean over images of what the processes get is what one process with the whole batch gets.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam.config.method import Method
from simsiam.distributed.collectives import all_gather, local_rows
from simsiam.model.precision import at_least_float32, in_full_precision


@in_full_precision
def negative_cosine(p: Tensor, t: Tensor) -> Tensor:
    """Equation 1: minus the cosine of p and t, averaged over the batch; from -1 to 1, about 0 for unrelated vectors."""
    return -F.cosine_similarity(p, t, dim=1).mean()


@in_full_precision
def cross_entropy(p: Tensor, t: Tensor) -> Tensor:
    """Section 4.5: -softmax(t) . log softmax(p), the channels taken as d categories."""
    return -(t.softmax(1) * p.log_softmax(1)).sum(1).mean()


@in_full_precision
def nt_xent(p: Tensor, t: Tensor, *, tau: float) -> Tensor:
    """SimCLR's loss seen from one view: tell an image's t among the t of all images and the p of all others.

    The mean of both directions is the loss over 2N x 2N similarities (SimCLR's equation 1). With a predictor (section
    6.2) the text leaves the negatives of the same view open; here they are predictions, so D depends on p and t alone.
    """
    p, t = F.normalize(p, dim=1), F.normalize(t, dim=1)
    others, targets = all_gather(p), all_gather(t)
    every = torch.arange(len(targets), device=t.device)
    label = every[local_rows(len(t))]
    itself = label[:, None] == every
    similarities = torch.cat([p @ targets.T, (p @ others.T).masked_fill(itself, -math.inf)], dim=1)
    return F.cross_entropy(similarities / tau, label)


@in_full_precision
def info_nce(p: Tensor, t: Tensor, queue: Tensor, *, tau: float) -> Tensor:
    """MoCo's loss: tell an image's t among the queue (K, d) of past targets, which are unit vectors."""
    p, t = F.normalize(p, dim=1), F.normalize(t, dim=1)
    logits = torch.cat([(p * t).sum(1, keepdim=True), p @ queue.T], dim=1) / tau
    return F.cross_entropy(logits, torch.zeros(len(p), dtype=torch.long, device=p.device))


@in_full_precision
def sinkhorn(scores: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """Codes (N, K) for scores (N, K): a row sums to 1, and each of the K prototypes gets about as much as the others.

    Sinkhorn-Knopp on exp(scores / epsilon), in logarithms; the limit is the optimal transport that maximizes the scores
    plus epsilon times the entropy (SwAV's equation 3).
    """
    log = all_gather(scores) / epsilon
    for _ in range(iterations):
        log = log - log.logsumexp(0)
        log = log - log.logsumexp(1, keepdim=True)
    return log[local_rows(len(scores))].exp()


@in_full_precision
def barlow_twins(p: Tensor, t: Tensor, *, weight: float) -> Tensor:
    """The correlations (d, d) between p's channels and t's should be the identity; `weight` is lambda (equation 1)."""
    p, t = (F.normalize(x - x.mean(0), dim=0) for x in (all_gather(p), all_gather(t)))
    c = p.T @ t
    on = c.diagonal()
    return (on - 1).square().sum() + weight * (c.square().sum() - on.square().sum())


@in_full_precision
def vicreg(
    p: Tensor, t: Tensor, *, invariance: float, variance: float, covariance: float
) -> Tensor:
    """VICReg's Algorithm 1: p near t; in each, every channel's std at least 1 and channels uncorrelated."""
    p, t = all_gather(p), all_gather(t)
    loss = invariance * F.mse_loss(p, t)
    for x in (p, t):
        x = x - x.mean(0)
        c = x.T @ x / (len(x) - 1)
        on = c.diagonal()
        loss = loss + variance * F.relu(1 - (on + 1e-4).sqrt()).mean()
        loss = loss + covariance * (c.square().sum() - on.square().sum()) / len(c)
    return loss


class Criterion(nn.Module):
    """A row's D, with its settings and its state. One that is new to the table needs a `forward`, nothing else."""

    def __init__(self, method: Method):
        super().__init__()
        self.method = method

    def encode_target(self, t: Tensor) -> Tensor:
        """What the target's z is turned into, before the stop-gradient."""
        return t

    def loss_range(self, batch_size: int) -> tuple[float, float] | None:
        """The value for unrelated p and t over a batch of n, and the least value; None where neither is known."""
        return None

    def high_loss_threshold(self, batch_size: int) -> float | None:
        """Above this, a value is less than a quarter of the way from unrelated p and t to the least; None: unknown."""
        if (span := self.loss_range(batch_size)) is None:
            return None
        unrelated, least = span
        return unrelated - (unrelated - least) / 4

    def after_step(self, t: list[Tensor]) -> None:
        """Move what gradients do not move, given the step's targets."""


class NegativeCosine(Criterion):
    def forward(self, p: Tensor, t: Tensor) -> Tensor:
        return negative_cosine(p, t)

    def loss_range(self, batch_size: int) -> tuple[float, float]:
        return 0.0, -1.0


class CrossEntropy(Criterion):
    def forward(self, p: Tensor, t: Tensor) -> Tensor:
        return cross_entropy(p, t)


class NTXent(Criterion):
    def forward(self, p: Tensor, t: Tensor) -> Tensor:
        return nt_xent(p, t, tau=self.method.tau)

    def loss_range(self, batch_size: int) -> tuple[float, float]:
        return math.log(2 * batch_size - 1), math.log1p(
            (2 * batch_size - 2) * math.exp(-1 / self.method.tau)
        )


class InfoNCE(Criterion):
    """With MoCo's queue: the latest `queue` targets, oldest first; random directions until there are as many."""

    queue: Tensor

    def __init__(self, method: Method):
        super().__init__(method)
        self.register_buffer("queue", F.normalize(torch.randn(method.queue, method.dim), dim=1))

    def forward(self, p: Tensor, t: Tensor) -> Tensor:
        return info_nce(p, t, self.queue, tau=self.method.tau)

    def loss_range(self, batch_size: int) -> tuple[float, float]:
        k = self.method.queue
        return math.log(k + 1), math.log1p(k * math.exp(-1 / self.method.tau))

    @torch.no_grad()
    def after_step(self, t: list[Tensor]) -> None:
        new = torch.cat([all_gather(F.normalize(at_least_float32(view), dim=1)) for view in t])
        self.queue.copy_(torch.cat([self.queue, new])[-len(self.queue) :])


class SwappedPrediction(Criterion):
    """SwAV: predict the code of the other view, which is its balanced assignment to K prototypes."""

    def __init__(self, method: Method):
        super().__init__(method)
        self.prototypes = nn.Linear(method.dim, method.prototypes, bias=False)
        self.after_step([])

    def prototype_scores(self, z: Tensor) -> Tensor:
        """Cosines (N, K) of z (N, d) with the prototypes."""
        weight = at_least_float32(self.prototypes.weight)
        with torch.autocast(z.device.type, enabled=False):
            if self.method.prototype_norm == "inside":
                weight = F.normalize(weight, dim=1)
            return F.linear(F.normalize(at_least_float32(z), dim=1), weight)

    def encode_target(self, t: Tensor) -> Tensor:
        m = self.method
        return sinkhorn(
            self.prototype_scores(t), epsilon=m.sinkhorn_epsilon, iterations=m.sinkhorn_iterations
        )

    def forward(self, p: Tensor, t: Tensor) -> Tensor:
        return -(t * (self.prototype_scores(p) / self.method.tau).log_softmax(1)).sum(1).mean()

    def high_loss_threshold(self, batch_size: int) -> float:
        """Next to log K, where all prototypes are as likely; how far down it comes depends on how soft codes are."""
        return 0.98 * math.log(self.method.prototypes)

    @torch.no_grad()
    def after_step(self, t: list[Tensor]) -> None:
        if self.method.prototype_norm == "outside":
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))


class BarlowTwins(Criterion):
    def forward(self, p: Tensor, t: Tensor) -> Tensor:
        return barlow_twins(p, t, weight=self.method.barlow_lambda)

    def loss_range(self, batch_size: int) -> tuple[float, float]:
        d = self.method.dim
        return d + self.method.barlow_lambda * d * (
            d - 1
        ) / batch_size, 0.0  # a correlation of chance has square 1/n


class VICReg(Criterion):
    def forward(self, p: Tensor, t: Tensor) -> Tensor:
        invariance, variance, covariance = self.method.vicreg_weights
        return vicreg(p, t, invariance=invariance, variance=variance, covariance=covariance)

    def loss_range(self, batch_size: int) -> tuple[float, float]:
        return 2 * self.method.vicreg_weights[0], 0.0  # unrelated channels of variance 1


class Classification(Criterion):
    """Cross-entropy with labels t, int64 (N,)."""

    def forward(self, p: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(at_least_float32(p), t)

    def loss_range(self, batch_size: int) -> tuple[float, float]:
        return math.log(self.method.dim), 0.0


CRITERIA: dict[str, type[Criterion]] = {
    "cosine": NegativeCosine,
    "cross_entropy": CrossEntropy,
    "nt_xent": NTXent,
    "info_nce": InfoNCE,
    "swapped": SwappedPrediction,
    "barlow_twins": BarlowTwins,
    "vicreg": VICReg,
    "classification": Classification,
}
