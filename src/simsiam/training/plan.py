"""What a run would take, before it is started: steps, time, memory, checkpoints, storage and reading.

Sizes are counted on the model itself, speed is measured here or taken from what `simsiam bench` measured elsewhere, and
whatever is only assumed is said.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import Unpack

from simsiam.config.keyword_settings import PretrainSettings
from simsiam.config.method import BN_SPLITS
from simsiam.config.recipes import Recipe, ResolvedRecipe
from simsiam.data.batches import steps_per_epoch
from simsiam.data.decode import Unreadable
from simsiam.data.images import Images, measure_sizes, quick_sample
from simsiam.errors import UsageError, WorkFailed, printable
from simsiam.model.memory import activation_bytes, build_on_meta
from simsiam.model.precision import Compute
from simsiam.model.targets import eta_bytes
from simsiam.runs.compose import compose_recipe
from simsiam.runs.environment import collect_environment
from simsiam.runs.run_folder import checkpoint_bytes
from simsiam.training.inspect import (
    format_bytes,
    format_duration,
    measure_speed,
    print_lines,
    seconds_per_image,
)
from simsiam.training.prepare import build_training_setup
from simsiam.utils.files import atomic_write
from simsiam.utils.workers import CPU_CORES

FILE_SAMPLE_SIZE = 200  # images whose files are measured
SCALING_EFFICIENCY = 0.9  # of N times the speed of one process is what N of them reach
CATALOG_BYTES_PER_IMAGE = (
    72  # bytes on the disk that are known of each image in shards: its name, its place, its label
)


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
) -> dict[str, Any]:
    """Print what pretraining on a source would take, and return it; `words` change the recipe as in `pretrain`.

    `gpus`: processes, one a device. `images`: as if there were so many, of the source's kind. `cores`: of each process,
    to prepare images with; as many as here. `bench`: files of `simsiam bench --out`, from the machine that is to
    train. `out` is a file for the facts, as JSON.
    """
    path = None if out is None else Path(out)
    if path and (path.is_dir() or not path.parent.is_dir()):
        raise UsageError(
            f"--out is {printable(str(path))}: it takes the name of a file in a folder that exists"
        )
    for name, given in {"gpus": gpus, "images": images, "cores": cores}.items():
        if given is not None and given < 1:
            raise UsageError(f"{name} is {given}; it is at least 1")
    names = [
        os.fspath(one) for one in ([sources] if isinstance(sources, str | os.PathLike) else sources)
    ]
    complete, source, why = compose_recipe(names, recipe, settings)
    if complete.batch_size % gpus:
        raise UsageError(
            f"batch_size {complete.batch_size} cannot be shared out evenly among {gpus} processes"
        )
    train = source.train
    count = min(images or len(train), complete.limit or 2**63)
    resident = is_resident(train, count, complete)
    files = [bench] if isinstance(bench, str | os.PathLike) else list(bench or ())
    measured = (
        speed_from_bench(files, complete)
        if files
        else measure_local_speed(complete, train, resident)
    )
    facts: dict[str, Any] = {
        "recipe": {"chosen": why[0], "because": why[1:]},
        "images": {
            "count": count,
            "in_source": len(train),
            "bytes_each": round(mean_file_bytes(train)),
            "resident": resident,
        },
        "steps": count_steps(complete, count),
    }
    facts["time"] = estimate_time(facts["steps"], measured, gpus, cores or CPU_CORES, resident)
    facts["memory"] = estimate_memory(complete, train, count, gpus, measured["precision"])
    facts["storage"] = estimate_storage(complete, facts, train, count)
    facts["reading"] = estimate_reading(facts, gpus)
    facts["assumed"] = {"lines": list_assumptions(facts, measured, gpus, images is not None)}
    for name, fact in facts.items():
        print_lines(name, PLAN_FORMATTERS[name](fact))
    if path:
        with atomic_write(path) as part:
            part.write_text(json.dumps(facts, indent=2) + "\n")
    return facts


# --- the images -------------------------------------------------------------------------------------------------------


def is_resident(images: Images, num_images: int, recipe: ResolvedRecipe) -> bool:
    """Whether `count` such images would be decoded once and stay in memory."""
    if images.pixels is not None:
        return num_images <= len(images)
    sizes = measure_sizes(images)
    same = len(sizes) > 0 and bool((sizes == sizes[0]).all())
    return same and num_images * recipe.channels * int(sizes[0].prod()) <= recipe.cache_gib * 2**30


def mean_file_bytes(images: Images) -> float:
    """The mean size of an image's file, of a sample."""
    if images.pixels is not None:
        return images.pixels[0].nbytes
    sizes, some = [], quick_sample(images, FILE_SAMPLE_SIZE)
    for i in range(len(some)):
        with suppress(Unreadable, OSError):
            file = some.file(i)
            sizes.append(len(file) if isinstance(file, bytes) else os.path.getsize(file))
    if not sizes:
        raise WorkFailed(f"none of {len(some)} images looked at can be read")
    return sum(sizes) / len(sizes)


