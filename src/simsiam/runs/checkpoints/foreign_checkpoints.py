"""Checkpoints of other programs: recognized by their tensors, and renamed.

A checkpoint is recognized by the names and shapes of its tensors. Each tensor is used or left over,
depending on its name. A tensor that is missing, extra, of the wrong shape, or not finite is an
error. A layout consists of the prefixes under which a program stores the parts of its model. They
were taken from the code of the programs:

- facebookresearch/simsiam, simsiam/builder.py: the projector is in `encoder.fc`; its output layer
  has a bias without gradient, before a batch norm without affine parameters.
- facebookresearch/moco, moco/builder.py: `encoder_q` is trained, `encoder_k` is its slow copy; `fc`
  has no batch norm.
- lightly-ai/lightly, examples/pytorch_lightning/simsiam.py: the backbone is a Sequential of the
  children of a ResNet, so its parts have numbers. lightly/models/simsiam.py, which is older, has
  other names for the heads.
- open-mmlab/mmselfsup, models/necks/nonlinear_neck.py and models/heads/latent_pred_head.py: fc0,
  bn0, fc1, bn1, ...
- PatrickHua/SimSiam, models/simsiam.py: backbone and projector are stored twice, every layer has a
  bias, and a projector of two layers keeps an unused `layer2`. models/backbones/cifar_resnet_2.py
  calls the downsampling path shortcut.
- vturrisi/solo-learn, solo/methods/simsiam.py and base.py: `backbone` was called `encoder` in older
  versions. The checkpoints of this package have the same layout.
- pytorch/vision, torchvision/models/resnet.py, and huggingface/pytorch-image-models,
  timm/models/resnet.py: the same names; a classifier is left over.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, TypedDict

import torch
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

from simsiam.config.method import HeadBN
from simsiam.config.methods import METHODS, Method
from simsiam.errors import UsageError
from simsiam.model.backbones import RESNETS, create_backbone, feature_dim, input_size
from simsiam.model.heads import build_predictor, build_projector


class Layout(NamedTuple):
    """How a program names the parts of its model.

    Attributes:
        program: The name of the program.
        backbone: The prefix of the backbone.
        projector: The prefix of the projector; "" if there is none. Without heads, a classifier may
            follow the backbone.
        predictor: The prefix of the predictor; "" if there is none.
        method: The name of the method.
        bias_before_bn: The layers that must have a bias before a batch norm: "no" layer, the "out"
            layer of the projector, or "all" layers.
        tied_prefixes: Pairs of prefixes under which the same tensors are stored: the copy first.
    """

    program: str
    backbone: str
    projector: str = ""
    predictor: str = ""
    method: str = "simsiam"
    bias_before_bn: Literal["no", "out", "all"] = "no"
    tied_prefixes: tuple[tuple[str, str], ...] = ()

    @property
    def heads(self) -> dict[str, str]:
        """The prefixes of the heads that there are, by the name of the head."""
        heads = {"projector": self.projector, "predictor": self.predictor}
        return {name: prefix for name, prefix in heads.items() if prefix}


# A checkpoint has the first layout whose prefixes all occur.
LAYOUTS = (
    Layout("the authors' SimSiam", "encoder.", "encoder.fc.", "predictor.", bias_before_bn="out"),
    Layout("MoCo", "encoder_q.", "encoder_q.fc.", method="moco_v2"),
    Layout("lightly", "backbone.", "projection_head.", "prediction_head."),
    Layout("lightly", "backbone.", "projection_mlp.", "prediction_mlp."),
    Layout("mmselfsup", "backbone.", "neck.", "head.predictor."),
    Layout(
        "PatrickHua's SimSiam", "backbone.", "projector.", "predictor.", bias_before_bn="all",
        tied_prefixes=(("encoder.0.", "backbone."), ("encoder.1.", "projector.")),
    ),
    Layout("solo-learn", "backbone.", "projector.", "predictor."),
    Layout("solo-learn", "encoder.", "projector.", "predictor."),
    Layout("torchvision or timm", "", method="none"),
)  # fmt: skip
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel's and torch.compile's
# The children of a ResNet that have weights, by their position.
RESNET_CHILDREN = {
    "0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4",
}  # fmt: skip


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
    """

    layout: Layout
    settings: BackboneSettings
    method: Method
    model_state: dict[str, Tensor]
    absorbed_biases: list[str]
    unused_keys: list[str]


