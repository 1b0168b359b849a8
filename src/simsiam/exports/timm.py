"""Format `timm`: a folder that timm loads from the disk or from the hub."""

import json
from dataclasses import replace
from math import nextafter
from pathlib import Path

import torch
from torch import nn

from simsiam.config.recipes import ResolvedRecipe
from simsiam.data.transform import Transform
from simsiam.errors import UsageError, WorkFailed
from simsiam.exports.format import (
    Format,
    Network,
    is_standard_backbone,
    missing_backbone,
    split_encoder,
)
from simsiam.model.backbones import RESNETS, TIMM_PREFIX, feature_dim
from simsiam.model.encoder import Encoder
from simsiam.runs.encoder import eval_transform
from simsiam.runs.run_folder import Run
from simsiam.runs.weight_files import save_weights


def write(network: nn.Module, run: Run, folder: Path) -> None:
    """Write config.json and model.safetensors; a head is the classifier in it.

    Args:
        network: The backbone, with a head or without.
        run: Its run.
        folder: Where to write.

    Raises:
        UsageError: timm has no such network, or none with a linear classifier for the head.
    """
    recipe, transform = run.recipe, eval_transform(run.recipe)
    if not is_in_timm(recipe):
        raise missing_backbone("timm", recipe)
    arguments = {"in_chans": recipe.channels} if recipe.channels != 3 else {}
    backbone, head = split_encoder(network)
    name = recipe.backbone.removeprefix(TIMM_PREFIX)
    state, num_classes, classifier = dict(backbone.state_dict()), 0, {}
    if head is not None:
        path, num_classes = find_classifier(name, feature_dim(backbone)), head.out_features
        state |= {f"{path}.{part}": tensor for part, tensor in head.state_dict().items()}
        classifier = {"classifier": path}
    fixed = bool(getattr(backbone, "pretrained_cfg", {}).get("fixed_input_size"))
    config = {
        "architecture": name,
        "num_classes": num_classes,
        "num_features": feature_dim(backbone),
        "model_args": arguments | ({"img_size": transform.size} if fixed else {}),
        "pretrained_cfg": {
            "input_size": [recipe.channels, transform.size, transform.size],
            "interpolation": transform.interpolation,
            "crop_pct": crop_fraction(transform),
            "crop_mode": "center",
            "mean": list(transform.mean),
            "std": list(transform.std),
            "fixed_input_size": fixed,
            "num_classes": num_classes,
            **classifier,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    save_weights(state, folder / "model.safetensors", {"format": "pt"})


def reload(folder: Path, recipe: ResolvedRecipe) -> Network:
    """Load the network with timm.

    Args:
        folder: What `write` wrote.
        recipe: The recipe of the run.

    Raises:
        WorkFailed: timm would prepare images differently.
    """
    import timm

    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(network)
    transform = eval_transform(recipe)
    size, resize = config["input_size"][1], int(config["input_size"][1] / config["crop_pct"])
    theirs = Transform(
        size, tuple(config["mean"]), tuple(config["std"]), config["interpolation"], resize
    )
    if theirs != replace(transform, shorter_side=transform.resize):
        raise WorkFailed(f"not kept: timm would prepare images differently: {config}")
    return network


def crop_fraction(transform: Transform) -> float:
    """Compute timm's crop_pct: timm resizes the shorter side to floor(size / crop_pct).

    Args:
        transform: The preprocessing.
    """
    fraction = transform.size / transform.resize
    while int(transform.size / fraction) < transform.resize:  # the division was rounded up
        fraction = nextafter(fraction, 0)
    return fraction


def find_classifier(name: str, dim: int) -> str:
    """Find the name of the linear classifier of a model of timm.

    Args:
        name: The model.
        dim: The width of its features.

    Returns:
        The name of the module.

    Raises:
        UsageError: The model has another kind of classifier.
    """
    import timm

    with torch.device("meta"):
        bare = timm.create_model(name, num_classes=0).state_dict()
        extra = {
            key: tensor.shape
            for key, tensor in timm.create_model(name, num_classes=7).state_dict().items()
            if key not in bare
        }
    path = next(iter(extra), "").rpartition(".")[0]
    if extra != {f"{path}.weight": (7, dim), f"{path}.bias": (7,)}:
        raise UsageError(
            f"timm's {name} has no linear classifier to hold the head: use safetensors, onnx, "
            "torch_export or huggingface"
        )
    return path


def holds(network: nn.Module, recipe: ResolvedRecipe) -> bool:
    """Tell whether timm has the network, with a classifier for its head.

    Args:
        network: The backbone or encoder.
        recipe: The recipe of the run.
    """
    if not is_in_timm(recipe):
        return False
    if not isinstance(network, Encoder):
        return True
    try:
        find_classifier(recipe.backbone.removeprefix(TIMM_PREFIX), feature_dim(network.backbone))
    except UsageError:
        return False
    return network.patches is None and network.head is not None


def is_in_timm(recipe: ResolvedRecipe) -> bool:
    """Tell whether timm has the network. Its ResNets have the same parameters as torchvision's.

    Args:
        recipe: The recipe of the run.
    """
    import timm

    name = recipe.backbone
    is_resnet = name in RESNETS and name in timm.list_models() and is_standard_backbone(recipe)
    return is_resnet or name.startswith(TIMM_PREFIX)


FORMAT = Format(
    write, reload, 'timm.create_model("local-dir:{path}", pretrained=True)', holds="head"
)
