"""Preparing a run: the images to train on and those kept out, the model, and the optimizer."""

from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.optim import Optimizer

from simsiam.config.method import BN_SPLITS
from simsiam.config.recipes import ResolvedRecipe
from simsiam.data.batches import min_decode_side, sequential_batches, steps_per_epoch
from simsiam.data.images import Images, hold_out, load_into_memory, sample
from simsiam.distributed.collectives import all_gather_objects
from simsiam.distributed.process_group import world_size
from simsiam.distributed.sync_batch_norm import convert_sync_batchnorm
from simsiam.errors import UsageError
from simsiam.model.memory import check_memory
from simsiam.model.optimizers import build_optimizer
from simsiam.model.patches import PATCHES_PREFIX
from simsiam.model.precision import Compute
from simsiam.model.siamese import Siamese, build
from simsiam.model.targets import MovingAverageTarget
from simsiam.runs.weights import load_init_weights
from simsiam.sources.disk_cache import with_disk_cache
from simsiam.sources.fingerprint import fingerprint_source
from simsiam.sources.open_source import Source


@dataclass(frozen=True)
class RunData:
    """The images of a run.

    Attributes:
        train: The images to train on.
        bank: The labeled images that vote in the kNN monitor; the training images if they have
            labels.
        held_out: The labeled images that are classified in the kNN monitor, if there are any.
        unreadable: Key and reason of the files that cannot be decoded.
        total_images: The number of images before unreadable ones were left out.
        fingerprint: That of the source; see `simsiam.sources.fingerprint`.
    """

    train: Images
    bank: Images
    held_out: Images | None
    unreadable: list[tuple[str, str]]
    total_images: int
    fingerprint: dict[str, str]


