"""Figures: curves over epochs, or accuracies beside the paper's. Seeds light, means bold; told apart in gray too."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

from simsiam.evaluation import finetune
from simsiam.laboratory.claims import MetricValues
from simsiam.utils.files import atomic_write

COLORS = (*finetune.COLORS, "black")
LINE_STYLES: tuple[Any, ...] = (*finetune.DASHES, (0, (6, 1)))
MARKERS = ("o", "s", "^", "D", "v")
METRIC_LABELS = {
    "loss": "training loss",
    "z_std_sqrt_d": "std of z/‖z‖, times √d",
    "knn_top1": "kNN on held-out images (%)",
    "linear": "linear top-1 on test images (%)",
}
Y_LIMITS = {
    "loss": (-1.05, 0.05),
    "z_std_sqrt_d": (0, 1.05),
    "knn_top1": (0, None),
}  # as in Figure 2
Curve = Sequence[tuple[float, float]]


def plot_curves(
    curves: Mapping[str, Mapping[str, Sequence[Curve]]], path: Path, title: str
) -> None:
    """A panel for each metric of `found`, with a curve for each seed of each cell and their mean."""
    figure = new_figure(4.2 * len(curves), 3.6)
    for axes, (metric, cells) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves.items()
    ):
        for (cell, seeds), color, dash in zip(cells.items(), cycle(COLORS), cycle(LINE_STYLES)):
            at: dict[float, list[float]] = defaultdict(list)
            for curve in seeds:
                axes.plot(*zip(*curve), color=color, linewidth=0.8, alpha=0.35)
                for x, y in curve:
                    at[x].append(y)
            mean = [(x, fmean(ys)) for x, ys in sorted(at.items())]
            axes.plot(*zip(*mean), linestyle=dash, color=color, linewidth=2, label=cell)
        if metric == "z_std_sqrt_d":
            axes.axhline(1, color="gray", linewidth=0.8, linestyle=":", label="1/√d: isotropic z")
        format_axes(axes, "epoch", METRIC_LABELS[metric])
        axes.set_ylim(Y_LIMITS.get(metric))
    figure.suptitle(title)
    save_figure(figure, path)


def plot_accuracies(
    values: MetricValues,
    paper: Mapping[str, Any],
    our_label: str,
    paper_label: str,
    path: Path,
    title: str,
    metric: str = "linear",
) -> None:
    """Accuracies of every cell, ours and the paper's in a panel each: their metrics differ."""
    cells = list(values)
    figure = new_figure(9, 1.6 + 0.4 * len(cells))
    left, right = figure.subplots(1, 2, sharey=True)
    for y, cell in enumerate(cells):
        accuracies = known_values(values[cell], metric)
        left.scatter(accuracies, [y] * len(accuracies), color=COLORS[0], alpha=0.35, s=25)
        if accuracies:
            left.scatter(fmean(accuracies), y, color=COLORS[0], marker="|", s=250, linewidths=2.5)
        printed = paper.get(cell, {})
        if (
            top1 := fmean(v[0] for v in printed.values())
            if metric == "ap50"
            else printed.get("top1")
        ) is not None:
            right.scatter(top1, y, color=COLORS[1], marker="D", s=35)
    left.set(yticks=range(len(cells)), yticklabels=cells, ylim=(len(cells) - 0.5, -0.5))
    format_axes(left, wrap_label(our_label), "")
    format_axes(right, wrap_label(paper_label), "")
    figure.suptitle(title)
    save_figure(figure, path)


def plot_accuracy_lines(
    values: MetricValues, x: Mapping[str, float], paper: Mapping[str, Any], setting: str, our_label: str, paper_label: str, path: Path,
    title: str,
) -> None:  # fmt: skip
    """Accuracies against a word of the recipe, `x` of each cell; cells that differ in their last number are a line."""
    figure = new_figure(9, 4)
    left, right = figure.subplots(1, 2)
    series, there = defaultdict[str, list[str]](list), set[int]()
    for cell in values:
        series[cell.rstrip("0123456789").rstrip(" =,")].append(cell)
    for (name, cells), color, dash, mark in zip(
        series.items(), cycle(COLORS), cycle(LINE_STYLES), cycle(MARKERS)
    ):
        style = {"color": color, "linestyle": dash, "marker": mark}
        measured = [
            (x[cell], known_values(values[cell])) for cell in cells if known_values(values[cell])
        ]
        for at, accuracies in measured:
            left.scatter([at] * len(accuracies), accuracies, color=color, alpha=0.35, s=15)
        if measured:
            left.plot(
                [at for at, _ in measured], [fmean(a) for _, a in measured], **style, label=name
            )
        printed = [
            (int(cell.split()[-1]), paper[cell]["top1"])
            for cell in cells
            if paper.get(cell, {}).get("top1")
        ]
        if printed:
            right.plot(*zip(*printed), **style, label=name)
            there |= {at for at, _ in printed}
    for axes, metric, ticks in ((left, our_label, set(x.values())), (right, paper_label, there)):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(ticks), labels=map(str, sorted(ticks)))
        format_axes(axes, setting.replace("_", " "), wrap_label(metric))
    figure.suptitle(title)
    save_figure(figure, path)


def format_axes(axes: Any, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def known_values(seeds: Mapping[int, Mapping[str, Any]], metric: str = "linear") -> list[float]:
    return [v[metric] for v in seeds.values() if v.get(metric) is not None]


def wrap_label(label: str) -> str:
    return label.replace(", linear", ",\nlinear")


def new_figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """As PNG and as SVG, the same bytes for the same numbers."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "simsiam"}):
        for kind, about in (("png", {"Software": None}), ("svg", {"Date": None})):
            with atomic_write(path.with_suffix(f".{kind}")) as part:
                figure.savefig(part, format=kind, metadata=about)
