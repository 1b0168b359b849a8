"""`simsiam reproduce`: plan runs, run what is missing, measure, test claims and write pages.

If it is interrupted, the same command continues. Several processes may work on one folder of runs:
a process locks the run it works on, and the others take another one.
"""

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from simsiam.config import figure3
from simsiam.errors import Stopped, UsageError, WorkFailed, printable, unknown_name
from simsiam.laboratory import detector_cells as detectors
from simsiam.laboratory import drawing, measure
from simsiam.laboratory import experiment_page as pages
from simsiam.laboratory.claims import MetricValues
from simsiam.laboratory.detector_cells import DetectorSetting
from simsiam.laboratory.experiments import EXPERIMENTS, Experiment
from simsiam.laboratory.jobs import (
    FINISHED,
    INTERRUPTED,
    MISSING,
    Job,
    JobGrid,
    RunRecord,
    estimate_hours,
    load_saved_records,
    plan_jobs,
    unique_jobs,
)
from simsiam.laboratory.scales import SCALES, Scale
from simsiam.laboratory.switches.page import render_switches
from simsiam.laboratory.switches.recording import RecordedPretraining, choose_images
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import absolute_source, absolute_sources, open_source
from simsiam.sources.own_marks import mark_places
from simsiam.training.launch import pretrain, resume
from simsiam.training.pretrain import Pretraining
from simsiam.utils.files import file_lock, make_folder, write_text
from simsiam.utils.names import hide_keys
from simsiam.utils.read_files import read_text
from simsiam.utils.system import guard_folder


def reproduce(
    experiments: Sequence[str],
    *,
    scale: str = "tiny",
    source: Sequence[str] = (),
    seeds: int | None = None,
    epochs: int | None = None,
    limit: int | None = None,
    no_labels: bool = False,
    only: Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
    annotated: Sequence[str] = ("shapes",),
    device: str = "auto",
    plan: bool = False,
) -> list[Path]:
    """Repeat experiments of the paper.

    Runs are kept in runs/laboratory/SCALE and shared by all experiments. Pages, tables, figures and
    JSON files go to `out`.

    Args:
        experiments: Names of experiments, or "all".
        scale: One of SCALES.
        source: The images; by default the scale's own.
        seeds: The number of seeds; by default the experiment's own.
        epochs: What 100 epochs of the paper become; by default the scale's own.
        limit: Train on this many images at most.
        no_labels: Whether to ignore the labels of the images; pages then have no accuracies.
        only: The cells to run; all by default.
        out: The folder of the pages; results/SCALE by default.
        annotated: What detectors are fine-tuned on (Table 5).
        device: "auto", "cpu", "cuda", ...
        plan: Whether to print the plan and stop.

    Returns:
        The page of each experiment; none with `plan`.

    Raises:
        UsageError: If the request is wrong.
        WorkFailed: At the end, if a run failed.
        Stopped: After SIGINT or SIGTERM.
    """
    chosen = select_experiments(experiments, only)
    images = tuple(absolute_source(path) for path in source)
    counts = {"seeds": seeds, "epochs": epochs, "limit": limit}
    campaign = open_campaign(scale, out, annotated, counts, no_labels, images, only)
    grids = campaign.plan(
        chosen,
        Path("runs") / "laboratory" / scale,
        seeds=seeds,
        epochs=epochs,
        source=images or (campaign.scale.source or "",),
        limit=limit,
        no_labels=no_labels,
        device=device,
    )
    pending = {
        name: {cell: jobs for cell, jobs in grid.items() if not only or cell in only}
        for name, grid in grids.items()
    }
    campaign.console.print(format_plan(pending, campaign.scale, limit), soft_wrap=True)
    if plan:
        return []
    if not images and campaign.scale.source is None:
        raise UsageError(
            f"scale {scale} needs the data: --source FOLDER, with train/CLASS/ and val/CLASS/ in it"
        )
    if unique_jobs(pending.values()):
        campaign.check_source(images, no_labels=no_labels)
    written = []
    for name, experiment in chosen.items():
        campaign.run_jobs(experiment, pending[name])
        written.append(campaign.write_results(name, experiment, grids[name]))
        campaign.console.print(f"wrote    {written[-1]}", soft_wrap=True)
    campaign.write_index()
    campaign.raise_failures()
    return written


