"""The method: Figure 3 as one module, and its forward is Algorithm 1."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from simsiam.backbones import backbone as named_backbone
from simsiam.criteria import CRITERIA
from simsiam.errors import unknown
from simsiam.heads import predictor, projector
from simsiam.methods import METHODS, Method
from simsiam.targets import TARGETS

PAIRS = {"symmetric": ((0, 1), (1, 0)), "asymmetric": ((0, 1),)}  # (view of p, view of t), section 4.6


class Output(NamedTuple):
    """What one step computes, with one tensor a view: features (N, dim), all others (N, d)."""

    loss: Tensor
    features: list[Tensor]  # h
    projections: list[Tensor]  # z
    predictions: list[Tensor]  # p
    targets: list[Tensor]  # t


class Siamese(nn.Module):
    """A backbone, a projector and a predictor, put together as a row of METHODS says.

    Call it with two views of a batch, each (N, 3, H, W) and normalized; `.loss` of what it returns is a scalar to call
    `backward` on. After the optimizer's step call `after_step`.
    """

    def __init__(self, backbone: nn.Module, method: Method):
        super().__init__()
        self.method = method
        self.backbone = backbone
        self.projector = projector(method, int(backbone.dim))  # type: ignore[arg-type]
        self.predictor = predictor(method)
        self.target = TARGETS[method.target]()
        self.criterion = CRITERIA[method.criterion]
        self.pairs = PAIRS[method.pairs]

    def forward(self, *x: Tensor) -> Output:
        h = [self.backbone(view) for view in x]  # view by view: batch norm's statistics are each view's own
        z = [self.projector(view) for view in h]
        p = [self.predictor(view) for view in z]
        t = self.target(x, z)
        if self.method.stop_gradient:
            t = [view.detach() for view in t]
        loss = torch.stack([self.criterion(p[i], t[j]) for i, j in self.pairs]).mean()
        return Output(loss, h, z, p, t)

    def after_step(self) -> None:
        """Move what gradients do not move, once a step."""
        self.target.after_step()


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
            raise unknown("method", method, METHODS)
        method = METHODS[method]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(backbone, str):
            backbone = named_backbone(backbone, image_size=image_size, width=width, stem=stem, channels=channels)
        return Siamese(backbone, method)
