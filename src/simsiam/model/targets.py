"""How the target t, the paper's eta, is computed (section 5).

A target makes t from the views x, the encoder's projections z and, if it keeps something for every
image, the positions of the batch's images in the training set. `forward` changes no state; what a
target remembers is updated in `after_step`.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam.config.method import BN_SPLITS, Method
from simsiam.distributed.collectives import (
    all_gather,
    gather_rows,
    local_rows,
    lookup_rows,
    shard_rows,
    write_rows,
)
from simsiam.errors import UsageError
from simsiam.model.heads import BN_GROUPINGS, forward_split
from simsiam.model.optimizers import SCHEDULES
from simsiam.model.precision import at_least_float32

TensorsByView = dict[int, Tensor]  # keys are views, counted from 0


class SharedTarget(nn.Module):
    """The encoder's own projections: one step of the alternation in section 5.1.

    The other targets derive from it.

    Attributes:
        views: The views that need a target.
        required_views: The views that the encoder has to project for the target.
    """

    def __init__(self, method: Method, f: nn.Module):
        """Create the target.

        Args:
            method: The row; `target...` fields are the settings, `terms` says which views need t.
            f: The encoder, x (N, C, H, W) to z (N, d).
        """
        super().__init__()
        self.method = method
        self.views = sorted({view for _, views in method.terms for view in views})
        self.required_views = self.views

    def begin(
        self, f: nn.Module, *, images: int, labels: Tensor | None, steps: int, per_epoch: int
    ) -> None:
        """Prepare for a run, before its first step and before a checkpoint is loaded.

        Args:
            f: The encoder.
            images: Number of training images.
            labels: (images,) int64, or None if there are none.
            steps: Number of steps of the run.
            per_epoch: Number of steps in an epoch.
        """

    def forward(self, x: Sequence[Tensor], z: TensorsByView, index: Tensor | None) -> TensorsByView:
        """Return the targets of a batch.

        Args:
            x: All views, (N, C, H, W) each.
            z: Projections (N, d) of the views that the encoder has projected.
            index: (N,) int64, the positions of the images in the training set.

        Returns:
            (N, d) for each of `views`.
        """
        return {j: z[j] for j in self.views}

    def after_step(
        self, f: nn.Module, z: TensorsByView, step: int | None, index: Tensor | None
    ) -> None:
        """Update what the target remembers, after a step of the optimizer.

        Args:
            f: The encoder.
            z: The step's projections, as `forward` was given them.
            step: The step, counted from 0.
            index: (N,) int64, the positions of the images in the training set.
        """


class EncoderCopyTarget(SharedTarget):
    """A second encoder: a slow average of f (momentum), or an old f (alternation, section 5.2).

    After every step the copy keeps the fraction m of itself and takes 1 - m from f. Alternation in
    blocks of k steps has m = 1, and m = 0 in the last step of each block. Its targets are those
    that section 5.2 computes in advance with the weights at the start of the block, without a
    cache. Batch norm uses the statistics of the batch, as in training.
    """

    def __init__(self, method: Method, f: nn.Module):
        """Create the target with a copy of f (see `SharedTarget`)."""
        super().__init__(method, f)
        self.required_views = []
        self.copy = deepcopy(f).requires_grad_(False)
        self.steps, self.per_epoch = 0, 0

    def begin(
        self, f: nn.Module, *, images: int, labels: Tensor | None, steps: int, per_epoch: int
    ) -> None:
        """Copy the weights of f again, and keep `steps` and `per_epoch` (see `SharedTarget`)."""
        self.copy.load_state_dict(f.state_dict())
        self.steps, self.per_epoch = steps, per_epoch

    def forward(self, x: Sequence[Tensor], z: TensorsByView, index: Tensor | None) -> TensorsByView:
        """Return the copy's projections, (N, d) for each of `views`."""
        views = {j: x[j] for j in self.views}
        if self.method.bn == "split":
            return self._forward_shuffled(views)
        return BN_GROUPINGS[self.method.bn](self.copy, views)

    def _forward_shuffled(self, views: TensorsByView) -> TensorsByView:
        # Each image shares batch norm's statistics with other images than it does in f, or the
        # statistics would reveal which key belongs to a query (MoCo, section 3.3).
        rows = local_rows(len(views[self.views[0]]))
        gathered = {j: all_gather(view) for j, view in views.items()}
        first = gathered[self.views[0]]
        images = torch.arange(len(first), device=first.device)
        order = (images % BN_SPLITS).argsort(stable=True)
        shuffled = forward_split(self.copy, {j: view[order[rows]] for j, view in gathered.items()})
        return {j: all_gather(t)[order.argsort()[rows]] for j, t in shuffled.items()}

    def momentum_at(self, step: int | None) -> float:
        """Return m, the fraction of itself that the copy keeps after a step.

        Args:
            step: The step, counted from 0; None is allowed if m is constant.

        Returns:
            m, from 0 to 1.

        Raises:
            UsageError: If m depends on the step or on the run, and these are not known.
        """
        method = self.method
        if method.target == "momentum" and method.target_schedule == "constant":
            return method.decay
        if step is None:
            raise UsageError(
                f"target {method.target} depends on the step: give it to model.after_step"
            )
        if method.target == "alternation":
            block = method.target_steps or self.per_epoch
            if not block:
                _raise_not_begun("target_steps 0", "per_epoch")
            return 0.0 if (step + 1) % block == 0 else 1.0
        if not self.steps:
            _raise_not_begun("target_schedule cosine", "steps")
        return 1 - (1 - method.decay) * SCHEDULES["cosine"](step, self.steps)

    @torch.no_grad()
    def after_step(
        self, f: nn.Module, z: TensorsByView, step: int | None, index: Tensor | None
    ) -> None:
        """Move the copy's weights towards those of f (see `SharedTarget`)."""
        if (m := self.momentum_at(step)) < 1:
            for copied, new in zip(self.copy.parameters(), f.parameters(), strict=True):
                copied.lerp_(new, 1 - m)


