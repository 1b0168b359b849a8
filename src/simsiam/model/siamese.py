"""The method: Figure 3 as one module, and its forward is Algorithm 1."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from simsiam.config.method import PAIRS
from simsiam.config.methods import METHODS, Method
from simsiam.errors import UsageError, unknown_name
from simsiam.model.backbones import create_backbone, feature_dim
from simsiam.model.heads import BN_GROUPINGS, build_predictor, build_projector
from simsiam.model.losses import CRITERIA
from simsiam.model.targets import TARGETS


class Output(NamedTuple):
    """What one step computes: features (N, dim), all others (N, d), a tensor for each view that has one."""

    loss: Tensor
    features: list[Tensor]  # h
    projections: list[Tensor]  # z
    predictions: list[Tensor]  # p
    targets: list[Tensor]  # t


class Siamese(nn.Module):
    """A backbone, a projector, a predictor, a target and a criterion, put together as a row of METHODS says.

    Call it with `method.view_count` views of a batch, each (N, 3, H, W) and normalized; `.loss` of what it returns is a
    scalar to call `backward` on. After the optimizer's step call `after_step`. Targets that depend on the run (eta for
    each image, schedules, labels) need `begin` first, and `index`, the images' positions in the training set.
    """

    def __init__(self, backbone: nn.Module, method: Method):
        super().__init__()
        if method.criterion not in CRITERIA:
            raise unknown_name("criterion", method.criterion, CRITERIA)
        self.method = method
        self.backbone = backbone
        self.projector = build_projector(method, feature_dim(backbone))
        self.predictor = build_predictor(method)
        self.target = TARGETS[method.target](method, self.f)
        self.criterion = CRITERIA[method.criterion](method)
        self.forward_views = BN_GROUPINGS[method.bn]
        self.pairs = PAIRS[method.pairs]
        self.predicted_views = sorted({i for i, _ in self.pairs})

    @property
    def f(self) -> nn.Module:
        """The encoder: a view to its z."""
        return nn.Sequential(self.backbone, self.projector)

    def forward(self, *x: Tensor, index: Tensor | None = None) -> Output:
        if len(x) != self.method.view_count:
            raise UsageError(
                f"{self.method.name} takes {self.method.view_count} views of each image, not {len(x)}"
            )
        seen = sorted({*self.predicted_views, *self.target.required_views})
        h = self.forward_views(self.backbone, {i: x[i] for i in seen})
        z = self.forward_views(self.projector, h)
        p = self.forward_views(self.predictor, {i: z[i] for i in self.predicted_views})
        eta = self.target(x, z, index)
        t = {j: self.criterion.encode_target(eta[j]) for j in eta}
        if self.method.stop_gradient:
            t = {j: t[j].detach() for j in t}
        loss = torch.stack([self.criterion(p[i], t[j]) for i, j in self.pairs]).mean()
        return Output(
            self.method.loss_scale * loss, *(list(by_view.values()) for by_view in (h, z, p, t))
        )

    def high_loss_threshold(self, batch_size: int) -> float | None:
        """A loss above this, over a batch of n, is not converging."""
        high = self.criterion.high_loss_threshold(batch_size)
        return None if high is None else self.method.loss_scale * high

    def begin(
        self, *, images: int = 0, labels: Tensor | None = None, steps: int = 0, per_epoch: int = 0
    ) -> None:
        """Learn the size of the run, before its first step and before an earlier run's state is loaded."""
        self.target.begin(self.f, images=images, labels=labels, steps=steps, per_epoch=per_epoch)

    def after_step(
        self, output: Output, step: int | None = None, index: Tensor | None = None
    ) -> None:
        """Move what gradients do not move, once after each step of the optimizer; steps count from 0."""
        self.target.after_step(self.f, output.targets, step, index)
        self.criterion.after_step(output.targets)


def build(
    method: str | Method = "simsiam",
    *,
    backbone: str | nn.Module = "resnet50",
    image_size: int = 224,
    width: int = 64,
    stem: str | None = None,
    channels: int = 3,
    seed: int = 0,
) -> Siamese:
    """The named method on the named backbone, or on any module with a `.dim`; torch's global generator is left alone.

    >>> model = build("simsiam", backbone="resnet18", image_size=32)
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise unknown_name("method", method, METHODS)
        method = METHODS[method]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(backbone, str):
            backbone = create_backbone(
                backbone, image_size=image_size, width=width, stem=stem, channels=channels
            )
        return Siamese(backbone, method)
