"""Format `timm`: a folder that timm loads from the disk or from the hub."""

import json
from dataclasses import replace
from math import nextafter
from pathlib import Path

from torch import nn

from simsiam.config.recipes import ResolvedRecipe
from simsiam.data.transform import Transform
from simsiam.errors import WorkFailed
from simsiam.exports.format import Format, Network, is_standard_backbone, missing_backbone
from simsiam.model.backbones import RESNETS, TIMM_PREFIX
from simsiam.runs.encoder import eval_transform
from simsiam.runs.run_folder import Run
from simsiam.runs.weight_files import save_weights


def write(network: nn.Module, run: Run, folder: Path) -> None:
    """Write config.json and model.safetensors.

    Args:
        network: The backbone.
        run: Its run.
        folder: Where to write.

    Raises:
        UsageError: timm has no such network.
    """
    recipe, transform = run.recipe, eval_transform(run.recipe)
    if not is_in_timm(recipe):
        raise missing_backbone("timm", recipe)
    arguments = {"in_chans": recipe.channels} if recipe.channels != 3 else {}
    fixed = bool(getattr(network, "pretrained_cfg", {}).get("fixed_input_size"))
    config = {
        "architecture": recipe.backbone.removeprefix(TIMM_PREFIX),
        "num_classes": 0,
        "num_features": network.dim,
        "model_args": arguments | ({"img_size": transform.size} if fixed else {}),
        "pretrained_cfg": {
            "input_size": [recipe.channels, transform.size, transform.size],
            "interpolation": transform.interpolation,
            "crop_pct": crop_fraction(transform),
            "crop_mode": "center",
            "mean": list(transform.mean),
            "std": list(transform.std),
            "fixed_input_size": fixed,
            "num_classes": 0,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_weights(network.state_dict(), folder / "model.safetensors", {"format": "pt"})


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


def is_in_timm(recipe: ResolvedRecipe) -> bool:
    """Tell whether timm has the network. Its ResNets have the same parameters as torchvision's.

    Args:
        recipe: The recipe of the run.
    """
    import timm

    name = recipe.backbone
    is_resnet = name in RESNETS and name in timm.list_models() and is_standard_backbone(recipe)
    return is_resnet or name.startswith(TIMM_PREFIX)


FORMAT = Format(write, reload, 'timm.create_model("local-dir:{path}", pretrained=True)')
