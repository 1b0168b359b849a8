"""What a source holds, before anything is trained on it: the facts as a dictionary, and in words on 80 columns."""

import json
import math
import os
import platform
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from glob import glob
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from simsiam.config import recipes
from simsiam.config.recipes import Recipe, ResolvedRecipe
from simsiam.data.images import Images, evenly_spaced, load_into_memory
from simsiam.errors import UsageError, WorkFailed, printable
from simsiam.runs.compose import choose_recipe
from simsiam.sources.file_index import Index, load_index
from simsiam.sources.open_source import Source, open_source
from simsiam.utils.files import atomic_write
from simsiam.utils.workers import CPU_CORES

TEXT_WIDTH, INDENT = 80, 12  # of the text
MAX_EXAMPLES = 3  # of a kind of trouble, in the text; the dictionary has all
PROBE_SECONDS = 6.0  # seconds that measuring the speed of training may take, once torch is loaded


def inspect(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    channels: int = 3,
    out: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Print what a source holds, what would be trained on it, and how long that would take here; returns these facts.

    Every file is looked at once, and again only when it has changed: see `index_of`. What needs torch is measured once
    for the same images and, where speed matters, the same machine. `out` is a file for the facts, as JSON.
    """
    path = None if out is None else Path(out)
    if path and (path.is_dir() or not path.parent.is_dir()):
        raise UsageError(
            f"--out is {printable(str(path))}: it takes the name of a file in a folder that exists"
        )
    names = [
        os.fspath(one) for one in ([sources] if isinstance(sources, str | os.PathLike) else sources)
    ]
    wanted = Recipe().replace(channels=channels)
    source = open_source(names, wanted.channels)
    index = load_index(names, source, wanted.channels)
    facts: dict[str, Any] = {"source": source.name}

    def found(name: str, fact: dict[str, Any]) -> dict[str, Any]:
        facts[name] = fact
        print_fact(name, fact)
        return fact

    for name, fact in dataset_facts(source, index).items():
        found(name, fact)
    try:
        recipe, why = choose_recipe(names, source)
        found("recipe", {"chosen": why[0], "because": why[1:]})
        recipe = recipe.replace(source=names, channels=channels)
        color = found("colors", color_statistics(names, source, recipe, index))
        found(
            "time",
            estimate_duration(source, recipe.replace(mean=color["mean"], std=color["std"]).resolve(), index),
        )
    except (
        UsageError,
        WorkFailed,
    ) as error:  # of images that cannot be trained on, the rest is told all the same
        found("time", {"unknown": str(error)})
    if path:
        with atomic_write(path) as part:
            part.write_text(json.dumps(facts, indent=2) + "\n")
    return facts


# --- what there is ----------------------------------------------------------------------------------------------------


def dataset_facts(source: Source, index: Index) -> dict[str, dict[str, Any]]:
    """What the index knows of the images, and the source of their labels."""
    table = index.table
    readable = pc.equal(table["reason"], "").to_numpy()
    unreadable = table.select(["key", "reason"]).filter(pa.array(~readable))
    splits = {name: len(images) for name, images in source.splits.items()}
    return {
        "images": {"count": len(table), "bytes": pc.sum(table["bytes"]).as_py(), "splits": splits},
        "sizes": _size_facts(*(table[name].to_numpy()[readable] for name in ("height", "width"))),
        "formats": _file_format_facts(table, readable),
        "labels": _label_facts(source),
        "duplicates": index.get_or_measure(
            f"duplicates in {splits}", lambda: _duplicate_facts(table, readable, splits)
        ),
        "unreadable": {
            "files": [
                [_printable_key(key), reason.as_py()] for key, reason in zip(*unreadable.columns)
            ]
        },
    }


def _printable_key(key: pa.Scalar) -> str:
    return printable(os.fsdecode(key.as_py()))


def _size_facts(height: np.ndarray, width: np.ndarray) -> dict[str, Any]:
    """The shorter side in pixels, and how many times longer the other one is: least, median, most; {} of no image.

    As stored, before any rotation by EXIF.
    """
    if not len(height):
        return {}
    shorter, longer = np.minimum(height, width), np.maximum(height, width)
    return {
        "all": [int(width[0]), int(height[0])] if _all_same_size(height, width) else None,
        "shorter_side": [int(f(shorter)) for f in (np.min, np.median, np.max)],
        "longer_to_shorter": [
            round(float(f(longer / shorter)), 2) for f in (np.min, np.median, np.max)
        ],
    }


def _all_same_size(height: np.ndarray, width: np.ndarray) -> bool:
    return bool((height == height[0]).all() and (width == width[0]).all())


def _file_format_facts(table: pa.Table, readable: np.ndarray) -> dict[str, Any]:
    """How many readable images have each format, and which are named as if they had another."""
    formats = table["format"].filter(pa.array(readable)).value_counts().to_pylist()
    counts = {
        found["values"]: found["counts"]
        for found in sorted(formats, key=lambda found: -found["counts"])
    }
    rows = np.flatnonzero(table["misnamed"].to_numpy() & readable).tolist()
    return {
        "counts": counts,
        "misnamed": [[_printable_key(table["key"][i]), table["format"][i].as_py()] for i in rows],
    }


def _label_facts(source: Source) -> dict[str, Any]:
    """The classes, and how many images of each are in the first split that has labels; {} without any."""
    labeled = {
        split: images for split, images in source.splits.items() if images.labels is not None
    }
    for split, images in labeled.items():
        counts = np.bincount(np.asarray(images.labels), minlength=len(images.classes)).tolist()
        classes = dict(zip(map(printable, images.classes), counts))
        return {"splits": list(labeled), "counted_in": split, "classes": classes}
    return {}


def _duplicate_facts(
    table: pa.Table, readable: np.ndarray, splits: dict[str, int]
) -> dict[str, Any]:
    """Groups of readable images whose files are equal byte for byte, the largest first; how many two splits share."""
    digests = table["digest"].combine_chunks()
    halves = np.frombuffer(digests.buffers()[1], np.uint64)[2 * digests.offset :][
        : 2 * len(digests) : 2
    ]
    inorder = np.sort(halves)  # a half suffices to find the few that may be equal
    alike = np.isin(halves, inorder[1:][inorder[1:] == inorder[:-1]]) & readable
    found: dict[bytes, list[int]] = {}
    for i in np.flatnonzero(alike).tolist():
        found.setdefault(digests[i].as_py(), []).append(i)
    groups = sorted(
        (group for group in found.values() if len(group) > 1),
        key=lambda group: (-len(group), group),
    )
    stops, names = np.cumsum(list(splits.values())), list(splits)
    stands = [np.unique(np.searchsorted(stops, group, side="right")).tolist() for group in groups]
    shared = Counter(pair for places in stands for pair in combinations(places, 2))
    return {
        "copies": sum(map(len, groups)) - len(groups),
        "groups": [[_printable_key(table["key"][i]) for i in group] for group in groups],
        "shared": [[names[a], names[b], count] for (a, b), count in sorted(shared.items())],
    }


# --- what would be trained --------------------------------------------------------------------------------------------


def color_statistics(
    names: Sequence[str], source: Source, recipe: Recipe, index: Index
) -> dict[str, Any]:
    """Mean and standard deviation of each channel, in 0..1: those that training would normalize with."""
    known = recipes.CHANNEL_STATISTICS.get(names[0]) if len(names) == 1 else None
    mean, std = known or index.get_or_measure(
        f"colors at {recipe.image_size} px", lambda: _measure_statistics(source.train, recipe)
    )
    return {"mean": list(mean), "std": list(std), "measured": not known}


def _measure_statistics(images: Images, recipe: Recipe) -> Any:
    from simsiam.runs.compose import channel_statistics

    return channel_statistics(images, recipe.image_size or 0, recipe.channels)


def estimate_duration(source: Source, recipe: ResolvedRecipe, index: Index) -> dict[str, Any]:
    """An estimate of the time that the recipe's run takes here, without kNN monitor and checkpoints.

    An image is prepared (decoded, cropped, colored), then trained on. Worker processes prepare images beside a GPU, and
    the slower of the two decides; on a CPU they take its cores from training. Images that fit in memory are decoded
    only once, which is left out, and the rest of their preparation is done between the steps.
    """
    rows = index.table.slice(0, len(source.train))
    good = np.flatnonzero(pc.equal(rows["reason"], "").to_numpy())
    images = source.train.take(good)
    epoch = len(images) // recipe.batch_size * recipe.batch_size
    if not epoch:
        raise UsageError(
            f"{len(images)} readable images are less than a batch of {recipe.batch_size}"
        )
    height, width = (rows[name].to_numpy()[good] for name in ("height", "width"))
    pixels = len(images) * recipe.channels * int(height[0]) * int(width[0])
    resident = images.pixels is not None or (
        _all_same_size(height, width) and pixels <= recipe.cache_gib * 2**30
    )
    key = f"speed of {json.dumps([_machine_key(), recipe.to_dict()])}"
    found = index.get_or_measure(key, lambda: measure_speed(recipe, images, resident=resident))
    prepared, trained, seconds = seconds_per_image(found, resident=resident, cores=CPU_CORES)
    return {
        "seconds": round(seconds * epoch * recipe.epochs, 1),
        "epochs": recipe.epochs,
        "images_per_epoch": epoch,
        "images_per_second": round(1 / seconds, 1),
        "prepared_per_second": round(1 / prepared, 1),
        "trained_per_second": round(1 / trained, 1),
        "device": found["device"],
    }


def seconds_per_image(
    measured: Mapping[str, Any], *, resident: bool, cores: int
) -> tuple[float, float, float]:
    """Seconds an image takes to be prepared, by all cores, to be trained on, and both; `found` is what `speed` says."""
    prepared, trained = measured["prepared"] / (1 if resident else cores), measured["trained"]
    return (
        prepared,
        trained,
        max(prepared, trained) if measured["gpu"] and not resident else prepared + trained,
    )


def _machine_key() -> list[Any]:
    """What the speed of a run depends on besides its recipe."""
    chosen = [os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")]
    return [
        platform.node(),
        CPU_CORES,
        *chosen,
        sorted(glob("/dev/nvidia[0-9]*")),
        version("torch"),
    ]


def measure_speed(recipe: ResolvedRecipe, images: Images, *, resident: bool) -> dict[str, Any]:
    """Seconds it takes to prepare the views of an image in one process, and to train on them, and on which device.

    From real steps on images of the source: of 8 images, of 16, and so on up to a whole batch, as far as time allows.
    Raises WorkFailed if they do not fit in the device's memory.
    """
    import torch

    from simsiam.data.batches import make_training_views
    from simsiam.runs.environment import collect_environment
    from simsiam.training.prepare import build_training_setup

    model, optimizer, compute = build_training_setup(recipe)
    device = compute.device
    model.begin(images=len(images), labels=None, steps=1, per_epoch=1)

    def step(size: int) -> tuple[float, float]:
        batch = images.take(evenly_spaced(len(images), size))
        if resident:
            batch, _ = load_into_memory(batch, 2**62)
        start = time.monotonic()
        rows = np.arange(size) % len(batch)
        x, index = (
            make_training_views(
                batch, rows, recipe, 0, device, view_count=recipe.method.view_count
            ),
            torch.from_numpy(rows),
        )
        middle = time.monotonic()
        with compute.autocast():
            output = model(*x, index=index.to(device))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        model.after_step(output, 0, index.to(device))
        output.loss.item()  # waits for a GPU
        return (middle - start) / size, (time.monotonic() - middle) / size

    prepared = trained = math.inf
    try:
        step(2)  # loads what any first step does
        stop = time.monotonic() + PROBE_SECONDS
        for size in [2**k for k in range(3, 16) if 2**k < recipe.batch_size] + [
            recipe.batch_size
        ] * 3:
            if trained < math.inf and time.monotonic() + size * (prepared + trained) > stop:
                break
            prepared, trained = map(
                min, step(size), (prepared, trained)
            )  # what disturbs one step is not the recipe's
    except torch.OutOfMemoryError:
        raise WorkFailed(
            f"batches of {recipe.batch_size} do not fit in the memory of {device}"
        ) from None
    device_name = collect_environment(compute)["device"]
    return {
        "prepared": prepared,
        "trained": trained,
        "gpu": device.type != "cpu",
        "device": device_name,
    }


# --- in words ---------------------------------------------------------------------------------------------------------


def print_fact(name: str, fact: dict[str, Any]) -> None:
    """Print one fact: its name, and beside it what it says."""
    print_lines(name, FACT_FORMATTERS[name](fact))


def print_lines(name: str, lines: Sequence[str]) -> None:
    """Print lines on 80 columns, the name before the first."""
    encoding = sys.stdout.encoding or "utf-8"
    for i, line in enumerate(lines):
        first = f"{name if i == 0 else '':<{INDENT}}"
        deeper = " " * (INDENT + 4 if line.startswith("  ") else INDENT + 2)
        text = textwrap.fill(
            line, TEXT_WIDTH, initial_indent=first, subsequent_indent=deeper, break_on_hyphens=False
        )
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _format_images(fact: dict[str, Any]) -> list[str]:
    parts = ", ".join(f"{count:,} {split}" for split, count in fact["splits"].items())
    return [
        f"{fact['count']:,} in {format_bytes(fact['bytes'])}"
        + (f": {parts}" if len(fact["splits"]) > 1 else "")
    ]


def format_bytes(size: float, digits: int = 4) -> str:
    """Bytes in words."""
    power = min(int(math.log10(max(size, 1)) / 3), 5)
    return f"{size / 1000**power:,.{digits}g} {('bytes', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


def format_duration(seconds: float) -> str:
    """Time in words, to the nearest unit that is there twice."""
    units = {"years": 31_557_600, "days": 86_400, "hours": 3_600, "minutes": 60, "seconds": 1}
    unit = next(unit for unit, length in units.items() if seconds >= 2 * length or length == 1)
    return f"{seconds / units[unit]:,.0f} {unit}"


def _format_sizes(fact: dict[str, Any]) -> list[str]:
    if not fact:
        return ["unknown: no image can be read"]
    if fact["all"]:
        return ["all {} x {} px".format(*fact["all"])]
    (least, median, most), (square, usual, long) = fact["shorter_side"], fact["longer_to_shorter"]
    return [
        f"shorter side {least:,} to {most:,} px, median {median:,}",
        f"longer side {square:g} to {long:g} times that, median {usual:g}",
    ]


def _format_file_formats(fact: dict[str, Any]) -> list[str]:
    plain = {"pixels": "as plain pixels"}
    lines = [
        ", ".join(f"{count:,} {plain.get(kind, kind)}" for kind, count in fact["counts"].items())
        or "none"
    ]
    if fact["misnamed"]:
        lines += [
            f"{_pluralize(fact['misnamed'], 'file')} named as another format, which does no harm:"
        ]
    return lines + _first_examples([f"{name} is {kind}" for name, kind in fact["misnamed"]])


def _format_labels(fact: dict[str, Any]) -> list[str]:
    if not fact:
        return ["none, and none are needed"]
    names, ranked = list(fact["classes"]), sorted(fact["classes"].items(), key=lambda pair: pair[1])
    (small, least), (large, most) = ranked[0], ranked[-1]
    each = f"{least:,}" if least == most else f"{least:,} ({small}) to {most:,} ({large})"
    return [
        f"{len(names):,} classes, in {' and '.join(fact['splits'])}: {', '.join(names[:10])}"
        + ", ..." * (len(names) > 10),
        f"{each} images a class in {fact['counted_in']}",
    ]


def _format_duplicates(fact: dict[str, Any]) -> list[str]:
    if not fact["groups"]:
        return ["none, byte for byte"]
    lines = [f"{fact['copies']:,} copies, byte for byte:"]
    lines += _first_examples(
        [
            " = ".join(group[:3]) + f" = {len(group) - 3} more" * (len(group) > 3)
            for group in fact["groups"]
        ]
    )
    return lines + [
        f"{count:,} of them stand both in {a} and in {b}" for a, b, count in fact["shared"]
    ]


def _format_unreadable(fact: dict[str, Any]) -> list[str]:
    if not fact["files"]:
        return ["none"]
    lines = [f"{_pluralize(fact['files'], 'file')}, which training would leave out:"]
    return lines + _first_examples([f"{name}: {reason}" for name, reason in fact["files"]])


def _format_recipe(fact: dict[str, Any]) -> list[str]:
    return [fact["chosen"], *fact["because"]]


def _format_colors(fact: dict[str, Any]) -> list[str]:
    lines = [
        f"{name:<4} " + " ".join(f"{value:.4f}" for value in fact[name]) for name in ("mean", "std")
    ]
    return [
        *lines,
        f"of each channel in 0..1, {'measured on a sample' if fact['measured'] else 'as published'}",
    ]


def _format_training_time(fact: dict[str, Any]) -> list[str]:
    if "unknown" in fact:
        return [f"unknown: {fact['unknown']}"]
    total, prepared, trained = (
        f"{fact[f'{name}_per_second']:,.{0 if fact[f'{name}_per_second'] >= 10 else 1}f}"
        for name in ("images", "prepared", "trained")
    )
    return [
        f"about {format_duration(fact['seconds'])} for {fact['epochs']} epochs of "
        f"{fact['images_per_epoch']:,} images, an estimate",
        f"{total} images/s: {prepared}/s decoded and cropped, {trained}/s trained on",
        f"on {fact['device']}",
    ]


def _pluralize(items: Sequence[Any], noun: str) -> str:
    return f"{len(items):,} {noun}" + "s" * (len(items) != 1)


def _first_examples(lines: Sequence[str]) -> list[str]:
    more = len(lines) - MAX_EXAMPLES
    return [f"  {line}" for line in lines[:MAX_EXAMPLES]] + [
        f"  and {more:,} more, all in the file of --out"
    ] * (more > 0)


FACT_FORMATTERS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "images": _format_images,
    "sizes": _format_sizes,
    "formats": _format_file_formats,
    "labels": _format_labels,
    "duplicates": _format_duplicates,
    "unreadable": _format_unreadable,
    "recipe": _format_recipe,
    "colors": _format_colors,
    "time": _format_training_time,
}
