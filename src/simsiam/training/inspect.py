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
from simsiam.config.recipes import Recipe
from simsiam.data.images import Images, in_memory, spread
from simsiam.errors import UsageError, WorkFailed, shown
from simsiam.runs.compose import recipe_for
from simsiam.sources.file_index import Index, index_of
from simsiam.sources.open_source import Source, open_source
from simsiam.utils.files import whole
from simsiam.utils.workers import CORES

COLUMNS, INDENT = 80, 12  # of the text
EXAMPLES = 3  # of a kind of trouble, in the text; the dictionary has all
PROBE = 6.0  # seconds that measuring the speed of training may take, once torch is loaded


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
        raise UsageError(f"--out is {shown(str(path))}: it takes the name of a file in a folder that exists")
    names = [os.fspath(one) for one in ([sources] if isinstance(sources, str | os.PathLike) else sources)]
    wanted = Recipe().replace(channels=channels)
    source = open_source(names, wanted.channels)
    index = index_of(names, source, wanted.channels)
    facts: dict[str, Any] = {"source": source.name}

    def found(name: str, fact: dict[str, Any]) -> dict[str, Any]:
        facts[name] = fact
        tell(name, fact)
        return fact

    for name, fact in contents(source, index).items():
        found(name, fact)
    try:
        recipe, why = recipe_for(names, source)
        found("recipe", {"chosen": why[0], "because": why[1:]})
        recipe = recipe.replace(source=names, channels=channels)
        color = found("colors", colors(names, source, recipe, index))
        found("time", duration(source, recipe.replace(mean=color["mean"], std=color["std"]), index))
    except (UsageError, WorkFailed) as error:  # of images that cannot be trained on, the rest is told all the same
        found("time", {"unknown": str(error)})
    if path:
        with whole(path) as part:
            part.write_text(json.dumps(facts, indent=2) + "\n")
    return facts


# --- what there is ----------------------------------------------------------------------------------------------------


def contents(source: Source, index: Index) -> dict[str, dict[str, Any]]:
    """What the index knows of the images, and the source of their labels."""
    table = index.table
    readable = pc.equal(table["reason"], "").to_numpy()
    unreadable = table.select(["key", "reason"]).filter(pa.array(~readable))
    splits = {name: len(images) for name, images in source.splits.items()}
    return {
        "images": {"count": len(table), "bytes": pc.sum(table["bytes"]).as_py(), "splits": splits},
        "sizes": _sizes(*(table[name].to_numpy()[readable] for name in ("height", "width"))),
        "formats": _formats(table, readable),
        "labels": _labels(source),
        "duplicates": index.fact(f"duplicates in {splits}", lambda: _duplicates(table, readable, splits)),
        "unreadable": {"files": [[_name(key), reason.as_py()] for key, reason in zip(*unreadable.columns)]},
    }


def _name(key: pa.Scalar) -> str:
    return shown(os.fsdecode(key.as_py()))


def _sizes(height: np.ndarray, width: np.ndarray) -> dict[str, Any]:
    """The shorter side in pixels, and how many times longer the other one is: least, median, most; {} of no image.

    As stored, before any rotation by EXIF.
    """
    if not len(height):
        return {}
    shorter, longer = np.minimum(height, width), np.maximum(height, width)
    return {
        "all": [int(width[0]), int(height[0])] if _alike(height, width) else None,
        "shorter_side": [int(f(shorter)) for f in (np.min, np.median, np.max)],
        "longer_to_shorter": [round(float(f(longer / shorter)), 2) for f in (np.min, np.median, np.max)],
    }


def _alike(height: np.ndarray, width: np.ndarray) -> bool:
    return bool((height == height[0]).all() and (width == width[0]).all())


def _formats(table: pa.Table, readable: np.ndarray) -> dict[str, Any]:
    """How many readable images have each format, and which are named as if they had another."""
    formats = table["format"].filter(pa.array(readable)).value_counts().to_pylist()
    counts = {found["values"]: found["counts"] for found in sorted(formats, key=lambda found: -found["counts"])}
    rows = np.flatnonzero(table["misnamed"].to_numpy() & readable).tolist()
    return {"counts": counts, "misnamed": [[_name(table["key"][i]), table["format"][i].as_py()] for i in rows]}


def _labels(source: Source) -> dict[str, Any]:
    """The classes, and how many images of each are in the first split that has labels; {} without any."""
    labeled = {split: images for split, images in source.splits.items() if images.labels is not None}
    for split, images in labeled.items():
        counts = np.bincount(np.asarray(images.labels), minlength=len(images.classes)).tolist()
        classes = dict(zip(map(shown, images.classes), counts))
        return {"splits": list(labeled), "counted_in": split, "classes": classes}
    return {}


