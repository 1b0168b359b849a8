"""Compare runs: how their recipes and environments differ, and what results they got."""

import os
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from simsiam.config.settings import flatten
from simsiam.errors import UsageError, printable
from simsiam.runs.run_folder import Run

LAST_STEP_METRICS = ("loss", "z_std_sqrt_d", "z_rank")  # taken from the last logged step
LABEL_FREE_METRICS = ("rankme", "spectrum_auc", "alignment", "uniformity", "view_retrieval")
ENVIRONMENT_KEYS = ("device", "precision", "threads", "processes", "commit")

# Row name -> one value per run; None where a run has no such value.
ComparisonRows = dict[str, list[object]]


def compare(runs: Sequence[str | os.PathLike[str]]) -> dict[str, ComparisonRows]:
    """Print and return tables that compare runs.

    Args:
        runs: Two or more run folders.

    Returns:
        The tables "recipe" and "environment", with the rows in which the runs differ, and
        "results", with all rows that have a value.

    Raises:
        UsageError: Fewer than two runs were given, or a path is not a run folder.
    """
    if len(runs) < 2:
        raise UsageError("give at least two runs to compare")
    folders = [Run(run) for run in runs]
    tables = {
        "recipe": differing_rows(align_rows([flatten(run.recipe.to_dict()) for run in folders])),
        "environment": differing_rows(align_rows([environment_values(run) for run in folders])),
        "results": known_rows(align_rows([result_values(run) for run in folders])),
    }
    print_tables(tables, [escape(printable(str(run.path))) for run in folders])
    return tables


def align_rows(columns: Sequence[Mapping[str, object]]) -> ComparisonRows:
    """Turn one mapping per run into rows with one value per run.

    Args:
        columns: The values of each run, by name.

    Returns:
        A row for each name that any run has, in order of first appearance.
    """
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name) for column in columns] for name in names}


def known_rows(rows: ComparisonRows) -> ComparisonRows:
    """Keep the rows in which at least one run has a value.

    Args:
        rows: Rows with one value per run.
    """
    return {name: values for name, values in rows.items() if any(v is not None for v in values)}


def differing_rows(rows: ComparisonRows) -> ComparisonRows:
    """Keep the rows whose values are not all equal.

    Args:
        rows: Rows with one value per run.

    Returns:
        The rows in which at least one value differs from the first.
    """
    return {
        name: values for name, values in rows.items() if any(value != values[0] for value in values)
    }


def environment_values(run: Run) -> dict[str, object]:
    """Read the environment in which a run was trained.

    Args:
        run: The run.

    Returns:
        The values of `ENVIRONMENT_KEYS`, and the version of each library.
    """
    environment = run.json("environment.json")
    return {key: environment.get(key) for key in ENVIRONMENT_KEYS} | environment.get("versions", {})


def result_values(run: Run) -> dict[str, object]:
    """Read the results of a run.

    Args:
        run: The run.

    Returns:
        The verdict, the last values of the monitors, the label-free score at start and end, and of
        each evaluation the top-1 accuracy or the label-free signals, named by protocol, setting,
        features, checkpoint and source.
    """
    summary, lines = run.json("summary.json"), run.metrics()
    knn = summary.get("knn_top1") or {}
    values = {name: summary.get(name) for name in ("verdict", "steps", "images_per_second")}
    values |= {name: lines[-1].get(name) if lines else None for name in LAST_STEP_METRICS}
    values |= {f"knn_top1 {name}": knn.get(name) for name in ("last", "best")}
    for end in ("start", "end"):
        values[f"label-free score at the {end}"] = (summary.get(end) or {}).get("score")
    for record in run.evaluations():
        setting = f"{record['protocol']} {record['name']}, {record['features']}"
        place = f"{record['checkpoint']}, {record['source']}"
        if "top1" in record:
            values[f"{setting}, {place}"] = record["top1"]
        for name in LABEL_FREE_METRICS:
            if name in record:
                values[f"{setting}, {place}: {name}"] = record[name]
    return values


def print_tables(tables: Mapping[str, ComparisonRows], names: Sequence[str]) -> None:
    """Print the tables, each with one column per run.

    With two runs, the table of results also has a column with the differences of numbers.

    Args:
        tables: Rows by the title of their table.
        names: The headings of the columns, one per run, escaped for rich.
    """
    console = Console(highlight=False)
    for title, rows in tables.items():
        if not rows:
            console.print(f"{title}: the same")
            continue
        with_difference = title == "results" and len(names) == 2
        table = Table(
            title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False
        )
        table.add_column("", overflow="fold")
        for name in names:
            table.add_column(
                name, overflow="fold", justify="right" if title == "results" else "left"
            )
        if with_difference:
            table.add_column("difference", justify="right")
        for row_name, values in rows.items():
            cells = [format_cell(value) for value in values]
            if with_difference:
                cells.append(_format_difference(*values))
            table.add_row(escape(printable(row_name)), *cells)
        console.print(table)


def format_cell(value: object) -> str:
    """Format one value for a table, escaped for rich.

    Args:
        value: Any value; None becomes a dash.
    """
    if value is None:
        return "–"
    return f"{value:.5g}" if isinstance(value, float) else escape(printable(str(value)))


def _format_difference(first: object, second: object) -> str:
    """Format second - first, or nothing where one of them is no number."""
    if isinstance(first, int | float) and isinstance(second, int | float):
        return f"{second - first:+.4g}"
    return ""
