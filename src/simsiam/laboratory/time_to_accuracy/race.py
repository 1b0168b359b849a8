"""Minutes to levels of kNN accuracy, on h of the test split, of several ways to learn features.

Every contestant has the same network and images, and all but one the same number of epochs. Time is
that of training: opening and decoding of images count, measurements do not. Everything is kept
beside the JSON file, and the same command goes on where it was stopped.
"""

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import TypeAlias, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from typing_extensions import NotRequired, TypedDict

from simsiam.config.recipes import SPRINT, ResolvedRecipe
from simsiam.data.images import Images, load_into_memory, sample
from simsiam.data.transform import Transform
from simsiam.errors import UsageError
from simsiam.evaluation.finetune import line_styles
from simsiam.laboratory.drawing import format_axes, new_figure, save_figure
from simsiam.laboratory.time_to_accuracy.plain_loop import MODULES, train_plain_loop
from simsiam.model.encoder import Encoder
from simsiam.model.precision import Compute
from simsiam.monitoring.candidates import COSINE_WEIGHT, best_patches, read_sample
from simsiam.monitoring.nearest_neighbors import encoder_knn_top1
from simsiam.runs.closed_form import fit_patches_run
from simsiam.runs.compose import compose_recipe
from simsiam.runs.encoder import build_backbone, eval_transform, load
from simsiam.runs.environment import collect_environment
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import Source, open_source
from simsiam.training.launch import pretrain, resume
from simsiam.training.prepare import prepare_data
from simsiam.utils.files import make_folder, write_text
from simsiam.utils.typed_json import read_json

NAME = "time_to_accuracy"
BANK, QUERIES = 10_000, 5_000  # training images that vote, and test images that are classified
LEVELS = (40.0, 50.0, 60.0, 70.0, 80.0, 90.0)
# Of images like CIFAR-10's: the network and the recipe that `results/label_free.py` used.
CIFAR = {"backbone": "resnet18", "width": 16, "batch_size": 256, "base_lr": 0.2}
PLAIN_LOOP = "plain loop"
LONGER = 3  # times as many epochs, in the run that is put beside patches
Curve: TypeAlias = list[tuple[float, float]]  # seconds of training, kNN accuracy in percent


class MeasuredCurve(TypedDict):
    """The curve of a contestant with one seed, and with what it was measured."""

    curve: Curve
    threads: int  # of torch
    plain_loop: NotRequired[str]  # whose modules the plain loop had


def time_to_accuracy(
    source: str, *, out: str | None, epochs: int = 12, seeds: int = 3, device: str = "auto"
) -> dict[str, object]:
    """Train every contestant with every seed, print a table, and write curves and JSON after each.

    Args:
        source: A labeled source with a test split.
        out: A JSON file. Runs are kept in a folder beside it, and the curves in a .png and a .svg.
        epochs: Passes over the training images.
        seeds: Number of seeds.
        device: "auto", "cpu", "cuda", ...

    Returns:
        The content of the JSON file.

    Raises:
        UsageError: `out` is missing, or the source has no labels or no test split.
    """
    if out is None:
        raise UsageError(f"{NAME} takes long: give --out FILE.json, beside which its runs are kept")
    folder = Path(out).with_suffix(".runs")
    make_folder(folder)
    opened = open_source(source)
    if opened.test is None or opened.test.labels is None or opened.train.labels is None:
        raise UsageError(f"{source} needs labels and a test split for {NAME}")
    bank, queries = (
        load_into_memory(sample(images, count), 2**31)[0]
        for images, count in ((opened.train, BANK), (opened.test, QUERIES))
    )
    compute, curves = Compute.pick(device), dict[str, dict[str, Curve]]()
    report: dict[str, object] = collect_environment(compute)
    for key in ("command", "processes", "threads"):
        report.pop(key, None)
    threads, modules = dict[str, dict[str, int]](), set[str]()
    report |= {"source": opened.name, "epochs": epochs}
    report |= {"bank": len(bank), "queries": len(queries), "threads": threads, "curves": curves}
    for seed in range(seeds):
        for name, train in contestants(source, opened, epochs, seed, compute).items():
            file = folder / f"{name}, seed {seed}.json"
            if not file.exists():
                curve = train(partial(knn, bank, queries, compute), file.with_suffix(""))
                measured: MeasuredCurve = {
                    "curve": curve,
                    "threads": torch.get_num_threads(),
                    "plain_loop": MODULES,
                }
                write_text(file, json.dumps(measured) + "\n")
            found = read_json(file, MeasuredCurve)
            curves.setdefault(name, {})[str(seed)] = [(s, a) for s, a in found["curve"]]
            threads.setdefault(name, {})[str(seed)] = found["threads"]
            if name.startswith(PLAIN_LOOP):
                modules.add(found.get("plain_loop", "unknown origin"))
                report[PLAIN_LOOP] = " or ".join(sorted(modules))
            report["minutes_to"] = {
                name: {f"{level:g}": minutes_to(level, of_seeds.values()) for level in LEVELS}
                for name, of_seeds in curves.items()
            }
            write_text(Path(out), json.dumps(report, indent=1) + "\n")
            draw(named_with_threads(curves, threads), Path(out).with_suffix(""), opened.name)
    shown = named_with_threads(curves, threads)
    Console(highlight=False).print(table(shown, opened.name, " or ".join(sorted(modules))))
    return report