def count_steps(recipe: ResolvedRecipe, num_images: int) -> dict[str, Any]:
    """Steps, and the images that they go through."""
    per_epoch = steps_per_epoch(num_images, recipe.batch_size)
    total = recipe.steps or recipe.epochs * per_epoch
    return {
        "total": total,
        "per_epoch": per_epoch,
        "epochs": round(total / per_epoch, 4),
        "batch_size": recipe.batch_size,
        "samples": total * recipe.batch_size,
    }


# --- speed ------------------------------------------------------------------------------------------------------------


def measure_local_speed(recipe: ResolvedRecipe, images: Images, resident: bool) -> dict[str, Any]:
    """Seconds an image takes, measured here: see `speed`."""
    found = measure_speed(recipe, images, resident=resident)
    precision = Compute.pick(recipe.device, recipe.precision).precision
    return found | {"from": "a probe on this machine", "precision": precision}


def speed_from_bench(files: Sequence[str | os.PathLike[str]], recipe: ResolvedRecipe) -> dict[str, Any]:
    """Seconds an image takes on the machine of a bench file, by the arithmetic that its largest network got done.

    What takes a GPU may be in one file and what takes cores in another. Raises UsageError where none holds a training
    step.
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
        _, flops = model_costs(recipe, report["precision"])
        found = {
            "prepared": 0.0,
            "trained": flops / _achieved_flops(best),
            "gpu": report["device_type"] != "cpu",
            "device": report["device"],
            "precision": report["precision"],
            "from": f"{name}: {_achieved_flops(best) / 1e12:.3g} TFLOP/s in {best['what']}",
            "flops": flops,
        }
        for other in reports.values():
            if (
                views := other["cases"]
                .get("views-224", {})
                .get("ways", {})
                .get("simsiam, what workers do of it")
            ):
                found |= {"prepared": 1 / views["rate"], "prepared_on": other["device"]}
    except (ValueError, LookupError, TypeError, AttributeError):
        need = "`simsiam bench --only step-resnet18-256 views-224 --out FILE.json` writes one"
        names = ", ".join(printable(str(file)) for file in files)
        raise UsageError(f"{names} is no bench file with a training step: {need}") from None
    return found


def _read_bench_file(file: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        report = json.loads(Path(file).read_text())
    except OSError as error:
        raise UsageError(f"cannot read {printable(str(file))}: {error.strerror}") from None
    except ValueError:
        report = None
    return report if isinstance(report, dict) else {}


def _achieved_flops(case: Mapping[str, Any]) -> float:
    return float(case["limit"]["achieved"])


def estimate_time(
    steps: Mapping[str, Any], measured: Mapping[str, Any], gpus: int, cores: int, resident: bool
) -> dict[str, Any]:
    """Rates per second, and how long it takes."""
    prepared, trained, seconds = seconds_per_image(measured, resident=resident, cores=cores)
    rate = gpus / seconds * (SCALING_EFFICIENCY if gpus > 1 else 1.0)
    return {
        "seconds": round(steps["samples"] / rate, 1),
        "images_per_second": round(rate, 1),
        "prepared_per_second": round(gpus / prepared, 1) if prepared else None,
        "trained_per_second": round(gpus / trained, 1),
        "cores_to_keep_up": round(measured["prepared"] / measured["trained"], 1)
        if measured["gpu"]
        else None,
        "processes": gpus,
        "cores": cores,
        "device": measured["device"],
        "from": measured["from"],
    }


# --- sizes ------------------------------------------------------------------------------------------------------------


def model_costs(recipe: ResolvedRecipe, precision: str) -> tuple[dict[str, int], float]:
    """Bytes of the recipe's model by what they are for, counted in one step on few images here; FLOPs of an image."""
    recipe = recipe.replace(device="cpu", init=None)
    compute = Compute(torch.device("cpu"), precision)
    few = 2 * BN_SPLITS if recipe.method.bn == "split" else 4
    model, optimizer, _ = build_training_setup(
        recipe.replace(batch_size=few)
    )  # all that has to fit into memory here
    labels = torch.zeros(few, dtype=torch.long) if recipe.method.target == "labels" else None
    model.begin(images=few, labels=labels, steps=1, per_epoch=1)
    shape = (few, recipe.channels, recipe.image_size, recipe.image_size)
    x = [
        torch.randn(shape).contiguous(memory_format=torch.channels_last)
        for _ in range(recipe.method.view_count)
    ]
    index = torch.arange(few)
    with FlopCounterMode(display=False) as counter:
        with compute.autocast():
            output = model(*x, index=index)
        output.loss.backward()
    optimizer.step()
    model.after_step(output, 0, index)
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = [
        t
        for state in optimizer.state.values()
        for t in state.values()
        if isinstance(t, torch.Tensor)
    ]
    here = collect_environment(compute)
    return {
        "weights": _total_bytes(model.parameters()) + _total_bytes(model.buffers()),
        "gradients": _total_bytes(trained),
        "optimizer": _total_bytes(kept),
        "activations_per_image": activation_bytes(
            build_on_meta(recipe), recipe.replace(precision=precision), few
        )
        // few,
        "checkpoint": checkpoint_bytes(recipe, model, optimizer, here)
        - eta_bytes(recipe.method, few),
    }, counter.get_total_flops() / few


