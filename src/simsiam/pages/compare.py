"""simsiam compare: what differs between runs in how they were made, and in what came of it."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from simsiam.errors import UsageError, printable
from simsiam.runs.run_folder import Run

LAST_STEP_METRICS = ("loss", "z_std_sqrt_d", "z_rank")  # of the last logged step
ENVIRONMENT_KEYS = ("device", "precision", "threads", "processes", "commit")

ComparisonRows = dict[str, list[Any]]  # a value a run; None where a run has none


def compare(runs: Sequence[str | os.PathLike[str]]) -> dict[str, ComparisonRows]:
    """Tables "recipe", "environment" (where they differ) and "results" (all); prints them. Raises UsageError."""
    if len(runs) < 2:
        raise UsageError("give at least two runs to compare")
    folders = [Run(run) for run in runs]
    tables = {
        "recipe": differing_rows(align_rows([flatten(run.recipe.to_dict()) for run in folders])),
        "environment": differing_rows(align_rows([environment_values(run) for run in folders])),
        "results": align_rows([result_values(run) for run in folders]),
    }
    print_tables(tables, [escape(printable(str(run.path))) for run in folders])
    return tables


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """A nested mapping's leaves by path: "method.dim", "method.views.0.blur"."""
    if isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return {name: value}
    return {
        k: v
        for key, inner in value.items()
        for k, v in flatten(inner, f"{name}.{key}".lstrip(".")).items()
    }


def align_rows(columns: Sequence[Mapping[str, Any]]) -> ComparisonRows:
    return {
        name: [column.get(name) for column in columns]
        for name in dict.fromkeys(k for c in columns for k in c)
    }


def differing_rows(rows: ComparisonRows) -> ComparisonRows:
    return {
        name: values for name, values in rows.items() if any(value != values[0] for value in values)
    }


def environment_values(run: Run) -> dict[str, Any]:
    here = run.json("environment.json")
    return {name: here.get(name) for name in ENVIRONMENT_KEYS} | here.get("versions", {})


def result_values(run: Run) -> dict[str, Any]:
    """The verdict, the monitors' last values, and the accuracy of every evaluation by what was measured."""
    summary, lines = run.json("summary.json"), run.metrics()
    knn = summary.get("knn_top1") or {}
    found = {name: summary.get(name) for name in ("verdict", "steps", "images_per_second")}
    found |= {name: lines[-1].get(name) if lines else None for name in LAST_STEP_METRICS}
    found |= {f"knn_top1 {name}": knn.get(name) for name in ("last", "best")}
    for r in run.evaluations():
        if "top1" in r:
            found[
                f"{r['protocol']} {r['name']}, {r['features']}, {r['checkpoint']}, {r['source']}"
            ] = r["top1"]
    return found


def print_tables(tables: Mapping[str, ComparisonRows], names: Sequence[str]) -> None:
    """As tables of 80 columns; of two runs, with the difference of two numbers."""
    console = Console(highlight=False)
    for title, found in tables.items():
        table = Table(
            title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False
        )
        table.add_column("", overflow="fold")
        for name in names:
            table.add_column(
                name, overflow="fold", justify="right" if title == "results" else "left"
            )
        if title == "results" and len(names) == 2:
            table.add_column("difference", justify="right")
        for name, values in found.items():
            cells = [format_cell(value) for value in values]
            if title == "results" and len(names) == 2:
                numbers = all(isinstance(value, int | float) for value in values)
                cells.append(f"{values[1] - values[0]:+.4g}" if numbers else "")
            table.add_row(escape(printable(name)), *cells)
        if found:
            console.print(table)
        else:
            console.print(f"{title}: the same")


def format_cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.5g}" if isinstance(value, float) else escape(printable(str(value)))
