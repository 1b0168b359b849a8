"""Backbones: an image in, one feature vector h out, with the vector's width in `.dim`.

Networks and parameter names are torchvision's, or timm's for `timm/NAME`, so weights move freely between the libraries.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck

from simsiam.config.recipes import default_stem
from simsiam.errors import UsageError, unknown_name

# Blocks in each of the four stages. resnet10 is the demo's: one block a stage.
RESNETS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet10": (BasicBlock, [1, 1, 1, 1]),
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}
TIMM_PREFIX = "timm/"  # what stands before the name of a model of timm's


class ResNet(models.ResNet):
    """torchvision's ResNet without its classifier, with a width and, for small images, CIFAR's stem.

    Images (N, channels, H, W) to features (N, dim), dim = 8 * width (4 times that with bottlenecks). Convolutions are
    initialized as in torchvision, and the last batch norm of every residual block starts at zero (appendix A).
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: list[int],
        *,
        width: int = 64,
        stem: str = "large",
        channels: int = 3,
    ):
        self.width = width
        super().__init__(block, layers, zero_init_residual=True)
        self.dim = self.inplanes
        self.fc = nn.Identity()  # type: ignore[assignment]
        if stem == "small":  # appendix D: 3x3, stride 1, no pooling
            self.conv1 = nn.Conv2d(channels, width, 3, stride=1, padding=1, bias=False)
            self.maxpool = nn.Identity()  # type: ignore[assignment]
        else:
            self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(width)

    def _make_layer(
        self, block, planes, *args, **kwargs
    ):  # called by torchvision once a stage, with planes 64 to 512
        if planes == 64:
            self.inplanes = self.width
        stage = super()._make_layer(block, planes * self.width // 64, *args, **kwargs)
        for shortcut in [block.downsample for block in stage if block.downsample is not None]:
            if shortcut[0].in_channels < 16:
                shortcut[0] = nn.utils.skip_init(SubsampledConv2d, shortcut[0])
        return stage


class SubsampledConv2d(nn.Conv2d):
    """A strided 1 x 1 convolution in two steps: every second pixel, then the convolution. The same function.

    For fewer than 16 channels only: there oneDNN's gradient of the fused form writes outside its memory, on a CPU, in
    float32 and channels_last (github.com/uxlfoundation/oneDNN issue 6035).
    """

    def __init__(self, conv: nn.Conv2d, device: Any = None):
        super().__init__(conv.in_channels, conv.out_channels, 1, bias=False, device=device)
        self.subsample_stride = conv.stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x[..., :: self.subsample_stride[0], :: self.subsample_stride[1]])


def feature_dim(backbone: nn.Module) -> int:
    """Return the width of a backbone's feature h.

    Args:
        backbone: A module with an attribute `dim`, as `create_backbone` makes it.

    Returns:
        The number of channels of h.
    """
    return int(backbone.dim)  # type: ignore[arg-type]


def create_backbone(
    name: str, *, image_size: int, width: int = 64, stem: str | None = None, channels: int = 3
) -> nn.Module:
    """The named network, freshly initialized and without its classifier: (N, channels, H, W) to (N, dim).

    The name is one of RESNETS, a classification model of torchvision's, or `timm/NAME`. `stem` is "small" or "large"
    (RESNETS only); by default small up to 64 px. Raises UsageError for a name or a combination that has no network.
    """
    input_size(name)  # raises for an unknown name
    if not 1 <= channels <= 16:
        raise UsageError(f"channels is {channels}; it lies between 1 and 16")
    if name in RESNETS:
        block, layers = RESNETS[name]
        return ResNet(
            block, layers, width=width, stem=stem or default_stem(image_size), channels=channels
        )
    if width != 64 or stem is not None:
        raise UsageError(f"width and stem belong to {', '.join(RESNETS)}; {name} has neither")
    if name.startswith(TIMM_PREFIX):
        return build_timm_backbone(name, image_size, channels)
    if channels != 3:
        raise UsageError(
            f"{name} takes 3 channels, not {channels}; {', '.join(RESNETS)} and {TIMM_PREFIX}... take 1 to 16"
        )
    plain = (
        {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    )
    return remove_classifier(models.get_model(name, weights=None, **plain), name, image_size)


def input_size(name: str) -> int | None:
    """The image size that the named network was designed for, or None where none is stated; builds no network.

    timm states one for each model, the other networks have none. Raises UsageError for an unknown name.
    """
    if name.startswith(TIMM_PREFIX):
        return min(timm_config(name).input_size[1:])
    known = [*RESNETS, *models.list_models(module=models)]
    if name not in known:
        raise unknown_name("backbone", name, known)
    return None


def timm_config(name: str) -> Any:
    """What timm states about `timm/NAME`: its PretrainedCfg. Raises UsageError for an unknown name."""
    import timm

    names = [TIMM_PREFIX + known for known in timm.list_models(name_matches_cfg=True)]
    if name not in names:
        raise unknown_name(
            "backbone", name, get_close_matches(name, names, n=5, cutoff=0)
        )  # of more than a thousand
    return timm.get_pretrained_cfg(name.removeprefix(TIMM_PREFIX))


def build_timm_backbone(name: str, image_size: int, channels: int) -> nn.Module:
    """timm's model without classifier and pretrained weights, made for images of this size and so many channels."""
    import timm

    # timm calls an input size fixed where the constructor fixes it, by img_size; other models take images as they come.
    img_size = image_size if timm_config(name).fixed_input_size else None
    with as_usage_error(name, image_size, channels):
        model = timm.create_model(
            name.removeprefix(TIMM_PREFIX), num_classes=0, in_chans=channels, img_size=img_size
        )
        h = forward_zeros(model, image_size, channels)
    return set_dim(model, name, h, model.head_hidden_size)  # type: ignore[arg-type]


def remove_classifier(model: nn.Module, name: str, image_size: int) -> nn.Module:
    """The model with its last fully-connected layer taken out and that layer's input width as `.dim`."""
    linear = [(k, m) for k, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise UsageError(
            f"{name} has no clear feature output: no fully-connected layer to take out"
        )
    path, last = linear[-1]
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    with as_usage_error(name, image_size):
        h = forward_zeros(model, image_size)
    return set_dim(model, name, h, last.in_features)


@contextmanager
def as_usage_error(name: str, image_size: int, channels: int = 3) -> Iterator[None]:
    """Whatever a network raises on images it cannot take becomes one UsageError, with the size it is made for."""
    try:
        yield
    except Exception as error:  # the libraries raise RuntimeError, AssertionError, TypeError, ZeroDivisionError, ...
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        images = f"images of {image_size} px" + (
            f" with {channels} channels" if channels != 3 else ""
        )
        made_for = input_size(name)
        hint = f" (it is made for {made_for} px)" if made_for else ""
        raise UsageError(f"{name} does not take {images}{hint}: {reason}") from None


def forward_zeros(model: nn.Module, image_size: int, channels: int = 3) -> Any:
    """What the model gives for one zero image; batch norm's statistics and the random numbers stay as they are."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return model.eval()(torch.zeros(1, channels, image_size, image_size))


def set_dim(model: nn.Module, name: str, h: Any, dim: int) -> nn.Module:
    """The model with `.dim`, in training mode; raises UsageError where h, one image's features, is not (1, dim)."""
    if not isinstance(h, torch.Tensor) or h.shape != (1, dim):
        shape = tuple(h.shape) if isinstance(h, torch.Tensor) else type(h).__name__
        raise UsageError(
            f"{name} has no clear feature output: {shape} where (1, {dim}) was expected"
        )
    model.dim = dim  # type: ignore[assignment]
    return model.train()
