"""Figures: curves over epochs, and accuracies next to the paper's.

Seeds are light and means are bold. Lines differ in dashes and markers, not only in color.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from simsiam.evaluation.finetune import COLORS, line_styles
from simsiam.laboratory.claims import MetricValues, SeedValues
from simsiam.utils.files import atomic_write, keep_fonts_in_cache

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    """Draw a panel for each metric, with a curve for each seed of each cell, and their mean.

    Args:
        curves: The curves of all seeds, by metric and cell.
        path: The files to write, without extension.
        title: The title of the figure.
    """
    figure = new_figure(4.2 * len(curves), 3.6)
    for axes, (metric, cells) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves.items()
    ):
        for (cell, seeds), (color, dash) in zip(cells.items(), line_styles()):
            ys_at: dict[float, list[float]] = defaultdict(list)
            for curve in seeds:
                axes.plot(*zip(*curve), color=color, linewidth=0.8, alpha=0.35)
                for x, y in curve:
                    ys_at[x].append(y)
            mean = [(x, fmean(ys)) for x, ys in sorted(ys_at.items())]
            axes.plot(*zip(*mean), linestyle=dash, color=color, linewidth=2, label=cell)
        if metric == "z_std_sqrt_d":
            axes.axhline(1, color="gray", linewidth=0.8, linestyle=":", label="1: evenly spread z")
        format_axes(axes, "epoch", METRIC_LABELS[metric])
        axes.set_ylim(Y_LIMITS.get(metric))
    figure.suptitle(title)
    save_figure(figure, path)


def plot_accuracies(
    values: MetricValues,
    published: Mapping[str, float],
    *,
    our_label: str,
    paper_label: str,
    path: Path,
    title: str,
    metric: str = "linear",
) -> None:
    """Draw the accuracy of every cell, and in a second panel those that the paper has.

    Args:
        values: Our metrics.
        published: The paper's numbers by cell, for the cells that have one.
        our_label: What we measure.
        paper_label: What the paper measures.
        path: The files to write, without extension.
        title: The title of the figure.
        metric: The metric: "linear", or "ap50" for detectors.
    """
    cells = list(values)
    figure = new_figure(9, 1.6 + 0.4 * len(cells))
    left, *others = figure.subplots(1, 2 if published else 1, sharey=True, squeeze=False)[0]
    for y, cell in enumerate(cells):
        accuracies = known_values(values[cell], metric)
        left.scatter(accuracies, [y] * len(accuracies), color=COLORS[0], alpha=0.35, s=25)
        if accuracies:
            left.scatter(fmean(accuracies), y, color=COLORS[0], marker="|", s=250, linewidths=2.5)
        for right in others:
            if cell in published:
                right.scatter(published[cell], y, color=COLORS[1], marker="D", s=35)
    left.set(yticks=range(len(cells)), yticklabels=cells, ylim=(len(cells) - 0.5, -0.5))
    format_axes(left, wrap_label(our_label), "")
    for right in others:
        format_axes(right, wrap_label(paper_label), "")
    figure.suptitle(title)
    save_figure(figure, path)


def plot_accuracy_lines(
    values: MetricValues,
    x: Mapping[str, float],
    published: Mapping[str, float],
    *,
    setting: str,
    our_label: str,
    paper_label: str,
    path: Path,
    title: str,
) -> None:
    """Draw accuracies against a setting; cells that differ only in their last number form a line.

    Args:
        values: Our metrics.
        x: Our value of the setting in each cell.
        published: The paper's numbers by cell, for the cells that have one. The last number in a
            cell's name is the paper's setting.
        setting: The name of the setting.
        our_label: What we measure.
        paper_label: What the paper measures.
        path: The files to write, without extension.
        title: The title of the figure.
    """
    figure = new_figure(9, 4)
    left, right = figure.subplots(1, 2)
    series, paper_ticks = defaultdict[str, list[str]](list), set[int]()
    for cell in values:
        series[cell.rstrip("0123456789").rstrip(" =,")].append(cell)
    for (name, cells), (color, dash), marker in zip(series.items(), line_styles(), cycle(MARKERS)):
        style = {"color": color, "linestyle": dash, "marker": marker, "label": name}
        means = []
        for cell in cells:
            if accuracies := known_values(values[cell]):
                positions = [x[cell]] * len(accuracies)
                left.scatter(positions, accuracies, color=color, alpha=0.35, s=15)
                means.append((x[cell], fmean(accuracies)))
        if means:
            left.plot(*zip(*means), **style)
        points = [(int(cell.split()[-1]), published[cell]) for cell in cells if cell in published]
        if points:
            right.plot(*zip(*points), **style)
            paper_ticks |= {position for position, _ in points}
    panels = ((left, our_label, set(x.values())), (right, paper_label, paper_ticks))
    for axes, metric, ticks in panels:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(ticks), labels=map(str, sorted(ticks)))
        format_axes(axes, setting.replace("_", " "), wrap_label(metric))
    figure.suptitle(title)
    save_figure(figure, path)


def format_axes(axes: "Axes", x: str, y: str) -> None:
    """Add labels, a grid and a legend.

    Args:
        axes: The panel.
        x: The label of the x axis.
        y: The label of the y axis.
    """
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def known_values(seeds: SeedValues, metric: str = "linear") -> list[float]:
    """Collect a metric over seeds.

    Args:
        seeds: Metrics by seed.
        metric: The metric.

    Returns:
        The values of the seeds that have it.
    """
    return [v[metric] for v in seeds.values() if v.get(metric) is not None]


def wrap_label(label: str) -> str:
    """Break a long label into two lines.

    Args:
        label: The label.

    Returns:
        The label with a line break before "linear".
    """
    return label.replace(", linear", ",\nlinear")


def new_figure(width: float, height: float) -> "Figure":
    """Create a figure without a display and without pyplot's global state.

    Args:
        width: Inches.
        height: Inches.

    Returns:
        The figure.
    """
    keep_fonts_in_cache()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG and as SVG, with the same bytes for the same numbers.

    Args:
        figure: The figure.
        path: The files to write, without extension.
    """
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "simsiam"}):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            with atomic_write(path.with_suffix(f".{kind}")) as part:
                figure.savefig(part, format=kind, metadata=metadata)
