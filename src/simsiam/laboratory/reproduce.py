"""`simsiam reproduce`: plan, run what is missing, measure, judge, write. Killed anywhere, it goes on where it was.

Several processes may work on one folder of runs: whoever starts a run locks it, and the others take another.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from simsiam.config import figure3
from simsiam.errors import Stopped, UsageError, WorkFailed, unknown_name
from simsiam.laboratory import detector_cells as detectors
from simsiam.laboratory import drawing, measure
from simsiam.laboratory import experiment_page as pages
from simsiam.laboratory.claims import MetricValues
from simsiam.laboratory.detector_cells import FineTuning
from simsiam.laboratory.experiments import EXPERIMENTS, Experiment
from simsiam.laboratory.jobs import (
    FINISHED,
    INTERRUPTED,
    Job,
    JobGrid,
    estimate_hours,
    load_saved_records,
    plan_jobs,
    unique_jobs,
)
from simsiam.laboratory.scales import SCALES, Scale
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import absolute_source, open_source
from simsiam.training.launch import pretrain, resume
from simsiam.utils.files import atomic_write, file_lock


def reproduce(
    experiments: Sequence[str],
    *,
    scale: str = "tiny",
    source: Sequence[str] = (),
    seeds: int | None = None,
    epochs: int | None = None,
    limit: int | None = None,
    only: Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
    annotated: Sequence[str] = ("shapes",),
    device: str = "auto",
    plan: bool = False,
) -> list[Path]:
    """Repeat experiments of the paper; returns the page of each.

    Runs are kept in runs/laboratory/SCALE and shared by all experiments; pages, tables, figures and JSON go to `out`,
    results/SCALE. `seeds` is how many, `epochs` what the paper's 100 become, `only` the cells to run, and
    `annotated` what Table 5's detectors are fine-tuned on; with `plan` nothing is run. Raises UsageError for a wrong
    request, WorkFailed at the end if a run failed, Stopped at a signal.
    """
    chosen = select_experiments(experiments)
    if scale not in SCALES:
        raise unknown_name("scale", scale, SCALES)
    size = SCALES[scale]
    for name, number in {"seeds": seeds, "epochs": epochs, "limit": limit}.items():
        if number is not None and number < 1:
            raise UsageError(f"{name} is {number}; it is at least 1")
    cells = {cell for experiment in chosen.values() for cell in experiment.cells}
    for cell in only:
        if cell not in cells:
            raise unknown_name("cell", cell, cells)
    results = Path(out or f"results/{scale}")
    page = results / "README.md"
    if page.exists() and not page.read_text(encoding="utf-8", errors="replace").startswith(
        pages.INDEX_TITLE
    ):
        raise UsageError(
            f"{page} is not ours and would be written over; --out takes another folder"
        )
    images = tuple(absolute_source(one) for one in source)
    words: dict[str, Any] = {
        "source": images or (size.source or "",),
        "limit": limit,
        "device": device,
    }
    folder = Path("runs") / "laboratory" / scale
    sets = [one if one == "shapes" else str(Path(one).expanduser().resolve()) for one in annotated]
    tunings = detectors.list_fine_tunings(sets)
    known, words["detected"] = (
        load_saved_records(results),
        {column for tuning in tunings for column in tuning.columns},
    )
    plans = {
        n: plan_jobs(e, size, folder, seeds, epochs, known, **words) for n, e in chosen.items()
    }
    wanted = {n: {c: s for c, s in p.items() if not only or c in only} for n, p in plans.items()}

    console = Console(highlight=False, markup=False)
    console.print(format_plan(wanted, size, limit), soft_wrap=True)
    if plan:
        return []
    if not images and size.source is None:
        raise UsageError(
            f"scale {scale} needs the data: --source FOLDER, with train/CLASS/ and val/CLASS/ in it"
        )
    if unique_jobs(wanted.values()):
        opened = open_source(images or size.source or "")  # now rather than once for every run
        if images:  # they may have other classes than the scale's own
            data = f"{size.dataset} from {', '.join(Path(one).name for one in images)}"
            size = replace(
                size, dataset=data, num_classes=len(opened.train.classes) or size.num_classes
            )

    failures, written = dict[Path, str](), list[Path]()
    results.mkdir(parents=True, exist_ok=True)
    asked = {"scale": scale, "seeds": seeds, "epochs": epochs, "limit": limit}
    flags = "".join(f" --{flag} {value}" for flag, value in asked.items() if value is not None)
    for name, experiment in chosen.items():
        pending = {
            job.path: job
            for made in wanted[name].values()
            for job in made.values()
            if not job.saved_record
        }
        for wait in (False, True):  # first whatever nobody else is at
            for path, job in list(pending.items()):
                with file_lock(path.with_name(f"{path.name}.lock"), wait=wait) as mine:
                    if mine:
                        del pending[path]
                        mine_in = [
                            cell for cell, made in wanted[name].items() if job in made.values()
                        ]
                        if path not in failures and (
                            reason := run_job(job, size, experiment, mine_in, tunings)
                        ):
                            failures[path] = reason
                            console.print(f"failed   {path}: {reason}", soft_wrap=True)
        written.append(
            write_results(
                name,
                experiment,
                size,
                plans[name],
                f"simsiam reproduce {name}{flags}",
                failures,
                results,
                tunings,
            )
        )
        console.print(f"wrote    {written[-1]}", soft_wrap=True)
    write_text(page, pages.render_index(results, size))
    if failures:
        path, reason = next(iter(failures.items()))
        raise WorkFailed(
            f"{len(failures)} runs failed and the rest is done; the same command goes on: {path}: {reason}"
        )
    return written


def select_experiments(experiments: Sequence[str]) -> dict[str, Experiment]:
    """Experiments by name; `all` is every one."""
    for name in experiments:
        if name not in (*EXPERIMENTS, "all"):
            raise unknown_name("experiment", name, [*EXPERIMENTS, "all"])
    return {n: e for n, e in EXPERIMENTS.items() if n in experiments or "all" in experiments}


def format_plan(plans: Mapping[str, JobGrid], scale: Scale, limit: int | None) -> str:
    """The plan in words: each experiment's runs, how many are there, and the time that the others take together."""
    lines = []
    for name, plan in plans.items():
        states = [job.state for job in unique_jobs([plan]).values()]
        there, begun = states.count(FINISHED), states.count(INTERRUPTED)
        lines.append(f"{name:<22} {len(states):>3} runs, {there} finished, {begun} to continue")
    together = unique_jobs(plans.values()).values()
    missing, time = (
        sum(job.state != FINISHED for job in together),
        estimate_hours(together, scale, limit),
    )
    on = "at the speed of the finished ones" if missing < len(together) else f"on {scale.hardware}"
    unit = "GPU-hours" if scale.source is None else "hours"
    return "\n".join(
        [
            *lines,
            f"{'together':<22} {len(together):>3} runs, {missing} to do: {time:,.2f} {unit} of training {on}",
        ]
    )


