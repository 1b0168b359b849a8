"""How the target t, the paper's eta, is solved (section 5).

A target makes t from the views x, the encoder's projections z, and, where it keeps something for every image, the
positions of the batch's images in the training set. `forward` is pure; what is remembered moves in `after_step`.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam.config.method import BN_SPLITS, PAIRS, Method
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

TensorsByView = dict[int, Tensor]  # by view, counted from 0


class SharedTarget(nn.Module):
    """The encoder's own projections: one step of the alternation that section 5.1 describes."""

    def __init__(self, method: Method, f: nn.Module):
        super().__init__()
        self.method = method
        self.views = sorted({j for _, j in PAIRS[method.pairs]})  # that a target is wanted of
        self.required_views = self.views  # that the encoder projects for it

    def begin(
        self, f: nn.Module, *, images: int, labels: Tensor | None, steps: int, per_epoch: int
    ) -> None:
        """Learn the size of the run, before its first step and before the state of an earlier one is loaded."""

    def forward(self, x: Sequence[Tensor], z: TensorsByView, index: Tensor | None) -> TensorsByView:
        return {j: z[j] for j in self.views}

    def after_step(
        self, f: nn.Module, t: list[Tensor], step: int | None, index: Tensor | None
    ) -> None:
        """Move what gradients do not move; `step` counts from 0."""


class EncoderCopyTarget(SharedTarget):
    """A second encoder: a slow average of f (momentum), or f as it was at the start of a block of steps (alternation).

    After every step the copy keeps m of itself. In a block of k steps m is 1 but for the last step's 0, so targets are
    what section 5.2 computes ahead with the weights at the block's start, and need no cache. Batch norm works on the
    batch, as in training.
    """

    def __init__(self, method: Method, f: nn.Module):
        super().__init__(method, f)
        self.required_views = []
        self.copy = deepcopy(f).requires_grad_(False)
        self.steps, self.per_epoch = 0, 0

    def begin(
        self, f: nn.Module, *, images: int, labels: Tensor | None, steps: int, per_epoch: int
    ) -> None:
        self.copy.load_state_dict(f.state_dict())
        self.steps, self.per_epoch = steps, per_epoch

    def forward(self, x: Sequence[Tensor], z: TensorsByView, index: Tensor | None) -> TensorsByView:
        views = {j: x[j] for j in self.views}
        if (
            self.method.bn == "split"
        ):  # in other company than f saw it, or batch norm would give the image away
            mine = local_rows(len(x[0]))
            every = {j: all_gather(view) for j, view in views.items()}
            dealt = (
                torch.arange(len(every[self.views[0]]), device=x[0].device) % BN_SPLITS
            ).argsort(stable=True)
            shuffled = forward_split(self.copy, {j: view[dealt[mine]] for j, view in every.items()})
            return {j: all_gather(t)[dealt.argsort()[mine]] for j, t in shuffled.items()}
        return BN_GROUPINGS[self.method.bn](self.copy, views)

    def momentum_at(self, step: int | None) -> float:
        """m after the step."""
        if self.method.target == "momentum" and self.method.target_schedule == "constant":
            return self.method.decay
        if step is None:
            raise UsageError(
                f"target {self.method.target} depends on the step: give it to model.after_step"
            )
        if self.method.target == "alternation":
            block = (
                self.method.target_steps
                or self.per_epoch
                or _raise_not_begun("target_steps 0", "per_epoch")
            )
            return 0.0 if (step + 1) % block == 0 else 1.0
        steps = self.steps or _raise_not_begun("target_schedule cosine", "steps")
        return 1 - (1 - self.method.decay) * SCHEDULES["cosine"](step, steps)

    @torch.no_grad()
    def after_step(
        self, f: nn.Module, t: list[Tensor], step: int | None, index: Tensor | None
    ) -> None:
        if (m := self.momentum_at(step)) < 1:
            for mine, new in zip(self.copy.parameters(), f.parameters(), strict=True):
                mine.lerp_(new, 1 - m)