Measure: TypeAlias = Callable[[Transform, nn.Module], float]


def contestants(
    source: str, opened: Source, epochs: int, seed: int, compute: Compute
) -> dict[str, Callable[[Measure, Path], Curve]]:
    """Return the contestants by name, each a function of a measurement and a place for its files.

    Args:
        source: The source.
        opened: The same, opened.
        epochs: Passes over the training images.
        seed: Seed of weights, order and views.
        compute: Where to compute.
    """
    settings = {"epochs": epochs, "seed": seed, "device": compute.device.type, "holdout": 0}
    simsiam = {"method": "simsiam"}
    default = compose_recipe(source, None, simsiam)[0]
    small = CIFAR if default.backbone == "resnet18" and default.image_size == 32 else {}
    recipe = compose_recipe(source, None, {**simsiam, **small, **settings})[0]
    network = {"backbone": recipe.backbone, "width": recipe.width}
    sprint = compose_recipe(source, SPRINT, {**network, **settings})[0]
    found: dict[str, Callable[[Measure, Path], Curve]] = {
        "simsiam": partial(own_run, source, recipe, opened),
        "sprint": partial(own_run, source, sprint, opened),
        f"sprint, {LONGER} x as long, beside patches": partial(
            run_beside_patches, source, sprint.replace(epochs=LONGER * epochs), opened
        ),
        "patches with map": partial(patches, source),
    }
    for fast in (True, False):
        name = f"{PLAIN_LOOP}, {'our precision' if fast else 'as documented'}"
        found[name] = partial(plain_loop, recipe, opened, compute, fast)
    return found


def knn(
    bank: Images, queries: Images, compute: Compute, transform: Transform, backbone: nn.Module
) -> float:
    """Measure the kNN accuracy of a backbone.

    Args:
        bank: The training images that vote.
        queries: The test images that are classified.
        compute: Where to compute.
        transform: The preprocessing of the backbone.
        backbone: The backbone.

    Returns:
        Percent.
    """
    backbone = compute.place(deepcopy(backbone))  # the plain loop goes on with its memory format
    return encoder_knn_top1(backbone, bank, queries, transform, compute=compute)


def own_run(
    source: str, recipe: ResolvedRecipe, opened: Source, measure: Measure, place: Path
) -> Curve:
    """Train a run of this program, and measure the checkpoint of each epoch afterwards.

    Args:
        source: The source.
        recipe: The recipe.
        opened: The source, opened.
        measure: The measurement.
        place: The run folder.

    Returns:
        Seconds and accuracies.
    """
    begun = time.monotonic()
    data = prepare_data(recipe, opened)  # once more in the run, whose own time begins afterwards
    before, per_epoch = time.monotonic() - begun, len(data.train) // recipe.batch_size
    if (place / "recipe.yaml").exists():
        resume(place, source=source, logger="none")
    else:
        never = {"knn_every": recipe.epochs, "log_every": per_epoch, "save_every": 1}
        pretrain(source, recipe=recipe.replace(**never), out=place, logger="none")
    run, transform = Run(place), eval_transform(recipe)
    backbone = build_backbone(recipe)
    curve = Curve()
    for epoch in range(1, recipe.epochs + 1):
        state = run.checkpoint(f"epoch-{epoch:04d}")
        assert state is not None
        part = "backbone."
        weights = {k[len(part) :]: v for k, v in state["model"].items() if k.startswith(part)}
        backbone.load_state_dict(weights)
        curve.append((before + state["seconds"], measure(transform, backbone)))
    return curve


def run_beside_patches(
    source: str, recipe: ResolvedRecipe, opened: Source, measure: Measure, place: Path
) -> Curve:
    """Train a run, and measure each epoch beside patches as `adapt` puts it: `beside_patches`.

    Args:
        source: The source.
        recipe: The recipe.
        opened: The source, opened.
        measure: The measurement.
        place: The run folder.

    Returns:
        Seconds, with those of learning the patches, and accuracies.
    """
    begun, transform = time.monotonic(), eval_transform(recipe)
    chosen = read_sample(opened.train, transform.resize, seed=recipe.seed)
    best, _ = best_patches(chosen, transform)
    seconds = time.monotonic() - begun

    def with_patches(transform: Transform, backbone: nn.Module) -> float:
        parts = (best.branches[0].backbone, best.heads[0], COSINE_WEIGHT)
        return measure(transform, Encoder(backbone, None, *parts))

    return [(seconds + s, a) for s, a in own_run(source, recipe, opened, with_patches, place)]