class ParsedHead(NamedTuple):
    """An MLP in a checkpoint.

    Attributes:
        names: The names of this package, and the checkpoint's for each.
        widths: The dimensions of its input and of each layer's output.
        has_bn: Whether a batch norm follows, for each layer.
        last_bn_affine: Whether the last batch norm has affine parameters.
        biases: Names of running means, and the bias that each absorbs.
    """

    names: dict[str, str]
    widths: list[int]
    has_bn: list[bool]
    last_bn_affine: bool
    biases: dict[str, str]


def convert_state_dict(
    tensors: Mapping[str, Tensor],
    network: str | None = None,
    *,
    image_size: int | None = None,
    channels: int = 3,
) -> ConvertedCheckpoint:
    """Recognize and rename the model in a state dict.

    Args:
        tensors: The tensors of the checkpoint.
        network: The name of the backbone. It is not needed for a ResNet, whose depth, width and
            stem are read from the shapes.
        image_size: Side of its images in pixels, for networks whose tensors depend on it; None
            takes the size that the network was designed for.
        channels: Channels of an image.

    Returns:
        The model, and what became of every tensor.

    Raises:
        UsageError: A tensor is missing, extra, of the wrong shape or not finite, or no layout fits.
    """
    tensors = strip_wrapper_prefixes(tensors)
    layout = detect_layout(tensors)
    copies = tied_names(tensors, layout)
    backbone_names = map_backbone_names(tensors, layout)
    if network is None or network in RESNETS:
        settings = detect_resnet(backbone_names, tensors)
        if network not in (None, settings["backbone"]):
            raise UsageError(f"its backbone is a {settings['backbone']}, not a {network}")
    else:
        settings = {"backbone": network, "width": 64, "stem": None}
    heads = {part: parse_head(tensors, prefix) for part, prefix in layout.heads.items()}
    method = method_from_heads(layout, heads)

    names = {f"backbone.{name}": key for name, key in backbone_names.items()}
    biases: dict[str, str] = {}
    for part, head in heads.items():
        names |= {f"{part}.{name}": key for name, key in head.names.items()}
        biases |= {f"{part}.{mean}": key for mean, key in head.biases.items()}
    expected = expected_state_dict(settings, method, heads, image_size, channels)
    if not heads and is_classifier(extra := names.keys() - expected.keys(), names, tensors):
        names = {name: key for name, key in names.items() if name not in extra}
    check_biases(layout, heads, biases)
    description = f"{settings['backbone']}, width {settings['width']}"
    model_state = match_state_dict(names, tensors, expected, description)
    absorb_biases(model_state, biases, tensors)

    used = {*names.values(), *biases.values()}
    for key in used:
        if tensors[key].is_floating_point() and not tensors[key].isfinite().all():
            raise UsageError(f"{key} has values that are not finite")
    used |= {copy for copy, original in copies.items() if original in used}
    unused = [key for key in tensors if key not in used]
    return ConvertedCheckpoint(layout, settings, method, model_state, list(biases.values()), unused)


def check_biases(
    layout: Layout, heads: Mapping[str, ParsedHead], biases: Mapping[str, str]
) -> None:
    """Check that the biases are there that the layout has before batch norms.

    Without such a bias, the running mean of the batch norm would be wrong.

    Args:
        layout: The layout.
        heads: The heads, by name.
        biases: The biases that were found before batch norms.

    Raises:
        UsageError: Some are missing.
    """
    num_norms = sum(sum(head.has_bn) for head in heads.values())
    required = {"no": 0, "out": 1, "all": num_norms}[layout.bias_before_bn]
    if len(biases) < required:
        raise UsageError(
            f"{layout.program} has {required} biases before batch norms, and here are {len(biases)}"
        )