def run_job(
    job: Job,
    scale: Scale,
    experiment: Experiment,
    cells: Sequence[str],
    fine_tunings: Sequence[FineTuning],
) -> str:
    """Start, continue and measure a run, whatever of it is missing; why that failed, or ""."""
    try:
        try:
            if job.state == INTERRUPTED:
                resume(job.path)
            elif job.state != FINISHED:
                pretrain(job.recipe.source, recipe=job.recipe, out=job.path)
        except WorkFailed:
            if job.state != FINISHED:  # to diverge is a result
                raise
        measured = measure.measure_run(
            Run(job.path), scale, experiment
        )  # what is costly stays in the run folder
        for cell in (
            cells if experiment.train_detectors and not measured["values"]["diverged"] else ()
        ):
            detector_metrics(job, cell, experiment, fine_tunings)
    except Stopped:
        raise
    except (
        Exception
    ) as error:  # whatever it is, the other runs go on; it is said, and the exit code is 1
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def detector_metrics(
    job: Job, cell: str, experiment: Experiment, fine_tunings: Sequence[FineTuning]
) -> dict[str, Any]:
    """What the detectors made of a run are worth."""
    scratch, device = cell in experiment.scratch_cells, job.recipe.device
    return detectors.measure_detectors(
        Run(job.path), fine_tunings, from_scratch=scratch, device=device
    )


