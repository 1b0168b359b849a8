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

from simsiam.laboratory.claims import HOLDS, NOISE, NOT, Claim, Ruling, Values
from simsiam.laboratory.experiments import EXPERIMENTS, Experiment
from simsiam.laboratory.scales import Scale

INDEX = "# The paper at scale"  # how an index begins: a README.md that does not is somebody else's
PAPER: dict[str, Any] = json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))
UNPRINTED: dict[str, Any] = {"metric": "none", "cells": {}}  # of an experiment that is not in the paper
# Columns of a table between the cell and the paper's number: metric and heading.
COLUMNS = {"knn": "kNN (%)", "loss": "loss", "z_std_sqrt_d": "z std × √d", "z_rank": "rank of z"}
READING = {"cos_p_mean": "cos(p1, E[z])", "cos_z_mean": "cos(z1, E[z])"}


def printed(name: str, cell: str) -> str:
    """The paper's number as it stands in a table."""
    known = PAPER.get(name, {}).get("cells", {}).get(cell, {})
    top1 = known.get("top1")
    text = "" if top1 is None else f"{top1:.1f}" + (f" ± {known['std']}" if "std" in known else "")
    return f"{text} ({known['note']})".strip() if "note" in known else text


def spread(seeds: Mapping[int, Mapping[str, Any]], metric: str, digits: int) -> str:
    """Mean ± standard deviation over the seeds that have the metric."""
    numbers = [float(v[metric]) for v in seeds.values() if v.get(metric) is not None]
    if not numbers:
        return "–"
    return f"{fmean(numbers):.{digits}f}" + (f" ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else "")


def table(name: str, experiment: Experiment, scale: Scale, values: Values) -> list[list[str]]:
    """The heading, then a row for each cell."""
    columns = COLUMNS | (READING if experiment.reads_h else {})
    paper = [f"paper: {PAPER[name]['metric']}"] if name in PAPER else []
    rows = [["", f"ours: {scale.metric}", *columns.values(), "seeds", "verdicts", *paper]]
    for cell, seeds in values.items():
        ended = [v["verdict"] for v in seeds.values()]
        verdicts = ", ".join(f"{ended.count(v)} {v}" for v in sorted(set(ended))) or "not run"
        numbers = [spread(seeds, m, 1 if m == "knn" else 2) for m in columns]
        rows.append([cell, spread(seeds, "linear", 1), *numbers, str(len(seeds)), verdicts])
        rows[-1] += [printed(name, cell)] if paper else []
    return rows


def ruled(rulings: Sequence[tuple[Claim, Ruling]]) -> list[list[str]]:
    """The heading, then a row for each claim."""
    rows = [["claim of the paper", "rule", "mean [95 %]", "seeds", ""]]
    for claim, ruling in rulings:
        mean = "–" if ruling.mean is None else f"{ruling.mean:.3g}"
        between = " [{:.3g}, {:.3g}]".format(*ruling.interval) if ruling.interval else ""
        rows.append([claim.says, claim.rule, mean + between, str(ruling.n), f"**{ruling.verdict}**"])
    return rows


def plain(claim: Claim, ruling: Ruling) -> dict[str, Any]:
    """A claim and its ruling for JSON, which has no infinity."""
    ends = {end: value if isfinite(value) else None for end, value in (("low", claim.low), ("high", claim.high))}
    return {"says": claim.says, "of": claim.of, "metric": claim.metric, **ends, **ruling._asdict()}


def markdown(rows: Sequence[Sequence[str]]) -> str:
    escaped = [[text.replace("|", "\\|") for text in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [escaped[0], ["---"] * len(rows[0]), *escaped[1:]])


def as_csv(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def page(
    name: str, experiment: Experiment, scale: Scale, values: Values, rulings: Sequence[tuple[Claim, Ruling]],
    about: Mapping[str, Any], rows: Sequence[Sequence[str]],
) -> str:  # fmt: skip
    """One experiment for readers: table (its `rows`), figure, claims, and where it all comes from."""
    runs = about["runs"]
    failed = [
        f"- not finished: {run['cell']}, seed {run['seed']}: {run['state']}" for run in runs if "values" not in run
    ]
    made = [run["environment"] for run in runs if "environment" in run]
    commits = ", ".join(sorted({str(e["commit"])[:12] for e in made})) or "none"
    devices = "; ".join(sorted({f"{e['device']}, threads: {e['threads']}, {e['precision']}" for e in made})) or "none"
    seconds = sum(v["seconds"] for seeds in values.values() for v in seeds.values())
    lines = [
        f"# {name}: {experiment.title}",
        f"{experiment.where[0].upper()}{experiment.where[1:]} of the paper, at scale {scale.name}. Accuracies are of "
        "the last epoch's network; mean ± standard deviation over seeds. The paper's have a metric of their own, named "
        "in their heading.",
        markdown(rows),
        f"![{experiment.title}]({name}.svg)",
        markdown(ruled(rulings)),
        "A claim holds if the 95 % interval of its mean, paired by seed, lies inside its range; it does not hold if it "
        "lies outside; otherwise it is within noise.",
        *(["\n".join(failed)] if failed else []),
        f"Settings: {'; '.join(scale.mapping)}.",
        f"Made by `{about['command']}`; code {commits}; on {devices}; {seconds / 3600:.2f} hours of training, runs "
        f"shared with other experiments included. Every run and its recipe: {name}.json.",
    ]
    return "\n\n".join(lines) + "\n"


def index(folder: Path, scale: Scale) -> str:
    """All experiments of a folder of results, by their JSON: what became of the paper's claims, and the readings."""
    parts: list[str] = []
    every: list[str] = []
    for name, experiment in EXPERIMENTS.items():
        if not experiment.cells and (folder / f"{name}.md").exists():  # a drawing: there is nothing to judge
            parts += [f"## [{experiment.title}]({name}.md)", f"![{experiment.title}]({name}.svg)"]
        if (path := folder / f"{name}.json").exists():
            claims = json.loads(path.read_text(encoding="utf-8"))["claims"]
            ended = [claim["verdict"] for claim in claims]
            every += ended
            said = [f"- {claim['says']}: **{claim['verdict']}**" for claim in claims]
            parts += [f"## [{experiment.title}]({name}.md)", f"{experiment.where}; {counted(ended)}"]
            parts += ["\n".join(said), f"![{experiment.title}]({name}.svg)"]
            if (reading := folder / f"{name}.reading.md").exists():
                parts.append(reading.read_text(encoding="utf-8").strip())
    head = [f"{INDEX} {scale.name}", f"In all {counted(every)}."]
    return "\n\n".join([*head, *parts, f"Settings: {'; '.join(scale.mapping)}."]) + "\n"


def counted(verdicts: Sequence[str]) -> str:
    found = ", ".join(f"{verdict} {verdicts.count(verdict)}" for verdict in (HOLDS, NOISE, NOT) if verdict in verdicts)
    return f"{len(verdicts)} claims: {found}"