class MovingAverageTarget(SharedTarget):
    """One eta for each image, a moving average of its projections (section 5.2); both are unit vectors (footnote 5).

    t is the average that already includes this step's z, and what includes the mean z of the step's views is kept.
    Several processes have the images' eta `dealt` among them; the state dict of the first one has all.
    """

    def __init__(self, method: Method, f: nn.Module):
        super().__init__(method, f)
        self.eta = torch.empty(0, method.dim)  # no buffer, for those are the same on every process

    def begin(
        self, f: nn.Module, *, images: int, labels: Tensor | None, steps: int, per_epoch: int
    ) -> None:
        self.eta = next(f.parameters()).new_zeros(
            len(shard_rows(torch.arange(images))), self.method.dim
        )

    @torch.no_grad()
    def set_eta(self, z: Tensor, index: Tensor) -> None:
        """The first eta of some images."""
        write_rows(self.eta, index, F.normalize(at_least_float32(z), dim=1))

    def forward(self, x: Sequence[Tensor], z: TensorsByView, index: Tensor | None) -> TensorsByView:
        if index is None or not len(self.eta):
            _raise_not_begun("moving_average", "images, and an index with every batch")
        m, eta = self.method.decay, lookup_rows(self.eta, index)
        return {
            j: m * eta + (1 - m) * F.normalize(at_least_float32(z[j]), dim=1) for j in self.views
        }

    @torch.no_grad()
    def after_step(
        self, f: nn.Module, t: list[Tensor], step: int | None, index: Tensor | None
    ) -> None:
        if index is None:
            _raise_not_begun("moving_average", "images, and an index with every batch")
        self.set_eta(torch.stack(t).mean(0), index)

    def _save_to_state_dict(self, state: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(state, prefix, keep_vars)
        state[prefix + "eta"] = gather_rows(self.eta)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *others: Any) -> None:
        self.eta.copy_(shard_rows(state.pop(prefix + "eta")))
        super()._load_from_state_dict(state, prefix, *others)


class ExpectationTarget(SharedTarget):
    """The mean over n views (equation 9): that of the pair, and n - 1 more that serve every pair."""

    def __init__(self, method: Method, f: nn.Module):
        super().__init__(method, f)
        self.extra_views = list(
            range(method.view_count - method.target_views + 1, method.view_count)
        )
        self.required_views = self.views + self.extra_views

    def forward(self, x: Sequence[Tensor], z: TensorsByView, index: Tensor | None) -> TensorsByView:
        return {
            j: torch.stack([z[view] for view in (j, *self.extra_views)]).mean(0) for j in self.views
        }


class LabelTarget(SharedTarget):
    """Each image's label: the target of supervised learning."""

    labels: Tensor

    def __init__(self, method: Method, f: nn.Module):
        super().__init__(method, f)
        self.required_views = []
        self.register_buffer("labels", torch.empty(0, dtype=torch.long), persistent=False)

    def begin(
        self, f: nn.Module, *, images: int, labels: Tensor | None, steps: int, per_epoch: int
    ) -> None:
        if labels is None:
            raise UsageError("target labels needs labeled images")
        self.labels = labels.to(self.labels)

    def forward(self, x: Sequence[Tensor], z: TensorsByView, index: Tensor | None) -> TensorsByView:
        if index is None or not len(self.labels):
            _raise_not_begun("labels", "labels, and an index with every batch")
        return dict.fromkeys(self.views, self.labels[index])


def _raise_not_begun(name: str, missing: str) -> NoReturn:
    raise UsageError(f"{name} depends on the run: call model.begin with {missing}")


def eta_bytes(method: Method, images: int) -> int:
    """Memory that a target keeps for all images together: float32, d numbers each."""
    return 4 * method.dim * images if method.target == "moving_average" else 0


TARGETS: dict[str, type[SharedTarget]] = {
    "shared": SharedTarget,
    "momentum": EncoderCopyTarget,
    "alternation": EncoderCopyTarget,
    "moving_average": MovingAverageTarget,
    "expectation": ExpectationTarget,
    "labels": LabelTarget,
}
