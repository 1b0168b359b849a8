"""Preparing a run: the images to train on and those kept out, the model, and the optimizer."""

from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from simsiam.config.method import BN_SPLITS
from simsiam.config.recipes import ResolvedRecipe
from simsiam.data.batches import min_decode_side, sequential_batches, steps_per_epoch
from simsiam.data.images import Images, hold_out, load_into_memory, sample
from simsiam.data.transform import Transform
from simsiam.distributed.collectives import all_gather_objects
from simsiam.distributed.process_group import broadcast, local_slice, rank_zero_only, world_size
from simsiam.distributed.sync_batch_norm import convert_sync_batchnorm
from simsiam.errors import UsageError
from simsiam.model.losses import Classification
from simsiam.model.memory import build_on_meta, check_memory
from simsiam.model.optimizers import build_optimizer
from simsiam.model.patches import PATCHES_PREFIX, parse_patches
from simsiam.model.precision import Compute
from simsiam.model.siamese import Siamese, build
from simsiam.model.targets import KMeansTarget, MovingAverageTarget, TeacherTarget
from simsiam.monitoring.features import extract_features
from simsiam.runs.choose import held_out_count, monitored_val
from simsiam.runs.encoder import eval_transform, load
from simsiam.runs.weights import load_init_weights, open_weights
from simsiam.sources.disk_cache import with_disk_cache
from simsiam.sources.fingerprint import fingerprint_source
from simsiam.sources.open_source import Source

