"""A time budget: size of views, stem, width, batch and number of steps that fit into minutes.

A small network that sees its images many times learns more in a short time than a large one that
sees them once. So the largest network is taken whose measured speed lets it see enough images.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from simsiam.config.recipes import ResolvedRecipe
from simsiam.data.images import Images, sample
from simsiam.data.transform import Transform
from simsiam.distributed.process_group import rank_zero_only
from simsiam.errors import UsageError
from simsiam.model.backbones import RESNETS, input_size
from simsiam.model.patches import PATCHES_PREFIX, parse_patches
from simsiam.model.precision import Compute
from simsiam.monitoring.features import extract_features
from simsiam.runs.encoder import eval_transform
from simsiam.runs.weights import PATCHES
from simsiam.training.plan import SCALING_EFFICIENCY, is_resident
from simsiam.training.prepare import build_training_setup, cluster_features, load_teacher
from simsiam.training.speed import measure_speed, seconds_per_image
from simsiam.utils.workers import CPU_CORES

ENOUGH_IMAGES = 300_000  # that training should see, counting repetitions
ENOUGH_STEPS = 1500
# Few steps need a large lr. Chosen on CIFAR-10, on images held out of its training split: after 675
# steps of 64 images, kNN accuracy was 33.4 % with a peak lr of 0.075, 37.5 with 0.25, 38.6 with 0.5
# (where z has fewer directions).
FEW_STEPS, FEW_STEPS_LR = 10_000, 0.25
SIDES, WIDTHS = (128, 64), (32, 16)  # that are tried where the recipe's own are too slow
# From this side on a large stem is tried before narrower networks: it makes four to five times as
# many steps in the same time. After five minutes on one core with 1,547 photographs of hands, kNN
# accuracy was 95 % with it, and 28 % with the small stem (seed 0).
LARGE_STEM_SIDE = 64
MIN_BATCH = 64
MEASUREMENTS = 5  # of the monitors, in a run; at most one an epoch, and one at the end
TRIAL_SECONDS = 3.0  # for the speed of one choice
START_SECONDS, END_SECONDS = 6, 10  # loading the program; writing files
PATCH_SECONDS = 45  # for learning patches at the end of a run of ten minutes or longer
MEASURING_SHARE = 0.05  # of the time, for measuring the start and the end
FORWARD_SHARE = 1 / 6  # of the time to train on an image: one forward pass of six
EXTRACTED, CLUSTERED = 64, 2000  # images with which features and k-means are timed
# What a time limit may choose.
CHOSEN_SETTINGS = (
    "steps", "batch_size", "image_size", "eval_resize", "stem", "width", "knn_every",
)  # fmt: skip
CHOSEN_METHOD_SETTINGS = ("base_lr", "warmup_epochs")


@dataclass(frozen=True)
class Trial:
    """A choice and its measured speed.

    Attributes:
        recipe: The recipe with this choice.
        rate: Images per second in training.
    """

    recipe: ResolvedRecipe
    rate: float

    def __str__(self) -> str:
        recipe = self.recipe
        network = f", {recipe.resnet_stem} stem, width {recipe.width}" * (
            recipe.backbone in RESNETS
        )
        return f"views of {recipe.view_size} px{network}: {self.rate:,.0f} images/s"


@rank_zero_only
def fit_to_minutes(
    recipe: ResolvedRecipe,
    images: Images,
    given: Mapping[str, object],
    *,
    minutes: float,
    elapsed: float,
    processes: int = 1,
    held_out: int = 0,
    keep_settings: bool = False,
) -> tuple[ResolvedRecipe, list[str]]:
    """Choose settings with which a run ends in time on this machine and learns the most it can.

    Args:
        recipe: The recipe.
        images: The images of the source.
        given: Settings that the user chose; they are kept.
        minutes: The time from start to end, evaluation included.
        elapsed: Seconds of it that have passed.
        processes: The number of processes that will train.
        held_out: Number of these images that are not trained on.
        keep_settings: Whether all settings but the length are kept, not only those in `given`.

    Returns:
        The recipe with the chosen settings, and lines that give the reasons.

    Raises:
        UsageError: The time is too short, or the settings contradict it.
        WorkFailed: A batch does not fit in memory.
    """
    if not minutes > 0:
        raise UsageError(f"minutes is {minutes}: give a number above 0")
    for name in ("epochs", "steps"):
        if given.get(name) is not None:
            raise UsageError(f"--minutes chooses the number of {name}: leave --{name} out")
    count = min(len(images), recipe.limit or len(images)) - held_out
    reserve = START_SECONDS + END_SECONDS + PATCH_SECONDS * (minutes >= 10)
    seconds = (60 * minutes - elapsed - reserve) * (1 - MEASURING_SHARE)
    lines, first_lines, trial = [], [], None
    if recipe.teacher is not None:
        begun = time.monotonic()
        needed = teacher_seconds(recipe, images) * count / processes
        seconds -= needed + time.monotonic() - begun
        first_lines = [f"before the first step: {needed:,.0f} seconds for the teacher's features"]
    for choice in [recipe] if keep_settings else choices(recipe, given):
        begun = time.monotonic()
        rate = measure_rate(choice, images, count, processes)
        in_epoch = epoch_seconds(choice, images, count, processes)
        before = in_epoch  # an epoch that is not completed also has it
        if recipe.method.target == "moving_average" and recipe.method.target_fresh:
            before = count * FORWARD_SHARE / rate  # eta of each image, before the first step
        trial = Trial(choice, rate)
        seconds -= time.monotonic() - begun
        total = trained_images(rate, seconds - before, count, in_epoch)
        lines.append(f"{trial}, {max(total, 0):,} images in this time")
        if total >= ENOUGH_IMAGES:
            break
    assert trial is not None
    if total < 2 * MIN_BATCH:
        raise UsageError(f"{minutes:g} minutes are too short to train here: {lines[-1]}")
    batch = recipe.batch_size
    if given.get("batch_size") is None and not keep_settings:
        while batch > MIN_BATCH and total / batch < ENOUGH_STEPS:
            batch //= 2
    steps, settings = total // batch, dict[str, float](batch_size=batch)
    epochs = steps * batch / count
    method = recipe.method
    scratch = method.name == "simsiam" and recipe.init in (None, PATCHES)
    fast = scratch and method.optimizer == "sgd" and steps < FEW_STEPS
    if fast and given.get("base_lr") is None and not keep_settings:
        settings["base_lr"] = max(FEW_STEPS_LR * 256 / batch, method.base_lr)
    if given.get("warmup_epochs") is None:  # at most a tenth: the lr has to reach its peak, and 0
        settings["warmup_epochs"] = min(method.warmup_epochs, int(epochs / 10))
    if given.get("knn_every") is None:
        settings["knn_every"] = max(1, math.ceil(epochs / MEASUREMENTS))
    chosen = trial.recipe.replace(steps=steps, **settings)
    wanted = f"the first of these that sees {ENOUGH_IMAGES:,} images is taken, or the last one:"
    summary = (
        f"{minutes:g} minutes: {steps:,} steps of {chosen.batch_size} images, "
        f"{epochs:.3g} epochs of {count:,}, peak lr {chosen.peak_lr:.3g}"
    )
    return chosen, [summary, *first_lines, wanted, *lines]


def choices(recipe: ResolvedRecipe, given: Mapping[str, object]) -> Iterator[ResolvedRecipe]:
    """Yield the recipe, then cheaper ones: smaller views, a large stem, narrower networks.

    Args:
        recipe: The recipe.
        given: Settings that the user chose; they are kept. So is the network of initial weights.
    """
    yield recipe
    stem, network = recipe.resnet_stem, recipe.backbone
    if network.startswith(PATCHES_PREFIX):
        network = parse_patches(network)[1] or network
    if given.get("image_size") is None:
        smallest = input_size(recipe.backbone) or 0 if recipe.init == PATCHES else 0
        changes = dict[str, object]()
        if network in RESNETS:  # a small stem at 64 px would take four times as long
            changes["stem"] = stem
        if given.get("eval_resize") is None:
            changes["eval_resize"] = None  # it belongs to the size of the recipe or the weights
        for size in (side for side in SIDES if smallest <= side < recipe.image_size):
            recipe = recipe.replace(image_size=size, **changes)
            yield recipe
    if network not in RESNETS or recipe.init not in (None, PATCHES):
        return
    if recipe.stem is None and stem == "small" and recipe.image_size >= LARGE_STEM_SIDE:
        recipe = recipe.replace(stem="large")
        yield recipe
    if given.get("width") is None:
        for width in (width for width in WIDTHS if width < recipe.width):
            recipe = recipe.replace(width=width)
            yield recipe


def teacher_seconds(recipe: ResolvedRecipe, images: Images) -> float:
    """Measure how long the teacher needs for the features of an image.

    Args:
        recipe: A recipe with a teacher.
        images: The images of the source.

    Returns:
        Seconds, of one process.
    """
    compute = Compute.pick(recipe.device, recipe.precision)
    teacher, transform = load_teacher(recipe, compute)
    return extraction_seconds(teacher, sample(images, EXTRACTED), transform, compute)


def extraction_seconds(
    model: nn.Module, images: Images, transform: Transform, compute: Compute
) -> float:
    """Measure how long a network needs for the features of an image.

    Args:
        model: The network, on its device.
        images: The images to measure with.
        transform: The preprocessing.
        compute: Device and precision.

    Returns:
        Seconds, of one process.
    """
    extract_features(model, images, transform, compute=compute)  # initializes libraries
    begun = time.monotonic()
    extract_features(model, images, transform, compute=compute)
    return (time.monotonic() - begun) / len(images)


def measure_rate(recipe: ResolvedRecipe, images: Images, count: int, processes: int) -> float:
    """Measure how many images a second training takes, with all processes.

    Args:
        recipe: The recipe.
        images: The images of the source.
        count: Number of training images.
        processes: The number of processes, which share a batch.
    """
    few = sample(images, 4 * recipe.batch_size)
    resident = is_resident(images if images.pixels is not None else few, count, recipe)
    share = recipe.replace(
        batch_size=max(recipe.method.min_batch, -(-recipe.batch_size // processes))
    )
    speed = measure_speed(share, few, resident=resident, seconds=TRIAL_SECONDS)
    _, _, seconds = seconds_per_image(speed, resident=resident, cores=CPU_CORES)
    return processes / seconds * (SCALING_EFFICIENCY if processes > 1 else 1)


def epoch_seconds(recipe: ResolvedRecipe, images: Images, count: int, processes: int) -> float:
    """Measure what an epoch takes besides its steps: with target kmeans, to find the clusters.

    Args:
        recipe: The recipe.
        images: The images of the source.
        count: Number of training images.
        processes: The number of processes. They share the features; one finds the clusters.

    Returns:
        Seconds.
    """
    if recipe.method.target != "kmeans":
        return 0.0
    setup, few = build_training_setup(recipe), sample(images, EXTRACTED)
    backbone = setup.model.backbone
    extracting = extraction_seconds(backbone, few, eval_transform(recipe), setup.compute)
    # k-means takes (images) x (clusters); fewer of both in the same proportion are measured.
    rows = min(count, CLUSTERED)
    width = int(backbone.dim)  # type: ignore[arg-type]
    h = np.random.default_rng(0).standard_normal((rows, width), dtype=np.float32)
    clusters = min(rows, max(2, recipe.method.dim * rows // count))
    begun = time.monotonic()
    cluster_features(h, clusters, recipe.seed)
    clustering = (time.monotonic() - begun) * (count / rows) ** 2
    return extracting * count / processes + clustering


def trained_images(rate: float, seconds: float, count: int, in_epoch: float = 0.0) -> int:
    """Compute how many images can be trained on, beside the measurements of the monitors.

    Args:
        rate: Images per second in training.
        seconds: The time.
        count: Number of training images, all of which the monitors read.
        in_epoch: Seconds that an epoch takes besides its steps.
    """
    monitor = (count + 3 * 2000) * FORWARD_SHARE / rate
    image = 1 / rate + in_epoch / max(count, 1)
    limits = {number: number * count for number in range(1, MEASUREMENTS)} | {
        MEASUREMENTS: math.inf
    }
    return int(max(min((seconds - n * monitor) / image, limits[n]) for n in limits))