def select_experiments(names: Sequence[str], only: Sequence[str]) -> dict[str, Experiment]:
    """Look up experiments.

    Args:
        names: Names of experiments, or "all".
        only: The cells to run; all if empty.

    Returns:
        The experiments by name.

    Raises:
        UsageError: If a name is unknown, or no experiment has such a cell.
    """
    for name in names:
        if name not in (*EXPERIMENTS, "all"):
            raise unknown_name("experiment", name, [*EXPERIMENTS, "all"])
    experiments = {n: e for n, e in EXPERIMENTS.items() if n in names or "all" in names}
    cells = {cell for experiment in experiments.values() for cell in experiment.cells}
    for cell in only:
        if cell not in cells:
            raise unknown_name("cell", cell, cells)
    return experiments


def open_campaign(
    scale: str,
    out: str | os.PathLike[str] | None,
    annotated: Sequence[str],
    counts: Mapping[str, int | None],
    no_labels: bool,
    images: Sequence[str],
    only: Sequence[str],
) -> "Campaign":
    """Check the request, and collect what all experiments share.

    Args:
        scale: One of SCALES.
        out: The folder of the pages; results/SCALE by default.
        annotated: What detectors are fine-tuned on.
        counts: Numbers by flag; None if a flag is not given.
        no_labels: Whether labels are ignored.
        images: The user's sources.
        only: The cells to run; all if empty.

    Returns:
        The campaign.

    Raises:
        UsageError: If the scale is unknown, a number is below 1, the folder is not one of pages,
            or an annotated set is unknown.
    """
    if scale not in SCALES:
        raise unknown_name("scale", scale, SCALES)
    for name, number in counts.items():
        if number is not None and number < 1:
            raise UsageError(f"{name} is {number}; it is at least 1")
    pages_folder = Path(out or f"results/{scale}")
    guard_folder(pages_folder)
    check_index(pages_folder / "README.md")
    sets = [
        text if text == "shapes" else str(Path(text).expanduser().resolve()) for text in annotated
    ]
    settings = detectors.list_detector_settings(sets)
    words = {"scale": [scale]} | {flag: [str(n)] for flag, n in counts.items() if n is not None}
    own_sets = [] if list(annotated) == ["shapes"] else sets
    for flag, places in {"source": images, "annotated": own_sets}.items():  # not where they are
        words[flag] = [printable(Path(hide_keys(place)).name) for place in places]
    words["only"] = list(only)
    flags = [f" --{flag} {shlex.join(given)}" for flag, given in words.items() if given]
    flags += [" --no-labels"] * no_labels
    return Campaign(SCALES[scale], settings, pages_folder, "".join(flags))


def check_index(path: Path) -> None:
    """Refuse to overwrite a file that is not an index of experiments.

    Args:
        path: Where the index will be written.

    Raises:
        UsageError: If another file is there.
    """
    if not path.exists():
        return
    if not read_text(path, errors="replace").startswith(pages.INDEX_TITLE):
        raise UsageError(
            f"{path} is not an index of experiments and would be overwritten; "
            "choose another folder with --out"
        )


def format_plan(grids: Mapping[str, JobGrid], scale: Scale, limit: int | None) -> str:
    """Format the number of runs of each experiment, and the time that the unfinished ones take.

    Args:
        grids: The jobs of each experiment.
        scale: The scale.
        limit: The number of images that runs train on, if it is limited.

    Returns:
        A line for each experiment, and one for all of them.
    """
    lines = []
    for name, grid in grids.items():
        states = [job.state for job in unique_jobs([grid]).values()]
        finished, interrupted = states.count(FINISHED), states.count(INTERRUPTED)
        lines.append(
            f"{name:<22} {len(states):>3} runs, {finished} finished, {interrupted} to continue"
        )
    jobs = unique_jobs(grids.values()).values()
    missing = sum(job.state != FINISHED for job in jobs)
    hours = f"{estimate_hours(jobs, scale, limit):,.2f}"
    unit = "GPU-hours" if scale.source is None else "hours"
    speed = "at the speed of the finished runs" if missing < len(jobs) else f"on {scale.hardware}"
    total = f"{len(jobs):>3} runs, {missing} to do: {hours} {unit} of training {speed}"
    return "\n".join([*lines, f"{'together':<22} {total}"])


