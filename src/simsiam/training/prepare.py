"""Before the loop: the recipe a source asks for, the images to train on and those kept out, the model and optimizer."""

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
from simsiam.model.precision import Compute
from simsiam.model.siamese import Siamese, build
from simsiam.model.targets import MovingAverageTarget
from simsiam.runs.encoder import load_init_weights
from simsiam.sources.disk_cache import with_disk_cache
from simsiam.sources.open_source import Source


@dataclass(frozen=True)
class RunData:
    """What a run reads."""

    train: Images
    bank: Images  # labeled images that vote in the kNN monitor, where there are any: the training images if they can
    held_out: Images | None  # labeled images they vote on
    unreadable: list[tuple[str, str]]  # key and reason of files that do not decode
    total_images: int  # how many images there were, readable or not


def prepare_data(recipe: ResolvedRecipe, source: Source) -> RunData:
    """Limit, decode what fits in memory or on disk, and hold out; a function of the recipe and the files alone.

    Labeled images are held out of the training set, unless the source has a `val` split beside its `test` split (a lone
    `val` is what others test on) and no number is asked for. Where only `val` is labeled (STL-10), a fifth of it is
    classified by the rest. Raises UsageError where the images do not fill one batch.
    """
    limit_bytes = int(recipe.cache_gib * 2**30)
    everything = sample(source.train, recipe.limit)
    train, unreadable = load_into_memory(everything, limit_bytes)
    unreadable = [*source.damage, *unreadable]
    seen, bank, held_out, tenth = len(everything), train, None, min(len(train) // 10, 5000)
    beside = (
        None
        if source.val is None or source.val.labels is None or recipe.holdout == 0
        else source.val
    )
    if beside is not None and (
        train.labels is None or (recipe.holdout is None and source.test is not None)
    ):
        held_out, more = load_into_memory(beside, limit_bytes)
        unreadable, seen = unreadable + more, seen + len(beside)
        if train.labels is None:
            bank, held_out = hold_out(held_out, recipe.holdout or max(1, len(held_out) // 5))
    elif train.labels is not None and (
        count := tenth if recipe.holdout is None else recipe.holdout
    ):
        train, held_out = hold_out(train, count)
        bank = train
    steps_per_epoch(len(train), recipe.batch_size)
    check_process_split(recipe, len(train))
    if recipe.method.target == "labels" and (
        train.labels is None or len(train.classes) > recipe.method.dim
    ):
        known = (
            "no labels"
            if train.labels is None
            else f"{len(train.classes)} classes: dim is {recipe.method.dim}"
        )
        raise UsageError(
            f"target labels needs a label, of at most `dim`, for each image; {source.name} has {known}"
        )
    train = with_disk_cache(
        train,
        recipe.source,
        source.train,
        min_decode_side(recipe),
        int(recipe.disk_cache_gib * 2**30),
    )
    return RunData(train, bank, held_out, unreadable, seen)


def check_process_split(recipe: ResolvedRecipe, image_count: int) -> None:
    """Raises UsageError where a batch cannot be dealt to the processes, or they do not see the same source."""
    processes, size = world_size(), recipe.batch_size
    if size < processes:
        raise UsageError(
            f"batch_size is {size} and there are {processes} processes: each needs an image"
        )
    if (
        processes > 1
        and recipe.method.bn == "split"
        and (BN_SPLITS % processes or size % BN_SPLITS)
    ):
        raise UsageError(
            f"bn split makes {BN_SPLITS} equal parts of a batch, for 1, 2, 4 or 8 processes, and batch_size is {size} with "
            f"{processes} processes: take other numbers, or bn per_view"
        )
    mine = recipe.to_dict() | {"images": image_count}
    for other in all_gather_objects([mine]):
        if differ := [name for name in mine if mine[name] != other[name]]:
            both = f"{differ[0]} is {mine[differ[0]]} here and {other[differ[0]]} elsewhere"
            raise UsageError(f"the processes do not see the same source: {both}")


class TrainingSetup(NamedTuple):
    """What the loop moves, and where."""

    model: Siamese
    optimizer: Optimizer
    compute: Compute


def build_training_setup(recipe: ResolvedRecipe) -> TrainingSetup:
    """The recipe's model and optimizer on its device, at their first step."""
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


def initialize_eta(model: Siamese, images: Images, recipe: ResolvedRecipe, compute: Compute) -> None:
    """Give every image its first eta, what the initial network makes of one view, where the target keeps one (5.2).

    Without it, in the first epoch t would be the other view's z alone: Table 1a, which collapses.
    """
    if isinstance(model.target, MovingAverageTarget):
        f = deepcopy(
            model.f
        )  # a copy: the running statistics of the model's batch norms stay as they are
        for batch in sequential_batches(images, recipe, compute.device):
            with torch.no_grad(), compute.autocast():
                model.target.set_eta(f(batch.views[0]), batch.index.to(compute.device))
