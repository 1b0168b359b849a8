"""From an experiment to run folders: which it needs, which are there, and how long the rest takes. Loads no torch.

A run's folder is named by its recipe, so experiments that ask for the same run share it, today or next year.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

from simsiam.laboratory.experiments import Experiment
from simsiam.laboratory.scales import Scale
from simsiam.recipes import Recipe

FINISHED, INTERRUPTED, MISSING = "finished", "interrupted", "missing"


@dataclass(frozen=True)
class Job:
    """One run that an experiment needs."""

    recipe: Recipe
    path: Path

    @property
    def summary(self) -> dict[str, Any]:
        """The run's summary.json, {} where there is none."""
        path = self.path / "summary.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def state(self) -> str:
        """FINISHED if it took all its epochs or diverged; a run that was stopped has a summary too."""
        summary = self.summary
        if summary and (summary["verdict"] == "diverged" or summary["epochs"] >= self.recipe.epochs):
            return FINISHED
        return INTERRUPTED if (self.path / "recipe.yaml").exists() else MISSING

    @property
    def work(self) -> float:
        """Views of an image that it makes in an epoch, times epochs."""
        return self.recipe.method.view_count * self.recipe.epochs


Jobs = Mapping[str, Mapping[int, Job]]  # cell -> seed -> job


def jobs(experiment: Experiment, scale: Scale, folder: Path, seeds: int | None, given: int | None, **run: Any) -> Jobs:
    """Every run of an experiment. Raises UsageError where a cell contradicts the user's words."""
    run |= {"common": experiment.common, "epochs": experiment.epochs, "given": given}
    found: dict[str, dict[int, Job]] = {}
    for cell, words in experiment.cells.items():
        recipe = scale.recipe(words, **run)
        if "linear" in experiment.curves:
            recipe = recipe.replace(save_every=recipe.knn_every)
        name = f"{recipe.method.name}-{digest(recipe)}"
        found[cell] = {
            seed: Job(recipe.replace(seed=seed), folder / f"{name}-{seed}") for seed in range(seeds or experiment.seeds)
        }
    return found


def digest(recipe: Recipe) -> str:
    """What tells recipes apart, but for the seed and the device."""
    told = recipe.replace(seed=0, device="auto").to_dict()
    return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:10]


def every(plans: Iterable[Jobs]) -> dict[Path, Job]:
    """The jobs of all experiments, each once."""
    return {job.path: job for plan in plans for seeds in plan.values() for job in seeds.values()}


def hours(wanted: Iterable[Job], scale: Scale, limit: int | None) -> float:
    """The time of the unfinished jobs, by the speed of the finished ones, or else by the scale's."""
    images, wanted = min(scale.images, limit or scale.images), list(wanted)
    speeds = [
        job.summary["images_per_second"] * job.recipe.method.view_count for job in wanted if job.state == FINISHED
    ]
    views_per_second = median(speeds) if speeds else 2 * scale.rate
    return sum(job.work * images for job in wanted if job.state != FINISHED) / views_per_second / 3600