DRAWN_ROWS = 2**16  # of eta that are drawn at a time


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
    if count := held_out_count(recipe, source, len(train)):
        train, held_out = hold_out(train, count)
        bank = train
    elif (val := monitored_val(recipe, source)) is not None:
        held_out, unreadable_val = load_into_memory(val, limit_bytes)
        unreadable, total_images = unreadable + unreadable_val, total_images + len(val)
        if train.labels is None:
            bank, held_out = hold_out(held_out, recipe.holdout or max(1, len(held_out) // 5))
    steps_per_epoch(len(train), recipe.batch_size)
    check_process_split(recipe, len(train))
    if recipe.method.target == "labels":
        check_labels(train, recipe.method.dim, source.name)
    if recipe.method.target == "kmeans" and len(train) < recipe.method.dim:
        raise UsageError(
            f"target kmeans finds {recipe.method.dim} clusters (--dim) in {len(train)} images: "
            f"use --dim {max(2, len(train) // 20)} or so"
        )
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
    if recipe.backbone.startswith(PATCHES_PREFIX) and parse_patches(recipe.backbone)[1] is None:
        raise UsageError(
            f"{recipe.backbone} is learned in closed form, not by steps: `simsiam adapt SOURCE` "
            "makes a run of it, which is complete"
        )
    compute = Compute.pick(recipe.device, recipe.precision)
    # Each process measures whether bfloat16 is faster; one decides.
    compute = compute._replace(precision=broadcast(compute.precision))
    model = build(
        recipe.method,
        backbone=recipe.backbone,
        image_size=recipe.image_size,
        width=recipe.width,
        stem=recipe.stem,
        channels=recipe.channels,
        seed=recipe.seed,
    )
    check_view_sizes(recipe)
    if recipe.init is not None:
        load_init_weights(model.backbone, recipe)
    if recipe.sync_bn and recipe.method.bn != "split" and world_size() > 1:
        convert_sync_batchnorm(model, compute.device)
    check_memory(recipe.replace(precision=compute.precision), compute.device)
    compute.place(model)
    return TrainingSetup(model, build_optimizer(model, recipe.method), compute)


def check_view_sizes(recipe: ResolvedRecipe) -> None:
    """Check that the backbone takes views that are smaller than the images, as a ResNet does.

    Args:
        recipe: The recipe of the run.

    Raises:
        UsageError: If it takes images of one size only.
    """
    image_size = recipe.image_size
    for size in {*recipe.view_sizes} - {image_size}:
        try:
            x = torch.empty(2, recipe.channels, size, size, device="meta")
            build_on_meta(recipe).backbone(x)
        except (AssertionError, RuntimeError, ValueError):
            raise UsageError(
                f"{recipe.backbone} does not take views of {size} px beside images of "
                f"{image_size} px: use a ResNet, or --view-ratio 1 and --small-crop-size "
                f"{image_size}"
            ) from None


def initialize_eta(
    model: Siamese, images: Images, recipe: ResolvedRecipe, compute: Compute, *, resumed: bool
) -> None:
    """Set the eta of every image before the first step of a process.

    A moving average begins with the projection by the initial network (section 5.2). Without this
    pass, t would be the other view's z alone in the first epoch: Table 1a, which collapses. A
    memory bank begins with random vectors, as in the code of instance discrimination: projections
    by the initial network resemble each other, so they are bad negatives. A teacher's features are
    centered, since what all images share teaches nothing.

    Args:
        model: The model before its first step.
        images: The training images.
        recipe: The recipe of the run.
        compute: Device and precision.
        resumed: Whether the model was loaded from a checkpoint.
    """
    if isinstance(model.target, TeacherTarget):
        teacher, transform = load_teacher(recipe, compute)
        found = extract_features(teacher, images, transform, compute=compute)
        h, own = found.matrices[0], local_slice(len(found.kept_indices))
        index = torch.as_tensor(found.kept_indices)
        model.target.set_eta((h - h.mean(0))[own].to(compute.device), index[own].to(compute.device))
    if not isinstance(model.target, MovingAverageTarget) or resumed:
        return
    if not recipe.method.target_fresh:
        draw_eta(model.target, len(images), recipe.seed)
    else:
        f = deepcopy(model.f)  # a copy, so that the running statistics of the model do not change
        for batch in sequential_batches(images, recipe, compute.device):
            with torch.no_grad(), compute.autocast():
                model.target.set_eta(f(batch.views[0]), batch.index.to(compute.device))


def load_teacher(recipe: ResolvedRecipe, compute: Compute) -> tuple[nn.Module, Transform]:
    """Load the teacher of a recipe.

    Args:
        recipe: A recipe with a teacher.
        compute: Device and precision.

    Returns:
        The encoder on the device, and its preprocessing.
    """
    assert recipe.teacher is not None
    teacher = load(
        open_weights(
            recipe.teacher,
            source=recipe.source,
            channels=recipe.channels,
            splits=recipe.splits,
        )
    )
    return compute.place(teacher), cast(Transform, teacher.transform)


def draw_eta(target: MovingAverageTarget, images: int, seed: int) -> None:
    """Set every eta to a random unit vector.

    Args:
        target: The target.
        images: Number of training images.
        seed: Seed of the run.
    """
    generator = torch.Generator().manual_seed(seed)
    for index in torch.arange(images).split(DRAWN_ROWS):
        rows = torch.randn(len(index), target.eta.shape[1], generator=generator)
        own = local_slice(len(index))
        target.set_eta(rows[own].to(target.eta), index[own].to(target.eta.device))


def solve_clusters(
    setup: TrainingSetup, images: Images, recipe: ResolvedRecipe, epoch: int
) -> None:
    """Cluster all images by the backbone as it is, and begin a new classifier (DeepCluster, 3.3).

    Args:
        setup: The model, whose target is `KMeansTarget`, and its optimizer.
        images: The training images.
        recipe: The recipe of the run.
        epoch: The epoch that begins.
    """
    model, optimizer, compute = setup
    target, criterion, head = model.target, model.criterion, model.projector[-1]
    assert isinstance(target, KMeansTarget) and isinstance(criterion, Classification)
    assert isinstance(head, nn.Linear)
    features = extract_features(model.backbone, images, eval_transform(recipe), compute=compute)
    if not features.matrices[0].isfinite().all():
        return  # the next check of the weights says that the run diverged
    found = cluster_features(features.matrices[0].numpy(), recipe.method.dim, recipe.seed + epoch)
    target.labels[torch.as_tensor(features.kept_indices)] = torch.as_tensor(found).to(target.labels)
    criterion.balance(target.labels)
    generator = torch.Generator().manual_seed(recipe.seed + epoch)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.01)
        head.bias.zero_()
    for p in head.parameters():
        for value in optimizer.state[p].values():  # of momentum, and AdamW's count of steps
            value.zero_()


@rank_zero_only
def cluster_features(h: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Find clusters as DeepCluster does (3.3): PCA to 256 dimensions, whitened, of unit length.

    Of narrower features than DeepCluster's 4096, the same share of the dimensions is kept, one of
    16, but at least 8: whitening more would give noise the same weight as everything else, and no
    crop of an image would tell its cluster.

    Args:
        h: (N, d) features.
        clusters: The number of clusters; N, if there are fewer features.
        seed: Seed of the first centers.

    Returns:
        (N,) int32, the cluster of each row.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import normalize
    from threadpoolctl import threadpool_limits

    kept = min(256, *h.shape, max(8, h.shape[1] // 16))
    seed %= 2**32  # scikit-learn's limit
    x = normalize(PCA(kept, whiten=True, random_state=seed).fit_transform(h))
    kmeans = KMeans(min(clusters, len(x)), n_init=1, max_iter=20, random_state=seed)
    # Several threads would add their sums in the order in which they end: no run would be the same.
    with threadpool_limits(1, user_api="openmp"):
        return kmeans.fit(x).labels_
