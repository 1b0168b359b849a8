"""Backbones: networks that turn an image into one feature vector h, with its width in `.dim`.

Networks and parameter names are torchvision's, or timm's for `timm/NAME`, so that weights can be
exchanged with these libraries.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck

from simsiam.config.recipes import default_stem
from simsiam.errors import UsageError, unknown_name
from simsiam.model.patches import PATCHES_PREFIX, Patches, parse_sizes

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

# Blocks in each of the four stages. resnet10, with one block per stage, is for demonstrations.
RESNETS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet10": (BasicBlock, [1, 1, 1, 1]),
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}
TIMM_PREFIX = "timm/"  # begins the names of timm's models


class ResNet(models.ResNet):
    """torchvision's ResNet without its classifier, with a choice of width, stem and channels.

    Convolutions are initialized as in torchvision, and the last batch norm of every residual block
    starts at zero (appendix A).
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
        """Create the network: (N, channels, H, W) to (N, dim), dim = 8 * width * block.expansion.

        Args:
            block: The kind of residual block.
            layers: Number of blocks in each of the four stages.
            width: Channels of the first stage; it doubles with every stage.
            stem: "large": 7x7, stride 2, max pooling; "small": 3x3, stride 1 (appendix D).
            channels: Channels of the images.
        """
        self.width = width
        super().__init__(block, layers, zero_init_residual=True)
        self.dim = self.inplanes
        self.fc = nn.Identity()  # type: ignore[assignment]
        if stem == "small":
            self.conv1 = nn.Conv2d(channels, width, 3, stride=1, padding=1, bias=False)
            self.maxpool = nn.Identity()  # type: ignore[assignment]
        else:
            self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(width)

    def _make_layer(self, block, planes, *args, **kwargs):
        # torchvision calls this once for each stage, with planes 64, 128, 256 and 512.
        if planes == 64:
            self.inplanes = self.width
        stage = super()._make_layer(block, planes * self.width // 64, *args, **kwargs)
        for shortcut in [block.downsample for block in stage if block.downsample is not None]:
            if shortcut[0].in_channels < 16:
                shortcut[0] = nn.utils.skip_init(SubsampledConv2d, shortcut[0])
        return stage


class SubsampledConv2d(nn.Conv2d):
    """A strided 1x1 convolution computed in two steps: subsample the pixels, then convolve.

    The result is the same. It is for fewer than 16 input channels, where oneDNN's gradient of the
    strided form writes outside its memory on a CPU, in float32 and channels_last
    (github.com/uxlfoundation/oneDNN issue 6035).
    """

    def __init__(self, conv: nn.Conv2d, device: torch.device | str | None = None):
        """Create a replacement for `conv`, without copying its weights.

        Args:
            conv: The 1x1 convolution to replace.
            device: Where to create the weights.
        """
        super().__init__(conv.in_channels, conv.out_channels, 1, bias=False, device=device)
        self.subsample_stride = conv.stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, out_channels, H / stride, W / stride) for x (N, in_channels, H, W)."""
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
    """Create a network by name, freshly initialized and without its classifier.

    Args:
        name: A name in RESNETS, a classification model of torchvision, `timm/NAME`, or
            `patches/SIZES` (empty: `fit_patches` or a file of weights fills it).
        image_size: Height and width of the images, in pixels.
        width: Channels of the first stage (RESNETS only).
        stem: "small" or "large" (RESNETS only); None chooses small up to 64 pixels.
        channels: Channels of the images, 1 to 16; torchvision's own models take only 3.

    Returns:
        The network in training mode: (N, channels, H, W) to (N, dim), with the attribute `dim`.

    Raises:
        UsageError: If the name is unknown or the network does not exist with these arguments.
    """
    input_size(name)  # raises for an unknown name
    if not 1 <= channels <= 16:
        raise UsageError(f"channels is {channels}; it lies between 1 and 16")
    if name in RESNETS:
        block, layers = RESNETS[name]
        stem = stem or default_stem(image_size)
        return ResNet(block, layers, width=width, stem=stem, channels=channels)
    if width != 64 or stem is not None:
        raise UsageError(f"width and stem belong to {', '.join(RESNETS)}; {name} has neither")
    if name.startswith(TIMM_PREFIX):
        return build_timm_backbone(name, image_size, channels)
    if name.startswith(PATCHES_PREFIX):
        return Patches(parse_sizes(name), image_size=image_size, channels=channels)
    if channels != 3:
        raise UsageError(
            f"{name} takes 3 channels, not {channels}; "
            f"{', '.join(RESNETS)} and {TIMM_PREFIX}... take 1 to 16"
        )
    options = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    return remove_classifier(models.get_model(name, weights=None, **options), name, image_size)


def input_size(name: str) -> int | None:
    """Return the image size that a network was designed for, without building it.

    Args:
        name: A name as in `create_backbone`.

    Returns:
        The size in pixels, or None for a network that states none; timm's models state one.

    Raises:
        UsageError: If the name is unknown.
    """
    if name.startswith(TIMM_PREFIX):
        return min(timm_config(name).input_size[1:])
    if name.startswith(PATCHES_PREFIX):
        return max(parse_sizes(name))
    known_names = [*RESNETS, *models.list_models(module=models)]
    if name not in known_names:
        raise unknown_name("backbone", name, known_names)
    return None


def timm_config(name: str) -> "PretrainedCfg":
    """Return timm's configuration of a model.

    Args:
        name: `timm/NAME`.

    Returns:
        The configuration: input size, mean, standard deviation and so on.

    Raises:
        UsageError: If timm has no such model.
    """
    import timm

    names = [TIMM_PREFIX + model_name for model_name in timm.list_models(name_matches_cfg=True)]
    if name not in names:  # there are more than a thousand: the error lists the nearest five
        raise unknown_name("backbone", name, get_close_matches(name, names, n=5, cutoff=0))
    return timm.get_pretrained_cfg(name.removeprefix(TIMM_PREFIX))  # type: ignore[return-value]


def build_timm_backbone(name: str, image_size: int, channels: int) -> nn.Module:
    """Create a model of timm without classifier and without pretrained weights.

    Args:
        name: `timm/NAME`.
        image_size: Height and width of the images, in pixels.
        channels: Channels of the images.

    Returns:
        The model in training mode, with the attribute `dim`.

    Raises:
        UsageError: If the model does not take such images or gives no feature vector.
    """
    import timm

    # Models with a fixed input size get it from the argument img_size; others take any size.
    img_size = image_size if timm_config(name).fixed_input_size else None
    timm_name = name.removeprefix(TIMM_PREFIX)
    with as_usage_error(name, image_size, channels):
        model = timm.create_model(timm_name, num_classes=0, in_chans=channels, img_size=img_size)
        h = forward_zeros(model, image_size, channels)
    return set_dim(model, name, h, model.head_hidden_size)  # type: ignore[arg-type]


def remove_classifier(model: nn.Module, name: str, image_size: int) -> nn.Module:
    """Replace a model's last fully-connected layer by the identity.

    Args:
        model: A classifier; it is changed in place.
        name: Its name, for errors.
        image_size: Height and width of the images, in pixels.

    Returns:
        The model in training mode, with the removed layer's input width in the attribute `dim`.

    Raises:
        UsageError: If the model does not take such images or gives no feature vector.
    """
    path = classifier_path(model)
    if path is None:
        raise UsageError(f"{name} has no clear feature output: no fully-connected layer to remove")
    last = cast(nn.Linear, model.get_submodule(path))
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    with as_usage_error(name, image_size):
        h = forward_zeros(model, image_size)
    return set_dim(model, name, h, last.in_features)


def classifier_path(model: nn.Module) -> str | None:
    """Find the classifier of a network: its last fully-connected layer.

    Args:
        model: The network.

    Returns:
        The name of the module, or None if there is no such layer.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return names[-1] if names else None