def _duplicates(table: pa.Table, readable: np.ndarray, splits: dict[str, int]) -> dict[str, Any]:
    """Groups of readable images whose files are equal byte for byte, the largest first; how many two splits share."""
    digests = table["digest"].combine_chunks()
    halves = np.frombuffer(digests.buffers()[1], np.uint64)[2 * digests.offset :][: 2 * len(digests) : 2]
    inorder = np.sort(halves)  # a half suffices to find the few that may be equal
    alike = np.isin(halves, inorder[1:][inorder[1:] == inorder[:-1]]) & readable
    found: dict[bytes, list[int]] = {}
    for i in np.flatnonzero(alike).tolist():
        found.setdefault(digests[i].as_py(), []).append(i)
    groups = sorted((group for group in found.values() if len(group) > 1), key=lambda group: (-len(group), group))
    stops, names = np.cumsum(list(splits.values())), list(splits)
    stands = [np.unique(np.searchsorted(stops, group, side="right")).tolist() for group in groups]
    shared = Counter(pair for places in stands for pair in combinations(places, 2))
    return {
        "copies": sum(map(len, groups)) - len(groups),
        "groups": [[_name(table["key"][i]) for i in group] for group in groups],
        "shared": [[names[a], names[b], count] for (a, b), count in sorted(shared.items())],
    }


# --- what would be trained --------------------------------------------------------------------------------------------


def colors(names: Sequence[str], source: Source, recipe: Recipe, index: Index) -> dict[str, Any]:
    """Mean and standard deviation of each channel, in 0..1: those that training would normalize with."""
    known = recipes.STATISTICS.get(names[0]) if len(names) == 1 else None
    mean, std = known or index.fact(f"colors at {recipe.image_size} px", lambda: _measured(source.train, recipe))
    return {"mean": list(mean), "std": list(std), "measured": not known}


def _measured(images: Images, recipe: Recipe) -> Any:
    from simsiam.runs.compose import statistics

    return statistics(images, recipe)


def duration(source: Source, recipe: Recipe, index: Index) -> dict[str, Any]:
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
        raise UsageError(f"{len(images)} readable images are less than a batch of {recipe.batch_size}")
    height, width = (rows[name].to_numpy()[good] for name in ("height", "width"))
    pixels = len(images) * recipe.channels * int(height[0]) * int(width[0])
    resident = images.pixels is not None or (_alike(height, width) and pixels <= recipe.cache_gib * 2**30)
    key = f"speed of {json.dumps([_machine(), recipe.to_dict()])}"
    found = index.fact(key, lambda: speed(recipe, images, resident=resident))
    prepared, trained, seconds = per_image(found, resident=resident, cores=CORES)
    return {
        "seconds": round(seconds * epoch * recipe.epochs, 1),
        "epochs": recipe.epochs,
        "images_per_epoch": epoch,
        "images_per_second": round(1 / seconds, 1),
        "prepared_per_second": round(1 / prepared, 1),
        "trained_per_second": round(1 / trained, 1),
        "device": found["device"],
    }


def per_image(found: Mapping[str, Any], *, resident: bool, cores: int) -> tuple[float, float, float]:
    """Seconds an image takes to be prepared, by all cores, to be trained on, and both; `found` is what `speed` says."""
    prepared, trained = found["prepared"] / (1 if resident else cores), found["trained"]
    return prepared, trained, max(prepared, trained) if found["gpu"] and not resident else prepared + trained


