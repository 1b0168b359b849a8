"""Backbones: an image in, one feature vector h out, with the vector's width in `.dim`.

Networks and parameter names are torchvision's, so weights move freely between the two libraries.
"""

import torch
from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck

from simsiam.errors import UsageError, unknown

# Blocks in each of the four stages. resnet10 is the demo's: one block a stage.
RESNETS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet10": (BasicBlock, [1, 1, 1, 1]),
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}
SMALL = 64  # up to this many pixels a ResNet takes the small stem


class ResNet(models.ResNet):
    """torchvision's ResNet without its classifier, with a width and, for small images, CIFAR's stem.

    Images (N, 3, H, W) to features (N, dim), dim = 8 * width (4 times that with bottlenecks). Convolutions are
    initialized as in torchvision, and the last batch norm of every residual block starts at zero (appendix A).
    """

    def __init__(
        self, block: type[BasicBlock | Bottleneck], layers: list[int], *, width: int = 64, stem: str = "large"
    ):
        self.width = width
        super().__init__(block, layers, zero_init_residual=True)
        self.dim = self.inplanes
        self.fc = nn.Identity()  # type: ignore[assignment]
        if stem == "small":  # appendix D: 3x3, stride 1, no pooling
            self.conv1 = nn.Conv2d(3, width, 3, stride=1, padding=1, bias=False)
            self.maxpool = nn.Identity()  # type: ignore[assignment]
        else:
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(width)

    def _make_layer(self, block, planes, *args, **kwargs):  # called by torchvision once a stage, with planes 64 to 512
        if planes == 64:
            self.inplanes = self.width
        return super()._make_layer(block, planes * self.width // 64, *args, **kwargs)


def backbone(name: str, *, image_size: int, width: int = 64, stem: str | None = None) -> nn.Module:
    """The named network without its classifier. Raises UsageError for a name or a combination that has none.

    `stem` is "small" or "large" (ResNets only); by default small up to 64 px.
    """
    if name in RESNETS:
        block, layers = RESNETS[name]
        return ResNet(block, layers, width=width, stem=stem or ("small" if image_size <= SMALL else "large"))
    known = models.list_models(module=models)
    if name not in known:
        raise unknown("backbone", name, [*RESNETS, *known])
    if width != 64 or stem is not None:
        raise UsageError(f"width and stem belong to {', '.join(RESNETS)}; {name} has neither")
    plain = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return without_classifier(models.get_model(name, weights=None, **plain), name, image_size)


def without_classifier(model: nn.Module, name: str, image_size: int) -> nn.Module:
    """The model with its last fully-connected layer taken out and that layer's input width as `.dim`."""
    linear = [(k, m) for k, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise UsageError(f"{name} has no clear feature output: no fully-connected layer to take out")
    path, last = linear[-1]
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    try:
        with torch.no_grad():
            shape = tuple(model.eval()(torch.zeros(1, 3, image_size, image_size)).shape)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UsageError(f"{name} does not take images of {image_size} px: {str(error).splitlines()[0]}") from None
    if shape != (1, last.in_features):
        raise UsageError(f"{name} has no clear feature output: {shape} where (1, {last.in_features}) was expected")
    model.dim = last.in_features  # type: ignore[assignment]
    return model.train()