def absorb_biases(
    model_state: dict[str, Tensor], biases: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> None:
    """Absorb biases into the running means of the batch norms after them.

    With running mean m, BN(Wx + b) equals BN(Wx) with running mean m - b; in training mode, the
    mean of the batch removes b.

    Args:
        model_state: The renamed state dict, which is changed.
        biases: Names of running means in it, and the key of the bias that each absorbs.
        tensors: The tensors of the checkpoint.

    Raises:
        UsageError: A bias has another shape than the running mean.
    """
    for mean, key in biases.items():
        bias, running_mean = tensors[key], model_state[mean]
        if bias.shape != running_mean.shape:
            raise UsageError(
                f"{key} is {_format_shape(bias)} before a batch norm of "
                f"{_format_shape(running_mean)}"
            )
        model_state[mean] = (running_mean.double() - bias.double()).to(running_mean.dtype)


# --- names ---


def strip_wrapper_prefixes(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Remove the prefixes that wrappers around the whole model give to all names.

    Args:
        tensors: The tensors of the checkpoint.

    Returns:
        The same tensors.
    """
    for prefix in WRAPPER_PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            return strip_wrapper_prefixes(
                {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
            )
    return tensors


def detect_layout(tensors: Mapping[str, Tensor]) -> Layout:
    """Find the first layout whose prefixes all occur; the last layout always fits.

    Args:
        tensors: The tensors of the checkpoint.

    Returns:
        The layout.
    """

    def occur(prefixes: Sequence[str]) -> bool:
        return all(any(name.startswith(prefix) for name in tensors) for prefix in prefixes)

    return next(
        layout
        for layout in LAYOUTS
        if occur(
            [
                layout.backbone,
                *layout.heads.values(),
                *(prefix for prefix, _ in layout.tied_prefixes),
            ]
        )
    )


def tied_names(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, str]:
    """Find the tensors that a layout stores twice.

    Args:
        tensors: The tensors of the checkpoint.
        layout: Its layout.

    Returns:
        The name of each copy, and of its original.

    Raises:
        UsageError: A copy is missing or differs from the original.
    """
    copies: dict[str, str] = {}
    for prefix, original in layout.tied_prefixes:
        first = {name.removeprefix(original) for name in tensors if name.startswith(original)}
        second = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
        for name in sorted(first | second):
            in_both = name in first & second
            if not in_both or not torch.equal(tensors[original + name], tensors[prefix + name]):
                raise UsageError(
                    f"{original}{name} and {prefix}{name} are one tensor in this layout, and "
                    "differ here"
                )
        copies |= {prefix + name: original + name for name in second}
    return copies


def map_backbone_names(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, str]:
    """Find the tensors of the backbone.

    Args:
        tensors: The tensors of the checkpoint.
        layout: Its layout.

    Returns:
        torchvision's name for each, and its name in the checkpoint.

    Raises:
        UsageError: The backbone is a Sequential, but not of a ResNet's children.
    """
    names = {
        name.removeprefix(layout.backbone): name
        for name in tensors
        if name.startswith(layout.backbone)
        and not (layout.projector and name.startswith(layout.projector))
    }
    children = dict.fromkeys(name.split(".")[0] for name in names)
    if children and all(child.isdigit() for child in children):
        # In lightly's ResNetGenerator they are 0 to 5; converting that would lose a ReLU.
        if set(children) != set(RESNET_CHILDREN):
            raise UsageError(
                f"the backbone's weights are children {', '.join(children)} of a Sequential, and "
                f"a ResNet's are {', '.join(RESNET_CHILDREN)}"
            )
        names = {
            re.sub(r"^\d+", lambda child: RESNET_CHILDREN[child[0]], name): key
            for name, key in names.items()
        }
    return {name.replace(".shortcut.", ".downsample."): key for name, key in names.items()}


def parse_head(tensors: Mapping[str, Tensor], prefix: str) -> ParsedHead:
    """Parse the MLP under a prefix: layers and batch norms in the order of the numbers in names.

    Args:
        tensors: The tensors of the checkpoint.
        prefix: The prefix of the head.

    Returns:
        Its tensors and dimensions.

    Raises:
        UsageError: It has a module that is neither a fully connected layer nor a batch norm.
    """
    layers = _used_layers(_pair_layers(tensors, prefix), tensors)
    names: dict[str, str] = {}
    biases: dict[str, str] = {}
    position = 0  # in the Sequential of this package
    for fc, bn in layers:
        if bn and "bias" in fc:
            biases[f"{position + 1}.running_mean"] = fc["bias"]
        names |= {
            f"{position}.{leaf}": name for leaf, name in fc.items() if not bn or leaf != "bias"
        }
        names |= {f"{position + 1}.{leaf}": name for leaf, name in bn.items()}
        position += 3 if bn else 2  # the ReLU has a position too
    shapes = [tensors[fc["weight"]].shape for fc, _ in layers]
    widths = [shapes[0][1], *(shape[0] for shape in shapes)]
    has_bn = [bool(bn) for _, bn in layers]
    return ParsedHead(names, widths, has_bn, "weight" in layers[-1][1], biases)


# The names of the tensors of a fully connected layer and of the batch norm after it, by what they
# are ("weight", "bias", ...); {} if there is no batch norm.
_Layer = tuple[dict[str, str], dict[str, str]]


def _pair_layers(tensors: Mapping[str, Tensor], prefix: str) -> list[_Layer]:
    """List the layers of a head in order, each with the batch norm after it."""
    modules: dict[str, dict[str, str]] = {}
    for name in tensors:
        if name.startswith(prefix):
            path, _, leaf = name.rpartition(".")
            modules.setdefault(path, {})[leaf] = name

    def order(path: str) -> tuple[list[int], bool]:
        # fc0 and bn0 have the same number: the batch norm is the second.
        numbers = [int(n) for n in re.findall(r"\d+", path[len(prefix) :])]
        return numbers, "running_mean" in modules[path]

    layers: list[_Layer] = []
    for path in sorted(modules, key=order):
        module = modules[path]
        if "running_mean" in module and layers and not layers[-1][1]:
            layers[-1] = (layers[-1][0], module)
        elif "weight" in module and tensors[module["weight"]].ndim == 2:
            layers.append((module, {}))
        else:
            raise UsageError(
                f"{path} is neither a fully connected layer nor a batch norm after one"
            )
    return layers


def _used_layers(layers: list[_Layer], tensors: Mapping[str, Tensor]) -> list[_Layer]:
    """Leave out layers that are stored but not part of the network (PatrickHua's layer2).

    Their batch norm has counted no batch, while that of another layer has.
    """
    counters = [
        bool(tensors[bn["num_batches_tracked"]].any()) if "num_batches_tracked" in bn else None
        for _, bn in layers
    ]
    if True not in counters:
        return layers
    return [layer for layer, counted in zip(layers, counters) if counted is not False]


# --- shapes ---


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


def method_from_heads(layout: Layout, heads: Mapping[str, ParsedHead]) -> Method:
    """Make a row of methods with the heads of a checkpoint.

    It is the row of SimSiam under the name of the layout's method. Only its heads come from the
    checkpoint: a converted MoCo has no key encoder and no queue, so its training cannot continue.

    Args:
        layout: The layout.
        heads: The heads, by name.

    Returns:
        The row; without heads, its name is "none".

    Raises:
        UsageError: No method can have such heads.
    """
    row = replace(METHODS["simsiam"], name=layout.method)
    if not heads:
        return row
    projector, predictor = heads["projector"], heads.get("predictor")
    hidden = set(zip(projector.widths[1:-1], projector.has_bn[:-1]))
    if len(hidden) > 1 or (predictor and len(predictor.has_bn) != 2):
        widths = ["-".join(map(str, head.widths)) for head in heads.values()]
        raise UsageError(
            f"no method has such heads: layers of {' and '.join(widths)}, batch norm after some"
        )
    has_bn: dict[HeadBN, bool] = {
        "proj_hidden": any(projector.has_bn[:-1]),
        "proj_out": projector.has_bn[-1],
    }
    row = replace(
        row,
        dim=projector.widths[-1],
        proj_layers=len(projector.has_bn),
        output_bn_affine=projector.last_bn_affine,
        predictor="none",
    )
    for width, _ in hidden:
        row = replace(row, proj_hidden=width)
    if predictor:
        has_bn |= {"pred_hidden": predictor.has_bn[0], "pred_out": predictor.has_bn[1]}
        row = replace(row, predictor="mlp", pred_dim=predictor.widths[1])
    return replace(row, head_bn=tuple(name for name, present in has_bn.items() if present))


def expected_state_dict(
    settings: BackboneSettings,
    method: Method,
    heads: Mapping[str, ParsedHead],
    image_size: int | None = None,
    channels: int = 3,
) -> dict[str, Tensor]:
    """Build the state dict that a model has, without numbers.

    Args:
        settings: The settings of the backbone.
        method: The method, for the heads.
        heads: The heads of the checkpoint; if there are none, the model has none.
        image_size: Side of an image in pixels; None takes that of the network's design.
        channels: Channels of an image.

    Returns:
        Tensors on the meta device.
    """
    name = settings["backbone"]
    with torch.device("meta"):
        backbone = create_backbone(
            name,
            image_size=image_size or input_size(name) or 224,
            width=settings["width"],
            stem=settings["stem"],
            channels=channels,
        )
        parts = {"backbone": backbone}
        if heads:
            parts["projector"] = build_projector(method, feature_dim(backbone))
            parts["predictor"] = build_predictor(method)
        return {
            f"{part}.{name}": tensor
            for part, module in parts.items()
            for name, tensor in module.state_dict().items()
        }


def match_state_dict(
    names: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    network: str,
) -> dict[str, Tensor]:
    """Rename the tensors of a checkpoint and check them against the expected ones.

    Args:
        names: Names of this package, and those in the checkpoint.
        tensors: The tensors of the checkpoint.
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
    state = {name: tensors[names[name]] if name in names else counters[name] for name in expected}
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise UsageError(
                f"{names[name]} is {_format_shape(tensor)}; {network} has "
                f"{_format_shape(expected[name])}"
            )
    return state


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


def _format_shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
