"""The speed of training, measured with real steps. Importing this module does not load torch."""

import json
import math
import os
import platform
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import psutil

from simsiam.config.recipes import ResolvedRecipe
from simsiam.data.images import Images, evenly_spaced, load_into_memory
from simsiam.errors import WorkFailed, printable
from simsiam.sources.file_index import Index
from simsiam.utils.system import gpu_devices
from simsiam.utils.workers import CPU_CORES

if TYPE_CHECKING:
    from simsiam.training.prepare import TrainingSetup

SPEED_INDEPENDENT = ("source", "mean", "std", "seed", "epochs", "steps", "limit", "holdout")
BUSY_LOAD = 0.5  # for each core, from which a measurement is not kept
MEASURING_SECONDS = 6.0  # that `measure_speed` may take once torch is loaded
FULL_BATCH_REPEATS = 3  # measurements with a full batch, of which the fastest counts


class Speed(TypedDict):
    """Seconds that an image takes.

    Attributes:
        prepared: To decode an image and make its views, in one process.
        trained: To train on its views.
        gpu: Whether a GPU trains, so that other processes prepare images at the same time.
        device: The name of the device.
        load: Load of the machine at the beginning, for each core; 0 where it is not known.
    """

    prepared: float
    trained: float
    gpu: bool
    device: str
    load: float


def measure_speed(
    recipe: ResolvedRecipe,
    images: Images,
    *,
    resident: bool,
    seconds: float = MEASURING_SECONDS,
) -> Speed:
    """Measure how long it takes to prepare images and to train on them.

    Steps are run on images of the source: first with small batches, then with larger ones up to
    the batch size, as far as time allows.

    Args:
        recipe: The recipe.
        images: The training images, all readable.
        resident: Whether the images will be decoded once and kept in memory; then preparing them
            does not include decoding.
        seconds: Time that the measurement may take once torch is loaded.

    Raises:
        UsageError: Labels are missing, or there are more classes than outputs.
        WorkFailed: A batch does not fit in the memory of the device.
    """
    import torch

    from simsiam.runs.environment import collect_environment
    from simsiam.training.prepare import build_training_setup, check_labels

    if recipe.method.target == "labels":
        check_labels(images, recipe.method.dim, printable(recipe.source[0]))
    load = round(psutil.getloadavg()[0] / CPU_CORES, 2)
    setup = build_training_setup(recipe)
    labels = None if images.labels is None else torch.from_numpy(images.labels)
    setup.model.begin(images=len(images), labels=labels, steps=1, per_epoch=1)
    device = setup.compute.device
    prepared = trained = math.inf
    try:
        _timed_step(recipe, setup, images, 2, resident)  # initializes libraries and the device
        deadline = time.monotonic() + seconds
        sizes = [2**k for k in range(3, 16) if 2**k < recipe.batch_size]
        for size in sizes + [recipe.batch_size] * FULL_BATCH_REPEATS:
            expected = size * (prepared + trained)
            if trained < math.inf and time.monotonic() + expected > deadline:
                break
            # The minimum: whatever slows down a single step is not due to the recipe.
            measured = _timed_step(recipe, setup, images, size, resident)
            prepared, trained = map(min, measured, (prepared, trained))
    except torch.OutOfMemoryError:
        raise WorkFailed(
            f"batches of {recipe.batch_size} do not fit in the memory of {device}"
        ) from None
    return {
        "prepared": prepared,
        "trained": trained,
        "gpu": device.type != "cpu",
        "device": str(collect_environment(setup.compute)["device"]),
        "load": load,
    }


def kept_speed(index: Index, recipe: ResolvedRecipe, images: Images, *, resident: bool) -> Speed:
    """Return the speed for a recipe, measured once on this machine, or again if it was busy then.

    Args:
        index: The index of the source, where the measurement is kept.
        recipe: The recipe.
        images: The training images, all readable.
        resident: Whether the images will be decoded once and kept in memory.

    Raises:
        WorkFailed: A batch does not fit in the memory of the device.
    """
    variables = [os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")]
    machine = [platform.node(), CPU_CORES, *variables, gpu_devices(), version("torch")]
    settings = {k: v for k, v in recipe.to_dict().items() if k not in SPEED_INDEPENDENT}
    key = f"speed of {json.dumps([machine, resident, settings])}"
    speed: Speed = index.get_or_measure(
        key, lambda: measure_speed(recipe, images, resident=resident)
    )
    if speed["load"] > BUSY_LOAD:
        index.forget(key)
    return speed


def _timed_step(
    recipe: ResolvedRecipe, setup: "TrainingSetup", images: Images, size: int, resident: bool
) -> tuple[float, float]:
    """Train on a batch of `size` images; return seconds per image to prepare and to train."""
    import torch

    from simsiam.data.batches import make_training_views

    model, optimizer, compute = setup
    batch = images.take(evenly_spaced(len(images), size))
    if resident:
        batch, _ = load_into_memory(batch, 2**62)
    start = time.monotonic()
    rows = np.arange(size) % len(batch)
    device = compute.device
    x = make_training_views(batch, rows, recipe, 0, device, view_count=None)
    index = torch.from_numpy(rows)
    middle = time.monotonic()
    with compute.autocast():
        output = model(*x, index=index.to(device))
    optimizer.zero_grad()
    output.loss.backward()
    optimizer.step()
    model.after_step(output, 0, index.to(device))
    output.loss.item()  # waits for a GPU
    return (middle - start) / size, (time.monotonic() - middle) / size


def seconds_per_image(speed: Speed, *, resident: bool, cores: int) -> tuple[float, float, float]:
    """Compute the seconds that an image takes in a run.

    A GPU trains while worker processes prepare images, so the slower of the two decides. On a CPU
    both use the same cores. Images in memory are prepared between the steps.

    Args:
        speed: The measured speed.
        resident: Whether the images are decoded once and kept in memory.
        cores: The number of cores that prepare images.

    Returns:
        Seconds per image to prepare it with all cores, to train on it, and for both.
    """
    prepared, trained = speed["prepared"] / (1 if resident else cores), speed["trained"]
    at_the_same_time = speed["gpu"] and not resident
    total = max(prepared, trained) if at_the_same_time else prepared + trained
    return prepared, trained, total
