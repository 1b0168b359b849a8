"""Layouts: how programs name the parts of a model in their checkpoints.

A layout consists of the prefixes under which a program stores the parts of its model. They were
taken from the code of the programs:

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
- facebookresearch/moco-v3, moco/builder.py and vits.py: `base_encoder` is trained; the projector
  replaces its `fc`, or the `head` of a ViT. Its ViT-Small has twice the heads of timm's.
- facebookresearch/swav, src/resnet50.py: `projection_head` and `prototypes` are beside the layers
  of the backbone.
- facebookresearch/barlowtwins, main.py, and facebookresearch/vicreg, main_vicreg.py: `backbone` and
  `projector`, whose last layer has no bias; `bn` belongs to the loss of Barlow Twins.
- facebookresearch/dino, main_dino.py and vision_transformer.py: student and teacher have `backbone`
  and `head`, a projector with GELU and normalized weights, which no method here has.
- pytorch/vision, torchvision/models/resnet.py, and huggingface/pytorch-image-models,
  timm/models/resnet.py: the same names; a classifier is left over.

Whatever prefix a program puts before all of this is taken off, such as `model.`, `student.` or
`teacher.`. If no layout fits, the backbone is placed and everything else is left over.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from simsiam.errors import UsageError


class Layout(NamedTuple):
    """How a program names the parts of its model.

    Attributes:
        program: The name of the program.
        backbone: The prefix of the backbone.
        projector: The prefix of the projector; "" if there is none, or none that a method here has.
        predictor: The prefix of the predictor; "" if there is none.
        method: The name of the method; "none" if it is unknown or not one of these.
        bias_before_bn: The layers that must have a bias before a batch norm: "no" layer, the "out"
            layer of the projector, or "all" layers.
        tied_prefixes: Pairs of prefixes under which the same tensors are stored: the copy first.
        also: Other prefixes that occur.
        out_bias: Whether the last layer of the projector has a bias, if no batch norm follows it.
        exact: Whether the heads are those of one program. Others may have any form, and are left
            over if no method here has it.
    """

    program: str
    backbone: str
    projector: str = ""
    predictor: str = ""
    method: str = "simsiam"
    bias_before_bn: Literal["no", "out", "all"] = "no"
    tied_prefixes: tuple[tuple[str, str], ...] = ()
    also: tuple[str, ...] = ()
    out_bias: bool = True
    exact: bool = True

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
    # Without predictor
    Layout("MoCo v3", "base_encoder.", "base_encoder.fc.", method="none", also=("predictor.",)),
    Layout("MoCo v3", "base_encoder.", "base_encoder.head.", method="none", also=("predictor.",)),
    Layout(
        "SwAV", "", "projection_head.", method="swav", bias_before_bn="all", also=("prototypes.",)
    ),
    Layout(
        "Barlow Twins", "backbone.", "projector.", method="barlow_twins", also=("bn.",),
        out_bias=False,
    ),
    Layout("DINO", "backbone.", method="none", also=("head.last_layer.",)),
    # Of several methods
    Layout("lightly", "backbone.", "projection_head.", method="none", exact=False),
    Layout("lightly", "backbone.", "projection_mlp.", method="none", exact=False),
    Layout("mmselfsup", "backbone.", "neck.", method="none", exact=False),
    Layout("solo-learn or VICReg", "backbone.", "projector.", method="none", exact=False),
    Layout("solo-learn", "encoder.", "projector.", method="none", exact=False),
    Layout("torchvision or timm", "", method="none"),
)  # fmt: skip
# What wrappers add to names: DistributedDataParallel and AveragedModel, torch.compile, FSDP.
WRAPPERS = r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_forward_module)\."
# Two tensors of a ResNet, as torchvision and as a Sequential of its children name them. By either
# a backbone is found, so that an incomplete one is not passed over for a copy.
RESNET_ANCHORS = (
    "layer1.0.conv1.weight", "layer4.0.conv1.weight", "4.0.conv1.weight", "7.0.conv1.weight",
)  # fmt: skip
# The children of a ResNet that have weights, by their position.
RESNET_CHILDREN = {
    "0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4",
}  # fmt: skip


def strip_wrappers(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Remove what wrappers around a model or a part of it add to names.

    Args:
        tensors: The tensors of the checkpoint.

    Returns:
        The same tensors; under the same names if two would have one name without wrappers.
    """
    names = {re.sub(WRAPPERS, "", name): tensor for name, tensor in tensors.items()}
    return names if len(names) == len(tensors) else tensors


