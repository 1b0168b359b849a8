"""Plan a run before it is started: steps, time, memory, checkpoints, storage and reading.

Sizes are counted on the model itself. The speed is measured on this machine or taken from what
`simsiam bench` measured on another one. Assumptions are listed with the results.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from typing_extensions import Unpack

from simsiam.config.keyword_settings import PretrainSettings
from simsiam.config.recipes import Recipe, ResolvedRecipe
from simsiam.data.batches import steps_per_epoch
from simsiam.data.decode import Unreadable
from simsiam.data.images import Images, measure_sizes, quick_sample
from simsiam.errors import UsageError, none_readable, printable
from simsiam.model.memory import activation_bytes, build_on_meta
from simsiam.model.precision import Compute
from simsiam.model.targets import eta_bytes
from simsiam.runs.choose import held_out_count
from simsiam.runs.compose import compose_recipe
from simsiam.runs.environment import collect_environment
from simsiam.runs.run_folder import checkpoint_bytes
from simsiam.sources.file_index import Index, load_index
from simsiam.sources.open_source import source_names
from simsiam.training.facts import (
    check_out_file,
    format_bytes,
    format_duration,
    print_fact_lines,
    write_facts,
)
from simsiam.training.inspect import BUSY_LINES, RecipeFacts, format_recipe
from simsiam.training.prepare import build_training_setup
from simsiam.training.speed import BUSY_LOAD, Speed, kept_speed, seconds_per_image
from simsiam.utils.flops import count_flops
from simsiam.utils.typed_json import read_json
from simsiam.utils.workers import CPU_CORES

FILE_SAMPLE_SIZE = 200  # images whose files are measured
SCALING_EFFICIENCY = 0.9  # speed of N processes, divided by N times the speed of one
CATALOG_BYTES_PER_IMAGE = 72  # on disk, for an image in shards: its name, location and label
EXTRA_CHECKPOINTS = 3  # besides those that are kept: last.pt, previous.pt and best.pt
PREPARING_CASE = "simsiam, what workers do of it"  # in the case views-224 of a bench file


@dataclass(frozen=True, kw_only=True)
class SpeedEstimate:
    """The speed that a plan is based on.

    Attributes:
        speed: Seconds per image; `prepared` is 0 if unknown.
        precision: The precision of the training steps.
        origin: Where the speed was measured.
        from_bench: Whether it was computed from a bench file.
        prepared_on: The device of the bench file that `prepared` comes from, if it does.
    """

    speed: Speed
    precision: str
    origin: str
    from_bench: bool = False
    prepared_on: str | None = None


class ImageFacts(TypedDict):
    """The images to train on."""

    count: int
    in_source: int
    bytes_each: int
    resident: bool  # whether they are decoded once and kept in memory


class StepFacts(TypedDict):
    """Steps of the run."""

    total: int
    per_epoch: int
    epochs: float
    batch_size: int
    samples: int  # images in all steps, counting repetitions


TimeFacts = TypedDict(
    "TimeFacts",
    {
        "seconds": float,
        "images_per_second": float,
        "prepared_per_second": float | None,
        "trained_per_second": float,
        "cores_to_keep_up": float | None,  # of each process, to prepare as fast as a GPU trains
        "processes": int,
        "cores": int,  # of each process
        "device": str,
        "from": str,  # where the speed was measured
    },
)


class ModelCosts(TypedDict):
    """Bytes of a model by purpose."""

    weights: int
    gradients: int
    optimizer: int
    activations_per_image: int
    checkpoint: int


class MemoryFacts(TypedDict):
    """Bytes of memory, and the arithmetic of a step."""

    device_bytes: int  # on the device of each process: the sum of the next four
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    shards_bytes: int  # in the memory of the data workers of each process
    checkpoint_bytes: int
    flops_per_image: float
    precision: str


class StorageFacts(TypedDict):
    """Bytes on disk."""

    images_bytes: int
    catalog_bytes: int
    checkpoint_bytes: int
    checkpoints: int
    run_bytes: int


class ReadingFacts(TypedDict):
    """What storage and network have to deliver."""

    bytes_per_second: int  # 0 if the images stay in memory
    each_process: int  # bytes per second
    bytes: int  # in the whole run


class AssumptionFacts(TypedDict):
    """What the numbers are based on without being known."""

    lines: list[str]


class PlanFacts(TypedDict):
    """All facts of a plan."""

    recipe: RecipeFacts
    images: ImageFacts
    steps: StepFacts
    time: TimeFacts
    memory: MemoryFacts
    storage: StorageFacts
    reading: ReadingFacts
    assumed: AssumptionFacts


def plan(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    gpus: int = 1,
    images: int | None = None,
    cores: int | None = None,
    bench: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    out: str | os.PathLike[str] | None = None,
    recipe: str | Recipe | None = None,
    **settings: Unpack[PretrainSettings],
) -> PlanFacts:
    """Print what pretraining on a source would take.

    Args:
        sources: One or several sources, as for `pretrain`.
        gpus: The number of processes, one for each device.
        images: Plan for this many images like those of the source; by default as many as it has.
        cores: CPU cores of each process that prepare images; by default those of this machine.
        bench: Files written by `simsiam bench --out` on the machine that will train; by default
            the speed is measured here.
        out: A JSON file for the facts.
        recipe: A recipe, its name or its file, as for `pretrain`.
        **settings: Settings that replace those of the recipe, as for `pretrain`.

    Returns:
        The facts.

    Raises:
        UsageError: An argument is wrong.
        WorkFailed: No image can be read, or a batch does not fit in memory.
    """
    path = check_out_file(out)
    for name, value in {"gpus": gpus, "images": images, "cores": cores}.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; it is at least 1")
    names = source_names(sources)
    resolved, source, (chosen, *reasons) = compose_recipe(names, recipe, settings, ["plan"])
    if resolved.batch_size % gpus:
        raise UsageError(
            f"batch_size {resolved.batch_size} cannot be divided evenly among {gpus} processes: "
            "choose another --batch-size or --gpus"
        )
    train = source.train
    count = min(images or len(train), resolved.limit or 2**63)
    resident = is_resident(train, count, resolved)
    if bench:
        files = [bench] if isinstance(bench, str | os.PathLike) else list(bench)
        estimate = speed_from_bench(files, resolved)
    else:
        index = load_index(names, source, resolved.channels)
        estimate = measure_local_speed(index, resolved, train, resident)
    image_facts: ImageFacts = {
        "count": count,
        "in_source": len(train),
        "bytes_each": round(mean_file_bytes(train)),
        "resident": resident,
    }
    held_out = held_out_count(resolved, source, count)
    steps = count_steps(resolved, count - held_out)
    time = estimate_time(steps, estimate, gpus, cores or CPU_CORES, resident)
    memory = estimate_memory(resolved, train, count, gpus, estimate.precision)
    storage = estimate_storage(resolved, image_facts, steps, memory, train)
    assumed = list_assumptions(image_facts, estimate, gpus, images is not None)
    if held_out:
        assumed.append(f"{held_out:,} of the images are not trained on: kNN classifies them")
    facts: PlanFacts = {
        "recipe": {"chosen": chosen, "because": reasons},
        "images": image_facts,
        "steps": steps,
        "time": time,
        "memory": memory,
        "storage": storage,
        "reading": estimate_reading(image_facts, steps, time, storage, gpus),
        "assumed": {"lines": assumed},
    }
    for name, fact in facts.items():
        print_fact_lines(name, PLAN_FORMATTERS[name](fact))
    write_facts(path, facts)
    return facts


# --- images and steps -----------------------------------------------------------------------------


def is_resident(images: Images, num_images: int, recipe: ResolvedRecipe) -> bool:
    """Return whether images would be decoded once and kept in memory.

    Args:
        images: The images of the source.
        num_images: The number of images like these that are planned for.
        recipe: The recipe, which limits the memory.
    """
    if images.pixels is not None:
        return num_images <= len(images)
    sizes = measure_sizes(images)
    same = len(sizes) > 0 and bool((sizes == sizes[0]).all())
    return same and num_images * recipe.channels * int(sizes[0].prod()) <= recipe.cache_gib * 2**30


def mean_file_bytes(images: Images) -> float:
    """Measure the mean size of an image file in bytes, on a sample.

    Args:
        images: The images.

    Raises:
        WorkFailed: No image of the sample can be read.
    """
    if images.pixels is not None:
        return images.pixels[0].nbytes
    sizes, sampled, reasons = [], quick_sample(images, FILE_SAMPLE_SIZE), list[str]()
    for i in range(len(sampled)):
        try:
            file = sampled.file(i)
            sizes.append(len(file) if isinstance(file, bytes) else os.path.getsize(file))
        except (Unreadable, OSError) as error:
            reasons.append(getattr(error, "strerror", None) or str(error))
    if not sizes:
        raise none_readable(len(sampled), sampled.keys[0], reasons[0], "images of a sample")
    return sum(sizes) / len(sizes)


def count_steps(recipe: ResolvedRecipe, num_images: int) -> StepFacts:
    """Count the steps of a run.

    Args:
        recipe: The recipe.
        num_images: The number of training images.

    Raises:
        UsageError: The images do not fill a batch.
    """
    per_epoch = steps_per_epoch(num_images, recipe.batch_size)
    total = recipe.steps or recipe.epochs * per_epoch
    return {
        "total": total,
        "per_epoch": per_epoch,
        "epochs": round(total / per_epoch, 4),
        "batch_size": recipe.batch_size,
        "samples": total * recipe.batch_size,
    }


# --- speed ----------------------------------------------------------------------------------------


def measure_local_speed(
    index: Index, recipe: ResolvedRecipe, images: Images, resident: bool
) -> SpeedEstimate:
    """Measure the speed of training on this machine.

    Args:
        index: The index of the source, where the measurement is kept; `inspect` uses the same one.
        recipe: The recipe.
        images: The training images.
        resident: Whether the images will be decoded once and kept in memory.

    Raises:
        WorkFailed: A batch does not fit in the memory of the device.
    """
    return SpeedEstimate(
        speed=kept_speed(index, recipe, images, resident=resident),
        precision=Compute.pick(recipe.device, recipe.precision).precision,
        origin="a measurement on this machine",
    )


def speed_from_bench(
    files: Sequence[str | os.PathLike[str]], recipe: ResolvedRecipe
) -> SpeedEstimate:
    """Compute the speed on another machine from its bench files.

    Training is assumed to reach the FLOP/s of the fastest training step that was measured. The
    step and the preparation of images may be in different files.

    Args:
        files: Files written by `simsiam bench --out`.
        recipe: The recipe.

    Raises:
        UsageError: A file cannot be read, or no file contains a training step.
    """
    reports = {Path(file).name: _read_bench_file(file) for file in files}
    try:
        steps = [
            (name, report, case)
            for name, report in reports.items()
            for key, case in report["cases"].items()
            if key.startswith("step-")
        ]
        name, report, best = max(steps, key=lambda step: _achieved_flops(step[2]))
        achieved, precision = _achieved_flops(best), report["precision"]
        speed: Speed = {
            "prepared": 0.0,
            "trained": model_costs(recipe, precision)[1] / achieved,
            "gpu": report["device_type"] != "cpu",
            "device": report["device"],
            "load": 0.0,
        }
        prepared_on = None
        for other in reports.values():
            ways = other["cases"].get("views-224", {}).get("ways", {})
            if views := ways.get(PREPARING_CASE):
                speed["prepared"], prepared_on = 1 / views["rate"], other["device"]
        return SpeedEstimate(
            speed=speed,
            precision=precision,
            origin=f"{name}: {achieved / 1e12:.3g} TFLOP/s in {best['what']}",
            from_bench=True,
            prepared_on=prepared_on,
        )
    except (ValueError, LookupError, TypeError, AttributeError):
        paths = ", ".join(printable(str(file)) for file in files)
        command = "simsiam bench --only step-resnet18-256 views-224 --out FILE.json"
        raise UsageError(
            f"found no bench file with a training step in {paths}: `{command}` writes one"
        ) from None


def _read_bench_file(file: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        return read_json(file, dict[str, Any])
    except OSError as error:
        raise UsageError(f"cannot read {printable(str(file))}: {error.strerror}") from None
    except UsageError:
        return {}


def _achieved_flops(case: Mapping[str, Any]) -> float:
    return float(case["limit"]["achieved"])


def estimate_time(
    steps: StepFacts, estimate: SpeedEstimate, gpus: int, cores: int, resident: bool
) -> TimeFacts:
    """Estimate rates and the duration of a run.

    Args:
        steps: The steps of the run.
        estimate: The speed of one process.
        gpus: The number of processes.
        cores: CPU cores of each process that prepare images.
        resident: Whether the images are decoded once and kept in memory.
    """
    speed = estimate.speed
    prepared, trained, seconds = seconds_per_image(speed, resident=resident, cores=cores)
    rate = gpus / seconds * (SCALING_EFFICIENCY if gpus > 1 else 1.0)
    cores_to_keep_up = round(speed["prepared"] / speed["trained"], 1) if speed["gpu"] else None
    return {
        "seconds": round(steps["samples"] / rate, 1),
        "images_per_second": round(rate, 1),
        "prepared_per_second": round(gpus / prepared, 1) if prepared else None,
        "trained_per_second": round(gpus / trained, 1),
        "cores_to_keep_up": cores_to_keep_up,
        "processes": gpus,
        "cores": cores,
        "device": speed["device"],
        "from": estimate.origin,
    }


# --- sizes ----------------------------------------------------------------------------------------


def model_costs(recipe: ResolvedRecipe, precision: str) -> tuple[ModelCosts, float]:
    """Count the bytes and the FLOPs of a model in one step on few images, on the CPU.

    Args:
        recipe: The recipe.
        precision: "float32" or "bfloat16".

    Returns:
        Bytes by purpose, and the FLOPs of a step per image.
    """
    recipe = recipe.replace(device="cpu", init=None)
    compute = Compute(torch.device("cpu"), precision)
    count = max(4, recipe.method.min_batch)  # images
    model, optimizer, _ = build_training_setup(recipe.replace(batch_size=count))
    labels = torch.zeros(count, dtype=torch.long) if recipe.method.target == "labels" else None
    model.begin(images=count, labels=labels, steps=1, per_epoch=1)
    shape = (count, recipe.channels)
    x = [compute.place(torch.randn(*shape, size, size)) for size in recipe.view_sizes]
    index = torch.arange(count)
    with count_flops() as counter:
        with compute.autocast():
            output = model(*x, index=index)
        output.loss.backward()
    optimizer.step()
    model.after_step(output, 0, index)
    state = [
        value
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor)
    ]
    activations = activation_bytes(
        build_on_meta(recipe), recipe.replace(precision=precision), count
    )
    checkpoint = checkpoint_bytes(recipe, model, optimizer, collect_environment(compute))
    costs: ModelCosts = {
        "weights": _total_bytes(model.parameters()) + _total_bytes(model.buffers()),
        "gradients": _total_bytes(p for p in model.parameters() if p.requires_grad),
        "optimizer": _total_bytes(state),
        "activations_per_image": activations // count,
        "checkpoint": checkpoint - eta_bytes(recipe.method, count),
    }
    return costs, counter.get_total_flops() / count


def _total_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def estimate_memory(
    recipe: ResolvedRecipe, images: Images, num_images: int, gpus: int, precision: str
) -> MemoryFacts:
    """Estimate the memory of each process.

    Args:
        recipe: The recipe.
        images: The images of the source.
        num_images: The number of images like these that are planned for.
        gpus: The number of processes.
        precision: "float32" or "bfloat16".
    """
    costs, flops = model_costs(recipe, precision)
    local_batch_size = recipe.batch_size // gpus
    weights = costs["weights"] + eta_bytes(recipe.method, -(-num_images // gpus))
    # Several processes also have buffers in which gradients are summed.
    gradients = costs["gradients"] * (2 if gpus > 1 else 1)
    activations = costs["activations_per_image"] * local_batch_size
    shards = 0
    if images.blocks and recipe.order == "auto":
        num_blocks = round(len(images.blocks) * max(1.0, num_images / len(images)))
        shards = min(local_batch_size, num_blocks) * images.storage.block_bytes
    return {
        "device_bytes": weights + gradients + costs["optimizer"] + activations,
        "weights_bytes": weights,
        "gradients_bytes": gradients,
        "optimizer_bytes": costs["optimizer"],
        "activations_bytes": activations,
        "shards_bytes": shards,
        "checkpoint_bytes": costs["checkpoint"] + eta_bytes(recipe.method, num_images),
        "flops_per_image": flops,
        "precision": precision,
    }


def estimate_storage(
    recipe: ResolvedRecipe,
    image_facts: ImageFacts,
    steps: StepFacts,
    memory: MemoryFacts,
    images: Images,
) -> StorageFacts:
    """Estimate the space on disk for the images, their catalog and the run folder.

    Args:
        recipe: The recipe.
        image_facts: The images that are planned for.
        steps: The steps of the run.
        memory: The size of a checkpoint.
        images: The images of the source.
    """
    count, size = image_facts["count"], memory["checkpoint_bytes"]
    checkpoints = int(steps["epochs"] // recipe.save_every) + EXTRA_CHECKPOINTS
    return {
        "images_bytes": round(count * image_facts["bytes_each"]),
        "catalog_bytes": count * CATALOG_BYTES_PER_IMAGE if images.blocks else 0,
        "checkpoint_bytes": size,
        "checkpoints": checkpoints,
        "run_bytes": size * checkpoints,
    }


def estimate_reading(
    images: ImageFacts, steps: StepFacts, time: TimeFacts, storage: StorageFacts, gpus: int
) -> ReadingFacts:
    """Estimate what storage and network have to deliver.

    Images that stay in memory are read once; all others are read in every epoch.

    Args:
        images: The images that are planned for.
        steps: The steps of the run.
        time: The rate of the run.
        storage: The size of the images.
        gpus: The number of processes.
    """
    rate = 0.0 if images["resident"] else time["images_per_second"] * images["bytes_each"]
    in_all_steps = steps["samples"] * images["bytes_each"]
    return {
        "bytes_per_second": round(rate),
        "each_process": round(rate / gpus),
        "bytes": round(storage["images_bytes"] if images["resident"] else in_all_steps),
    }


def list_assumptions(
    images: ImageFacts, estimate: SpeedEstimate, gpus: int, extrapolated: bool
) -> list[str]:
    """List what the numbers are based on without being known.

    Args:
        images: The images that are planned for.
        estimate: The speed that the time is based on.
        gpus: The number of processes.
        extrapolated: Whether the number of images is not that of the source.

    Returns:
        Lines of text.
    """
    speed = estimate.speed
    lines = [
        "the time leaves out kNN measurements, checkpoints, waiting for storage, and the features "
        "of a teacher or for clusters",
        "the memory leaves out workspaces of kernels and fragmentation: add 20 %",
    ]
    if speed["load"] > BUSY_LOAD:
        lines += BUSY_LINES
    if estimate.from_bench:
        lines.append("training reaches the FLOP/s of the fastest step in the bench file")
    if estimate.prepared_on not in (None, speed["device"]):
        lines.append(f"images are prepared on cores like those of {estimate.prepared_on}")
    if gpus > 1:
        lines.append(
            f"{gpus} processes are {SCALING_EFFICIENCY:g} x {gpus} times as fast as one, on "
            "machines as fast as the measured one"
        )
    if extrapolated:
        lines.append(
            f"the {images['count']:,} images are like the {images['in_source']:,} of the source"
        )
    if not speed["prepared"]:
        lines.append(
            "images are prepared as fast as they are trained on: the bench file has no case "
            "views-224"
        )
    return lines


# --- the facts as text ----------------------------------------------------------------------------


def _format_images(fact: ImageFacts) -> list[str]:
    reading = (
        "decoded once and kept in memory" if fact["resident"] else "read and decoded in every epoch"
    )
    return [f"{fact['count']:,} of {format_bytes(fact['bytes_each'], 3)} each, {reading}"]


def _format_steps(fact: StepFacts) -> list[str]:
    return [
        f"{fact['total']:,} in {fact['epochs']:g} epochs of {fact['per_epoch']:,} steps, "
        f"{fact['batch_size']:,} images per step",
        f"{fact['samples']:,} images in all steps together",
    ]


def _format_time(fact: TimeFacts) -> list[str]:
    rate = fact["prepared_per_second"]
    prepared = "not measured" if rate is None else f"{rate:,.0f}/s"
    hours = f"{fact['seconds'] / 3600:,.3g} hours"
    lines = [
        f"about {format_duration(fact['seconds'])} ({hours}), estimated",
        f"{fact['images_per_second']:,.0f} images/s: preparing alone {prepared}, "
        f"training alone {fact['trained_per_second']:,.0f}/s",
        f"{fact['processes']:,} x {fact['device']}, each with {fact['cores']} cores to prepare "
        "images",
        f"based on {fact['from']}",
    ]
    if fact["cores_to_keep_up"]:
        lines.append(
            f"{fact['cores_to_keep_up']:,.0f} cores prepare images as fast as a device trains on "
            "them"
        )
    return lines


def _format_memory(fact: MemoryFacts) -> list[str]:
    sizes = {
        "weights": fact["weights_bytes"],
        "gradients": fact["gradients_bytes"],
        "optimizer": fact["optimizer_bytes"],
        "activations": fact["activations_bytes"],
    }
    parts = ", ".join(f"{format_bytes(size, 3)} {name}" for name, size in sizes.items())
    total = f"{format_bytes(fact['device_bytes'], 3)} on each device, in {fact['precision']}"
    lines = [f"{total}: {parts}"]
    if fact["shards_bytes"]:
        shards = format_bytes(fact["shards_bytes"], 3)
        lines.append(f"{shards} of shards in the memory of each process's data workers")
    return lines


def _format_storage(fact: StorageFacts) -> list[str]:
    images = f"{format_bytes(fact['images_bytes'], 3)} of images"
    if fact["catalog_bytes"]:
        images += f", and a catalog of {format_bytes(fact['catalog_bytes'], 3)} on each machine"
    checkpoint = format_bytes(fact["checkpoint_bytes"], 3)
    return [
        images,
        f"{format_bytes(fact['run_bytes'], 3)} in the run folder: {fact['checkpoints']:,} "
        f"checkpoints of {checkpoint}",
    ]


def _format_reading(fact: ReadingFacts) -> list[str]:
    total = format_bytes(fact["bytes"], 3)
    if not fact["bytes_per_second"]:
        return [f"{total}, once"]
    rate, each = (format_bytes(fact[key], 3) for key in ("bytes_per_second", "each_process"))
    return [f"{rate}/s in total, {each}/s per process; {total} in the whole run"]


PLAN_FORMATTERS: dict[str, Callable[[Any], list[str]]] = {
    "recipe": format_recipe,
    "images": _format_images,
    "steps": _format_steps,
    "time": _format_time,
    "memory": _format_memory,
    "storage": _format_storage,
    "reading": _format_reading,
    "assumed": lambda fact: fact["lines"],
}
