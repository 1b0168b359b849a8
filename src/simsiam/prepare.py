"""Before the loop: which recipe a source asks for, what it is trained on, and what is kept out for the kNN monitor."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from simsiam import recipes
from simsiam.batches import steps_per_epoch
from simsiam.errors import UsageError, unknown
from simsiam.features import Transform, chunks
from simsiam.images import Images, Source, hold_out, in_memory, measure_sizes, open_source, spread
from simsiam.recipes import Recipe

LOOKED_AT = 1000  # images that mean, std and sizes are measured on, spread evenly over the training set


@dataclass(frozen=True)
class Data:
    """What a run reads: images to train on, labeled images held out of them (or None), and files that do not decode."""

    train: Images
    held_out: Images | None
    unreadable: list[tuple[str, str]]


def compose(source: str | None, recipe: str | Recipe | None, words: Mapping[str, Any]) -> tuple[Recipe, Source, str]:
    """The complete recipe for a source, the opened source, and why this recipe: the source decides, words override."""
    if isinstance(recipe, Recipe):
        base, why = recipe, "given"
    elif recipe in recipes.RECIPES:
        base, why = Recipe().replace(**recipes.RECIPES[recipe]()), f"{recipe}, by name"
    elif recipe is not None:
        base, why = read_recipe(Path(recipe)), f"from {recipe}"
    else:
        base, why = None, ""
    name = source or (base.source if base else "shapes")
    opened = open_source(name)
    if base is None:
        base, why = recipe_for(opened)
    name = str(Path(name).resolve()) if Path(name).exists() else name
    complete = base.replace(**{"source": name} | dict(words))
    if complete.image_size is None:
        complete = replace(complete, image_size=224)
    if complete.mean is None or complete.std is None:
        mean, std = recipes.STATISTICS.get(opened.name) or statistics(opened.train, complete)
        complete = replace(complete, mean=mean, std=std)
    return complete, opened, why


def recipe_for(source: Source) -> tuple[Recipe, str]:
    """The recipe that a source asks for, and the reason in words."""
    name = recipes.RECIPE_OF.get(source.name)
    if name:
        return Recipe().replace(**recipes.RECIPES[name]()), f"{name}, the recipe for {source.name}"
    sides = measure_sizes(source.train).min(axis=1)
    if len(sides) == 0:
        raise UsageError(f"no image in {source.name} can be read")
    side, count = int(np.median(sides)), len(source.train)
    if side <= 32 and count >= 10_000:
        return Recipe().replace(**recipes.cifar()), f"cifar, for {count:,} images of {side} px"
    words = recipes.folder(count, side)
    size = f"views of {words['image_size']} px"
    return Recipe().replace(**words), f"folder, for {count:,} images with a median shorter side of {side} px: {size}"


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file."""
    if not path.is_file():
        raise unknown("recipe", path, [*recipes.RECIPES, "a YAML file"])
    try:
        return Recipe.from_dict(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


def statistics(images: Images, recipe: Recipe) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in 0..1, over images prepared as for evaluation."""
    looked_at = images.take(spread(len(images), min(len(images), LOOKED_AT)))
    assert recipe.image_size
    transform = Transform(size=recipe.image_size, mean=(0.0,), std=(1.0,))
    parts = [transform.normalize(pixels).double() for _, pixels in chunks(looked_at, transform, [])]
    if not parts:
        raise UsageError(f"none of the first {len(looked_at)} images looked at can be read")
    x = torch.cat(parts)
    mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3), correction=0).clamp_min(1e-3)
    return tuple(round(v, 4) for v in mean.tolist()), tuple(round(v, 4) for v in std.tolist())


def prepare(recipe: Recipe, source: Source) -> Data:
    """Limit, decode what fits in memory, and hold out; a function of the recipe and the files alone.

    Labeled images are held out of the training set unless the source has a `val` split beside its `test` split (a lone
    `val` is what others test on). Raises UsageError where the images do not fill one batch.
    """
    limit_bytes = int(recipe.cache_gib * 2**30)
    train, unreadable = in_memory(source.train.take(spread(len(source.train), recipe.limit)), limit_bytes)
    held_out = None
    if train.labels is not None and recipe.holdout != 0:
        if source.val is not None and source.test is not None:
            held_out, more = in_memory(source.val, limit_bytes)
            unreadable += more
        elif count := min(len(train) // 10, 5000) if recipe.holdout is None else recipe.holdout:
            train, held_out = hold_out(train, count)
    steps_per_epoch(len(train), recipe.batch_size)
    return Data(train, held_out, unreadable)