def find_backbones(
    tensors: Mapping[str, Tensor], reference: Mapping[str, Tensor] | None
) -> list[str]:
    """Find the prefixes under which there is a backbone.

    Args:
        tensors: The tensors of the checkpoint.
        reference: The state dict of the network; None for a ResNet.

    Returns:
        The prefixes in the order of the tensors, but those of a teacher first.
    """
    anchors: tuple[str, ...] = RESNET_ANCHORS
    if reference is not None:
        by_depth = sorted(reference, key=lambda name: name.count("."))
        anchors = tuple(by_depth[-2:])
    prefixes = [
        name.removesuffix(anchor)
        for anchor in anchors
        for name in tensors
        if f".{name}".endswith(f".{anchor}")
    ]
    return sorted(dict.fromkeys(prefixes), key=lambda prefix: "teacher" not in prefix)


def detect_layout(tensors: Mapping[str, Tensor], prefixes: Sequence[str]) -> tuple[Layout, str]:
    """Find the first layout whose prefixes all occur, the one of the backbone among those found.

    Args:
        tensors: The tensors of the checkpoint.
        prefixes: The prefixes of its backbones; if there are none, its backbone is incomplete, and
            an error will say what is missing.

    Returns:
        The layout, and the prefix before its names; the last layout always fits.
    """
    for layout in LAYOUTS:
        parts = [*layout.heads.values(), *(copy for copy, _ in layout.tied_prefixes), *layout.also]
        for prefix in prefixes or [layout.backbone]:
            outer = prefix.removesuffix(layout.backbone)
            if outer + layout.backbone == prefix and f".{outer}".endswith("."):
                needed = [prefix, *(outer + part for part in parts)]
                if all(any(name.startswith(part) for name in tensors) for part in needed):
                    return layout, outer
    return LAYOUTS[-1], ""


def describe_prefix(layout: Layout, outer: str, prefixes: Sequence[str]) -> list[str]:
    """Say which prefix was taken off, and which of several backbones was taken.

    Args:
        layout: The layout.
        outer: The prefix before its names.
        prefixes: The prefixes of all backbones in the checkpoint.

    Returns:
        Notes.
    """
    notes = [f"the prefix {outer} was taken off"] if outer else []
    others = [prefix for prefix in prefixes if prefix != outer + layout.backbone]
    if others and not layout.heads:
        taken = (outer + layout.backbone) or "the names without prefix"
        notes.append(f"of several backbones, that under {taken} is taken, not {', '.join(others)}")
    return notes


def check_attention(layout: Layout, network: str) -> None:
    """Refuse weights that fit another network whose features are wrong with them.

    Args:
        layout: The layout.
        network: The name of the backbone.

    Raises:
        UsageError: It is MoCo v3's ViT-Small, whose attention has twice the heads of timm's; the
            shapes of their tensors are equal.
    """
    if layout.program == "MoCo v3" and "vit_small" in network:
        raise UsageError(
            f"MoCo v3's ViT-Small has 12 attention heads and {network} has 6: with equal shapes, "
            "its features would be wrong"
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
    # In lightly's ResNetGenerator they are 0 to 5; converting that would lose a ReLU.
    if not RESNET_CHILDREN.keys() <= children.keys():
        if children and all(child.isdigit() for child in children):
            raise UsageError(
                f"the backbone's weights are children {', '.join(children)} of a Sequential, and "
                f"a ResNet's are {', '.join(RESNET_CHILDREN)}"
            )
    else:
        names = {
            re.sub(r"^\d+", lambda child: RESNET_CHILDREN.get(child[0], child[0]), name): key
            for name, key in names.items()
        }
    return {name.replace(".shortcut.", ".downsample."): key for name, key in names.items()}