def plain_loop(
    recipe: ResolvedRecipe,
    opened: Source,
    compute: Compute,
    fast: bool,
    measure: Measure,
    place: Path,
) -> Curve:
    """Train the plain loop on the network of a recipe.

    Args:
        recipe: The recipe.
        opened: The source.
        compute: Where to compute.
        fast: Whether to use the precision and the memory format of this program.
        measure: The measurement.
        place: Where its state is kept.

    Returns:
        Seconds and accuracies.
    """
    return train_plain_loop(
        recipe,
        opened.train,
        partial(measure, eval_transform(recipe)),
        place.with_suffix(".pt"),
        compute=compute,
        fast=fast,
    )


def patches(source: str, measure: Measure, place: Path) -> Curve:
    """Learn patches with their map, in closed form.

    Args:
        source: The source.
        measure: The measurement.
        place: A new run folder.

    Returns:
        One point.
    """
    begun = time.monotonic()
    fit_patches_run(source, out=place)
    seconds = time.monotonic() - begun
    encoder = load(place)
    return [(seconds, measure(cast(Transform, encoder.transform), encoder))]


def named_with_threads(
    curves: Mapping[str, Mapping[str, Curve]], threads: Mapping[str, Mapping[str, int]]
) -> dict[str, Mapping[str, Curve]]:
    """Add the numbers of threads to the names of contestants, if these numbers differ.

    Args:
        curves: The curves by contestant and seed.
        threads: The numbers of threads by contestant and seed.
    """
    numbers = {name: sorted(set(of_seeds.values())) for name, of_seeds in threads.items()}
    if len({n for several in numbers.values() for n in several}) == 1:
        return dict(curves)
    texts = {name: " or ".join(map(str, several)) for name, several in numbers.items()}
    return {f"{name}, threads: {texts[name]}": curves[name] for name in curves}


def minutes_to(level: float, curves: Collection[Curve]) -> list[float | None]:
    """Return when each seed first measured a level.

    Args:
        level: The kNN accuracy in percent.
        curves: A curve for each seed.

    Returns:
        Minutes; None for a seed that never did.
    """
    return [
        next((round(seconds / 60, 3) for seconds, accuracy in curve if accuracy >= level), None)
        for curve in curves
    ]


def mean_and_spread(values: Sequence[float]) -> str:
    """Format a mean, with the standard deviation if there are several values.

    Args:
        values: At least one value.
    """
    spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
    return f"{fmean(values):.3g}{spread}"


def table(curves: Mapping[str, Mapping[str, Curve]], source: str, modules: str) -> Table:
    """Make the table of minutes to each level that any contestant reached.

    Args:
        curves: The curves by contestant and seed.
        source: The name of the source.
        modules: Whose modules the plain loop has; "" if it was not measured.
    """
    title = f"{source}: minutes of training to levels of kNN accuracy"
    caption = "Levels that are missing were never reached."
    if modules:
        caption += f" The plain loop has modules of {modules}."
    result = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for heading in ("", "kNN, %", "minutes"):
        result.add_column(heading, justify="right" if heading else "left")
    for name, of_seeds in curves.items():
        rows = list[tuple[str, str]]()
        for level in LEVELS:
            times = [m for m in minutes_to(level, of_seeds.values()) if m is not None]
            missed = len(of_seeds) - len(times)
            note = f" ({missed} of {len(of_seeds)} never)" if missed else ""
            rows += [(f"{level:g}", mean_and_spread(times) + note)] if times else []
        ends = [curve[-1] for curve in of_seeds.values()]
        last = mean_and_spread([accuracy for _, accuracy in ends])
        rows.append((f"at the end: {last}", mean_and_spread([s / 60 for s, _ in ends])))
        result.add_section()
        for number, row in enumerate(rows):
            result.add_row("" if number else name, *row)
    return result


def draw(curves: Mapping[str, Mapping[str, Curve]], path: Path, source: str) -> None:
    """Draw the accuracy over time: a line for each seed, and patches as the line to beat.

    Args:
        curves: The curves by contestant and seed.
        path: The files to write, without extension.
        source: The name of the source.
    """
    from matplotlib.ticker import LogLocator

    figure = new_figure(7, 5)
    axes = figure.subplots()
    for (name, of_seeds), (color, dash) in zip(curves.items(), line_styles()):
        for i, curve in enumerate(of_seeds.values()):
            x, y = [s / 60 for s, _ in curve if s > 0], [a for s, a in curve if s > 0]
            label = None if i else name
            if len(x) == 1:
                axes.plot(x, y, marker="D", linestyle="none", color=color, label=label)
                axes.axhline(y[0], color=color, linewidth=0.8, linestyle=":")
            else:
                axes.plot(x, y, linestyle=dash, marker=".", color=color, label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    format_axes(axes, "minutes of training", "kNN on test images (%)")
    # Curves may be anywhere in the panel, so the legend is below it.
    axes.legend(fontsize=8, ncols=2, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.suptitle(f"{source}: accuracy over time")
    save_figure(figure, path)