def _total_bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def estimate_memory(
    recipe: ResolvedRecipe, images: Images, num_images: int, gpus: int, precision: str
) -> dict[str, Any]:
    """Bytes on the device of each process, and what its workers hold of shards."""
    found, flops = model_costs(recipe, precision)
    mine, eta = recipe.batch_size // gpus, eta_bytes(recipe.method, -(-num_images // gpus))
    parts = {
        "weights": found["weights"] + eta,
        "gradients": found["gradients"]
        * (2 if gpus > 1 else 1),  # and the buckets in which they are summed
        "optimizer": found["optimizer"],
        "activations": found["activations_per_image"] * mine,
    }
    held = 0
    if images.blocks and recipe.order == "auto":
        scale = max(1.0, num_images / len(images))
        held = min(mine, round(len(images.blocks) * scale)) * images.storage.block_bytes
    return {
        "device_bytes": sum(parts.values()),
        **{f"{name}_bytes": size for name, size in parts.items()},
        "shards_bytes": held,
        "checkpoint_bytes": found["checkpoint"] + eta_bytes(recipe.method, num_images),
        "flops_per_image": flops,
        "precision": precision,
    }


def estimate_storage(
    recipe: ResolvedRecipe, facts: Mapping[str, Any], images: Images, num_images: int
) -> dict[str, Any]:
    """Bytes of the images, of what is known of them, and of the run folder."""
    one, epochs = facts["memory"]["checkpoint_bytes"], facts["steps"]["epochs"]
    kept = int(epochs // recipe.save_every) + 3  # and last.pt, the one before it, and best.pt
    return {
        "images_bytes": round(num_images * facts["images"]["bytes_each"]),
        "catalog_bytes": num_images * CATALOG_BYTES_PER_IMAGE
        if images.blocks is not None
        else 0,
        "checkpoint_bytes": one,
        "checkpoints": kept,
        "run_bytes": one * kept,
    }


def estimate_reading(facts: Mapping[str, Any], gpus: int) -> dict[str, Any]:
    """Bytes per second that storage and network have to bring; none, after a first time, of images in memory."""
    rate = facts["time"]["images_per_second"] * facts["images"]["bytes_each"]
    rate = 0.0 if facts["images"]["resident"] else rate
    total = facts["steps"]["samples"] * facts["images"]["bytes_each"]
    total = facts["storage"]["images_bytes"] if facts["images"]["resident"] else total
    return {
        "bytes_per_second": round(rate),
        "each_process": round(rate / gpus),
        "bytes": round(total),
    }


def list_assumptions(
    facts: Mapping[str, Any], measured: Mapping[str, Any], gpus: int, extrapolated: bool
) -> list[str]:
    """What the numbers rest on, and is not known."""
    lines = [
        "no kNN monitor, no checkpoint, no wait for storage in the time",
        "no workspace of kernels and no fragments in the memory: add a fifth",
    ]
    if "flops" in measured:
        lines.append("a network gets as many FLOP/s done as the bench's largest step")
    if measured.get("prepared_on", measured["device"]) != measured["device"]:
        lines.append(f"images are prepared by cores like those of {measured['prepared_on']}")
    if gpus > 1:
        lines.append(
            f"{gpus} processes are {SCALING_EFFICIENCY:g} x {gpus} times as fast as one, and machines as fast as the measured"
        )
    if extrapolated:
        lines.append(
            f"{facts['images']['count']:,} images are like the {facts['images']['in_source']:,} there are"
        )
    if not measured["prepared"]:
        lines.append(
            "images are prepared as fast as they are trained on: the bench file has no views-224"
        )
    return lines


# --- in words ---------------------------------------------------------------------------------------------------------


def _format_image_storage(fact: Mapping[str, Any]) -> list[str]:
    where = "decoded once, in memory" if fact["resident"] else "read and decoded every epoch"
    return [f"{fact['count']:,} of {format_bytes(fact['bytes_each'], 3)} each, {where}"]


def _format_steps(fact: Mapping[str, Any]) -> list[str]:
    return [
        f"{fact['total']:,}: {fact['epochs']:g} epochs of {fact['per_epoch']:,}, {fact['batch_size']:,} images each",
        f"{fact['samples']:,} samples",
    ]


def _format_time_estimate(fact: Mapping[str, Any]) -> list[str]:
    prepared = (
        "as many"
        if fact["prepared_per_second"] is None
        else f"{fact['prepared_per_second']:,.0f}/s"
    )
    lines = [
        f"about {format_duration(fact['seconds'])} ({fact['seconds'] / 3600:,.3g} hours), an estimate",
        f"{fact['images_per_second']:,.0f} images/s: {prepared} prepared, "
        f"{fact['trained_per_second']:,.0f}/s trained on",
        f"{fact['processes']:,} x {fact['device']}, with {fact['cores']} cores each to prepare images",
        f"from {fact['from']}",
    ]
    if fact["cores_to_keep_up"]:
        lines.append(
            f"{fact['cores_to_keep_up']:,.0f} cores would prepare images as fast as a device trains on them"
        )
    return lines


def _format_memory(fact: Mapping[str, Any]) -> list[str]:
    parts = ", ".join(
        f"{format_bytes(fact[f'{n}_bytes'], 3)} {n}"
        for n in ("weights", "gradients", "optimizer", "activations")
    )
    lines = [
        f"{format_bytes(fact['device_bytes'], 3)} on the device of each process, in {fact['precision']}: {parts}"
    ]
    if fact["shards_bytes"]:
        lines.append(
            f"{format_bytes(fact['shards_bytes'], 3)} of shards in the memory of each process's workers"
        )
    return lines


def _format_storage(fact: Mapping[str, Any]) -> list[str]:
    known = f", and {format_bytes(fact['catalog_bytes'], 3)} of places on every machine" * bool(
        fact["catalog_bytes"]
    )
    kept = f"{fact['checkpoints']:,} checkpoints of {format_bytes(fact['checkpoint_bytes'], 3)}"
    return [
        f"{format_bytes(fact['images_bytes'], 3)} of images{known}",
        f"{format_bytes(fact['run_bytes'], 3)} of run folder: {kept}",
    ]


def _format_reading(fact: Mapping[str, Any]) -> list[str]:
    if not fact["bytes_per_second"]:
        return [f"{format_bytes(fact['bytes'], 3)}, once"]
    each = f"{format_bytes(fact['each_process'], 3)}/s for each process"
    return [
        f"{format_bytes(fact['bytes_per_second'], 3)}/s in all, {each}; {format_bytes(fact['bytes'], 3)} in the end"
    ]


PLAN_FORMATTERS = {
    "recipe": lambda fact: [fact["chosen"], *fact["because"]],
    "images": _format_image_storage,
    "steps": _format_steps,
    "time": _format_time_estimate,
    "memory": _format_memory,
    "storage": _format_storage,
    "reading": _format_reading,
    "assumed": lambda fact: fact["lines"],
}
