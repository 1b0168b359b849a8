"""The recipe that a source asks for, chosen from the sizes of its images. Looks at headers only; loads no torch."""

from collections.abc import Sequence

import numpy as np

from simsiam import recipes
from simsiam.errors import UsageError
from simsiam.images import measure_sizes
from simsiam.recipes import Recipe
from simsiam.sources import Source


def recipe_for(names: Sequence[str], source: Source) -> tuple[Recipe, list[str]]:
    """The recipe, and in two lines what it is and why."""
    if len(names) == 1 and names[0] in recipes.RECIPE_OF:
        name = recipes.RECIPE_OF[names[0]]
        return Recipe().replace(**recipes.RECIPES[name]()), [name, f"the recipe for {names[0]}"]
    sides = measure_sizes(source.train).min(axis=1)
    if len(sides) == 0:
        raise UsageError(f"no image in {source.name} can be read")
    side, count = int(np.median(sides)), len(source.train)
    because = f"for {count:,} images with a median shorter side of {side} px"
    if side <= 32 and count >= 10_000:
        return Recipe().replace(**recipes.cifar()), ["cifar: appendix D of the paper", because]
    words = recipes.folder(count, side)
    stem = recipes.stem_for(words["image_size"])
    crops = f"crops from {words['crop_min']:.0%} of the area"
    return Recipe().replace(**words), [
        f"folder: {words['backbone']}, {stem} stem, views of {words['image_size']} px, {crops}",
        because,
    ]
