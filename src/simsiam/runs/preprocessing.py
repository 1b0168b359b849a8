"""The preprocessing that belongs to a backbone, and its description in files."""

import json
from collections.abc import Mapping
from typing import cast

from simsiam.config.recipes import Recipe, ResolvedRecipe
from simsiam.data.decode import PIL_MODES
from simsiam.data.transform import Transform
from simsiam.errors import UsageError
from simsiam.utils.typed_json import parse_json


def eval_transform(recipe: ResolvedRecipe) -> Transform:
    """Make the preprocessing that belongs to the backbone of a run.

    Args:
        recipe: The recipe of the run.
    """
    return Transform(
        recipe.image_size,
        recipe.mean,
        recipe.std,
        interpolation=recipe.eval_interpolation,
        shorter_side=recipe.eval_resize,
    )


def preprocessing_config(recipe: ResolvedRecipe) -> dict[str, object]:
    """Describe how an image is prepared for the network, for preprocessing.json.

    Args:
        recipe: The recipe of the run.
    """
    transform = eval_transform(recipe)
    return {
        "exif_orientation": "applied", "color": PIL_MODES.get(recipe.channels),
        "alpha": "kept" if recipe.channels > 3 else "dropped", "bits_16": "upper 8",
        "resize_shorter_side": transform.resize, "center_crop": transform.size, "antialias": True,
        "interpolation": transform.interpolation, "channels": recipe.channels, "range": [0, 1],
        "mean": list(transform.mean), "std": list(transform.std), "layout": "NCHW, float32",
    }  # fmt: skip


def weights_metadata(recipe: ResolvedRecipe) -> dict[str, str]:
    """Describe a backbone and its preprocessing for the metadata of its safetensors file.

    Args:
        recipe: The recipe of the run.
    """
    config = json.dumps(preprocessing_config(recipe))
    return {"backbone": recipe.backbone, "preprocessing": config}


def described_weights(metadata: Mapping[str, str]) -> dict[str, object]:
    """Read what `weights_metadata` described.

    Args:
        metadata: The metadata of a safetensors file.

    Returns:
        The name of the backbone and its preprocessing; {} for a file of another program.

    Raises:
        UsageError: The description is damaged.
    """
    if not {"backbone", "preprocessing"} <= metadata.keys():
        return {}
    name = "the description of its preprocessing"
    config = parse_json(metadata["preprocessing"], dict[str, object], name)
    return {"backbone": metadata["backbone"], **config}


def described_settings(config: object) -> dict[str, object]:
    """Read the settings that `preprocessing_config` described.

    Args:
        config: The content of preprocessing.json.

    Returns:
        `channels` and PREPROCESSING_SETTINGS of a recipe.

    Raises:
        UsageError: It is damaged.
    """
    keys = {
        "channels": "channels", "image_size": "center_crop", "mean": "mean", "std": "std",
        "eval_resize": "resize_shorter_side", "eval_interpolation": "interpolation",
    }  # fmt: skip
    try:
        values = cast(Mapping[str, object], config)
        settings = {name: values[key] for name, key in keys.items()}
        Recipe().replace(**settings)
    except (LookupError, TypeError, UsageError) as error:
        raise UsageError(f"the description of its preprocessing is damaged: {error}") from None
    return settings
