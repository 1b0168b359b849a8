"""From an experiment to run folders: which it needs, which are there, and how long the rest takes. Loads no torch.

A run's folder is named by its recipe, so experiments that ask for the same run share it, today or next year. A page's
JSON keeps the numbers of its runs, so a run whose folder is gone need not be repeated.
"""

import json
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

from simsiam.config.recipes import Recipe
from simsiam.laboratory.experiments import EXPERIMENTS, Experiment
from simsiam.laboratory.scales import Scale

FINISHED, INTERRUPTED, MISSING = "finished", "interrupted", "missing"


@dataclass(frozen=True)
class Job:
    """One run that an experiment needs."""

    recipe: Recipe
    path: Path
    saved_record: Mapping[str, Any] | None = (
        None  # what a page says of it, where the folder is gone
    )

    @property
    def summary(self) -> dict[str, Any]:
        """The run's summary.json, {} where there is none."""
        path = self.path / "summary.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def state(self) -> str:
        """FINISHED if it took all its epochs or diverged; a run that was stopped has a summary too."""
        if self.saved_record:
            return FINISHED
        summary = self.summary
        if summary and (
            summary["verdict"] == "diverged" or summary["epochs"] >= self.recipe.epochs
        ):
            return FINISHED
        return INTERRUPTED if (self.path / "recipe.yaml").exists() else MISSING

    @property
    def view_epochs(self) -> float:
        """Views of an image that it makes in an epoch, times epochs."""
        return self.recipe.method.view_count * self.recipe.epochs


JobGrid = Mapping[str, Mapping[int, Job]]  # cell -> seed -> job


def plan_jobs(
    experiment: Experiment,
    scale: Scale,
    folder: Path,
    seeds: int | None,
    user_epochs: int | None,
    saved_records: Mapping[tuple[str, str], Mapping[str, Any]] | None = None,
    detector_columns: Set[str] = frozenset(),
    **recipe_settings: Any,
) -> JobGrid:
    """Every run of an experiment; `kept` are the runs of pages, `detected` the columns that detectors are to fill.

    Raises UsageError for contradicting words.
    """
    recipe_settings |= {
        "common": experiment.common,
        "epochs": experiment.epochs,
        "given": user_epochs,
    }
    found: dict[str, dict[int, Job]] = {}
    for cell, words in experiment.cells.items():
        recipe = scale.recipe(words, **recipe_settings)
        if "linear" in experiment.curve_metrics:
            recipe = recipe.replace(save_every=recipe.knn_every)
        paths = {
            s: folder / f"{recipe.method.name}-{recipe_digest(recipe)}-{s}"
            for s in range(seeds or experiment.seeds)
        }
        found[cell] = {seed: Job(recipe.replace(seed=seed), path) for seed, path in paths.items()}
        for seed, job in found[cell].items():
            record = (saved_records or {}).get(
                (job.path.name, cell if experiment.train_detectors else ""), {}
            )
            if job.state == MISSING and is_complete(record, experiment, recipe, detector_columns):
                found[cell][seed] = replace(job, saved_record=record)
    return found


def load_saved_records(pages: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The finished runs of all pages in a folder, by name, with the values and curves of all of them.

    Cells may start their detectors from one run in several ways, so those pages' go by cell too; else that is "". Of a
    run that was made twice, perhaps on two machines, the later one counts, and all pages agree.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for page in sorted(pages.glob("*.json")):
        by_cell = page.stem in EXPERIMENTS and EXPERIMENTS[page.stem].train_detectors
        for run in json.loads(page.read_text(encoding="utf-8")).get("runs", []):
            if "values" in run:
                key = Path(run["run"]).name, run["cell"] if by_cell else ""
                start, known = run["environment"]["start"], found.get(key)
                if known is None or known["environment"]["start"] < start:
                    known = found[key] = dict(run)
                if known["environment"]["start"] == start:
                    for part in ("values", "curves"):
                        known[part] = {**known.get(part, {}), **run.get(part, {})}
    return found


def is_complete(
    record: Mapping[str, Any], experiment: Experiment, recipe: Recipe, detector_columns: Set[str]
) -> bool:
    """Whether a record has all that an experiment asks of a run."""
    if not record or record["values"]["diverged"]:
        return bool(record)
    values, reads_h = (
        record["values"],
        experiment.measure_predictor and recipe.method.predictor != "none",
    )
    read = not reads_h or "h_gain" in values
    transferred = (
        not experiment.train_detectors or values.get("detectors", {}).keys() == detector_columns
    )
    return read and transferred and record["curves"].keys() >= set(experiment.curve_metrics)


def recipe_digest(recipe: Recipe) -> str:
    """What tells recipes apart, but for the seed and the device.

    Words that have their default value are left out: a word that is new tomorrow leaves today's names as they are.
    """
    told = drop_defaults(recipe.replace(seed=0, device="auto").to_dict(), Recipe().to_dict())
    return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:10]


def drop_defaults(value: Any, default: Any) -> Any:
    """A recipe's plain data without what is as in another."""
    if isinstance(value, dict):
        return {k: drop_defaults(v, default[k]) for k, v in value.items() if v != default[k]}
    if isinstance(value, list) and value and isinstance(value[0], dict):  # views
        return [drop_defaults(v, default[0]) for v in value]
    return value


def unique_jobs(plans: Iterable[JobGrid]) -> dict[Path, Job]:
    """The jobs of all experiments, each once."""
    return {job.path: job for plan in plans for seeds in plan.values() for job in seeds.values()}


def estimate_hours(jobs: Iterable[Job], scale: Scale, limit: int | None) -> float:
    """The time of the unfinished jobs, by the speed of the finished ones, or else by the scale's."""
    images, jobs = min(scale.num_images, limit or scale.num_images), list(jobs)
    speeds = [
        job.summary["images_per_second"] * job.recipe.method.view_count
        for job in jobs
        if job.state == FINISHED and not job.saved_record
    ]
    views_per_second = median(speeds) if speeds else 2 * scale.images_per_second
    return (
        sum(job.view_epochs * images for job in jobs if job.state != FINISHED)
        / views_per_second
        / 3600
    )
