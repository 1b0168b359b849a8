"""Choosing a recipe for a source, and images to monitor with, by their number and sizes.

Only the headers of a sample of the images are read. This module does not import torch.
"""

from collections.abc import Collection, Sequence

import numpy as np

from simsiam.config import recipes
from simsiam.config.recipes import Recipe
from simsiam.data.images import Images, check_hold_out, measure_sizes, sampled_error
from simsiam.sources.open_source import Source

FOLDER = "folder"  # the name of the recipe for folders
SPRINT_REASON = "sprint: SimCLR's loss, which learns faster; --method simsiam is the paper's method"


def choose_recipe(
    names: Sequence[str], source: Source, changed: Collection[str] = (), *, sprint: bool = False
) -> tuple[Recipe, list[str]]:
    """Choose the recipe for a source.

    Of a folder it is `sprint` where that was compared: with random initial weights, and if the user
    does not change a component of the method.

    Args:
        names: What the user called the source.
        source: The opened source.
        changed: Names of the settings that the user has given.
        sprint: Whether the user has asked for `sprint`.

    Returns:
        The recipe, and lines: what it is, and why it was chosen.

    Raises:
        WorkFailed: No image can be read.
    """
    recipe, reasons = _choose_by_images(names, source)
    is_folder = reasons[0].startswith(f"{FOLDER}:")
    if sprint or (is_folder and {"init", *recipes.COMPONENTS}.isdisjoint(changed)):
        assert recipe.image_size is not None  # every recipe has one
        changes = recipes.sprint_recipe(recipe.batch_size, recipe.image_size)
        recipe = recipe.replace(**changes)
        reasons = [*reasons, SPRINT_REASON]
    return recipe, reasons


def _choose_by_images(names: Sequence[str], source: Source) -> tuple[Recipe, list[str]]:
    if len(names) == 1 and names[0] in recipes.SOURCE_RECIPES:
        name = recipes.SOURCE_RECIPES[names[0]]
        return Recipe().replace(**recipes.RECIPES[name]()), [name, f"the recipe for {names[0]}"]
    sides = measure_sizes(source.train).min(axis=1)
    if len(sides) == 0:
        raise sampled_error(source.train)
    side, count = int(np.median(sides)), len(source.train)
    reason = f"for {count:,} images with a median shorter side of {side} px"
    if side <= 32 and count >= 10_000:
        recipe = Recipe().replace(**recipes.cifar_recipe())
        return recipe, ["cifar: appendix D of the paper", reason]
    recipe = Recipe().replace(**recipes.folder_recipe(count, side))
    return recipe, [summarize_folder_recipe(recipe), reason]


def held_out_count(recipe: Recipe, source: Source, count: int) -> int:
    """Compute how many of the training images are not trained on: kNN classifies them.

    Labeled images are held out, unless the source has a `val` split as well as a `test` split and
    `holdout` is not set: then `val` is used.

    Args:
        recipe: The recipe.
        source: The opened source.
        count: Number of training images.

    Raises:
        UsageError: None would be left.
    """
    if source.train.labels is None or monitored_val(recipe, source) is not None:
        return 0
    held_out = min(count // 10, 5000) if recipe.holdout is None else recipe.holdout
    if held_out and count:
        check_hold_out(held_out, count)
    return held_out


def monitored_val(recipe: Recipe, source: Source) -> Images | None:
    """Return the labeled images of the split `val`, if training is monitored with them.

    Args:
        recipe: The recipe.
        source: The opened source.
    """
    if source.val is None or source.val.labels is None or recipe.holdout == 0:
        return None
    used = source.train.labels is None or (recipe.holdout is None and source.test is not None)
    return source.val if used else None


def summarize_folder_recipe(recipe: Recipe) -> str:
    """Say what was chosen for a folder of images.

    Args:
        recipe: The recipe; its image_size is chosen.
    """
    network = recipe.backbone
    if network.startswith("resnet"):
        network += f", {recipe.resnet_stem} stem"
    crop_min = recipe.method.views[0].crop_min
    views = f"views of {recipe.view_size} px, crops from {crop_min:.0%} of the area"
    return f"{FOLDER}: {network}, {views}"
