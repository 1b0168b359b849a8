"""Other people's checkpoints, recognized by the names and shapes of their tensors and renamed into ours.

Each tensor is placed or left over by name; one that is missing, extra, of another shape or not finite is an error. A
layout is the prefixes under which a program keeps the parts of its model, and they were read in the programs' code:

- facebookresearch/simsiam, simsiam/builder.py: the projector stands inside `encoder.fc`; its output layer has a bias
  without gradient, before a batch norm without affine.
- facebookresearch/moco, moco/builder.py: `encoder_q` is trained, `encoder_k` its slow copy; no batch norm in `fc`.
- lightly-ai/lightly, examples/pytorch_lightning/simsiam.py: the backbone is a Sequential of a ResNet's children, so
  its parts have numbers; lightly/models/simsiam.py, which is older, has other names for the heads.
- open-mmlab/mmselfsup, models/necks/nonlinear_neck.py and models/heads/latent_pred_head.py: fc0, bn0, fc1, bn1, ...
- PatrickHua/SimSiam, models/simsiam.py: backbone and projector are stored twice, every layer has a bias, and a
  projector of two layers keeps an unused `layer2`; models/backbones/cifar_resnet_2.py says shortcut for downsample.
- vturrisi/solo-learn, solo/methods/simsiam.py and base.py: `backbone` was once `encoder`. Our own last.pt is alike.
- pytorch/vision, torchvision/models/resnet.py, and huggingface/pytorch-image-models, timm/models/resnet.py: the same
  names; a classifier is left over.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

from simsiam.config.method import HeadBN
from simsiam.config.methods import METHODS, Method
from simsiam.errors import UsageError
from simsiam.model.backbones import RESNETS, create_backbone, feature_dim
from simsiam.model.heads import build_predictor, build_projector
from simsiam.runs.published_weights import resolve_checkpoint
from simsiam.runs.weight_files import read_state_dict


class Layout(NamedTuple):
    """A program's prefixes; "" for a head that it does not have. Without heads a classifier may follow the backbone."""

    program: str
    backbone: str
    projector: str = ""
    predictor: str = ""
    method: str = "simsiam"
    bias_before_bn: Literal["no", "out", "all"] = (
        "no"  # layers that have a bias before a batch norm, for certain
    )
    tied_prefixes: tuple[tuple[str, str], ...] = ()  # (prefix, prefix of the same tensors)

    @property
    def heads(self) -> dict[str, str]:
        return {
            k: v for k, v in {"projector": self.projector, "predictor": self.predictor}.items() if v
        }


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
RESNET_CHILDREN = {
    "0": "conv1",
    "1": "bn1",
    "4": "layer1",
    "5": "layer2",
    "6": "layer3",
    "7": "layer4",
}  # of a ResNet


class ConvertedCheckpoint(NamedTuple):
    """A checkpoint in our words."""

    layout: Layout
    settings: dict[str, Any]  # of a recipe: backbone, width, stem
    method: Method
    model_state: dict[
        str, Tensor
    ]  # by the names of Siamese's state dict, as far as the checkpoint goes
    absorbed_biases: list[str]  # biases that went into the batch norm behind them
    unused_keys: list[str]


class ParsedHead(NamedTuple):
    """An MLP: our names to the checkpoint's, and what the shapes say."""

    names: dict[str, str]
    widths: list[int]
    has_bn: list[bool]  # behind each layer
    last_bn_affine: bool  # of the last batch norm
    biases: dict[str, str]  # running means to the biases that they absorb


def load_backbone_weights(name_or_path: str | os.PathLike[str], network: str) -> dict[str, Tensor]:
    """The backbone, named `network`, in a published release, a run folder or a checkpoint; heads are set aside."""
    tensors, _ = read_state_dict(resolve_checkpoint(name_or_path)[0])
    try:
        model = convert_state_dict(tensors, network).model_state
    except UsageError as error:
        raise UsageError(f"{name_or_path}: {error}") from None
    return {
        name.removeprefix("backbone."): v
        for name, v in model.items()
        if name.startswith("backbone.")
    }


