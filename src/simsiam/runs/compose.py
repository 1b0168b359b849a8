"""Composing a recipe: from a source, a recipe and single settings to a resolved recipe.

What recipe and settings leave open is chosen from the images; see `simsiam.runs.choose`. If the
mean and the standard deviation of the channels are not known, they are measured on a sample.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from simsiam.config import recipes
from simsiam.config.recipes import (
    CONVERTED_SOURCES,
    SETTING_TYPES,
    Recipe,
    ResolvedRecipe,
)
from simsiam.config.settings import parse_value
from simsiam.data.images import Images, quick_sample
from simsiam.data.transform import Transform, iter_crops
from simsiam.errors import UsageError, none_readable, unknown_name
from simsiam.model.backbones import RESNETS, input_size
from simsiam.model.patches import PATCHES_PREFIX
from simsiam.model.siamese import check_names
from simsiam.runs.choose import FOLDER, choose_recipe, summarize_folder_recipe
from simsiam.runs.encoder import load
from simsiam.runs.recipe_file import read_recipe
from simsiam.runs.run_folder import Run
from simsiam.runs.weights import (
    PATCHES,
    canonical_name,
    describe_resampling,
    known_preprocessing,
    left_out_head,
    open_patches,
    open_weights,
)
from simsiam.sources.open_source import Source, absolute_sources, open_source, source_names
from simsiam.sources.own_marks import is_named, unnamed_places_error

# Images that mean and standard deviation are measured on, spread evenly over the training set.
STATISTICS_SAMPLE_SIZE = 1000
# Settings that name places: only those that the user has named are opened.
PLACES = {"source": "images", "init": "initial weights", "teacher": "teacher"}
WEIGHT_SETTINGS = ("init", "teacher")
SOURCE_SETTINGS = ("init", "channels", "no_labels", "splits")  # needed to open a source


def compose_recipe(
    sources: str | os.PathLike[str] | Sequence[str] | None,
    recipe: str | Recipe | None,
    overrides: Mapping[str, object],
    command: Sequence[str] = ("pretrain",),
) -> tuple[ResolvedRecipe, Source, list[str]]:
    """Compose the complete recipe of a run.

    Args:
        sources: What to train on; by default the source of the recipe, else "shapes".
        recipe: A recipe, its name, or a YAML file; by default the source decides.
        overrides: Single settings, which override the recipe.
        command: The verb, and flags that it needs besides, for an error.

    Returns:
        The recipe, the opened source, and lines that say where the recipe comes from.

    Raises:
        UsageError: A name is unknown, or a setting is wrong, or a YAML file names places that the
            user has not named.
        WorkFailed: No image can be read.
    """
    base, reasons = _named_recipe(recipe)
    if recipe == recipes.SPRINT and overrides.get("method") is not None:
        raise UsageError("--recipe sprint brings its own method: leave out --method or --recipe")
    names = source_names(sources or []) or (list(base.source) if base else ["shapes"])
    if base is not None and isinstance(recipe, str) and recipe not in recipes.RECIPES:
        unnamed = [] if sources else ["source"]
        unnamed += [name for name in WEIGHT_SETTINGS if name not in overrides]
        _check_named(Path(recipe), base, unnamed, [command[0], *names, *command[1:]])
    own = {name: getattr(base or Recipe(), name) for name in SOURCE_SETTINGS}
    settings = Recipe().replace(**{name: overrides.get(name, own[name]) for name in own})
    folder, weights = None, dict[str, object]()
    if settings.init not in (None, PATCHES):
        known = {} if base is None or "init" in overrides else {"backbone": base.backbone}
        folder, weights, notes = _describe_init(settings, names, known | dict(overrides))
        settings = settings.replace(channels=weights["channels"])
    opened = open_source(
        names, settings.channels, no_labels=settings.no_labels, splits=settings.splits
    )
    if base is None:
        changed = [name for name, value in overrides.items() if value is not None]
        base, reasons = choose_recipe(names, opened, changed, sprint=recipe == recipes.SPRINT)
    if weights:
        given = isinstance(recipe, Recipe) or reasons == [f"from {recipe}"]
        size = overrides.get("image_size")
        base = _with_weights(base, weights, size, keep_preprocessing=given)
        reasons = [*reasons, *notes]
    if (
        overrides.get("backbone", "resnet18") not in RESNETS
    ):  # it has no width and no stem to choose, and may take images of one size only
        base = replace(base, width=Recipe.width, stem=None, view_ratio=1.0)
    complete = base.replace(**{"source": absolute_sources(names)} | dict(overrides))
    complete = _with_teacher(complete, overrides)
    if complete.init == PATCHES:
        complete = _beside_patches(complete)
        reasons = [
            *reasons,
            f"{complete.backbone}: the network begins beside patches and their map",
        ]
    check_names(complete.method)
    if complete.init is not None:
        complete = replace(complete, init=canonical_name(complete.init))
    size = complete.image_size or input_size(complete.backbone) or 224
    complete = replace(complete, image_size=size)
    if complete.mean is None or complete.std is None:
        published = recipes.CHANNEL_STATISTICS.get(names[0]) if len(names) == 1 else None
        mean, std = published or channel_statistics(opened.train, size, complete.channels)
        complete = complete.replace(mean=complete.mean or mean, std=complete.std or std)
    resolved = complete.resolve()
    if reasons and reasons[0].startswith(f"{FOLDER}:"):  # flags may have changed what was chosen
        reasons = [summarize_folder_recipe(resolved), *reasons[1:]]
    if folder is not None:
        reasons = [*reasons, *describe_resampling(folder, resolved)]
    return resolved, opened, reasons


def _describe_init(
    settings: Recipe, sources: Sequence[str], overrides: Mapping[str, object]
) -> tuple[Path, dict[str, object], list[str]]:
    """The run folder of the initial weights, the settings that they bring, and lines about them.

    Raises UsageError if a flag contradicts their network.
    """
    init, backbone = settings.init or "", overrides.get("backbone")
    folder = open_weights(
        init,
        backbone=None if backbone is None else str(backbone),
        source=sources,
        channels=settings.channels,
        splits=settings.splits,
    )
    own = Run(folder).recipe
    network: dict[str, object] = {
        "backbone": own.backbone,
        "width": own.width,
        "stem": own.resnet_stem if own.backbone in RESNETS else None,
        "channels": own.channels,
    }
    for name, value in network.items():
        given = overrides.get(name, value)
        if parse_value(given, SETTING_TYPES[name], name) != value:
            raise UsageError(
                f"init {init} does not fit --{name} {given}: the weights have {name} {value}; "
                f"leave --{name} out"
            )
    line = f"{own.backbone}, the network of the initial weights {init}"
    return folder, network | known_preprocessing(folder), [line, *left_out_head(folder)]


def _with_teacher(complete: Recipe, overrides: Mapping[str, object]) -> Recipe:
    """Give the predictions the width of the teacher's features."""
    if (complete.teacher is None) != (complete.method.target != "teacher"):
        raise UsageError(
            "target teacher and --teacher WEIGHTS go together: give both, such as --method "
            "distillation --teacher lite0"
        )
    if complete.teacher is None:
        return complete
    folder = open_weights(
        complete.teacher,
        source=complete.source,
        channels=complete.channels,
        splits=complete.splits,
    )
    dim = load(folder).dim
    if overrides.get("dim", dim) != dim:
        raise UsageError(
            f"teacher {complete.teacher} has {dim} features and --dim is {overrides['dim']}: leave "
            "--dim out"
        )
    return complete.replace(dim=dim, teacher=canonical_name(complete.teacher))


