"""A finished run to the numbers of tables, figures and claims. What is costly is kept in the run folder."""

import io
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import pairwise
from statistics import fmean, median, pstdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from simsiam.data.batches import make_training_views
from simsiam.data.images import load_into_memory, sample
from simsiam.evaluation.evaluate import evaluate
from simsiam.evaluation.frozen import split_train_test
from simsiam.laboratory.experiments import Experiment
from simsiam.laboratory.scales import Scale
from simsiam.monitoring.verdict import MIN_VERDICT_STEPS, judge_run
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import open_source
from simsiam.training.prepare import build_training_setup

NUM_IMAGES, NUM_VIEWS = 500, 32  # test images, and views of each that E[z] is the mean over
VIEW_STEP = 2**62  # whose views they take: no run gets there


def measure_run(run: Run, scale: Scale, experiment: Experiment) -> dict[str, Any]:
    """All that a page needs of a finished run, as plain data."""
    found = measure_metrics(run, scale, measure_predictor=experiment.measure_predictor)
    curves = (
        {}
        if found["diverged"]
        else {metric: metric_curve(run, metric, scale) for metric in experiment.curve_metrics}
    )
    where = {
        k: v for k, v in run.json("environment.json").items() if k != "command"
    }  # it names paths of a machine
    return {"values": found, "curves": curves, "environment": where, "recipe": run.recipe.to_dict()}


def measure_metrics(run: Run, scale: Scale, *, measure_predictor: bool = False) -> dict[str, Any]:
    """Metrics of a run at its end; a diverged one has no accuracy. Measures what has not been measured yet."""
    lines = [line for line in run.metrics() if "loss" in line]
    summary = run.json("summary.json")
    found = {"verdict": summary["verdict"], "seconds": summary["training_seconds"], "diverged": 0.0}
    if summary["verdict"] == "diverged":
        return found | {"diverged": 1.0, "collapsed": 0.0}
    recent = lines[-max(3, len(lines) // 10) :]
    found |= {
        key: median(line[key] for line in recent) for key in ("loss", "z_std_sqrt_d", "z_rank")
    }
    late = [line["loss"] for line in lines[len(lines) // 2 :]]
    found["loss_swing"] = pstdev(b - a for a, b in pairwise(late)) if len(late) > 2 else None
    found["collapsed"] = float(
        judge_run(lines, MIN_VERDICT_STEPS, high_loss_threshold=None).verdict == "collapsed"
    )  # however few its steps
    monitor = [line["knn_top1"] for line in run.metrics() if "knn_top1" in line]
    found |= {"knn": measure_top1(run, "knn", scale), "linear": measure_top1(run, "linear", scale)}
    found |= {
        "knn_mean": fmean(monitor) if monitor else None,
        "above_chance": found["linear"] - scale.chance,
    }
    if measure_predictor and run.recipe.method.predictor != "none":
        found |= predictor_cosines(run)
    return found


def measure_top1(run: Run, protocol: str, scale: Scale, checkpoint: str = "last") -> float:
    """Test accuracy on h in percent, knn or linear, from the run's evaluations; measures both where it is not there."""

    def known() -> list[float]:
        mine = [
            r
            for r in run.read_records(f"evaluations/{protocol}.json")
            if r["checkpoint"] == checkpoint and r["features"] == "h"
        ]
        return [
            r["top1"]
            for r in mine
            if r["parameters"].get("linear", scale.linear_protocol) == scale.linear_protocol
        ]

    if not known():
        with redirect_stdout(io.StringIO()):
            how: dict[str, Any] = {
                "device": run.recipe.device,
                "linear": scale.linear_protocol,
                "baselines": False,
            }
            how["limit"] = run.recipe.limit  # a trial is one in all its parts
            evaluate(run.path, protocols=("knn", "linear"), checkpoint=checkpoint, **how)
    return known()[0]


def metric_curve(run: Run, metric: str, scale: Scale) -> list[tuple[float, float]]:
    """(epoch, value) of a metric of metrics.jsonl, or of the linear accuracy."""
    if metric == "linear":
        return linear_curve(run, scale)
    return [
        (line["epoch"], round(line[metric], 5))
        for line in run.metrics()
        if line.get(metric) is not None
    ]


def linear_curve(run: Run, scale: Scale) -> list[tuple[float, float]]:
    """(epoch, linear top-1) at every checkpoint that was kept."""
    kept = sorted((run.path / "checkpoints").glob("epoch-*.pt"))
    curve = [(float(path.stem[6:]), measure_top1(run, "linear", scale, path.stem)) for path in kept]
    if not kept or curve[-1][0] < run.recipe.epochs:
        curve.append((run.recipe.epochs, measure_top1(run, "linear", scale)))
    return curve


def predictor_cosines(run: Run) -> dict[str, float]:
    """Section 5.1: cosines of p1 and of z1 with E[z], the mean of z/|z| over other views of the same image.

    `h_gain` is by how much p1 is nearer; on test images, with the network in eval mode.
    """
    if not (found := run.json("laboratory.json")):
        recipe = run.recipe
        model, _, (device, _) = build_training_setup(replace(recipe, init=None))
        state: Any = run.checkpoint()
        model.load_state_dict(state["model"])
        _, test, _ = split_train_test(
            open_source(recipe.source, recipe.channels), require_labels=True
        )
        test, _ = load_into_memory(
            sample(test, min(NUM_IMAGES, len(test))), int(recipe.cache_gib * 2**30)
        )
        model.eval()
        with torch.no_grad():
            views = make_training_views(
                test, np.arange(len(test)), recipe, VIEW_STEP, device, view_count=1 + NUM_VIEWS
            )
            z = [model.projector(model.backbone(x)) for x in views]
            mean = torch.stack([F.normalize(other, dim=1) for other in z[1:]]).mean(0)
            of_p, of_z = (
                F.cosine_similarity(x, mean).mean().item() for x in (model.predictor(z[0]), z[0])
            )
        found = {
            "cos_p_mean": round(of_p, 5),
            "cos_z_mean": round(of_z, 5),
            "h_gain": round(of_p - of_z, 5),
        }
        run.write("laboratory.json", found)
    return found