def convert_state_dict(
    tensors: Mapping[str, Tensor], network: str | None = None
) -> ConvertedCheckpoint:
    """The model that a checkpoint's tensors make. Raises UsageError.

    A ResNet's depth, width and stem are read from the shapes; any other `network` is given by name.
    """
    tensors = strip_wrapper_prefixes(tensors)
    layout = detect_layout(tensors)
    copies = tied_names(tensors, layout)
    names = map_backbone_names(tensors, layout)
    words = {"backbone": network, "width": 64, "stem": None}
    if network is None or network in RESNETS:
        words = detect_resnet(names, tensors)
        if network not in (None, words["backbone"]):
            raise UsageError(f"its backbone is a {words['backbone']}, not a {network}")
    heads = {part: parse_head(tensors, prefix) for part, prefix in layout.heads.items()}
    method = method_from_heads(layout, heads)

    names = {f"backbone.{ours}": name for ours, name in names.items()}
    names |= {
        f"{part}.{ours}": name for part, head in heads.items() for ours, name in head.names.items()
    }
    biases = {
        f"{part}.{mean}": bias for part, head in heads.items() for mean, bias in head.biases.items()
    }
    expected = expected_state_dict(words, method, heads)
    if not heads and is_classifier(extra := names.keys() - expected.keys(), names, tensors):
        names = {ours: name for ours, name in names.items() if ours not in extra}
    least = {"no": 0, "out": 1, "all": sum(sum(head.has_bn) for head in heads.values())}[
        layout.bias_before_bn
    ]
    if len(biases) < least:  # without it the running mean behind it would be off
        raise UsageError(
            f"{layout.program} has {least} biases before batch norms, here are {len(biases)}"
        )
    model = match_state_dict(
        names, tensors, expected, f"{words['backbone']}, width {words['width']}"
    )
    for mean, bias in biases.items():
        if tensors[bias].shape != model[mean].shape:
            raise UsageError(
                f"{bias} is {_format_shape(tensors[bias])} before a batch norm of {_format_shape(model[mean])}"
            )
        # With m as running mean BN(Wx + b) is BN(Wx) with m - b; in training mode the batch's mean takes b away.
        model[mean] = (model[mean].double() - tensors[bias].double()).to(model[mean].dtype)
    placed = {*names.values(), *biases.values()}
    for name in placed:
        if tensors[name].is_floating_point() and not tensors[name].isfinite().all():
            raise UsageError(f"{name} has values that are not finite")
    placed |= {copy for copy, first in copies.items() if first in placed}
    return ConvertedCheckpoint(
        layout,
        words,
        method,
        model,
        list(biases.values()),
        [name for name in tensors if name not in placed],
    )


# --- names ------------------------------------------------------------------------------------------------------------


