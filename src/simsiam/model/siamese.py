"""The method: Figure 3 of the paper as one module, whose `forward` is Algorithm 1."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from simsiam.config.methods import METHODS, Method
from simsiam.errors import UsageError, unknown_name
from simsiam.model.backbones import create_backbone, cut_weights, feature_dim
from simsiam.model.heads import (
    BN_GROUPINGS,
    DirectPredictor,
    build_predictor,
    build_projector,
    forward_by_size,
)
from simsiam.model.losses import CRITERIA, InfoNCE
from simsiam.model.targets import TARGETS, MovingAverageTarget, mean_target


class Output(NamedTuple):
    """What one step computes; each list has one tensor per view that has one, in order of view."""

    loss: Tensor  # scalar: `loss_scale` times the mean of D(p, t) over the pairs
    features: list[Tensor]  # h, (N, dim) each
    projections: list[Tensor]  # z, (N, d) each
    predictions: list[Tensor]  # p, (N, d) each
    targets: list[Tensor]  # t, (N, d) each; codes (N, K) in SwAV, labels (N,) if supervised;
    # one for each set of views that is averaged


class Siamese(nn.Module):
    """Backbone, projector, predictor, target and criterion, combined as a row of METHODS says.

    In a training loop, call `after_step` after each step of the optimizer. Targets that depend on
    the run (one eta per image, schedules, labels) also need `begin` before the first step.
    """

    def __init__(self, backbone: nn.Module, method: Method):
        """Put a method's parts on a backbone: images (N, C, H, W) to features (N, backbone.dim)."""
        super().__init__()
        check_names(method)
        self.method = method
        self.backbone = backbone
        self.projector = build_projector(method, feature_dim(backbone))
        self.predictor = build_predictor(method)
        self.target = TARGETS[method.target](method, self.f)
        self.criterion = CRITERIA[method.criterion](method)
        self.forward_views = BN_GROUPINGS[method.bn]
        self.terms = method.terms
        self.predicted_views = sorted({i for i, _ in self.terms})
        self.encoded_views = sorted({*self.predicted_views, *self.target.required_views})

    @property
    def f(self) -> nn.Module:
        """The encoder: backbone and projector, x (N, C, H, W) to z (N, d)."""
        return nn.Sequential(self.backbone, self.projector)

    def forward(self, *x: Tensor, index: Tensor | None = None) -> Output:
        """Return a batch's loss (Algorithm 1), changing no state but batch norm's statistics.

        Args:
            *x: The views, `method.view_count` of them, each (N, C, H, W) and normalized.
            index: (N,) int64, the positions of the images in the training set.

        Raises:
            UsageError: If the number of views is wrong, or the target needs `begin` or `index`.
        """
        if len(x) != (count := self.method.view_count):
            raise UsageError(f"{self.method.name} takes {count} views of each image, not {len(x)}")
        full_and_small = {i: x[i] for i in self.encoded_views}
        h = forward_by_size(self.forward_views, self.backbone, full_and_small)
        z = self.forward_views(self.projector, h)
        p = self.forward_views(self.predictor, {i: z[i] for i in self.predicted_views})
        eta = self.target(x, z, index)
        t = {views: mean_target(eta, views) for views in sorted({views for _, views in self.terms})}
        t = {views: self.criterion.encode_target(t[views]) for views in t}
        if self.method.stop_gradient:
            t = {views: t[views].detach() for views in t}
        loss = torch.stack([self.criterion(p[i], t[views]) for i, views in self.terms]).mean()
        return Output(self.method.loss_scale * loss, *(list(v.values()) for v in (h, z, p, t)))

    def high_loss_threshold(self, batch_size: int) -> float | None:
        """Return the loss above which training on batches of this size is not converging."""
        high = self.criterion.high_loss_threshold(batch_size)
        return None if high is None else self.method.loss_scale * high

    def begin(
        self, *, images: int = 0, labels: Tensor | None = None, steps: int = 0, per_epoch: int = 0
    ) -> None:
        """Tell the target about the run, before its first step and before a checkpoint is loaded.

        Args:
            images: Number of training images.
            labels: (images,) int64, or None if there are none.
            steps: Number of steps of the run.
            per_epoch: Number of steps in an epoch.
        """
        self.target.begin(self.f, images=images, labels=labels, steps=steps, per_epoch=per_epoch)

    def after_step(
        self, output: Output, step: int | None = None, index: Tensor | None = None
    ) -> None:
        """Update what has no gradient; call it once after each step of the optimizer.

        Args:
            output: What `forward` returned.
            step: The step, counted from 0; needed by targets with a schedule.
            index: The `index` given to `forward`.
        """
        z = dict(zip(self.encoded_views, output.projections, strict=True))
        self.target.after_step(self.f, z, step, index)
        if isinstance(self.predictor, DirectPredictor):
            self.predictor.after_step([z[i] for i in self.predicted_views])
        negatives = output.targets
        if isinstance(self.criterion, InfoNCE) and isinstance(self.target, MovingAverageTarget):
            negatives = [self.target.draw(self.method.queue, step)]  # from the memory bank
        self.criterion.after_step(negatives)


def check_names(method: Method) -> None:
    """Raise UsageError if a method's target or criterion is not in its table."""
    if method.target not in TARGETS:
        raise unknown_name("target", method.target, TARGETS)
    if method.criterion not in CRITERIA:
        raise unknown_name("criterion", method.criterion, CRITERIA)


def build(
    method: str | Method = "simsiam", *, backbone: str | nn.Module = "resnet50",
    image_size: int = 224, width: int = 64, stem: str | None = None, channels: int = 3,
    seed: int = 0,
) -> Siamese:  # fmt: skip
    """Build a method on a backbone; PyTorch's global random generator is left as it was.

    >>> model = build("simsiam", backbone="resnet18", image_size=32)

    Args:
        method: A name in METHODS, or a Method.
        backbone: A name, or a module whose attribute `dim` is the width of its output.
        image_size: Height and width of the views, in pixels.
        width: Channels of a named ResNet's first stage.
        stem: "small" or "large", of a named ResNet; None chooses by the image size.
        channels: Channels of the images.
        seed: Seed of the initial weights.

    Raises:
        UsageError: If a name is unknown or the parts do not fit together.
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
        model = Siamese(backbone, method)
    cut_weights(model, method.cut_init)
    return model
