"""An experiment's numbers as Markdown, CSV and JSON: functions of the run folders alone, so they repeat exactly.

People add what no program can: NAME.reading.md beside a page is an honest reading of it, and the index holds it.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from simsiam.laboratory.claims import (
    DOES_NOT_HOLD,
    HOLDS,
    WITHIN_NOISE,
    Claim,
    ClaimResult,
    MetricValues,
)
from simsiam.laboratory.experiments import EXPERIMENTS, Experiment
from simsiam.laboratory.scales import Scale

INDEX_TITLE = (
    "# The paper at scale"  # how an index begins: a README.md that does not is somebody else's
)
PAPER_RESULTS: dict[str, Any] = json.loads(
    Path(__file__).with_name("paper.json").read_text(encoding="utf-8")
)
NO_PAPER_RESULTS: dict[str, Any] = {
    "metric": "none",
    "cells": {},
}  # of an experiment that is not in the paper
# Columns of a table between the cell and the paper's number: metric and heading.
METRIC_COLUMNS = {
    "knn": "kNN (%)",
    "loss": "loss",
    "z_std_sqrt_d": "z std × √d",
    "z_rank": "rank of z",
}
PREDICTOR_COLUMNS = {"cos_p_mean": "cos(p1, E[z])", "cos_z_mean": "cos(z1, E[z])"}


def format_paper_number(name: str, cell: str) -> str:
    """The paper's number as it stands in a table."""
    known = PAPER_RESULTS.get(name, {}).get("cells", {}).get(cell, {})
    top1 = known.get("top1")
    text = "" if top1 is None else f"{top1:.1f}" + (f" ± {known['std']}" if "std" in known else "")
    return f"{text} ({known['note']})".strip() if "note" in known else text


