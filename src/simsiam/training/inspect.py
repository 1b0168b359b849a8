"""Inspect a source before training: its images, the recipe it gets, and how long training takes.

The facts are JSON values; `inspect` prints them as text in 80 columns. Nothing here loads torch,
except for measurements that are not in the cache yet.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from simsiam.config import recipes
from simsiam.config.recipes import Recipe, ResolvedRecipe
from simsiam.data.images import Images
from simsiam.errors import UsageError, WorkFailed
from simsiam.runs.choose import choose_recipe, held_out_count
from simsiam.sources.file_index import Index, load_index
from simsiam.sources.file_kinds import join_kinds
from simsiam.sources.open_source import Source, open_source, source_names
from simsiam.training.facts import (
    check_out_file,
    format_bytes,
    format_duration,
    print_fact_lines,
    write_facts,
)
from simsiam.training.speed import BUSY_LOAD, kept_speed, seconds_per_image
from simsiam.utils.workers import CPU_CORES

LONG_SECONDS = 12 * 3600  # of training, above which shorter ways are named
SHORTER_LINES = (
    "good features in minutes: `simsiam adapt SOURCE --init lite0`",
    "training that ends in time: `simsiam pretrain SOURCE --minutes N`",
)
BUSY_LINES = ("measured while the machine was busy; the next time, it is measured again",)
MAX_EXAMPLES = 3  # files that the text names for each kind of problem; the facts name all


class ImageFacts(TypedDict):
    """How many images there are."""

    count: int
    bytes: int
    splits: dict[str, int]  # images by split


class FileFacts(TypedDict):
    """Every file of a folder or an archive; images in shards and lists count as files."""

    total: int
    read: int  # images that can be read, in any split
    unreadable: int
    passed_over: dict[str, int]  # files by kind: an extension, or "hidden", "in no split", ...


class SizeFacts(TypedDict, total=False):
    """Sizes in pixels as stored, before any rotation by EXIF; empty if no image is readable."""

    all: list[int] | None  # width and height, if all images have the same
    shorter_side: list[int]  # minimum, median, maximum
    longer_to_shorter: list[float]  # ratio of the sides: minimum, median, maximum


class FormatFacts(TypedDict):
    """File formats of the readable images."""

    counts: dict[str, int]  # images by format, the most frequent first
    misnamed: list[list[str]]  # name and format of files with the extension of another format


class LabelFacts(TypedDict, total=False):
    """Labels; empty if there are none."""

    splits: list[str]  # splits with labels
    counted_in: str  # the first of them
    classes: dict[str, int]  # images by class in that split


class DuplicateFacts(TypedDict):
    """Readable images whose files are equal byte for byte."""

    copies: int  # files that could be removed without losing an image
    groups: list[list[str]]  # names of equal files, the largest group first
    shared: list[list[str | int]]  # two splits, and the number of groups with files in both


class UnreadableFacts(TypedDict):
    """Images that cannot be read."""

    files: list[list[str]]  # name and reason


class RecipeFacts(TypedDict):
    """The recipe that the source gets."""

    chosen: str
    because: list[str]


class ColorFacts(TypedDict):
    """Mean and standard deviation of each channel, for values from 0 to 1."""

    mean: list[float]
    std: list[float]
    measured: bool  # on a sample, rather than published


class TimeFacts(TypedDict, total=False):
    """An estimate of the training time; if there is none, `unknown` is the only key."""

    seconds: float
    epochs: int
    images_per_epoch: int
    images_per_second: float
    prepared_per_second: float
    trained_per_second: float
    device: str
    load: float  # of the machine when the speed was measured, for each core
    unknown: str  # the reason


class SourceFacts(TypedDict, total=False):
    """All facts about a source."""

    source: str
    notes: list[str]  # what names decided, and which images are left out
    files: FileFacts
    images: ImageFacts
    sizes: SizeFacts
    formats: FormatFacts
    labels: LabelFacts
    duplicates: DuplicateFacts
    unreadable: UnreadableFacts
    recipe: RecipeFacts
    colors: ColorFacts
    time: TimeFacts


def inspect(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    channels: int = 3,
    no_labels: bool = False,
    splits: Sequence[str] | None = None,
    out: str | os.PathLike[str] | None = None,
) -> SourceFacts:
    """Print what a source contains, the recipe it gets, and how long training takes here.

    Each file is read once, and again only after it has changed: see `load_index`. Colors are
    measured once for the same images, the speed once for the same images and machine.

    Args:
        sources: One or several sources, as for `pretrain`.
        channels: The number of channels that images are decoded to.
        no_labels: Whether to ignore the labels.
        splits: Which folder or shard is which split; see `open_source`.
        out: A JSON file for the facts.

    Returns:
        The facts.

    Raises:
        UsageError: An argument is wrong.
        WorkFailed: A worker process was killed.
    """
    path = check_out_file(out)
    names = source_names(sources)
    channels = Recipe().replace(channels=channels).channels
    source = open_source(names, channels, no_labels=no_labels, splits=splits)
    index = load_index(names, source, channels)
    facts: SourceFacts = {"source": source.name, "notes": list(source.notes)}

    def add(new: SourceFacts) -> None:
        facts.update(new)
        for name, fact in new.items():
            print_fact_lines(name, FACT_FORMATTERS[name](fact))

    add(dataset_facts(source, index))
    try:
        recipe, (chosen, *reasons) = choose_recipe(names, source)
        add({"recipe": {"chosen": chosen, "because": reasons}})
        recipe = recipe.replace(source=names, channels=channels, no_labels=no_labels, splits=splits)
        colors = color_statistics(names, source, recipe, index)
        add({"colors": colors})
        recipe = recipe.replace(mean=colors["mean"], std=colors["std"])
        add({"time": estimate_duration(source, recipe.resolve(), index)})
    except (UsageError, WorkFailed) as error:  # the images cannot be trained on
        add({"time": {"unknown": str(error)}})
    write_facts(path, facts)
    return facts


# --- the images -----------------------------------------------------------------------------------


def dataset_facts(source: Source, index: Index) -> SourceFacts:
    """Collect the facts that the index of a source and its labels contain.

    Args:
        source: The opened source.
        index: Its index.
    """
    table = index.table
    readable = pc.equal(table["reason"], "").to_numpy()
    unreadable = table.select(["key", "reason"]).filter(pa.array(~readable))
    reasons = [[_name(key), reason.as_py()] for key, reason in zip(*unreadable.columns)]
    splits = {name: len(images) for name, images in source.splits.items()}
    passed_over = dict(source.passed_over)
    return {
        "files": {
            "total": len(table) + sum(passed_over.values()),
            "read": int(readable.sum()),
            "unreadable": len(reasons),
            "passed_over": passed_over,
        },
        "images": {"count": len(table), "bytes": pc.sum(table["bytes"]).as_py(), "splits": splits},
        "sizes": _size_facts(*(table[name].to_numpy()[readable] for name in ("height", "width"))),
        "formats": _file_format_facts(table, readable),
        "labels": _label_facts(source),
        "duplicates": index.get_or_measure(
            f"duplicates in {splits}", lambda: _duplicate_facts(table, readable, splits)
        ),
        "unreadable": {"files": reasons},
    }


def _name(key: pa.Scalar) -> str:
    return os.fsdecode(key.as_py())


def _size_facts(height: np.ndarray, width: np.ndarray) -> SizeFacts:
    """Summarize the sizes of the readable images; heights and widths are (N,)."""
    if not len(height):
        return {}
    shorter, longer = np.minimum(height, width), np.maximum(height, width)
    ratio = longer / shorter
    return {
        "all": [int(width[0]), int(height[0])] if _all_same_size(height, width) else None,
        "shorter_side": [int(f(shorter)) for f in (np.min, np.median, np.max)],
        "longer_to_shorter": [round(float(f(ratio)), 2) for f in (np.min, np.median, np.max)],
    }


def _all_same_size(height: np.ndarray, width: np.ndarray) -> bool:
    return bool((height == height[0]).all() and (width == width[0]).all())


def _file_format_facts(table: pa.Table, readable: np.ndarray) -> FormatFacts:
    counts = table["format"].filter(pa.array(readable)).value_counts().to_pylist()
    counts.sort(key=lambda entry: -entry["counts"])
    rows = np.flatnonzero(table["misnamed"].to_numpy() & readable).tolist()
    return {
        "counts": {entry["values"]: entry["counts"] for entry in counts},
        "misnamed": [[_name(table["key"][i]), table["format"][i].as_py()] for i in rows],
    }


def _label_facts(source: Source) -> LabelFacts:
    labeled = {
        split: images for split, images in source.splits.items() if images.labels is not None
    }
    if not labeled:
        return {}
    split, images = next(iter(labeled.items()))
    counts = np.bincount(np.asarray(images.labels), minlength=len(images.classes)).tolist()
    classes = dict(zip(images.classes, counts))
    return {"splits": list(labeled), "counted_in": split, "classes": classes}


def _duplicate_facts(
    table: pa.Table, readable: np.ndarray, splits: Mapping[str, int]
) -> DuplicateFacts:
    """Group readable images by the digests of their files."""
    digests = table["digest"].combine_chunks()
    halves = np.frombuffer(digests.buffers()[1], np.uint64)  # two for each digest
    first_halves = halves[2 * digests.offset :][: 2 * len(digests) : 2]
    # Half a digest is enough to find the few files that may be equal.
    ordered = np.sort(first_halves)
    candidates = np.isin(first_halves, ordered[1:][ordered[1:] == ordered[:-1]]) & readable
    rows_by_digest: dict[bytes, list[int]] = {}
    for i in np.flatnonzero(candidates).tolist():
        rows_by_digest.setdefault(digests[i].as_py(), []).append(i)
    groups = [rows for rows in rows_by_digest.values() if len(rows) > 1]
    groups.sort(key=lambda rows: (-len(rows), rows))
    ends, names = np.cumsum(list(splits.values())), list(splits)
    pairs = Counter(
        pair
        for rows in groups
        for pair in combinations(np.unique(np.searchsorted(ends, rows, side="right")).tolist(), 2)
    )
    return {
        "copies": sum(map(len, groups)) - len(groups),
        "groups": [[_name(table["key"][i]) for i in rows] for rows in groups],
        "shared": [[names[a], names[b], count] for (a, b), count in sorted(pairs.items())],
    }


# --- training on them -----------------------------------------------------------------------------


def color_statistics(
    names: Sequence[str], source: Source, recipe: Recipe, index: Index
) -> ColorFacts:
    """Find the mean and the standard deviation that training would normalize with.

    Args:
        names: The names of the sources.
        source: The opened source.
        recipe: The recipe.
        index: The index of the source, where the measurement is kept.

    Raises:
        UsageError: No image can be read.
    """
    known = recipes.CHANNEL_STATISTICS.get(names[0]) if len(names) == 1 else None
    mean, std = known or index.get_or_measure(
        f"colors of {len(source.train)} images at {recipe.image_size} px",
        lambda: _measure_statistics(source.train, recipe),
    )
    return {"mean": list(mean), "std": list(std), "measured": not known}


def _measure_statistics(
    images: Images, recipe: Recipe
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    from simsiam.runs.compose import channel_statistics

    return channel_statistics(images, recipe.image_size or 0, recipe.channels)


def estimate_duration(source: Source, recipe: ResolvedRecipe, index: Index) -> TimeFacts:
    """Estimate how long a run takes on this machine, without the kNN monitor and checkpoints.

    The speed is that of `measure_speed`, combined as in `seconds_per_image`. If the images fit in
    memory, they are decoded only once; the time for that is left out.

    Args:
        source: The opened source.
        recipe: The recipe of the run.
        index: The index of the source, where the measurement is kept.

    Raises:
        UsageError: The readable images do not fill a batch.
        WorkFailed: A batch does not fit in the memory of the device.
    """
    rows = index.table.slice(0, len(source.train))
    readable = np.flatnonzero(pc.equal(rows["reason"], "").to_numpy())
    images = source.train.take(readable)
    count = len(images) - held_out_count(recipe, source, len(images))
    images_per_epoch = count // recipe.batch_size * recipe.batch_size
    if not images_per_epoch:
        raise UsageError(f"{count} readable images do not fill a batch of {recipe.batch_size}")
    height, width = (rows[name].to_numpy()[readable] for name in ("height", "width"))
    num_bytes = len(images) * recipe.channels * int(height[0]) * int(width[0])
    fits = _all_same_size(height, width) and num_bytes <= recipe.cache_gib * 2**30
    resident = images.pixels is not None or fits
    speed = kept_speed(index, recipe, images, resident=resident)
    prepared, trained, seconds = seconds_per_image(speed, resident=resident, cores=CPU_CORES)
    return {
        "seconds": round(seconds * images_per_epoch * recipe.epochs, 1),
        "epochs": recipe.epochs,
        "images_per_epoch": images_per_epoch,
        "images_per_second": round(1 / seconds, 1),
        "prepared_per_second": round(1 / prepared, 1),
        "trained_per_second": round(1 / trained, 1),
        "device": speed["device"],
        "load": speed["load"],
    }


# --- the facts as text ----------------------------------------------------------------------------


def _format_files(fact: FileFacts) -> list[str]:
    lines = [f"{fact['total']:,}: {fact['read']:,} can be read"]
    if fact["unreadable"]:
        lines[0] += f", {fact['unreadable']:,} cannot"
    if kinds := fact["passed_over"]:
        lines[0] += f", {sum(kinds.values()):,} are passed over:"
        lines += [f"  {text}" for text in join_kinds(kinds, most=len(kinds)).split(", ")]
    return lines


def _format_images(fact: ImageFacts) -> list[str]:
    splits = ", ".join(f"{count:,} {split}" for split, count in fact["splits"].items())
    total = f"{fact['count']:,} in {format_bytes(fact['bytes'])}"
    return [f"{total}: {splits}" if len(fact["splits"]) > 1 else total]


def _format_sizes(fact: SizeFacts) -> list[str]:
    if not fact:
        return ["unknown: no image can be read"]
    if fact["all"]:
        return ["all {} x {} px".format(*fact["all"])]
    return [
        "shorter side {:,} to {:,} px, median {:,}".format(*_median_last(fact["shorter_side"])),
        "longer side {:g} to {:g} times the shorter side, median {:g}".format(
            *_median_last(fact["longer_to_shorter"])
        ),
    ]


def _median_last(values: Sequence[float]) -> tuple[float, float, float]:
    minimum, median, maximum = values
    return minimum, maximum, median


def _format_file_formats(fact: FormatFacts) -> list[str]:
    names = {"pixels": "decoded images"}
    counts = [f"{count:,} {names.get(kind, kind)}" for kind, count in fact["counts"].items()]
    lines = [", ".join(counts) or "none"]
    if fact["misnamed"]:
        files = _count_files(fact["misnamed"])
        lines += [f"{files} with the extension of another format, which is harmless:"]
    return lines + _first_examples([f"{name} is {kind}" for name, kind in fact["misnamed"]])


def _format_labels(fact: LabelFacts) -> list[str]:
    if not fact:
        return ["none (training needs none)"]
    names, by_count = list(fact["classes"]), sorted(fact["classes"].items(), key=lambda c: c[1])
    (smallest, minimum), (largest, maximum) = by_count[0], by_count[-1]
    counts = f"{minimum:,} ({smallest}) to {maximum:,} ({largest})"
    if minimum == maximum:
        counts = f"{minimum:,}"
    more = ", ..." if len(names) > 10 else ""
    return [
        f"{len(names):,} classes, in {' and '.join(fact['splits'])}: {', '.join(names[:10])}{more}",
        f"{counts} images per class in {fact['counted_in']}",
    ]


def _format_duplicates(fact: DuplicateFacts) -> list[str]:
    if not fact["groups"]:
        return ["none: all files differ"]
    groups = [
        " = ".join(group[:3]) + (f" = {len(group) - 3} more" if len(group) > 3 else "")
        for group in fact["groups"]
    ]
    shared = [f"groups with files in both {a} and {b}: {count:,}" for a, b, count in fact["shared"]]
    return [f"{fact['copies']:,} copies, byte for byte:", *_first_examples(groups), *shared]


def _format_unreadable(fact: UnreadableFacts) -> list[str]:
    if not fact["files"]:
        return ["none"]
    examples = _first_examples([f"{name}: {reason}" for name, reason in fact["files"]])
    return [f"{_count_files(fact['files'])}, which training leaves out:", *examples]


def format_recipe(fact: RecipeFacts) -> list[str]:
    """Format the recipe that was chosen.

    Args:
        fact: The recipe, and the reasons for it.

    Returns:
        Lines of text.
    """
    return [fact["chosen"], *fact["because"]]


def _format_colors(fact: ColorFacts) -> list[str]:
    mean, std = (" ".join(f"{v:.4f}" for v in values) for values in (fact["mean"], fact["std"]))
    origin = "measured on a sample" if fact["measured"] else "as published"
    return [f"mean {mean}", f"std  {std}", f"per channel, for values from 0 to 1, {origin}"]


def _format_training_time(fact: TimeFacts) -> list[str]:
    if "unknown" in fact:
        return [f"unknown: {fact['unknown']}"]
    rates = (fact["images_per_second"], fact["prepared_per_second"], fact["trained_per_second"])
    total, prepared, trained = (f"{rate:,.{0 if rate >= 10 else 1}f}" for rate in rates)
    return [
        f"about {format_duration(fact['seconds'])} for {fact['epochs']} epochs of "
        f"{fact['images_per_epoch']:,} images (estimated)",
        f"{total} images/s (making views alone: {prepared}/s, the network alone: {trained}/s)",
        f"on {fact['device']}",
        *(SHORTER_LINES if fact["seconds"] > LONG_SECONDS else ()),
        *(BUSY_LINES if fact["load"] > BUSY_LOAD else ()),
    ]


def _count_files(files: Sequence[object]) -> str:
    return f"{len(files):,} file" + "s" * (len(files) != 1)


def _first_examples(lines: Sequence[str]) -> list[str]:
    """Indent the first lines, and say how many more there are."""
    examples = [f"  {line}" for line in lines[:MAX_EXAMPLES]]
    more = len(lines) - MAX_EXAMPLES
    return [*examples, f"  and {more:,} more; --out FILE.json lists all"] if more > 0 else examples


FACT_FORMATTERS: dict[str, Callable[[Any], list[str]]] = {
    "files": _format_files,
    "images": _format_images,
    "sizes": _format_sizes,
    "formats": _format_file_formats,
    "labels": _format_labels,
    "duplicates": _format_duplicates,
    "unreadable": _format_unreadable,
    "recipe": format_recipe,
    "colors": _format_colors,
    "time": _format_training_time,
}