def _machine() -> list[Any]:
    """What the speed of a run depends on besides its recipe."""
    chosen = [os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")]
    return [platform.node(), CORES, *chosen, sorted(glob("/dev/nvidia[0-9]*")), version("torch")]


def speed(recipe: Recipe, images: Images, *, resident: bool) -> dict[str, Any]:
    """Seconds it takes to prepare the views of an image in one process, and to train on them, and on which device.

    From real steps on images of the source: of 8 images, of 16, and so on up to a whole batch, as far as time allows.
    Raises WorkFailed if they do not fit in the device's memory.
    """
    import torch

    from simsiam.data.batches import views_of
    from simsiam.model.precision import autocast
    from simsiam.runs.environment import environment
    from simsiam.training.prepare import assemble

    model, optimizer, device, precision = assemble(recipe)
    model.begin(images=len(images), labels=None, steps=1, per_epoch=1)

    def step(size: int) -> tuple[float, float]:
        batch = images.take(spread(len(images), size))
        if resident:
            batch, _ = in_memory(batch, 2**62)
        start = time.monotonic()
        rows = np.arange(size) % len(batch)
        x, index = views_of(batch, rows, recipe, 0, device, count=recipe.method.view_count), torch.from_numpy(rows)
        middle = time.monotonic()
        with autocast(device, precision):
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
        stop = time.monotonic() + PROBE
        for size in [2**k for k in range(3, 16) if 2**k < recipe.batch_size] + [recipe.batch_size] * 3:
            if trained < math.inf and time.monotonic() + size * (prepared + trained) > stop:
                break
            prepared, trained = map(min, step(size), (prepared, trained))  # what disturbs one step is not the recipe's
    except torch.OutOfMemoryError:
        raise WorkFailed(f"batches of {recipe.batch_size} do not fit in the memory of {device}") from None
    device_name = environment(device, precision)["device"]
    return {"prepared": prepared, "trained": trained, "gpu": device.type != "cpu", "device": device_name}


# --- in words ---------------------------------------------------------------------------------------------------------


def tell(name: str, fact: dict[str, Any]) -> None:
    """Print one fact: its name, and beside it what it says."""
    say(name, WORDS[name](fact))


def say(name: str, lines: Sequence[str]) -> None:
    """Print lines on 80 columns, the name before the first."""
    encoding = sys.stdout.encoding or "utf-8"
    for i, line in enumerate(lines):
        first = f"{name if i == 0 else '':<{INDENT}}"
        deeper = " " * (INDENT + 4 if line.startswith("  ") else INDENT + 2)
        text = textwrap.fill(line, COLUMNS, initial_indent=first, subsequent_indent=deeper, break_on_hyphens=False)
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _say_images(fact: dict[str, Any]) -> list[str]:
    parts = ", ".join(f"{count:,} {split}" for split, count in fact["splits"].items())
    return [f"{fact['count']:,} in {amount(fact['bytes'])}" + (f": {parts}" if len(fact["splits"]) > 1 else "")]


def amount(size: float, digits: int = 4) -> str:
    """Bytes in words."""
    power = min(int(math.log10(max(size, 1)) / 3), 5)
    return f"{size / 1000**power:,.{digits}g} {('bytes', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


def span(seconds: float) -> str:
    """Time in words, to the nearest unit that is there twice."""
    units = {"years": 31_557_600, "days": 86_400, "hours": 3_600, "minutes": 60, "seconds": 1}
    unit = next(unit for unit, length in units.items() if seconds >= 2 * length or length == 1)
    return f"{seconds / units[unit]:,.0f} {unit}"


def _say_sizes(fact: dict[str, Any]) -> list[str]:
    if not fact:
        return ["unknown: no image can be read"]
    if fact["all"]:
        return ["all {} x {} px".format(*fact["all"])]
    (least, median, most), (square, usual, long) = fact["shorter_side"], fact["longer_to_shorter"]
    return [
        f"shorter side {least:,} to {most:,} px, median {median:,}",
        f"longer side {square:g} to {long:g} times that, median {usual:g}",
    ]


def _say_formats(fact: dict[str, Any]) -> list[str]:
    plain = {"pixels": "as plain pixels"}
    lines = [", ".join(f"{count:,} {plain.get(kind, kind)}" for kind, count in fact["counts"].items()) or "none"]
    if fact["misnamed"]:
        lines += [f"{_count(fact['misnamed'], 'file')} named as another format, which does no harm:"]
    return lines + _some([f"{name} is {kind}" for name, kind in fact["misnamed"]])


def _say_labels(fact: dict[str, Any]) -> list[str]:
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


def _say_duplicates(fact: dict[str, Any]) -> list[str]:
    if not fact["groups"]:
        return ["none, byte for byte"]
    lines = [f"{fact['copies']:,} copies, byte for byte:"]
    lines += _some([" = ".join(group[:3]) + f" = {len(group) - 3} more" * (len(group) > 3) for group in fact["groups"]])
    return lines + [f"{count:,} of them stand both in {a} and in {b}" for a, b, count in fact["shared"]]


def _say_unreadable(fact: dict[str, Any]) -> list[str]:
    if not fact["files"]:
        return ["none"]
    lines = [f"{_count(fact['files'], 'file')}, which training would leave out:"]
    return lines + _some([f"{name}: {reason}" for name, reason in fact["files"]])


def _say_recipe(fact: dict[str, Any]) -> list[str]:
    return [fact["chosen"], *fact["because"]]


def _say_colors(fact: dict[str, Any]) -> list[str]:
    lines = [f"{name:<4} " + " ".join(f"{value:.4f}" for value in fact[name]) for name in ("mean", "std")]
    return [*lines, f"of each channel in 0..1, {'measured on a sample' if fact['measured'] else 'as published'}"]


def _say_time(fact: dict[str, Any]) -> list[str]:
    if "unknown" in fact:
        return [f"unknown: {fact['unknown']}"]
    total, prepared, trained = (
        f"{fact[f'{name}_per_second']:,.{0 if fact[f'{name}_per_second'] >= 10 else 1}f}"
        for name in ("images", "prepared", "trained")
    )
    return [
        f"about {span(fact['seconds'])} for {fact['epochs']} epochs of "
        f"{fact['images_per_epoch']:,} images, an estimate",
        f"{total} images/s: {prepared}/s decoded and cropped, {trained}/s trained on",
        f"on {fact['device']}",
    ]


def _count(things: Sequence[Any], noun: str) -> str:
    return f"{len(things):,} {noun}" + "s" * (len(things) != 1)


def _some(lines: Sequence[str]) -> list[str]:
    more = len(lines) - EXAMPLES
    return [f"  {line}" for line in lines[:EXAMPLES]] + [f"  and {more:,} more, all in the file of --out"] * (more > 0)


WORDS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "images": _say_images,
    "sizes": _say_sizes,
    "formats": _say_formats,
    "labels": _say_labels,
    "duplicates": _say_duplicates,
    "unreadable": _say_unreadable,
    "recipe": _say_recipe,
    "colors": _say_colors,
    "time": _say_time,
}