def strip_wrapper_prefixes(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Without the prefix that a wrapper around the whole model gives all names."""
    for wrapper in WRAPPER_PREFIXES:
        if all(name.startswith(wrapper) for name in tensors):
            return strip_wrapper_prefixes(
                {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
            )
    return tensors


def detect_layout(tensors: Mapping[str, Tensor]) -> Layout:
    def occur(prefixes: Sequence[str]) -> bool:
        return all(any(name.startswith(prefix) for name in tensors) for prefix in prefixes)

    return next(
        x
        for x in LAYOUTS
        if occur([x.backbone, *x.heads.values(), *(prefix for prefix, _ in x.tied_prefixes)])
    )


def tied_names(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, str]:
    """Names under which the layout stores a tensor again, to its first. Raises UsageError where the two differ."""
    copies: dict[str, str] = {}
    for prefix, of in layout.tied_prefixes:
        first = {name.removeprefix(of) for name in tensors if name.startswith(of)}
        second = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
        for name in sorted(first | second):
            if name not in first & second or not torch.equal(
                tensors[of + name], tensors[prefix + name]
            ):
                raise UsageError(
                    f"{of}{name} and {prefix}{name} are one tensor in this layout, and differ here"
                )
        copies |= {prefix + name: of + name for name in second}
    return copies


def map_backbone_names(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, str]:
    """torchvision's names to the checkpoint's."""
    names = {
        name.removeprefix(layout.backbone): name
        for name in tensors
        if name.startswith(layout.backbone)
        and not (layout.projector and name.startswith(layout.projector))
    }
    children = dict.fromkeys(name.split(".")[0] for name in names)
    if children and all(child.isdigit() for child in children):
        if set(children) != set(
            RESNET_CHILDREN
        ):  # in lightly's ResNetGenerator they are 0 to 5, and a ReLU gets lost
            given, known = ", ".join(children), ", ".join(RESNET_CHILDREN)
            raise UsageError(
                f"the backbone's weights are children {given} of a Sequential, and a ResNet's are {known}"
            )
        names = {
            re.sub(r"^\d+", lambda child: RESNET_CHILDREN[child[0]], ours): name
            for ours, name in names.items()
        }
    return {ours.replace(".shortcut.", ".downsample."): name for ours, name in names.items()}


def parse_head(tensors: Mapping[str, Tensor], prefix: str) -> ParsedHead:
    """The MLP under a prefix, whatever its modules are called: layers and batch norms in the order of their numbers."""
    modules: dict[str, dict[str, str]] = {}
    for name in tensors:
        if name.startswith(prefix):
            path, _, leaf = name.rpartition(".")
            modules.setdefault(path, {})[leaf] = name

    def order(
        path: str,
    ) -> tuple[list[int], bool]:  # fc0 and bn0 share a number: the batch norm comes second
        return [int(n) for n in re.findall(r"\d+", path[len(prefix) :])], "running_mean" in modules[
            path
        ]

    layers: list[
        tuple[dict[str, str], dict[str, str]]
    ] = []  # a fully-connected layer, and a batch norm or nothing
    for path in sorted(modules, key=order):
        module = modules[path]
        if "running_mean" in module and layers and not layers[-1][1]:
            layers[-1] = (layers[-1][0], module)
        elif "weight" in module and tensors[module["weight"]].ndim == 2:
            layers.append((module, {}))
        else:
            raise UsageError(
                f"{path} is neither a fully-connected layer nor a batch norm behind one"
            )
    # A batch norm that saw no batch where others did is no part of the network (PatrickHua's layer2).
    used = [
        bool(tensors[bn["num_batches_tracked"]].any()) if "num_batches_tracked" in bn else None
        for _, bn in layers
    ]
    layers = [layer for layer, seen in zip(layers, used) if seen is not False or True not in used]

    names: dict[str, str] = {}
    biases: dict[str, str] = {}
    at = 0
    for fc, bn in layers:
        if bn and "bias" in fc:
            biases[f"{at + 1}.running_mean"] = fc["bias"]
        names |= {f"{at}.{leaf}": name for leaf, name in fc.items() if not bn or leaf != "bias"}
        names |= {f"{at + 1}.{leaf}": name for leaf, name in bn.items()}
        at += 3 if bn else 2  # the ReLU has a number too
    shapes = [tensors[fc["weight"]].shape for fc, _ in layers]
    widths = [shapes[0][1], *(shape[0] for shape in shapes)]
    return ParsedHead(
        names, widths, [bool(bn) for _, bn in layers], "weight" in layers[-1][1], biases
    )


# --- shapes -----------------------------------------------------------------------------------------------------------


def detect_resnet(names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """backbone, width and stem of the ResNet with these tensors. Raises UsageError where it is none."""
    stages = [
        len({name.split(".")[1] for name in names if name.startswith(f"layer{i}.")})
        for i in (1, 2, 3, 4)
    ]
    block = Bottleneck if "layer1.0.conv3.weight" in names else BasicBlock
    found = next((name for name, shape in RESNETS.items() if shape == (block, stages)), None)
    stem = tensors[names["conv1.weight"]].shape if "conv1.weight" in names else ()
    if found is None or len(stem) != 4:
        programs = ", ".join(dict.fromkeys(layout.program for layout in LAYOUTS))
        held = ", ".join(dict.fromkeys(name.split(".")[0] for name in tensors))
        raise UsageError(
            f"no ResNet as {programs} store it; its tensors are in {held[:160]}; name other networks by --backbone"
        )
    return {"backbone": found, "width": stem[0], "stem": "small" if stem[2] == 3 else "large"}


def method_from_heads(layout: Layout, heads: Mapping[str, ParsedHead]) -> Method:
    """SimSiam's row, called as the layout's method, with the heads that the shapes say; without heads it is "none".

    Only its heads are the layout's: a converted MoCo has no key encoder and no queue, so its training cannot go on.
    """
    row = replace(METHODS["simsiam"], name=layout.method)
    if not heads:
        return row
    f, h = heads["projector"], heads.get("predictor")
    hidden = set(zip(f.widths[1:-1], f.has_bn[:-1]))
    if len(hidden) > 1 or (h and len(h.has_bn) != 2):
        widths = ["-".join(map(str, head.widths)) for head in heads.values()]
        raise UsageError(
            f"no method has such heads: layers of {' and '.join(widths)}, batch norm after some"
        )
    norms: dict[HeadBN, bool] = {"proj_hidden": any(f.has_bn[:-1]), "proj_out": f.has_bn[-1]}
    cells: dict[str, Any] = {
        "dim": f.widths[-1],
        "proj_layers": len(f.has_bn),
        "output_bn_affine": f.last_bn_affine,
    }
    for width, _ in hidden:
        cells["proj_hidden"] = width
    cells["predictor"] = "none"
    if h:
        norms |= {"pred_hidden": h.has_bn[0], "pred_out": h.has_bn[1]}
        cells |= {"predictor": "mlp", "pred_dim": h.widths[1]}
    return replace(row, head_bn=tuple(name for name, there in norms.items() if there), **cells)


def expected_state_dict(
    settings: Mapping[str, Any], method: Method, heads: Mapping[str, ParsedHead]
) -> dict[str, Tensor]:
    """The names and shapes of a model, without numbers."""
    with torch.device("meta"):
        bare = create_backbone(
            settings["backbone"], image_size=224, width=settings["width"], stem=settings["stem"]
        )
        parts = {"backbone": bare}
        if heads:
            parts |= {
                "projector": build_projector(method, feature_dim(bare)),
                "predictor": build_predictor(method),
            }
        return {
            f"{part}.{name}": v
            for part, module in parts.items()
            for name, v in module.state_dict().items()
        }


def match_state_dict(
    names: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    network: str,
) -> dict[str, Tensor]:
    """The expected tensors by our names. Raises UsageError where one is missing, extra or misshapen."""
    if extra := [name for ours, name in names.items() if ours not in expected]:
        raise UsageError(f"{extra[0]} has no place in {network}{_and_more(extra)}")
    counters = {
        name: torch.tensor(0) for name in expected if name.endswith(".num_batches_tracked")
    }  # new in torch 0.4
    if missing := [name for name in expected if name not in names and name not in counters]:
        raise UsageError(f"{missing[0]} of {network} is missing{_and_more(missing)}")
    model = {ours: tensors[names[ours]] if ours in names else counters[ours] for ours in expected}
    for ours, tensor in model.items():
        if tensor.shape != expected[ours].shape:
            raise UsageError(
                f"{names[ours]} is {_format_shape(tensor)}; {network} has {_format_shape(expected[ours])}"
            )
    return model


def is_classifier(extra: set[str], names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the weight and the bias of one fully-connected layer."""
    paths = {name.rpartition(".")[0] for name in extra}
    if len(paths) != 1 or {name.rpartition(".")[2] for name in extra} != {"weight", "bias"}:
        return False
    return tensors[names[f"{paths.pop()}.weight"]].ndim == 2


def _and_more(names: Sequence[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def _format_shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
