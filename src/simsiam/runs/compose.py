"""The recipe that a source asks for, chosen from the sizes of its images. Looks at headers only; loads no torch."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simsiam.config import recipes
from simsiam.config.recipes import Recipe, ResolvedRecipe
from simsiam.data.images import Images, measure_sizes, quick_sample
from simsiam.data.transform import Transform, iter_crops
from simsiam.errors import UsageError, unknown_name
from simsiam.model.backbones import RESNETS, input_size
from simsiam.runs.published_weights import is_published
from simsiam.runs.recipe_file import read_recipe
from simsiam.sources.open_source import Source, absolute_source, open_source


def choose_recipe(names: Sequence[str], source: Source) -> tuple[Recipe, list[str]]:
    """The recipe, and in two lines what it is and why."""
    if len(names) == 1 and names[0] in recipes.SOURCE_RECIPES:
        name = recipes.SOURCE_RECIPES[names[0]]
        return Recipe().replace(**recipes.RECIPES[name]()), [name, f"the recipe for {names[0]}"]
    sides = measure_sizes(source.train).min(axis=1)
    if len(sides) == 0:
        raise UsageError(f"no image in {source.name} can be read")
    side, count = int(np.median(sides)), len(source.train)
    because = f"for {count:,} images with a median shorter side of {side} px"
    if side <= 32 and count >= 10_000:
        return Recipe().replace(**recipes.cifar_recipe()), [
            "cifar: appendix D of the paper",
            because,
        ]
    words = recipes.folder_recipe(count, side)
    stem = recipes.default_stem(words["image_size"] or 0)  # it is never None here
    crops = f"crops from {words['crop_min']:.0%} of the area"
    return Recipe().replace(**words), [
        f"folder: {words['backbone']}, {stem} stem, views of {words['image_size']} px, {crops}",
        because,
    ]


STATISTICS_SAMPLE_SIZE = (
    1000  # images that mean, std and sizes are measured on, spread evenly over the training set
)


def compose_recipe(
    sources: str | os.PathLike[str] | Sequence[str] | None,
    recipe: str | Recipe | None,
    overrides: Mapping[str, Any],
) -> tuple[ResolvedRecipe, Source, list[str]]:
    """The complete recipe, the opened source, and why this recipe: the source decides, words override."""
    if isinstance(recipe, Recipe):
        base, why = recipe, ["given"]
    elif recipe in recipes.RECIPES:
        base, why = Recipe().replace(**recipes.RECIPES[recipe]()), [f"{recipe}, by name"]
    elif recipe is not None:
        if not Path(recipe).is_file():
            raise unknown_name("recipe", recipe, [*recipes.RECIPES, "a YAML file"])
        base, why = read_recipe(Path(recipe)), [f"from {recipe}"]
    else:
        base, why = None, []
    given = [os.fspath(sources)] if isinstance(sources, str | os.PathLike) else list(sources or [])
    names = given or (list(base.source) if base else ["shapes"])
    channels = overrides.get("channels", base.channels if base else 3)
    opened = open_source(names, Recipe().replace(channels=channels).channels)
    if base is None:
        base, why = choose_recipe(names, opened)
    known = recipes.CHANNEL_STATISTICS.get(names[0]) if len(names) == 1 else None
    if overrides.get("backbone") not in (
        None,
        *RESNETS,
    ):  # whose width and stem the recipe does not know
        base = replace(base, width=Recipe.width, stem=None)
    complete = base.replace(
        **{"source": [absolute_source(name) for name in names]} | dict(overrides)
    )
    if complete.init is not None and not is_published(
        complete.init
    ):  # a published name stays a name
        complete = replace(complete, init=str(Path(complete.init).expanduser().resolve()))
    if complete.image_size is None:
        complete = replace(complete, image_size=input_size(complete.backbone) or 224)
    size = complete.image_size or 0  # set above
    if complete.mean is None or complete.std is None:
        mean, std = known or channel_statistics(opened.train, size, complete.channels)
        complete = complete.replace(mean=complete.mean or mean, std=complete.std or std)
    return complete.resolve(), opened, why


def channel_statistics(
    images: Images, image_size: int, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in 0..1, over images prepared as for evaluation."""
    transform = Transform(size=image_size, mean=(0.0,), std=(1.0,))
    count, total, squares = (
        0,
        torch.zeros(channels).double(),
        torch.zeros(channels).double(),
    )
    for _, pixels in iter_crops(quick_sample(images, STATISTICS_SAMPLE_SIZE), transform, []):
        x = transform.normalize(pixels).double().movedim(1, 0).flatten(1)
        count, total, squares = count + x.shape[1], total + x.sum(1), squares + x.square().sum(1)
    if not count:
        raise UsageError(
            f"none of {min(len(images), STATISTICS_SAMPLE_SIZE)} images looked at can be read"
        )
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(1e-6).sqrt()
    return tuple(round(v, 4) for v in mean.tolist()), tuple(round(v, 4) for v in std.tolist())