def prepare_data(recipe: ResolvedRecipe, source: Source) -> RunData:
    """Limit the images, decode what fits in memory or on disk, and hold some out.

    The result depends on the recipe and the files alone. Labeled images are held out of the
    training set, unless the source has a `val` split as well as a `test` split and `holdout` is not
    set: then `val` is used. Where only `val` has labels (STL-10), a fifth of it is classified by
    the rest.

    Args:
        recipe: The recipe of the run.
        source: The opened source.

    Returns:
        The images to train on and to monitor with.

    Raises:
        UsageError: If the images do not fill one batch, the target needs labels that are missing,
            or the processes see different images.
    """
    fingerprint = fingerprint_source(source, recipe.source)
    limit_bytes = int(recipe.cache_gib * 2**30)
    selected = sample(source.train, recipe.limit)
    train, unreadable = load_into_memory(selected, limit_bytes)
    unreadable = [*source.damage, *unreadable]
    total_images, bank, held_out = len(selected), train, None
    val = source.val if source.val is not None and source.val.labels is not None else None
    holdout = min(len(train) // 10, 5000) if recipe.holdout is None else recipe.holdout
    use_val = train.labels is None or (recipe.holdout is None and source.test is not None)
    if val is not None and use_val and recipe.holdout != 0:
        held_out, unreadable_val = load_into_memory(val, limit_bytes)
        unreadable, total_images = unreadable + unreadable_val, total_images + len(val)
        if train.labels is None:
            bank, held_out = hold_out(held_out, recipe.holdout or max(1, len(held_out) // 5))
    elif train.labels is not None and holdout:
        train, held_out = hold_out(train, holdout)
        bank = train
    steps_per_epoch(len(train), recipe.batch_size)
    check_process_split(recipe, len(train))
    if recipe.method.target == "labels":
        check_labels(train, recipe.method.dim, source.name)
    cache_bytes = int(recipe.disk_cache_gib * 2**30)
    train = with_disk_cache(
        train, recipe.source, source.train, min_decode_side(recipe), cache_bytes
    )
    return RunData(train, bank, held_out, unreadable, total_images, fingerprint)


def check_labels(images: Images, dim: int, name: str) -> None:
    """Check that every image has a label and that the network has an output for each class.

    Args:
        images: The training images.
        dim: The number of outputs.
        name: The name of the source, for the message.

    Raises:
        UsageError: If labels are missing or there are more classes than outputs.
    """
    if images.labels is None or len(images.classes) > dim:
        labels = "no labels" if images.labels is None else f"{len(images.classes)} classes"
        raise UsageError(
            f"target labels needs a label for each image and at most dim = {dim} classes; "
            f"{name} has {labels}"
        )


def check_process_split(recipe: ResolvedRecipe, num_images: int) -> None:
    """Check that a batch can be split over the processes and that all of them see the same run.

    Args:
        recipe: The recipe of the run, as this process has it.
        num_images: The number of training images that this process sees.

    Raises:
        UsageError: If a batch cannot be split, or the processes see different recipes or sources.
    """
    processes, size = world_size(), recipe.batch_size
    if size < processes:
        raise UsageError(
            f"batch_size is {size} and there are {processes} processes: each needs an image"
        )
    splits = recipe.method.bn == "split" and processes > 1
    if splits and (BN_SPLITS % processes or size % BN_SPLITS):
        raise UsageError(
            f"bn split makes {BN_SPLITS} equal parts of a batch, for 1, 2, 4 or 8 processes, and "
            f"batch_size is {size} with {processes} processes: take other numbers, or bn per_view"
        )
    local = recipe.to_dict() | {"images": num_images}
    for other in all_gather_objects([local]):
        if differences := [name for name in local if local[name] != other[name]]:
            name = differences[0]
            raise UsageError(
                f"the processes do not see the same source: {name} is {local[name]} on this one "
                f"and {other[name]} on another"
            )


class TrainingSetup(NamedTuple):
    """What a training step changes, and where it is computed."""

    model: Siamese
    optimizer: Optimizer
    compute: Compute


def build_training_setup(recipe: ResolvedRecipe) -> TrainingSetup:
    """Build the recipe's model and optimizer on its device, as they are before the first step.

    Args:
        recipe: The recipe of the run.

    Returns:
        Model, optimizer, device and precision.

    Raises:
        UsageError: If the device, the backbone or the initial weights cannot be used.
        WorkFailed: If a step does not fit in memory.
    """
    if recipe.backbone.startswith(PATCHES_PREFIX):
        raise UsageError(
            f"{recipe.backbone} is learned in closed form, not by steps: `simsiam adapt SOURCE` "
            "makes a run of it, which is complete"
        )
    compute = Compute.pick(recipe.device, recipe.precision)
    model = build(
        recipe.method,
        backbone=recipe.backbone,
        image_size=recipe.image_size,
        width=recipe.width,
        stem=recipe.stem,
        channels=recipe.channels,
        seed=recipe.seed,
    )
    if recipe.init is not None:
        load_init_weights(model.backbone, recipe)
    if recipe.sync_bn and recipe.method.bn != "split" and world_size() > 1:
        convert_sync_batchnorm(model, compute.device)
    check_memory(recipe.replace(precision=compute.precision), compute.device)
    compute.place(model)
    return TrainingSetup(model, build_optimizer(model, recipe.method), compute)


def initialize_eta(
    model: Siamese, images: Images, recipe: ResolvedRecipe, compute: Compute
) -> None:
    """Set the first eta of every image to its projection by the initial network (section 5.2).

    Only a moving-average target keeps an eta for each image. Without this pass, t would be the
    other view's z alone in the first epoch: Table 1a, which collapses.

    Args:
        model: The model before its first step.
        images: The training images.
        recipe: The recipe of the run.
        compute: Device and precision.
    """
    if isinstance(model.target, MovingAverageTarget):
        f = deepcopy(model.f)  # a copy, so that the running statistics of the model do not change
        for batch in sequential_batches(images, recipe, compute.device):
            with torch.no_grad(), compute.autocast():
                model.target.set_eta(f(batch.views[0]), batch.index.to(compute.device))