def _beside_patches(complete: Recipe) -> Recipe:
    """Put patches, learned from the images, beside the network."""
    if complete.backbone.startswith(PATCHES_PREFIX):
        return complete
    folder = open_patches(complete)
    return complete.replace(backbone=f"{Run(folder).recipe.backbone}+{complete.backbone}")


def _with_weights(
    base: Recipe, weights: Mapping[str, object], image_size: object, *, keep_preprocessing: bool
) -> Recipe:
    """Replace the network of a recipe by that of weights, and the preprocessing unless it is kept.

    A ResNet takes views of the size that was chosen for the images, other networks those of the
    weights.
    """
    base = base.replace(
        **{name: weights[name] for name in ("backbone", "width", "stem", "channels")}
    )
    changes = {name: weights.get(name) for name in ("mean", "std") if getattr(base, name) is None}
    if not keep_preprocessing and "image_size" in weights:
        if base.image_size is None or base.backbone not in RESNETS:
            changes["image_size"] = weights["image_size"]
        size = image_size or changes.get("image_size", base.image_size)
        if int(str(size)) == weights["image_size"]:
            changes |= {name: weights[name] for name in ("eval_resize", "eval_interpolation")}
    return base.replace(**changes)


def source_flags(recipe: ResolvedRecipe) -> list[str]:
    """Return the flags with which a command opens the images of a run as the run does.

    Args:
        recipe: The recipe of the run.
    """
    splits = ["--splits", *recipe.splits] if recipe.splits else []
    return [*splits, *(["--no-labels"] if recipe.no_labels else [])]


