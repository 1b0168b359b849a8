"""D(p, t): how much a pair of views disagrees, from (N, d) predictions p and targets t to a scalar.

Losses that compare the images of a batch gather the batch of all processes, with gradients. The
mean over images of what each process gets is what one process with the complete batch gets.
"""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam.config.method import Method
from simsiam.distributed.collectives import all_gather, local_rows
from simsiam.model.precision import at_least_float32, in_full_precision


@in_full_precision
def negative_cosine(p: Tensor, t: Tensor) -> Tensor:
    """Return minus the cosine similarity (equation 1), SimSiam's and BYOL's loss.

    Args:
        p: (N, d) predictions.
        t: (N, d) targets.

    Returns:
        The mean over the batch, a scalar from -1 to 1; about 0 for unrelated vectors.
    """
    return -F.cosine_similarity(p, t, dim=1).mean()


@in_full_precision
def cross_entropy(p: Tensor, t: Tensor) -> Tensor:
    """Return the cross-entropy -softmax(t) . log softmax(p), channels as categories (section 4.5).

    Args:
        p: (N, d) predictions.
        t: (N, d) targets.

    Returns:
        The mean over the batch, a scalar.
    """
    return -(t.softmax(1) * p.log_softmax(1)).sum(1).mean()


@in_full_precision
def nt_xent(p: Tensor, t: Tensor, *, tau: float) -> Tensor:
    """Return SimCLR's loss for one direction (equation 1 of SimCLR, section 6.2 of SimSiam).

    It classifies each image's t among the t of all images and the p of all other images. The mean
    of both directions is SimCLR's loss over 2N x 2N similarities. With a predictor, section 6.2
    leaves open what the negatives of the same view are; here they are predictions, so that D
    depends on p and t alone.

    Args:
        p: (N, d) predictions.
        t: (N, d) targets.
        tau: Temperature.

    Returns:
        The mean over the batch, a scalar.
    """
    p, t = F.normalize(p, dim=1), F.normalize(t, dim=1)
    predictions, targets = all_gather(p), all_gather(t)
    positions = torch.arange(len(targets), device=t.device)
    label = positions[local_rows(len(t))]
    same_image = label[:, None] == positions
    negatives = (p @ predictions.T).masked_fill(same_image, -math.inf)
    similarities = torch.cat([p @ targets.T, negatives], dim=1)
    return F.cross_entropy(similarities / tau, label)


@in_full_precision
def info_nce(p: Tensor, t: Tensor, queue: Tensor, *, tau: float) -> Tensor:
    """Return MoCo's loss (equation 1 of MoCo): classify each image's t among t and the queue.

    Args:
        p: (N, d) predictions.
        t: (N, d) targets.
        queue: (K, d) past targets, unit vectors.
        tau: Temperature.

    Returns:
        The mean over the batch, a scalar.
    """
    p, t = F.normalize(p, dim=1), F.normalize(t, dim=1)
    logits = torch.cat([(p * t).sum(1, keepdim=True), p @ queue.T], dim=1) / tau
    return F.cross_entropy(logits, torch.zeros(len(p), dtype=torch.long, device=p.device))


