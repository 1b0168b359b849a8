"""The run folders of an experiment: which are needed, finished or missing. Loads no torch.

A run's folder is named by its recipe, so experiments that need the same run share it. The JSON file
of a page keeps the numbers of its runs, so a run whose folder was deleted need not be repeated.
"""

import json
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

from typing_extensions import Required, TypedDict

from simsiam.config.recipes import Recipe
from simsiam.laboratory.experiments import EXPERIMENTS, Experiment
from simsiam.laboratory.scales import Scale
from simsiam.utils.typed_json import read_json

FINISHED, INTERRUPTED, MISSING = "finished", "interrupted", "missing"


class RunSummary(TypedDict, total=False):
    """What is used of a run's summary.json."""

    verdict: str
    epochs: float
    images_per_second: float | None


class RunRecord(TypedDict, total=False):
    """A run in the JSON file of a page; one that is not finished lacks the first five keys."""

    values: dict[str, Any]  # by metric
    curves: dict[str, Any]  # pairs of epoch and value, by metric
    environment: dict[str, Any]
    recipe: dict[str, Any]
    recording: dict[str, Any]  # only of an experiment that records steps
    cell: str
    seed: int
    run: str  # its folder
    state: str  # FINISHED, INTERRUPTED or MISSING, or why it failed


class Claim(TypedDict, total=False):
    """A claim of the paper in the JSON file of a page."""

    says: Required[str]
    verdict: Required[str]


class SavedPage(TypedDict, total=False):
    """What is read of the JSON file of a page."""

    runs: list[RunRecord]
    claims: list[Claim]


@dataclass(frozen=True)
class Job:
    """One run that an experiment needs."""

    recipe: Recipe
    path: Path
    saved_record: RunRecord | None = None  # from a page, if the folder was deleted

    @property
    def summary(self) -> RunSummary:
        """The content of the run's summary.json, {} if there is none."""
        path = self.path / "summary.json"
        return read_json(path, RunSummary) if path.exists() else {}

    @property
    def state(self) -> str:
        """FINISHED after all epochs or divergence, INTERRUPTED, or MISSING."""
        if self.saved_record:
            return FINISHED
        summary = self.summary  # an interrupted run has one too
        done = summary.get("epochs", 0) >= self.recipe.epochs
        if summary and (done or summary.get("verdict") == "diverged"):
            return FINISHED
        return INTERRUPTED if (self.path / "recipe.yaml").exists() else MISSING

    @property
    def view_epochs(self) -> float:
        """The number of views that are made of each image."""
        return self.recipe.method.view_count * self.recipe.epochs


JobGrid = Mapping[str, Mapping[int, Job]]  # cell -> seed -> job
SavedRecords = Mapping[tuple[str, str], RunRecord]  # by name of run, and cell or ""


def plan_jobs(
    experiment: Experiment,
    scale: Scale,
    folder: Path,
    seeds: int | None,
    user_epochs: int | None,
    saved_records: SavedRecords | None = None,
    detector_columns: Set[str] = frozenset(),
    **recipe_settings: object,
) -> JobGrid:
    """List the runs of an experiment.

    Args:
        experiment: The experiment.
        scale: The scale at which it is repeated.
        folder: The folder of the runs.
        seeds: The number of seeds; None takes the experiment's.
        user_epochs: What 100 epochs of the paper become; None takes the scale's.
        saved_records: The runs of pages, from `load_saved_records`.
        detector_columns: The columns that detectors fill (Table 5).
        **recipe_settings: Settings of every recipe.

    Returns:
        The jobs by cell and seed.

    Raises:
        UsageError: If settings contradict each other.
    """
    grid: dict[str, dict[int, Job]] = {}
    for cell, overrides in experiment.cells.items():
        recipe = scale.recipe(
            overrides,
            common=experiment.common,
            epochs=experiment.epochs,
            user_epochs=user_epochs,
            **recipe_settings,
        )
        if "linear" in experiment.curve_metrics:
            recipe = recipe.replace(save_every=recipe.knn_every)
        prefix = f"{recipe.method.name}-{recipe_digest(recipe)}"
        prefix += "-recorded" * experiment.record_steps  # the same run elsewhere has no recording
        key_cell = cell if experiment.train_detectors else ""
        grid[cell] = {}
        for seed in range(seeds or experiment.seeds + (cell in experiment.repeated_cells)):
            job = Job(recipe.replace(seed=seed), folder / f"{prefix}-{seed}")
            record = (saved_records or {}).get((job.path.name, key_cell), {})
            if job.state == MISSING and is_complete(record, experiment, recipe, detector_columns):
                job = replace(job, saved_record=record)
            grid[cell][seed] = job
    return grid