def _check_named(
    file: Path, recipe: Recipe, settings: Sequence[str], command: Sequence[str]
) -> None:
    """Raise UsageError if a recipe names places that its user has not named; see `own_marks`.

    Args:
        file: The file of the recipe; beside that of a run are the marks of the run.
        recipe: The recipe.
        settings: Those of PLACES that the command does not name.
        command: The words of the command, with the images of the recipe.
    """
    weights = {name: [getattr(recipe, name)] for name in WEIGHT_SETTINGS if getattr(recipe, name)}
    places = {"source": recipe.source} | weights
    unnamed = [name for name in settings if not is_named(file.parent, name, places.get(name, ()))]
    if unnamed:
        text = " and ".join(PLACES[name] for name in unnamed)
        flags = [word for name in weights for word in (f"--{name}", *weights[name])]
        raise unnamed_places_error(file, text, [*command, "--recipe", str(file), *flags])


def open_run_source(
    run: Run,
    source: str | os.PathLike[str] | Sequence[str] | None = None,
    *,
    command: Callable[[Sequence[str]], Sequence[str]],
    place: str | os.PathLike[str] | Sequence[str] | None = None,
    no_labels: bool = False,
    splits: Sequence[str] | None = None,
) -> Source:
    """Open the images that a run was trained on, or others, for its backbone.

    Args:
        run: The run.
        source: Other images; by default the run's own, without labels if it was trained so.
        command: From the places of images to the words of a command that names them, for an error.
        place: Where the run's own images are now; by default where the recipe says.
        no_labels: Whether to ignore the labels.
        splits: Which folder or shard is which split; by default as in training for the run's own
            images, decided by names for others.

    Raises:
        UsageError: The source cannot be opened, or has no images, or only the run names it.
    """
    recipe = run.recipe
    if source:
        return open_source(source, recipe.channels, no_labels=no_labels, splits=splits)
    if not place and recipe.source in CONVERTED_SOURCES:
        raise UsageError("these weights were not trained here and have no images: give SOURCE")
    if not place and not is_named(run.path, "source", recipe.source):
        raise unnamed_places_error(run.path, "images", command(recipe.source))
    no_labels, splits = no_labels or recipe.no_labels, splits or recipe.splits
    try:
        return open_source(
            place or recipe.source, recipe.channels, no_labels=no_labels, splits=splits
        )
    except UsageError as error:
        raise UsageError(
            f"the images of this run cannot be opened: {str(error).partition(';')[0]}; if they "
            "have moved, give their new place: `simsiam resume RUN --source PLACE`, and SOURCE "
            "elsewhere"
        ) from None


def _named_recipe(recipe: str | Recipe | None) -> tuple[Recipe | None, list[str]]:
    """Return the recipe that the user named, and a line that says where it comes from."""
    if recipe in (None, recipes.SPRINT):  # the source decides
        return None, []
    if isinstance(recipe, Recipe):
        return recipe, ["given"]
    if recipe in recipes.RECIPES:
        return Recipe().replace(**recipes.RECIPES[recipe]()), [f"{recipe}, by name"]
    if not Path(recipe).is_file():
        raise unknown_name("recipe", recipe, [*recipes.RECIPE_NAMES, "a YAML file"])
    return read_recipe(Path(recipe)), [f"from {recipe}"]


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
        WorkFailed: None of these images can be read.
    """
    transform = Transform(size=image_size, mean=(0.0,), std=(1.0,))
    count = 0
    total, squares = torch.zeros(channels).double(), torch.zeros(channels).double()
    sampled, skipped = quick_sample(images, STATISTICS_SAMPLE_SIZE), list[tuple[str, str]]()
    for _, pixels in iter_crops(sampled, transform, skipped):
        x = transform.normalize(pixels).double().movedim(1, 0).flatten(1)
        count, total, squares = count + x.shape[1], total + x.sum(1), squares + x.square().sum(1)
    if not count:
        kind = "images" if len(sampled) == len(images) else "images of a sample"
        raise none_readable(len(sampled), *skipped[0], kind)
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(1e-6).sqrt()
    return tuple(round(v, 4) for v in mean.tolist()), tuple(round(v, 4) for v in std.tolist())
