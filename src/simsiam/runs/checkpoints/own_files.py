"""Files of this program as weights: checkpoints of runs, and exports.

They say which network they are of and how its images are prepared, so nothing has to be assumed.
"""

from pathlib import Path

from simsiam.config.recipes import PREPROCESSING_SETTINGS, Recipe
from simsiam.model.backbones import RESNETS, TIMM_PREFIX
from simsiam.runs.checkpoints.foreign_checkpoints import (
    ConvertedCheckpoint,
    check_finite,
    describe_network,
    detect_backbone,
    expected_state_dict,
    fit_backbone,
    match_state_dict,
)
from simsiam.runs.checkpoints.layouts import Layout
from simsiam.runs.checkpoints.timm_weights import timm_architecture
from simsiam.runs.preprocessing import described_settings, described_weights
from simsiam.runs.recipe_file import read_recipe
from simsiam.runs.records import Record
from simsiam.runs.run_folder import BACKBONE_FILE
from simsiam.runs.weight_files import WeightFile
from simsiam.utils.read_files import read_text
from simsiam.utils.typed_json import parse_json

OWN_LAYOUT = Layout("this program", "backbone.", "projector.", "predictor.")


def own_settings(path: Path, content: WeightFile) -> Record:
    """Read what this program wrote about a file of weights, in it or beside it.

    Args:
        path: The file.
        content: Its content.

    Returns:
        The settings of a recipe that are known: the backbone, its channels and its preprocessing;
        {} for a file of another program.

    Raises:
        UsageError: What is written there is wrong.
    """
    recipe = own_recipe(content)
    beside = path.with_name("recipe.yaml")
    if recipe is None and path.name == BACKBONE_FILE and beside.is_file():
        recipe = read_recipe(beside)
    if recipe is not None:
        names = ("backbone", "channels", *PREPROCESSING_SETTINGS)
        return {name: getattr(recipe, name) for name in names}
    described = path.with_name("preprocessing.json")
    if weights := described_weights(content.metadata):
        return {"backbone": weights["backbone"]} | described_settings(weights)
    if described.is_file():
        name = "the description of its preprocessing"
        config = parse_json(read_text(described), dict[str, object], name)
        settings = described_settings(config)
        network = timm_architecture(path.parent)
        if network is None:
            return settings
        backbone = network if network in RESNETS else f"{TIMM_PREFIX}{network}"
        return settings | {"backbone": backbone}
    return {}


def own_recipe(content: WeightFile) -> Recipe | None:
    """Read the recipe in a checkpoint of a run.

    Args:
        content: The content of the file.

    Returns:
        The recipe; None for a file of another program.

    Raises:
        UsageError: The recipe is wrong.
    """
    return None if content.recipe is None else Recipe.from_dict(content.recipe)


def convert_own_checkpoint(
    content: WeightFile, recipe: Recipe, image_size: int | None
) -> ConvertedCheckpoint:
    """Take the backbone and the heads of a checkpoint of a run.

    Args:
        content: The content of the file.
        recipe: The recipe in it.
        image_size: Side of the images in pixels; None takes that of the recipe.

    Returns:
        The model. The state of targets and losses is left over.

    Raises:
        UsageError: A tensor is missing, of the wrong shape or not finite.
    """
    tensors, prefix = content.tensors, "backbone."
    names = {key.removeprefix(prefix): key for key in tensors if key.startswith(prefix)}
    settings, size = detect_backbone(names, tensors, recipe.backbone), image_size
    if recipe.backbone not in RESNETS:
        size = image_size or recipe.image_size or 224
    has_heads = any(key.startswith("projector.") for key in tensors)
    expected = expected_state_dict(
        settings, recipe.method, size, recipe.channels, has_heads=has_heads
    )
    found, notes = {key: x for key, x in tensors.items() if key in expected}, list[str]()
    if size is not None:
        found, notes = fit_backbone(
            recipe.backbone, found, expected, size, recipe.channels, prefix=prefix
        )
    state = match_state_dict(
        dict(zip(found, found)), found, expected, describe_network(settings, size)
    )
    check_finite(state)
    unused = [key for key in tensors if key not in expected]
    layout = OWN_LAYOUT if has_heads else OWN_LAYOUT._replace(projector="", predictor="")
    return ConvertedCheckpoint(
        layout, settings, recipe.method, state, [], unused, recipe.channels, size, notes
    )