def write_results(
    name: str, experiment: Experiment, scale: Scale, plan: JobGrid, command: str, failures: Mapping[Path, str], out: Path,
    fine_tunings: Sequence[FineTuning],
) -> Path:  # fmt: skip
    """An experiment's page, table, figure and JSON, from the runs that are finished; returns the page."""
    page, title = out / f"{name}.md", f"{experiment.title} ({scale.name})"
    if not experiment.cells:
        write_text(out / f"{name}.svg", figure3.draw_methods_svg())
        write_text(
            page,
            f"# {name}: {experiment.title}\n\n![{experiment.title}]({name}.svg)\n\n{figure3.format_methods_markdown()}\n",
        )
        return page
    values: dict[str, dict[int, Any]] = {cell: {} for cell in plan}
    curves: dict[str, dict[int, Any]] = {cell: {} for cell in plan}
    runs = []
    for cell, seed, job in (
        (cell, seed, job) for cell, seeds in plan.items() for seed, job in seeds.items()
    ):
        told = {
            "cell": cell,
            "seed": seed,
            "run": str(job.path),
            "state": failures.get(job.path, job.state),
        }
        if job.state == FINISHED and job.path not in failures:
            told = {
                **(job.saved_record or measure.measure_run(Run(job.path), scale, experiment)),
                **told,
            }
            values[cell][seed], curves[cell][seed] = told["values"], told["curves"]
            if (
                experiment.train_detectors
                and not job.saved_record
                and not values[cell][seed]["diverged"]
            ):
                values[cell][seed] |= detector_metrics(job, cell, experiment, fine_tunings)
        runs.append(told)
    rulings = [(claim, claim.evaluate(values)) for claim in experiment.claims]
    paper = pages.PAPER_RESULTS.get(name, pages.NO_PAPER_RESULTS)
    about = {
        "experiment": name, "title": experiment.title, "where": experiment.section, "command": command,
        "scale": scale.name, "mapping": scale.mapping, "metric": scale.metric, "paper": paper,
        "claims": [pages.claim_to_dict(claim, ruling) for claim, ruling in rulings], "runs": runs,
    }  # fmt: skip
    draw_figure(experiment, scale, plan, values, curves, paper, out / name, title)
    table = (
        detectors.detector_table(name, values)
        if experiment.train_detectors
        else pages.metrics_table(name, experiment, scale, values)
    )
    write_text(out / f"{name}.csv", pages.to_csv(table))
    write_text(out / f"{name}.json", json.dumps(about, indent=2) + "\n")
    write_text(page, pages.render_page(name, experiment, scale, values, rulings, about, table))
    return page


def draw_figure(
    experiment: Experiment, scale: Scale, plan: JobGrid, values: MetricValues, curves: MetricValues, paper: Mapping[str, Any],
    path: Path, title: str,
) -> None:  # fmt: skip
    """The experiment's figure, as PNG and SVG."""
    metrics = (f"ours: {scale.metric}", f"paper: {paper['metric']}")
    if experiment.curve_metrics:
        found = {
            metric: {
                cell: [c[metric] for c in seeds.values() if metric in c]
                for cell, seeds in curves.items()
            }
            for metric in experiment.curve_metrics
        }
        drawing.plot_curves(found, path, title)
    elif experiment.plot_against:
        first = {cell: next(iter(seeds.values())).recipe for cell, seeds in plan.items()}
        x = {cell: (vars(r) | vars(r.method))[experiment.plot_against] for cell, r in first.items()}
        drawing.plot_accuracy_lines(
            values, x, paper["cells"], experiment.plot_against, *metrics, path, title
        )
    elif experiment.train_detectors:
        drawing.plot_accuracies(
            values,
            paper["cells"],
            "ours: AP50, mean of all columns",
            "paper: AP50, mean",
            path,
            title,
            "ap50",
        )
    else:
        drawing.plot_accuracies(values, paper["cells"], *metrics, path, title)


def write_text(path: Path, content: str) -> None:
    with atomic_write(path) as part:
        part.write_text(content, encoding="utf-8")