class PerImageTarget(SharedTarget):
    """One eta for each image, as unit vectors. Several processes share its rows (`shard_rows`).

    Attributes:
        eta: This process's rows, (images / processes, d). It is not a buffer, because buffers are
            the same on every process.
    """

    def __init__(self, method: Method, f: nn.Module):
        """Create the target without images (see `SharedTarget`)."""
        super().__init__(method, f)
        self.eta = torch.empty(0, method.dim)

    def begin(
        self, f: nn.Module, *, images: int, labels: Tensor | None, steps: int, per_epoch: int
    ) -> None:
        """Create eta for `images` images, all zero (see `SharedTarget`)."""
        rows = len(shard_rows(torch.arange(images)))
        self.eta = next(f.parameters()).new_zeros(rows, self.method.dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PerImageTarget":
        """Move eta with the model."""
        self.eta = fn(self.eta)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def set_eta(self, z: Tensor, index: Tensor) -> None:
        """Set the eta of some images to normalized vectors.

        Args:
            z: (n, d), their projections, or features of a teacher.
            index: (n,) int64, the positions of the images in the training set.
        """
        write_rows(self.eta, index, F.normalize(at_least_float32(z), dim=1))

    def lookup(self, index: Tensor | None) -> Tensor:
        """Return the eta of the images of a batch, (N, d).

        Args:
            index: (N,) int64, the positions of the images in the training set.

        Raises:
            UsageError: `begin` or the index is missing.
        """
        if index is None or not len(self.eta):
            _raise_not_begun(self.method.target, "images, and an index with every batch")
        return lookup_rows(self.eta, index)


class MovingAverageTarget(PerImageTarget):
    """A moving average of each image's projections (section 5.2), or a memory bank of them.

    t is the average that already includes this step's z (footnote 5) or, in a memory bank, the one
    before. What is kept includes the mean z of the step's views. The state dict of rank zero has
    the rows of all processes.
    """

    def __init__(self, method: Method, f: nn.Module):
        """Create the target without images (see `SharedTarget`)."""
        super().__init__(method, f)
        self.images = 0
        self.register_state_dict_post_hook(_save_eta)
        self.register_load_state_dict_pre_hook(_load_eta)

    def begin(
        self, f: nn.Module, *, images: int, labels: Tensor | None, steps: int, per_epoch: int
    ) -> None:
        """Create eta for `images` images, all zero (see `SharedTarget`)."""
        super().begin(f, images=images, labels=labels, steps=steps, per_epoch=per_epoch)
        self.images = images

    def forward(self, x: Sequence[Tensor], z: TensorsByView, index: Tensor | None) -> TensorsByView:
        """Return m eta + (1 - m) z with normalized z, or eta: (N, d) for each of `views`."""
        eta = self.lookup(index)
        if not self.method.target_fresh:
            return dict.fromkeys(self.views, eta)
        return {j: self._update(eta, z[j]) for j in self.views}

    def _update(self, eta: Tensor, z: Tensor) -> Tensor:
        m = self.method.decay
        return m * eta + (1 - m) * F.normalize(at_least_float32(z), dim=1)

    @torch.no_grad()
    def after_step(
        self, f: nn.Module, z: TensorsByView, step: int | None, index: Tensor | None
    ) -> None:
        """Set eta to its normalized mean update over the step's views (see `SharedTarget`)."""
        eta = self.lookup(index)
        assert index is not None
        self.set_eta(torch.stack([self._update(eta, z[j]) for j in self.views]).mean(0), index)

    def draw(self, count: int, step: int | None) -> Tensor:
        """Return the eta of images drawn at random, the same ones on all processes.

        Args:
            count: How many.
            step: The step, counted from 0, which decides what is drawn.

        Returns:
            (count, d).

        Raises:
            UsageError: The step is not known.
        """
        if step is None:
            raise UsageError("a memory bank depends on the step: give it to model.after_step")
        index = torch.randint(self.images, (count,), generator=torch.Generator().manual_seed(step))
        return self.lookup(index.to(self.eta.device))


def _save_eta(
    target: MovingAverageTarget, state: dict[str, Tensor], prefix: str, *_: object
) -> None:
    state[prefix + "eta"] = gather_rows(target.eta)


def _load_eta(
    target: MovingAverageTarget, state: dict[str, Tensor], prefix: str, *_: object
) -> None:
    target.eta.copy_(shard_rows(state.pop(prefix + "eta")))


class TeacherTarget(PerImageTarget):
    """The feature that a frozen network has of each image: distillation.

    The features are computed once, of the image as in evaluation, and not of each view. They are
    not in the state dict: a run that continues computes them again.
    """

    def forward(self, x: Sequence[Tensor], z: TensorsByView, index: Tensor | None) -> TensorsByView:
        """Return eta, (N, d) for each of `views`."""
        return dict.fromkeys(self.views, self.lookup(index))


class LabelTarget(SharedTarget):
    """Each image's label: the target of supervised learning."""

    labels: Tensor  # (images,) int64

    def __init__(self, method: Method, f: nn.Module):
        """Create the target without labels (see `SharedTarget`)."""
        super().__init__(method, f)
        self.required_views = []
        self.register_buffer("labels", torch.empty(0, dtype=torch.long), persistent=False)

    def begin(
        self, f: nn.Module, *, images: int, labels: Tensor | None, steps: int, per_epoch: int
    ) -> None:
        """Keep the labels; raise UsageError if there are none (see `SharedTarget`)."""
        if labels is None:
            raise UsageError("target labels needs labeled images")
        self.labels = labels.to(self.labels)

    def forward(self, x: Sequence[Tensor], z: TensorsByView, index: Tensor | None) -> TensorsByView:
        """Return the labels of the batch, (N,) int64 for each of `views`."""
        if index is None or not len(self.labels):
            _raise_not_begun("labels", "labels, and an index with every batch")
        return dict.fromkeys(self.views, self.labels[index])


class KMeansTarget(LabelTarget):
    """The cluster of each image: eta as k-means solves it before each epoch (section 5.1)."""

    def __init__(self, method: Method, f: nn.Module):
        """Create the target without images (see `SharedTarget`)."""
        super().__init__(method, f)
        self.register_buffer("labels", torch.empty(0, dtype=torch.long))

    def begin(
        self, f: nn.Module, *, images: int, labels: Tensor | None, steps: int, per_epoch: int
    ) -> None:
        """Put all images into cluster 0, until they are clustered (see `SharedTarget`)."""
        self.labels = self.labels.new_zeros(images)


def mean_target(eta: TensorsByView, views: tuple[int, ...]) -> Tensor:
    """Return the mean target of some views: of one, itself; of several, equation 9.

    Args:
        eta: The targets by view, (N, d) each.
        views: The views.
    """
    return eta[views[0]] if len(views) == 1 else torch.stack([eta[j] for j in views]).mean(0)


def _raise_not_begun(name: str, missing: str) -> NoReturn:
    raise UsageError(f"{name} depends on the run: call model.begin with {missing}")


def eta_bytes(method: Method, images: int) -> int:
    """Return the memory that a target keeps for all images.

    Args:
        method: The row.
        images: Number of training images.

    Returns:
        Bytes over all processes together: d float32 numbers per image, or 0.
    """
    return 4 * method.dim * images if issubclass(TARGETS[method.target], PerImageTarget) else 0


TARGETS: dict[str, type[SharedTarget]] = {
    "shared": SharedTarget,
    "momentum": EncoderCopyTarget,
    "alternation": EncoderCopyTarget,
    "moving_average": MovingAverageTarget,
    "expectation": SharedTarget,  # the mean is taken by Siamese: see `Method.terms`
    "teacher": TeacherTarget,
    "kmeans": KMeansTarget,
    "labels": LabelTarget,
}