def format_mean_std(seeds: Mapping[int, Mapping[str, Any]], metric: str, digits: int) -> str:
    """Mean ± standard deviation over the seeds that have the metric."""
    numbers = [float(v[metric]) for v in seeds.values() if v.get(metric) is not None]
    if not numbers:
        return "–"
    return f"{fmean(numbers):.{digits}f}" + (
        f" ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    )


def metrics_table(
    name: str, experiment: Experiment, scale: Scale, values: MetricValues
) -> list[list[str]]:
    """The heading, then a row for each cell."""
    columns = METRIC_COLUMNS | (PREDICTOR_COLUMNS if experiment.measure_predictor else {})
    paper = [f"paper: {PAPER_RESULTS[name]['metric']}"] if name in PAPER_RESULTS else []
    rows = [["", f"ours: {scale.metric}", *columns.values(), "seeds", "verdicts", *paper]]
    for cell, seeds in values.items():
        ended = [v["verdict"] for v in seeds.values()]
        verdicts = ", ".join(f"{ended.count(v)} {v}" for v in sorted(set(ended))) or "not run"
        numbers = [format_mean_std(seeds, m, 1 if m == "knn" else 2) for m in columns]
        rows.append(
            [cell, format_mean_std(seeds, "linear", 1), *numbers, str(len(seeds)), verdicts]
        )
        rows[-1] += [format_paper_number(name, cell)] if paper else []
    return rows


def claims_table(results: Sequence[tuple[Claim, ClaimResult]]) -> list[list[str]]:
    """The heading, then a row for each claim."""
    rows = [["claim of the paper", "rule", "mean [95 %]", "seeds", ""]]
    for claim, ruling in results:
        mean = "–" if ruling.mean is None else f"{ruling.mean:.3g}"
        between = " [{:.3g}, {:.3g}]".format(*ruling.interval) if ruling.interval else ""
        rows.append(
            [claim.statement, claim.rule, mean + between, str(ruling.n), f"**{ruling.verdict}**"]
        )
    return rows


def claim_to_dict(claim: Claim, result: ClaimResult) -> dict[str, Any]:
    """A claim and its ruling for JSON, which has no infinity."""
    ends = {
        end: value if isfinite(value) else None
        for end, value in (("low", claim.low), ("high", claim.high))
    }
    return {
        "says": claim.statement,
        "of": claim.weights,
        "metric": claim.metric,
        **ends,
        **result._asdict(),
    }


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    escaped = [[text.replace("|", "\\|") for text in row] for row in rows]
    return "\n".join(
        f"| {' | '.join(row)} |" for row in [escaped[0], ["---"] * len(rows[0]), *escaped[1:]]
    )


def to_csv(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def render_page(
    name: str, experiment: Experiment, scale: Scale, values: MetricValues, results: Sequence[tuple[Claim, ClaimResult]],
    metadata: Mapping[str, Any], rows: Sequence[Sequence[str]],
) -> str:  # fmt: skip
    """One experiment for readers: table (its `rows`), figure, claims, and where it all comes from."""
    runs = metadata["runs"]
    failed = [
        f"- not finished: {run['cell']}, seed {run['seed']}: {run['state']}"
        for run in runs
        if "values" not in run
    ]
    made = [run["environment"] for run in runs if "environment" in run]
    commits = ", ".join(sorted({str(e["commit"])[:12] for e in made})) or "none"
    devices = (
        "; ".join(
            sorted({f"{e['device']}, threads: {e['threads']}, {e['precision']}" for e in made})
        )
        or "none"
    )
    seconds = sum(v["seconds"] for seeds in values.values() for v in seeds.values())
    lines = [
        f"# {name}: {experiment.title}",
        f"{experiment.section[0].upper()}{experiment.section[1:]} of the paper, at scale {scale.name}. Accuracies are of "
        "the last epoch's network; mean ± standard deviation over seeds. The paper's have a metric of their own, named "
        "in their heading.",
        markdown_table(rows),
        f"![{experiment.title}]({name}.svg)",
        markdown_table(claims_table(results)),
        "A claim holds if the 95 % interval of its mean, paired by seed, lies inside its range; it does not hold if it "
        "lies outside; otherwise it is within noise.",
        *(["\n".join(failed)] if failed else []),
        f"Settings: {'; '.join(scale.mapping)}.",
        f"Made by `{metadata['command']}`; code {commits}; on {devices}; {seconds / 3600:.2f} hours of training, runs "
        f"shared with other experiments included. Every run and its recipe: {name}.json.",
    ]
    return "\n\n".join(lines) + "\n"


def render_index(folder: Path, scale: Scale) -> str:
    """All experiments of a folder of results, by their JSON: what became of the paper's claims, and the readings."""
    parts: list[str] = []
    every: list[str] = []
    for name, experiment in EXPERIMENTS.items():
        if (
            not experiment.cells and (folder / f"{name}.md").exists()
        ):  # a drawing: there is nothing to judge
            parts += [f"## [{experiment.title}]({name}.md)", f"![{experiment.title}]({name}.svg)"]
        if (path := folder / f"{name}.json").exists():
            claims = json.loads(path.read_text(encoding="utf-8"))["claims"]
            ended = [claim["verdict"] for claim in claims]
            every += ended
            said = [f"- {claim['says']}: **{claim['verdict']}**" for claim in claims]
            parts += [
                f"## [{experiment.title}]({name}.md)",
                f"{experiment.section}; {format_verdict_counts(ended)}",
            ]
            parts += ["\n".join(said), f"![{experiment.title}]({name}.svg)"]
            if (reading := folder / f"{name}.reading.md").exists():
                parts.append(reading.read_text(encoding="utf-8").strip())
    head = [f"{INDEX_TITLE} {scale.name}", f"In all {format_verdict_counts(every)}."]
    return "\n\n".join([*head, *parts, f"Settings: {'; '.join(scale.mapping)}."]) + "\n"


def format_verdict_counts(verdicts: Sequence[str]) -> str:
    found = ", ".join(
        f"{verdict} {verdicts.count(verdict)}"
        for verdict in (HOLDS, WITHIN_NOISE, DOES_NOT_HOLD)
        if verdict in verdicts
    )
    return f"{len(verdicts)} claims: {found}"
