"""Backbones: networks that turn an image into one feature vector h, with its width in `.dim`.

Networks and parameter names are torchvision's, or timm's for `timm/NAME`, so that weights can be
exchanged with these libraries.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from math import isqrt
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck

from simsiam.config.method import MAX_PARAMETERS
from simsiam.config.recipes import default_stem
from simsiam.errors import UsageError, unknown_name
from simsiam.model.patches import PATCHES_PREFIX, ClosedFormStart, Patches, parse_patches

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
# Parameters of a ResNet at width 64; they grow with the square of the width.
RESNET_PARAMETERS = {
    "resnet10": 4.9e6, "resnet18": 11.2e6, "resnet34": 21.3e6, "resnet50": 23.5e6,
    "resnet101": 42.5e6, "resnet152": 58.1e6,
}  # fmt: skip
TIMM_PREFIX = "timm/"  # begins the names of timm's models
# Words in the names of tensors whose shapes may depend on the image size.
POSITION_WORDS = ("pos_embed", "relative_position", "rel_pos", "attention_bias", "mlp_tokens")
# The position embeddings of a ViT of timm and of torchvision, and the convolution of its patches.
VIT_POSITIONS = {"pos_embed": "patch_embed.proj", "encoder.pos_embedding": "conv_proj"}


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
        name: A name in RESNETS, a classification model of torchvision, `timm/NAME`,
            `patches/SIZES` (empty: `fit_patches` or a file of weights fills it), or
            `patches/SIZES+NAME`, with one of the other networks beside the patches.
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
        count = RESNET_PARAMETERS[name] * (width / 64) ** 2
        if count > MAX_PARAMETERS:
            raise UsageError(
                f"{name} of width {width} has {count:.3g} parameters; at most {MAX_PARAMETERS:,} "
                "are allowed: give a smaller --width"
            )
        stem = stem or default_stem(image_size)
        return ResNet(block, layers, width=width, stem=stem, channels=channels)
    sizes, network = parse_patches(name) if name.startswith(PATCHES_PREFIX) else ((), None)
    if network is not None:
        beside = create_backbone(
            network, image_size=image_size, width=width, stem=stem, channels=channels
        )
        return ClosedFormStart(Patches(sizes, image_size=image_size, channels=channels), beside)
    if width != 64 or stem is not None:
        raise UsageError(f"width and stem belong to {', '.join(RESNETS)}; {name} has neither")
    if name.startswith(TIMM_PREFIX):
        return build_timm_backbone(name, image_size, channels)
    if sizes:
        return Patches(sizes, image_size=image_size, channels=channels)
    if channels != 3:
        raise UsageError(
            f"{name} takes 3 channels, not {channels}; "
            f"{', '.join(RESNETS)} and {TIMM_PREFIX}... take 1 to 16"
        )
    with as_usage_error(name, image_size):
        model = models.get_model(name, weights=None, **torchvision_options(name, image_size))
    return remove_classifier(model, name, image_size)


def torchvision_options(name: str, image_size: int) -> dict[str, object]:
    """Return what a model of torchvision needs beyond its name.

    Args:
        name: The name.
        image_size: Height and width of the images, in pixels.
    """
    if name in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    return {"image_size": image_size} if name.startswith("vit_") else {}


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
        sizes, network = parse_patches(name)
        return max(*sizes, (network and input_size(network)) or 0)
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


def vit_image_size(state: Mapping[str, Tensor]) -> int | None:
    """Read the image size of a ViT from its weights: patches in a row times pixels of a patch.

    Args:
        state: Its state dict.

    Returns:
        The size in pixels; None for other networks.
    """
    for name, patch in VIT_POSITIONS.items():
        positions, weight = state.get(name), state.get(f"{patch}.weight")
        if positions is not None and weight is not None and positions.ndim == 3:
            return isqrt(positions.shape[1]) * weight.shape[-1]  # a few tokens are no patches
    return None


def fit_positions(
    name: str,
    state: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    image_size: int,
    channels: int = 3,
) -> tuple[dict[str, Tensor], list[str]]:
    """Resample the position embeddings of weights to another image size, as timm does.

    Args:
        name: The network, as in `create_backbone`.
        state: Its state dict, at any image size.
        expected: Its state dict at the image size that is wanted; only the shapes matter.
        image_size: This image size, in pixels.
        channels: Channels of the images.

    Returns:
        The state dict, and the names of what was resampled. If tensors are missing or other shapes
        differ as well, it is returned as it is: loading it will say so.

    Raises:
        UsageError: They cannot be resampled.
    """
    wrong = [k for k in expected if k in state and state[k].shape != expected[k].shape]
    are_positions = all(any(word in k for word in POSITION_WORDS) for k in wrong)
    if not wrong or not are_positions or expected.keys() - state.keys():
        return dict(state), []
    own = {k: state[k] for k in expected}
    try:
        if name.startswith(TIMM_PREFIX):
            fitted = _load_with_timm(name, own, image_size, channels)
        else:
            fitted = own | {k: _resample_grid(own[k], expected[k].shape[1]) for k in wrong}
        assert all(torch.equal(fitted[k], own[k].to(fitted[k])) for k in own if k not in wrong)
    except Exception as error:  # of timm or torch, for a network that cannot be resampled
        reason = " ".join(str(error).split())[:120]
        size = vit_image_size(own) or input_size(name)
        raise UsageError(
            f"weights of {name} for {size} px cannot be resampled to {image_size} px: give "
            f"--image-size {size} ({wrong[0]}: {reason or type(error).__name__})"
        ) from None
    return dict(state) | fitted, wrong


def _load_with_timm(
    name: str, state: dict[str, Tensor], image_size: int, channels: int
) -> dict[str, Tensor]:
    """Load weights as timm loads its own: each family of networks has its way to resample."""
    import timm

    weights = {
        "state_dict": state, "source": "", "custom_load": False, "num_classes": 0,
        "first_conv": None,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about timm's own code
        model = timm.create_model(
            name.removeprefix(TIMM_PREFIX), pretrained=True, num_classes=0, in_chans=channels,
            img_size=image_size, pretrained_cfg_overlay=weights,
        )  # fmt: skip
    return model.state_dict()


def _resample_grid(positions: Tensor, count: int) -> Tensor:
    """Resample the positions of torchvision's ViT, (1, n, d), of which the first is no patch."""
    from timm.layers import resample_abs_pos_embed

    return resample_abs_pos_embed(positions, [isqrt(count)] * 2, num_prefix_tokens=1)


@torch.no_grad()
def cut_weights(model: nn.Module, divisor: float) -> None:
    """Divide the weights of all layers but batch norm's (Draganov et al., 2025, section 4).

    What follows a batch norm is the same, but a step turns smaller weights by a larger angle.

    Args:
        model: The model.
        divisor: What to divide by.
    """
    for p in model.parameters():
        if p.ndim > 1:
            p.div_(divisor)