@in_full_precision
def sinkhorn(scores: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """Return balanced codes: the optimal transport of SwAV's equation 3.

    This is Sinkhorn-Knopp on exp(scores / epsilon), in logarithms. In the limit of many iterations
    it maximizes the scores plus epsilon times the entropy.

    Args:
        scores: (N, K), similarities of images and prototypes.
        epsilon: Softness of the codes.
        iterations: Rounds of normalizing columns and rows.

    Returns:
        (N, K); each row sums to 1, and over the batches of all processes each column sums to
        about the same.
    """
    log = all_gather(scores) / epsilon
    for _ in range(iterations):
        log = log - log.logsumexp(0)
        log = log - log.logsumexp(1, keepdim=True)
    return log[local_rows(len(scores))].exp()


@in_full_precision
def barlow_twins(p: Tensor, t: Tensor, *, weight: float) -> Tensor:
    """Return Barlow Twins' loss (its equations 1 and 2): the correlations should be the identity.

    Args:
        p: (N, d) predictions.
        t: (N, d) targets.
        weight: lambda, the weight of correlations between different channels.

    Returns:
        A scalar.
    """
    p, t = (x - x.mean(0) for x in (all_gather(p), all_gather(t)))
    # The code normalizes by batch norm, whose eps keeps a channel without variance finite.
    p, t = (x * (x.square().mean(0) + 1e-5).rsqrt() for x in (p, t))
    c = p.T @ t / len(p)
    on = c.diagonal()
    return (on - 1).square().sum() + weight * (c.square().sum() - on.square().sum())


@in_full_precision
def vicreg(
    p: Tensor, t: Tensor, *, invariance: float, variance: float, covariance: float
) -> Tensor:
    """Return VICReg's loss (its equations 1 to 6, algorithm 1).

    p should be close to t, and in each of them the standard deviation of every channel should be
    at least 1 and different channels should be uncorrelated.

    Args:
        p: (N, d) predictions.
        t: (N, d) targets.
        invariance: Weight of the mean squared distance of p and t.
        variance: Weight of the standard deviations' hinge loss.
        covariance: Weight of the squared covariances.

    Returns:
        A scalar.
    """
    p, t = all_gather(p), all_gather(t)
    loss = invariance * F.mse_loss(p, t)
    for x in (p, t):
        x = x - x.mean(0)
        c = x.T @ x / (len(x) - 1)
        on = c.diagonal()
        loss = loss + variance * F.relu(1 - (on + 1e-4).sqrt()).mean()
        loss = loss + covariance * (c.square().sum() - on.square().sum()) / len(c)
    return loss


class Criterion(nn.Module, ABC):
    """D with a row's settings and the state that it keeps; the classes below are CRITERIA.

    A new one needs a `forward` and nothing else.
    """

    def __init__(self, method: Method):
        """Keep the row, whose fields are the settings of D."""
        super().__init__()
        self.method = method

    @abstractmethod
    def forward(self, p: Tensor, t: Tensor) -> Tensor:
        """Return D(p, t).

        Args:
            p: (N, d) predictions.
            t: (N, ...) what `encode_target` returned, usually (N, d).

        Returns:
            A scalar.
        """

    def encode_target(self, t: Tensor) -> Tensor:
        """Encode the targets, before the stop-gradient.

        Args:
            t: (N, d) the target's projections.

        Returns:
            (N, ...) what D compares p with; by default `t` itself.
        """
        return t

    def loss_range(self, batch_size: int) -> tuple[float, float] | None:
        """Return what the loss is expected to lie between.

        Args:
            batch_size: Images in a batch.

        Returns:
            The value for unrelated p and t, and the minimum; None if they are not known.
        """
        return None

    def high_loss_threshold(self, batch_size: int) -> float | None:
        """Return the loss above which training is not converging.

        Args:
            batch_size: Images in a batch.

        Returns:
            The loss a quarter of the way from unrelated p and t to the minimum; None if not known.
        """
        if (limits := self.loss_range(batch_size)) is None:
            return None
        unrelated, minimum = limits
        return unrelated - (unrelated - minimum) / 4

    def after_step(self, t: list[Tensor]) -> None:
        """Update what has no gradient, after a step of the optimizer.

        Args:
            t: The step's targets, (N, ...) for each view that has one.
        """


class NegativeCosine(Criterion):
    """SimSiam's and BYOL's loss (equation 1)."""

    def forward(self, p: Tensor, t: Tensor) -> Tensor:
        """Return `negative_cosine(p, t)`."""
        return negative_cosine(p, t)

    def loss_range(self, batch_size: int) -> tuple[float, float]:
        """Return the cosines of orthogonal and of equal vectors, with a minus sign."""
        return 0.0, -1.0


class CrossEntropy(Criterion):
    """The cross-entropy of section 4.5."""

    def forward(self, p: Tensor, t: Tensor) -> Tensor:
        """Return `cross_entropy(p, t)`."""
        return cross_entropy(p, t)


class NTXent(Criterion):
    """SimCLR's loss, with temperature `tau`."""

    def forward(self, p: Tensor, t: Tensor) -> Tensor:
        """Return `nt_xent(p, t)`."""
        return nt_xent(p, t, tau=self.method.tau)

    def loss_range(self, batch_size: int) -> tuple[float, float]:
        """Return log(2N - 1), and the loss of p = t with all other vectors orthogonal to them."""
        negatives = 2 * batch_size - 2
        return math.log(negatives + 1), math.log1p(negatives * math.exp(-1 / self.method.tau))


class InfoNCE(Criterion):
    """MoCo's loss, with temperature `tau` and a queue of the latest targets, oldest first.

    Until there are as many targets as the queue has places, it holds random directions.
    """

    queue: Tensor  # (K, d), unit vectors

    def __init__(self, method: Method):
        """Create the queue of `method.queue` random unit vectors."""
        super().__init__(method)
        self.register_buffer("queue", F.normalize(torch.randn(method.queue, method.dim), dim=1))

    def forward(self, p: Tensor, t: Tensor) -> Tensor:
        """Return `info_nce(p, t)` with the queue."""
        return info_nce(p, t, self.queue, tau=self.method.tau)

    def loss_range(self, batch_size: int) -> tuple[float, float]:
        """Return log(K + 1), and the loss of p = t with a queue orthogonal to them."""
        k = self.method.queue
        return math.log(k + 1), math.log1p(k * math.exp(-1 / self.method.tau))

    @torch.no_grad()
    def after_step(self, t: list[Tensor]) -> None:
        """Put the step's targets into the queue, in place of the oldest ones."""
        new = torch.cat([all_gather(F.normalize(at_least_float32(view), dim=1)) for view in t])
        self.queue.copy_(torch.cat([self.queue, new])[-len(self.queue) :])


class SwappedPrediction(Criterion):
    """SwAV's loss (its equations 1 and 2): predict the other view's code.

    A code is the balanced assignment of an image to K prototypes, see `sinkhorn`.
    """

    def __init__(self, method: Method):
        """Create `method.prototypes` prototypes of width d."""
        super().__init__(method)
        self.prototypes = nn.Linear(method.dim, method.prototypes, bias=False)
        self.after_step([])

    def prototype_scores(self, z: Tensor) -> Tensor:
        """Return the cosine similarities of projections and prototypes.

        Args:
            z: (N, d) projections.

        Returns:
            (N, K), in at least float32.
        """
        weight = at_least_float32(self.prototypes.weight)
        with torch.autocast(z.device.type, enabled=False):
            if self.method.prototype_norm == "inside":
                weight = F.normalize(weight, dim=1)
            return F.linear(F.normalize(at_least_float32(z), dim=1), weight)

    def encode_target(self, t: Tensor) -> Tensor:
        """Return the codes (N, K) of t (N, d)."""
        epsilon, iterations = self.method.sinkhorn_epsilon, self.method.sinkhorn_iterations
        return sinkhorn(self.prototype_scores(t), epsilon=epsilon, iterations=iterations)

    def forward(self, p: Tensor, t: Tensor) -> Tensor:
        """Return the cross-entropy of p (N, d) with the codes t (N, K)."""
        return -(t * (self.prototype_scores(p) / self.method.tau).log_softmax(1)).sum(1).mean()

    def high_loss_threshold(self, batch_size: int) -> float:
        """Return almost log K, the loss where all prototypes are equally likely.

        How far the loss can fall below depends on how soft the codes are.
        """
        return 0.98 * math.log(self.method.prototypes)

    @torch.no_grad()
    def after_step(self, t: list[Tensor]) -> None:
        """Normalize the prototypes, where the gradient does not (footnote 8)."""
        if self.method.prototype_norm == "outside":
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))