def load_saved_records(pages: Path) -> SavedRecords:
    """Read the finished runs of all pages in a folder.

    Cells of one experiment may train different detectors from the same run, so those are kept by
    cell. If a run was made twice, perhaps on two machines, the later one counts on all pages.

    Args:
        pages: The folder of the pages.

    Returns:
        Records by the run's name and its cell ("" without detectors); a record has the values and
        curves of all pages.
    """
    records: dict[tuple[str, str], RunRecord] = {}
    for page in sorted(pages.glob("*.json")):
        by_cell = page.stem in EXPERIMENTS and EXPERIMENTS[page.stem].train_detectors
        for run in read_json(page, SavedPage).get("runs", []):
            if {"values", "curves", "environment", "recipe", "cell", "run"} <= run.keys():
                key = Path(run["run"]).name, run["cell"] if by_cell else ""
                start, record = run["environment"]["start"], records.get(key)
                if record is None or record["environment"]["start"] < start:
                    record = records[key] = RunRecord(**run)
                if record["environment"]["start"] == start:
                    record["values"] = {**record.get("values", {}), **run.get("values", {})}
                    record["curves"] = {**record.get("curves", {}), **run.get("curves", {})}
    return records


def is_complete(
    record: RunRecord, experiment: Experiment, recipe: Recipe, detector_columns: Set[str]
) -> bool:
    """Check whether a record has all that an experiment needs of a run.

    Args:
        record: The record of a page, or {}.
        experiment: The experiment.
        recipe: The recipe of the run.
        detector_columns: The columns that detectors fill.

    Returns:
        Whether the run need not be repeated.
    """
    if not record or record["values"]["diverged"]:
        return bool(record)
    values = record["values"]
    has_predictor = recipe.method.predictor != "none"
    if experiment.measure_predictor and has_predictor and "h_gain" not in values:
        return False
    if experiment.train_detectors and values.get("detectors", {}).keys() != detector_columns:
        return False
    if experiment.record_steps and "recording" not in record:
        return False
    return record["curves"].keys() >= set(experiment.curve_metrics)


def recipe_digest(recipe: Recipe) -> str:
    """Hash a recipe without its seed and device.

    Settings with their default value are left out, so that a setting added later does not change
    the names of existing runs.

    Args:
        recipe: The recipe.

    Returns:
        10 hexadecimal digits.
    """
    settings = _drop_defaults(recipe.replace(seed=0, device="auto").to_dict(), Recipe().to_dict())
    return sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def _drop_defaults(value: object, default: Any) -> object:
    """Remove the parts of a recipe's plain data that equal another's.

    Args:
        value: The plain data.
        default: The plain data of the other recipe.

    Returns:
        The parts that differ.
    """
    if isinstance(value, dict):
        return {k: _drop_defaults(v, default[k]) for k, v in value.items() if v != default[k]}
    if isinstance(value, list) and value and isinstance(value[0], dict):  # views
        return [_drop_defaults(v, default[0]) for v in value]
    return value


def unique_jobs(plans: Iterable[JobGrid]) -> dict[Path, Job]:
    """Collect the jobs of several experiments, each once.

    Args:
        plans: The jobs of each experiment.

    Returns:
        The jobs by path.
    """
    return {job.path: job for plan in plans for seeds in plan.values() for job in seeds.values()}


def estimate_hours(jobs: Iterable[Job], scale: Scale, limit: int | None) -> float:
    """Estimate the time of the unfinished jobs.

    Args:
        jobs: All jobs; the finished ones give the speed, or else the scale does.
        scale: The scale.
        limit: The number of images that runs train on, if it is limited.

    Returns:
        The time in hours.
    """
    images, jobs = min(scale.num_images, limit or scale.num_images), list(jobs)
    speeds = [
        speed * job.recipe.method.view_count
        for job in jobs
        if job.state == FINISHED and (speed := job.summary.get("images_per_second"))
    ]
    views_per_second = median(speeds) if speeds else 2 * scale.images_per_second
    views = sum(job.view_epochs * images for job in jobs if job.state != FINISHED)
    return views / views_per_second / 3600