@contextmanager
def as_usage_error(name: str, image_size: int, channels: int = 3) -> Iterator[None]:
    """Turn whatever a network raises for images that it cannot take into a UsageError.

    Args:
        name: The network's name, as in `create_backbone`.
        image_size: Height and width of the images, in pixels.
        channels: Channels of the images.

    Raises:
        UsageError: If the body raises; it states the size that the network is made for.
    """
    try:
        yield
    except Exception as error:  # RuntimeError, AssertionError, TypeError, ZeroDivisionError, ...
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        images = f"images of {image_size} px" + (f" with {channels} channels" * (channels != 3))
        size = input_size(name)
        hint = f" (it is made for {size} px)" if size else ""
        raise UsageError(f"{name} does not take {images}{hint}: {reason}") from None


def forward_zeros(model: nn.Module, image_size: int, channels: int = 3) -> object:
    """Return a model's output for one zero image; buffers and the random state are not changed.

    Args:
        model: The model; it is left in evaluation mode.
        image_size: Height and width of the image, in pixels.
        channels: Channels of the image.

    Returns:
        Whatever the model returns.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return model.eval()(torch.zeros(1, channels, image_size, image_size))


def set_dim(model: nn.Module, name: str, h: object, dim: int) -> nn.Module:
    """Set the attribute `dim` of a backbone.

    Args:
        model: The backbone.
        name: Its name, for the error.
        h: The model's output for one image.
        dim: The expected width of `h`.

    Returns:
        The same model in training mode.

    Raises:
        UsageError: If `h` is not a tensor of shape (1, dim).
    """
    if not isinstance(h, torch.Tensor) or h.shape != (1, dim):
        shape = tuple(h.shape) if isinstance(h, torch.Tensor) else type(h).__name__
        raise UsageError(
            f"{name} has no clear feature output: {shape} where (1, {dim}) was expected"
        )
    model.dim = dim  # type: ignore[assignment]
    return model.train()