class BarlowTwins(Criterion):
    """Barlow Twins' loss, with `barlow_lambda`."""

    def forward(self, p: Tensor, t: Tensor) -> Tensor:
        """Return `barlow_twins(p, t)`."""
        return barlow_twins(p, t, weight=self.method.barlow_lambda)

    def loss_range(self, batch_size: int) -> tuple[float, float]:
        """Return the loss of unrelated channels, whose squared correlations are 1/N, and 0."""
        d = self.method.dim
        return d + self.method.barlow_lambda * d * (d - 1) / batch_size, 0.0


class VICReg(Criterion):
    """VICReg's loss, with `vicreg_weights`."""

    def forward(self, p: Tensor, t: Tensor) -> Tensor:
        """Return `vicreg(p, t)`."""
        invariance, variance, covariance = self.method.vicreg_weights
        return vicreg(p, t, invariance=invariance, variance=variance, covariance=covariance)

    def loss_range(self, batch_size: int) -> tuple[float, float]:
        """Return the loss of unrelated channels of variance 1, and 0."""
        return 2 * self.method.vicreg_weights[0], 0.0


class Classification(Criterion):
    """The cross-entropy of logits with labels, or with clusters, which count alike."""

    class_weights: Tensor | None  # (d,), of clusters; None: every image counts alike

    def __init__(self, method: Method):
        """Keep the row; clusters get weights, which are 1 until `balance`."""
        super().__init__(method)
        weights = torch.ones(method.dim) if method.target == "kmeans" else None
        self.register_buffer("class_weights", weights)

    def balance(self, labels: Tensor) -> None:
        """Weigh each class by the inverse of its size, or a few large ones would decide all.

        Args:
            labels: (images,) int64. The mean weight of these images is 1.
        """
        sizes = labels.bincount(minlength=self.method.dim)
        assert self.class_weights is not None
        self.class_weights.copy_(len(labels) / (sizes.clamp_min(1) * (sizes > 0).sum()))

    def forward(self, p: Tensor, t: Tensor) -> Tensor:
        """Return the cross-entropy of logits p (N, d) with labels t (N,) int64."""
        losses = F.cross_entropy(at_least_float32(p), t, reduction="none")
        # A weighted mean would divide by the weights of the batch, which processes do not share.
        return (
            losses.mean() if self.class_weights is None else (losses * self.class_weights[t]).mean()
        )

    def loss_range(self, batch_size: int) -> tuple[float, float]:
        """Return log d, the loss where all classes are equally likely, and 0."""
        return math.log(self.method.dim), 0.0

    def high_loss_threshold(self, batch_size: int) -> float | None:
        """Return it as for SwAV if the classes are clusters: almost log d.

        How far the loss can fall below depends on how well a crop tells the cluster of its image.
        """
        if self.method.target == "kmeans":
            return 0.98 * math.log(self.method.dim)
        return super().high_loss_threshold(batch_size)


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
