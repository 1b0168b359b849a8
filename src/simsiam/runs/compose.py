"""Composing a recipe: from a source, a recipe and single settings to a resolved recipe.

What recipe and settings leave open is chosen from the images; see `simsiam.runs.choose`. If the
mean and the standard deviation of the channels are not known, they are measured on a sample.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from simsiam.config import recipes
from simsiam.config.recipes import Recipe, ResolvedRecipe
from simsiam.data.images import Images, quick_sample
from simsiam.data.transform import Transform, iter_crops
from simsiam.errors import UsageError, unknown_name
from simsiam.model.backbones import RESNETS, input_size
from simsiam.model.siamese import check_names
from simsiam.runs.checkpoints.published_weights import is_published
from simsiam.runs.choose import choose_recipe
from simsiam.runs.recipe_file import read_recipe
from simsiam.sources.open_source import Source, absolute_source, open_source

# Images that mean and standard deviation are measured on, spread evenly over the training set.
STATISTICS_SAMPLE_SIZE = 1000


def compose_recipe(
    sources: str | os.PathLike[str] | Sequence[str] | None,
    recipe: str | Recipe | None,
    overrides: Mapping[str, object],
) -> tuple[ResolvedRecipe, Source, list[str]]:
    """Compose the complete recipe of a run.

    Args:
        sources: What to train on; by default the source of the recipe, else "shapes".
        recipe: A recipe, its name, or a YAML file; by default the source decides.
        overrides: Single settings, which override the recipe.

    Returns:
        The recipe, the opened source, and lines that say where the recipe comes from.

    Raises:
        UsageError: A name is unknown, a setting is wrong, or no image can be read.
    """
    base, reasons = _named_recipe(recipe)
    names = _source_names(sources) or (list(base.source) if base else ["shapes"])
    own = {name: getattr(base or Recipe(), name) for name in ("channels", "no_labels")}
    settings = Recipe().replace(**{name: overrides.get(name, own[name]) for name in own})
    opened = open_source(names, settings.channels, no_labels=settings.no_labels)
    if base is None:
        base, reasons = choose_recipe(names, opened)
    backbone = overrides.get("backbone")
    if backbone is not None and backbone not in RESNETS:  # it has no width and no stem to choose
        base = replace(base, width=Recipe.width, stem=None)
    source = [absolute_source(name) for name in names]
    complete = base.replace(**{"source": source} | dict(overrides))
    check_names(complete.method)
    init = complete.init
    if init is not None and not is_published(init):  # a published name stays as it is
        complete = replace(complete, init=str(Path(init).expanduser().resolve()))
    size = complete.image_size or input_size(complete.backbone) or 224
    complete = replace(complete, image_size=size)
    if complete.mean is None or complete.std is None:
        known = recipes.CHANNEL_STATISTICS.get(names[0]) if len(names) == 1 else None
        mean, std = known or channel_statistics(opened.train, size, complete.channels)
        complete = complete.replace(mean=complete.mean or mean, std=complete.std or std)
    return complete.resolve(), opened, reasons


def open_run_source(
    recipe: ResolvedRecipe,
    source: str | os.PathLike[str] | Sequence[str] | None = None,
    *,
    no_labels: bool = False,
) -> Source:
    """Open the images that a run was trained on, or others, for its backbone.

    Args:
        recipe: The recipe of the run.
        source: Other images; by default the run's own, without labels if it was trained so.
        no_labels: Whether to ignore the labels.

    Raises:
        UsageError: The source cannot be opened, or has no images.
    """
    if not source:
        source, no_labels = recipe.source, no_labels or recipe.no_labels
    return open_source(source, recipe.channels, no_labels=no_labels)


def _named_recipe(recipe: str | Recipe | None) -> tuple[Recipe | None, list[str]]:
    """Return the recipe that the user named, and a line that says where it comes from."""
    if recipe is None:
        return None, []
    if isinstance(recipe, Recipe):
        return recipe, ["given"]
    if recipe in recipes.RECIPES:
        return Recipe().replace(**recipes.RECIPES[recipe]()), [f"{recipe}, by name"]
    if not Path(recipe).is_file():
        raise unknown_name("recipe", recipe, [*recipes.RECIPES, "a YAML file"])
    return read_recipe(Path(recipe)), [f"from {recipe}"]


def _source_names(sources: str | os.PathLike[str] | Sequence[str] | None) -> list[str]:
    if isinstance(sources, str | os.PathLike):
        return [os.fspath(sources)]
    return list(sources or [])


def channel_statistics(
    images: Images, image_size: int, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Measure the mean and the standard deviation of each channel, on prepared images.

    Args:
        images: The training images, of which a sample is taken.
        image_size: Side of the prepared images in pixels.
        channels: Number of channels.

    Returns:
        Means and standard deviations, in 0..1.

    Raises:
        UsageError: None of these images can be read.
    """
    transform = Transform(size=image_size, mean=(0.0,), std=(1.0,))
    count = 0
    total, squares = torch.zeros(channels).double(), torch.zeros(channels).double()
    for _, pixels in iter_crops(quick_sample(images, STATISTICS_SAMPLE_SIZE), transform, []):
        x = transform.normalize(pixels).double().movedim(1, 0).flatten(1)
        count, total, squares = count + x.shape[1], total + x.sum(1), squares + x.square().sum(1)
    if not count:
        sample_size = min(len(images), STATISTICS_SAMPLE_SIZE)
        raise UsageError(f"none of {sample_size} sampled images can be read")
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(1e-6).sqrt()
    return tuple(round(v, 4) for v in mean.tolist()), tuple(round(v, 4) for v in std.tolist())
