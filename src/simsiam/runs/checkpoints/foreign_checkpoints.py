"""Checkpoints of other programs: recognized by their tensors, and renamed.

A checkpoint is recognized by the names and shapes of its tensors. Each tensor is used or left over,
depending on its name. A tensor of the backbone or of a known head that is missing, of the wrong
shape, or not finite is an error, and so is one that its modules do not have.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypedDict

import torch
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

from simsiam.config.methods import Method
from simsiam.errors import UsageError
from simsiam.model.backbones import (
    RESNETS,
    create_backbone,
    feature_dim,
    fit_positions,
    input_size,
    vit_image_size,
)
from simsiam.model.heads import build_predictor, build_projector
from simsiam.runs.checkpoints.foreign_heads import (
    absorb_biases,
    check_biases,
    format_shape,
    parse_heads,
)
from simsiam.runs.checkpoints.layouts import (
    LAYOUTS,
    Layout,
    check_attention,
    describe_prefix,
    detect_layout,
    find_backbones,
    map_backbone_names,
    strip_wrappers,
    tied_names,
)

# Names that begin so are beside a backbone, not in it: parts of MAE and others, and of `adapt`.
BESIDE_BACKBONE = ("mask_token", "decoder", "patches")


class BackboneSettings(TypedDict):
    """The settings of a recipe that determine a backbone."""

    backbone: str
    width: int
    stem: Literal["small", "large"] | None


class ConvertedCheckpoint(NamedTuple):
    """A checkpoint under the names of this package.

    Attributes:
        layout: The layout that was recognized.
        settings: The settings of the backbone.
        method: The method, with the cells of its heads.
        model_state: Tensors under the names of Siamese's state dict, for the parts that there are.
        absorbed_biases: Biases that were absorbed into the batch norm after them.
        unused_keys: Tensors that are not part of the model.
        channels: Channels of an image.
        image_size: Side of an image in pixels; None if the tensors do not depend on it.
        notes: What else there is to say.
    """

    layout: Layout
    settings: BackboneSettings
    method: Method
    model_state: dict[str, Tensor]
    absorbed_biases: list[str]
    unused_keys: list[str]
    channels: int
    image_size: int | None
    notes: list[str]


def convert_state_dict(
    tensors: Mapping[str, Tensor],
    network: str | None = None,
    *,
    image_size: int | None = None,
    channels: int | None = None,
) -> ConvertedCheckpoint:
    """Recognize and rename the model in a state dict.

    Args:
        tensors: The tensors of the checkpoint.
        network: The name of the backbone. It is not needed for a ResNet, whose depth, width and
            stem are read from the shapes.
        image_size: Side of its images in pixels, for networks whose tensors depend on it: position
            embeddings of another size are resampled. None takes the size of the tensors.
        channels: Channels of an image; None takes that of the tensors.

    Returns:
        The model, and what became of every tensor.

    Raises:
        UsageError: A tensor is missing, extra, of the wrong shape or not finite, or no layout fits.
    """
    tensors, reference = strip_wrappers(tensors), reference_state(network)
    prefixes = find_backbones(tensors, reference)
    layout, outer = detect_layout(tensors, prefixes)
    outside = [name for name in tensors if not name.startswith(outer)]
    tensors = {k.removeprefix(outer): x for k, x in tensors.items() if k.startswith(outer)}
    check_attention(layout, network or "")
    copies = tied_names(tensors, layout)
    backbone_names = map_backbone_names(tensors, layout)
    layout, heads, method, notes = parse_heads(tensors, layout)
    notes += describe_prefix(layout, outer, prefixes)
    settings = detect_backbone(backbone_names, tensors, network)
    channels = channels or stem_channels(backbone_names, tensors, reference)
    if reference is not None:
        stored = vit_image_size({k: tensors[key] for k, key in backbone_names.items()})
        image_size = image_size or stored or input_size(settings["backbone"]) or 224

    names = {f"backbone.{name}": key for name, key in backbone_names.items()}
    biases: dict[str, str] = {}
    for part, head in heads.items():
        names |= {f"{part}.{name}": key for name, key in head.names.items()}
        biases |= {f"{part}.{mean}": key for mean, key in head.biases.items()}
    expected = expected_state_dict(settings, method, image_size, channels, has_heads=bool(heads))
    beside = names_beside(names, expected, tensors, has_heads=bool(heads))
    names = {name: key for name, key in names.items() if name not in beside}
    check_biases(layout, heads, biases)
    found = {name: tensors[key] for name, key in names.items()}
    if reference is not None and image_size is not None:
        found, lines = fit_backbone(
            settings["backbone"], found, expected, image_size, channels, prefix="backbone."
        )
        notes += lines
    model_state = match_state_dict(names, found, expected, describe_network(settings, image_size))
    absorb_biases(model_state, biases, tensors)

    used = {*names.values(), *biases.values()}
    check_finite({key: tensors[key] for key in used})
    used |= {copy for copy, original in copies.items() if original in used}
    unused = [outer + key for key in tensors if key not in used] + outside
    return ConvertedCheckpoint(
        layout, settings, method, model_state, list(biases.values()), unused, channels, image_size,
        notes,
    )  # fmt: skip


def reference_state(network: str | None) -> dict[str, Tensor] | None:
    """Build the state dict of a network that goes by its name, without numbers.

    Args:
        network: The name; None for a ResNet, which goes by its shapes.

    Returns:
        Tensors on the meta device, for the image size that the network was designed for; None for
        a ResNet.

    Raises:
        UsageError: There is no such network.
    """
    if network is None or network in RESNETS:
        return None
    with torch.device("meta"):
        return create_backbone(network, image_size=input_size(network) or 224).state_dict()


def detect_resnet(names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> BackboneSettings:
    """Read the depth, width and stem of a ResNet from its tensors.

    Args:
        names: torchvision's names, and those in the checkpoint.
        tensors: The tensors of the checkpoint.

    Returns:
        The settings of the backbone.

    Raises:
        UsageError: It is no ResNet.
    """
    stages = [
        len({name.split(".")[1] for name in names if name.startswith(f"layer{i}.")})
        for i in (1, 2, 3, 4)
    ]
    block = Bottleneck if "layer1.0.conv3.weight" in names else BasicBlock
    network = next((name for name, shape in RESNETS.items() if shape == (block, stages)), None)
    stem = tensors[names["conv1.weight"]].shape if "conv1.weight" in names else ()
    if network is None or len(stem) != 4:
        programs = ", ".join(dict.fromkeys(layout.program for layout in LAYOUTS))
        parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in tensors))
        raise UsageError(
            f"no ResNet as {programs} store it; its tensors are in {parts[:160]}; name other "
            "networks by --backbone"
        )
    return {"backbone": network, "width": stem[0], "stem": "small" if stem[2] == 3 else "large"}


def detect_backbone(
    names: Mapping[str, str], tensors: Mapping[str, Tensor], network: str | None
) -> BackboneSettings:
    """Find the settings of the backbone: those of a ResNet by its shapes, others by their name.

    Args:
        names: torchvision's names, and those in the checkpoint.
        tensors: The tensors of the checkpoint.
        network: The name of the backbone, if it is known.

    Returns:
        The settings.

    Raises:
        UsageError: It is no ResNet, or another one.
    """
    if network is not None and network not in RESNETS:
        return {"backbone": network, "width": 64, "stem": None}
    settings = detect_resnet(names, tensors)
    if network not in (None, settings["backbone"]):
        raise UsageError(f"its backbone is a {settings['backbone']}, not a {network}")
    return settings


def stem_channels(
    names: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    reference: Mapping[str, Tensor] | None,
) -> int:
    """Read the number of channels of an image from the first convolution.

    Args:
        names: The names of the backbone's tensors, and those in the checkpoint.
        tensors: The tensors of the checkpoint.
        reference: The state dict of the network; None for a ResNet.

    Returns:
        The number; 3 if there is no such convolution.
    """
    convolutions = [name for name, tensor in (reference or {}).items() if tensor.ndim == 4]
    key = names.get(convolutions[0] if convolutions else "conv1.weight", "")
    shape = tensors[key].shape if key in tensors else ()
    return shape[1] if len(shape) == 4 and 1 <= shape[1] <= 16 else 3


def names_beside(
    names: Mapping[str, str],
    expected: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    *,
    has_heads: bool,
) -> set[str]:
    """Find the tensors beside a backbone that can be left over: they are in none of its modules.

    Args:
        names: Names of this package, and those in the checkpoint.
        expected: The expected tensors, by the names of this package.
        tensors: The tensors of the checkpoint.
        has_heads: Whether the model has heads; without them, a classifier may be in a module.

    Returns:
        Names of this package. Tensors of more than two dimensions may be tokens or convolutions of
        another network: they are not among them.
    """
    modules = {name.split(".")[1] for name in expected if name.startswith("backbone.")}
    extra = {name for name in names.keys() - expected.keys() if name.startswith("backbone.")}
    beside = set()
    for name in extra:
        module = name.split(".")[1]
        flat = tensors[names[name]].ndim <= 2 or module.startswith(BESIDE_BACKBONE)
        if module not in modules and flat:
            beside.add(name)
    in_modules = extra - beside
    if not has_heads and is_classifier(in_modules, names, tensors):
        beside |= in_modules
    return beside


def expected_state_dict(
    settings: BackboneSettings,
    method: Method,
    image_size: int | None,
    channels: int,
    *,
    has_heads: bool,
) -> dict[str, Tensor]:
    """Build the state dict that a model has, without numbers.

    Args:
        settings: The settings of the backbone.
        method: The method, for the heads.
        image_size: Side of an image in pixels; None if the tensors do not depend on it.
        channels: Channels of an image.
        has_heads: Whether the model has heads.

    Returns:
        Tensors on the meta device.
    """
    name = settings["backbone"]
    with torch.device("meta"):
        backbone = create_backbone(
            name,
            image_size=image_size or 224,
            width=settings["width"],
            stem=settings["stem"],
            channels=channels,
        )
        parts = {"backbone": backbone}
        if has_heads:
            parts["projector"] = build_projector(method, feature_dim(backbone))
            parts["predictor"] = build_predictor(method)
        return {
            f"{part}.{name}": tensor
            for part, module in parts.items()
            for name, tensor in module.state_dict().items()
        }


def fit_backbone(
    network: str,
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    image_size: int,
    channels: int,
    *,
    prefix: str = "",
) -> tuple[dict[str, Tensor], list[str]]:
    """Resample the position embeddings of a backbone if they are of another image size.

    Args:
        network: The name of the backbone.
        found: Its tensors, and perhaps others.
        expected: The expected tensors.
        image_size: Side of an image in pixels.
        channels: Channels of an image.
        prefix: What the names of the backbone's tensors begin with.

    Returns:
        All tensors, and a note if some were resampled.

    Raises:
        UsageError: They cannot be resampled.
    """
    own, wanted = (
        {k.removeprefix(prefix): x for k, x in state.items() if k.startswith(prefix)}
        for state in (found, expected)
    )
    fitted, resampled = fit_positions(
        network, own, wanted, image_size=image_size, channels=channels
    )
    tensors = dict(found) | {prefix + k: x for k, x in fitted.items()}
    return tensors, [resampling_note(vit_image_size(own), image_size)] if resampled else []


def resampling_note(source_size: int | None, image_size: int) -> str:
    """Say that position embeddings are resampled.

    Args:
        source_size: The image size that they are of, in pixels, if it is known.
        image_size: The image size that they become of.
    """
    source = f" of {source_size} px" if source_size else ""
    return f"position embeddings{source} are resampled to {image_size} px, as timm does"


def describe_network(settings: BackboneSettings, image_size: int | None) -> str:
    """Describe a backbone for an error.

    Args:
        settings: Its settings.
        image_size: Side of its images in pixels, if its tensors may depend on it.
    """
    if settings["backbone"] in RESNETS:
        return f"{settings['backbone']}, width {settings['width']}"
    return f"{settings['backbone']} for images of {image_size} px"


def match_state_dict(
    names: Mapping[str, str],
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    network: str,
) -> dict[str, Tensor]:
    """Check the tensors of a checkpoint against the expected ones, and add counters of batches.

    Args:
        names: Names of this package, and those in the checkpoint.
        found: The tensors, by the names of this package.
        expected: The expected tensors, by the names of this package.
        network: What the model is called in errors.

    Returns:
        The tensors, by the names of this package.

    Raises:
        UsageError: One is missing, extra, or of the wrong shape.
    """
    if extra := [key for name, key in names.items() if name not in expected]:
        raise UsageError(f"{extra[0]} has no place in {network}{_and_more(extra)}")
    # Files from before torch 0.4 have no counters of batches.
    counters = {name: torch.tensor(0) for name in expected if name.endswith(".num_batches_tracked")}
    if missing := [name for name in expected if name not in names and name not in counters]:
        raise UsageError(f"{missing[0]} of {network} is missing{_and_more(missing)}")
    state = {name: found[name] if name in found else counters[name] for name in expected}
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise UsageError(
                f"{names[name]} is {format_shape(tensor)}; {network} has "
                f"{format_shape(expected[name])}"
            )
    return state


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Check that all values of tensors are finite.

    Args:
        tensors: The tensors, by name.

    Raises:
        UsageError: Some are not.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UsageError(f"{name} has values that are not finite")


def is_classifier(extra: set[str], names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether tensors are the weight and the bias of one fully connected layer.

    Args:
        extra: The names of the tensors in this package.
        names: Names of this package, and those in the checkpoint.
        tensors: The tensors of the checkpoint.
    """
    paths = {name.rpartition(".")[0] for name in extra}
    if len(paths) != 1 or {name.rpartition(".")[2] for name in extra} != {"weight", "bias"}:
        return False
    return tensors[names[f"{paths.pop()}.weight"]].ndim == 2


def _and_more(names: Sequence[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""