@dataclass
class Campaign:
    """What is shared by all experiments of one call of `reproduce`.

    Attributes:
        scale: The scale.
        detector_settings: How detectors are fine-tuned (Table 5).
        pages_folder: The folder of the pages.
        flags: The flags of the command, for the pages.
        failures: Why runs failed, by path.
        console: Where progress is printed.
    """

    scale: Scale
    detector_settings: Sequence[DetectorSetting]
    pages_folder: Path
    flags: str
    failures: dict[Path, str] = field(default_factory=dict)
    console: Console = field(default_factory=lambda: Console(highlight=False, markup=False))

    def plan(
        self,
        experiments: Mapping[str, Experiment],
        runs_folder: Path,
        *,
        seeds: int | None,
        epochs: int | None,
        **recipe_settings: object,
    ) -> dict[str, JobGrid]:
        """List the runs of all experiments.

        Args:
            experiments: The experiments by name.
            runs_folder: The folder of the runs.
            seeds: The number of seeds.
            epochs: What 100 epochs of the paper become.
            **recipe_settings: Settings of every recipe.

        Returns:
            The jobs of each experiment.

        Raises:
            UsageError: If settings contradict each other.
        """
        saved_records = load_saved_records(self.pages_folder)
        columns = {column for setting in self.detector_settings for column in setting.columns}
        return {
            name: plan_jobs(
                experiment,
                self.scale,
                runs_folder,
                seeds,
                epochs,
                saved_records=saved_records,
                detector_columns=columns,
                **recipe_settings,
            )
            for name, experiment in experiments.items()
        }

    def check_source(self, images: Sequence[str], *, no_labels: bool = False) -> None:
        """Open the images once before any run, and adapt the scale to a user's own images.

        Args:
            images: The user's sources; the scale's own if empty.
            no_labels: Whether to ignore their labels.

        Raises:
            UsageError: If the source cannot be opened.
        """
        source = open_source(images or self.scale.source or "", no_labels=no_labels)
        if images:
            self.scale = replace(
                self.scale,
                dataset=f"{self.scale.dataset} from {', '.join(Path(p).name for p in images)}",
                num_classes=len(source.train.classes) or self.scale.num_classes,
            )

    def run_jobs(self, experiment: Experiment, grid: JobGrid) -> None:
        """Run the jobs of an experiment; other processes may work on some of them.

        Args:
            experiment: The experiment.
            grid: Its jobs.
        """
        pending = unique_jobs([grid])
        for wait in (False, True):  # first those that no other process works on
            for path, job in list(pending.items()):
                if job.saved_record:
                    continue
                with file_lock(path.with_name(f"{path.name}.lock"), wait=wait) as locked:
                    if not locked:
                        continue
                    del pending[path]
                    if path in self.failures:
                        continue
                    cells = [cell for cell, jobs in grid.items() if job in jobs.values()]
                    if reason := self.run_job(job, experiment, cells):
                        self.failures[path] = reason
                        self.console.print(f"failed   {path}: {reason}", soft_wrap=True)

    def run_job(self, job: Job, experiment: Experiment, cells: Sequence[str]) -> str:
        """Start, continue or measure a run, whatever is missing.

        Args:
            job: The run.
            experiment: The experiment that needs it.
            cells: The cells that need it.

        Returns:
            Why it failed, or "".

        Raises:
            Stopped: After SIGINT or SIGTERM.
        """
        training = RecordedPretraining if experiment.record_steps else Pretraining
        try:
            if job.state != MISSING:
                self.mark_source(job)
            try:
                if job.state == INTERRUPTED:
                    resume(job.path, training_class=training)
                elif job.state != FINISHED:
                    pretrain(
                        job.recipe.source,
                        recipe=job.recipe,
                        out=job.path,
                        training_class=training,
                    )
            except WorkFailed:
                if job.state != FINISHED:  # a diverged run is a result
                    raise
            # Expensive results are kept in the run folder, for write_results.
            measured = measure.measure_run(Run(job.path), self.scale, experiment)
            if experiment.train_detectors and not measured["values"]["diverged"]:
                for cell in cells:
                    self.measure_detectors(job, experiment, cell)
        except Stopped:
            raise
        except Exception as error:  # the other runs continue, and the exit code is 1
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return ""

    def mark_source(self, job: Job) -> None:
        """Mark the images of a run as named by the user, if this command names them.

        Args:
            job: The run, which is there already.
        """
        source = tuple(absolute_sources(job.recipe.source))
        if Run(job.path).recipe.source == source:
            mark_places(job.path, source=source)

    def measure_detectors(self, job: Job, experiment: Experiment, cell: str) -> dict[str, object]:
        """Fine-tune a run as a detector, unless that was done before.

        Args:
            job: The run.
            experiment: The experiment that needs it.
            cell: The cell, which may start from random weights.

        Returns:
            The average precision of the detectors.
        """
        return detectors.measure_detectors(
            Run(job.path),
            self.detector_settings,
            from_scratch=cell in experiment.scratch_cells,
            device=job.recipe.device,
        )

    def write_results(self, name: str, experiment: Experiment, grid: JobGrid) -> Path:
        """Write the page, table, figure and JSON file of an experiment from its finished runs.

        Args:
            name: The experiment's name.
            experiment: The experiment.
            grid: All of its jobs.

        Returns:
            The page.
        """
        make_folder(self.pages_folder)
        path, title = self.pages_folder / name, f"{experiment.title} ({self.scale.name})"
        page = path.with_suffix(".md")
        if not experiment.cells:
            write_text(path.with_suffix(".svg"), figure3.draw_methods_svg())
            picture = f"![{experiment.title}]({name}.svg)"
            table = figure3.format_methods_markdown()
            write_text(page, f"# {name}: {experiment.title}\n\n{picture}\n\n{table}\n")
            return page
        runs = list(self.list_runs(experiment, grid))
        values: dict[str, dict[int, Any]] = {cell: {} for cell in grid}
        curves: dict[str, dict[int, Any]] = {cell: {} for cell in grid}
        for run in runs:
            if "values" in run:
                values[run["cell"]][run["seed"]] = run["values"]
                curves[run["cell"]][run["seed"]] = run["curves"]
        results = [(claim, claim.evaluate(values)) for claim in experiment.claims]
        paper = pages.PAPER_RESULTS.get(name, pages.NO_PAPER_RESULTS)
        command = f"simsiam reproduce {name}{self.flags}"
        metadata = {
            "experiment": name,
            "title": experiment.title,
            "where": experiment.section,
            "command": command,
            "scale": self.scale.name,
            "mapping": self.scale.mapping,
            "metric": self.scale.metric,
            "paper": paper,
            "claims": [pages.claim_to_dict(claim, result) for claim, result in results],
            "runs": runs,
        }
        if experiment.curve_metrics:
            metrics = experiment.curve_metrics
            drawing.plot_curves({m: select_curves(curves, m) for m in metrics}, path, title)
        else:
            self.draw_accuracies(experiment, grid, values, paper, path, title)
        if experiment.train_detectors:
            rows = detectors.detector_table(name, values)
        else:
            rows = pages.metrics_table(name, experiment, self.scale, values)
        write_text(path.with_suffix(".csv"), pages.to_csv(rows))
        write_text(path.with_suffix(".json"), json.dumps(metadata, indent=2) + "\n")
        text = pages.render_page(
            name,
            experiment,
            self.scale,
            values,
            results=results,
            command=command,
            runs=runs,
            rows=rows,
        )
        write_text(page, text)
        if experiment.record_steps:
            self.write_switches(path.with_suffix(".html"), metadata, grid)
        return page

    def write_switches(self, path: Path, metadata: Mapping[str, object], grid: JobGrid) -> None:
        """Write the interactive page of an experiment that records steps.

        Args:
            path: The page.
            metadata: The content of the experiment's JSON file.
            grid: All of its jobs, which share their images.
        """
        recipe = next(iter(unique_jobs([grid]).values())).recipe
        source = open_source(recipe.source, no_labels=recipe.no_labels)
        if html := render_switches(metadata, choose_images(source, recipe)[0]):
            write_text(path, html)

    def draw_accuracies(
        self,
        experiment: Experiment,
        grid: JobGrid,
        values: MetricValues,
        paper: pages.PaperResults,
        path: Path,
        title: str,
    ) -> None:
        """Draw our accuracies and the paper's as PNG and SVG.

        Args:
            experiment: The experiment.
            grid: Its jobs.
            values: The measured metrics.
            paper: The paper's metric and numbers.
            path: The files to write, without extension.
            title: The title of the figure.
        """
        published = pages.published_numbers(paper)
        labels = {
            "our_label": f"ours: {self.scale.metric}",
            "paper_label": f"paper: {paper['metric']}",
        }
        if setting := experiment.plot_against:
            recipes = {cell: next(iter(jobs.values())).recipe for cell, jobs in grid.items()}
            x = {cell: (vars(r) | vars(r.method))[setting] for cell, r in recipes.items()}
            drawing.plot_accuracy_lines(
                values, x, published, setting=setting, **labels, path=path, title=title
            )
            return
        metric = "linear"
        if experiment.train_detectors:
            metric = "ap50"
            labels = {
                "our_label": "ours: AP50, mean of all columns",
                "paper_label": "paper: AP50, mean",
            }
        drawing.plot_accuracies(values, published, **labels, path=path, title=title, metric=metric)

    def list_runs(self, experiment: Experiment, grid: JobGrid) -> Iterator[RunRecord]:
        """Collect the record of every run.

        Args:
            experiment: The experiment.
            grid: All of its jobs.

        Yields:
            The cell, seed, folder and state of a run; and if it is finished, its values, curves,
            environment and recipe.
        """
        for cell, jobs in grid.items():
            for seed, job in jobs.items():
                state = self.failures.get(job.path, job.state)
                record = RunRecord(cell=cell, seed=seed, run=str(job.path), state=state)
                if job.state == FINISHED and job.path not in self.failures:
                    measured = job.saved_record or measure.measure_run(
                        Run(job.path), self.scale, experiment
                    )
                    record = RunRecord(
                        values=measured["values"],
                        curves=measured["curves"],
                        environment=measured["environment"],
                        recipe=measured["recipe"],
                        **record,
                    )
                    if "recording" in measured:
                        record["recording"] = measured["recording"]
                    diverged = record["values"]["diverged"]
                    if experiment.train_detectors and not job.saved_record and not diverged:
                        record["values"] |= self.measure_detectors(job, experiment, cell)
                yield record

    def write_index(self) -> None:
        """Write the index of all pages in the folder."""
        text = pages.render_index(self.pages_folder, self.scale)
        write_text(self.pages_folder / "README.md", text)

    def raise_failures(self) -> None:
        """Report the failures of all experiments.

        Raises:
            WorkFailed: If a run failed.
        """
        if self.failures:
            path, reason = next(iter(self.failures.items()))
            raise WorkFailed(
                f"{len(self.failures)} runs failed and the others are done; "
                f"the same command continues; the first, {path}: {reason}"
            )


def select_curves(curves: MetricValues, metric: str) -> dict[str, list[drawing.Curve]]:
    """Select the curves of one metric.

    Args:
        curves: Curves by cell, seed and metric.
        metric: The metric.

    Returns:
        The curves of all seeds that have it, by cell.
    """
    return {
        cell: [by_metric[metric] for by_metric in seeds.values() if metric in by_metric]
        for cell, seeds in curves.items()
    }
