"""The numbers of a finished run for tables, figures and claims.

Results that are expensive to compute are kept in the run folder.
"""

import io
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import pairwise
from statistics import fmean, median, pstdev
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from typing_extensions import NotRequired, TypedDict

from simsiam.data.batches import make_training_views
from simsiam.data.images import load_into_memory, sample
from simsiam.evaluation.evaluate import evaluate
from simsiam.evaluation.frozen import split_train_test
from simsiam.laboratory.experiments import Experiment
from simsiam.laboratory.scales import Scale
from simsiam.laboratory.switches.recording import collect_recording
from simsiam.monitoring.verdict import MIN_VERDICT_STEPS, judge_run
from simsiam.runs.compose import open_run_source
from simsiam.runs.run_folder import Run
from simsiam.training.prepare import build_training_setup
from simsiam.utils.names import without_credentials
from simsiam.utils.typed_json import read_json

NUM_IMAGES, NUM_VIEWS = 500, 32  # test images, and views of each that E[z] averages over
TOP1_FILE = "laboratory_top1.json"
VIEW_STEP = 2**62  # the step whose random numbers draw these views; no run gets there


class MeasuredRun(TypedDict):
    """What a page needs of a finished run, as plain data."""

    values: dict[str, Any]  # by metric
    curves: dict[str, list[tuple[float, float]]]  # pairs of epoch and value, by metric
    environment: dict[str, Any]
    recipe: dict[str, Any]
    recording: NotRequired[dict[str, Any]]  # of an experiment that records steps


class MeasuredTop1(TypedDict):
    """The accuracies of a run that pages show, which are kept in its folder."""

    top1: dict[str, float]  # in percent, by checkpoint and protocol


def measure_run(run: Run, scale: Scale, experiment: Experiment) -> MeasuredRun:
    """Collect what a page needs of a finished run.

    Args:
        run: The run.
        scale: The scale.
        experiment: The experiment of the page.

    Returns:
        Its metrics, curves, environment and recipe.
    """
    values = _measure_metrics(run, scale, measure_predictor=experiment.measure_predictor)
    metrics = () if values["diverged"] else experiment.curve_metrics
    environment = run.json("environment.json")
    environment.pop("command", None)  # it contains paths of the machine
    measured: MeasuredRun = {
        "values": values,
        "curves": {metric: metric_curve(run, metric, scale) for metric in metrics},
        "environment": environment,
        "recipe": without_credentials(run.recipe.to_dict()),
    }
    if experiment.record_steps:
        measured["recording"] = {**collect_recording(run)}
    return measured


def _measure_metrics(run: Run, scale: Scale, *, measure_predictor: bool = False) -> dict[str, Any]:
    """Compute the metrics of a run at its end, evaluating it if that was not done yet.

    Args:
        run: The run.
        scale: The scale.
        measure_predictor: Whether to measure what the predictor predicts.

    Returns:
        Numbers by metric, and the verdict; a diverged run, or one without labels, has no accuracy.
    """
    lines = [line for line in run.metrics() if "loss" in line]
    summary = run.json("summary.json")
    values: dict[str, Any] = {
        "verdict": summary.get("verdict", "unknown"),
        "seconds": summary.get("training_seconds") or 0.0,
        "diverged": 0.0,
    }
    if values["verdict"] == "diverged":
        return values | {"diverged": 1.0, "collapsed": 0.0}
    recent = lines[-max(3, len(lines) // 10) :]
    for key in ("loss", "z_std_sqrt_d", "z_rank"):
        values[key] = median(line[key] for line in recent)
    late = [line["loss"] for line in lines[len(lines) // 2 :]]
    values["loss_swing"] = pstdev(b - a for a, b in pairwise(late)) if len(late) > 2 else None
    # With the minimum number of steps, so that short runs get a verdict too.
    verdict = judge_run(lines, MIN_VERDICT_STEPS, high_loss_threshold=None).verdict
    values["collapsed"] = float(verdict == "collapsed")
    if not run.recipe.no_labels:
        monitored = [line["knn_top1"] for line in run.metrics() if "knn_top1" in line]
        values["knn"] = measure_top1(run, "knn", scale)
        values["linear"] = measure_top1(run, "linear", scale)
        values["knn_mean"] = fmean(monitored) if monitored else None
        values["above_chance"] = values["linear"] - scale.chance
    if measure_predictor and run.recipe.method.predictor != "none":
        values |= predictor_cosines(run)
    return values


def measure_top1(run: Run, protocol: str, scale: Scale, checkpoint: str = "last") -> float:
    """Look up the test accuracy on h, evaluating the run if that was not done yet.

    What the laboratory measured has a file of its own: evaluations of the user may have other
    settings.

    Args:
        run: The run.
        protocol: "knn" or "linear".
        scale: The scale, which determines the linear protocol.
        checkpoint: The checkpoint to evaluate.

    Returns:
        Top-1 accuracy in percent.
    """
    path, conditions = run.path / TOP1_FILE, f"{checkpoint}, linear {scale.linear_protocol}"
    measured = read_json(path, MeasuredTop1)["top1"] if path.exists() else {}
    if f"{conditions}: {protocol}" not in measured:
        with redirect_stdout(io.StringIO()):
            records = evaluate(
                run.path,
                protocols=("knn", "linear"),
                checkpoint=checkpoint,
                device=run.recipe.device,
                linear=scale.linear_protocol,
                baselines=False,
                limit=run.recipe.limit,  # a run on few images is evaluated on few
            )
        for record in records:
            if record["features"] == "h":
                measured[f"{conditions}: {record['protocol']}"] = cast(float, record["top1"])
        run.write(TOP1_FILE, {"top1": measured})
    return measured[f"{conditions}: {protocol}"]


def metric_curve(run: Run, metric: str, scale: Scale) -> list[tuple[float, float]]:
    """Read a metric over epochs.

    Args:
        run: The run.
        metric: A metric of metrics.jsonl, or "linear" for the linear accuracy, which a run without
            labels does not have.
        scale: The scale.

    Returns:
        Pairs of epoch and value.
    """
    if metric == "linear" and run.recipe.no_labels:
        return []
    if metric == "linear":
        return linear_curve(run, scale)
    return [
        (line["epoch"], round(line[metric], 5))
        for line in run.metrics()
        if line.get(metric) is not None
    ]


def linear_curve(run: Run, scale: Scale) -> list[tuple[float, float]]:
    """Evaluate every checkpoint that was kept.

    Args:
        run: The run.
        scale: The scale.

    Returns:
        Pairs of epoch and linear top-1 in percent.
    """
    names = sorted(path.stem for path in (run.path / "checkpoints").glob("epoch-*.pt"))
    curve = [
        (float(name.removeprefix("epoch-")), measure_top1(run, "linear", scale, name))
        for name in names
    ]
    if not curve or curve[-1][0] < run.recipe.epochs:
        curve.append((run.recipe.epochs, measure_top1(run, "linear", scale)))
    return curve


def predictor_cosines(run: Run) -> dict[str, float]:
    """Measure whether the predictor predicts E[z] (section 5.1).

    E[z] is the mean of z/|z| over other views of the same image. Uses test images, with the network
    in evaluation mode.

    Args:
        run: The run.

    Returns:
        The mean cosines of p1 and of z1 with E[z], and their difference `h_gain`.
    """
    if cosines := run.json("laboratory.json"):
        return cosines
    recipe = run.recipe
    model, _, (device, _) = build_training_setup(replace(recipe, init=None))
    state: Any = run.checkpoint()
    model.load_state_dict(state["model"])
    model.eval()
    source = open_run_source(run, command=lambda names: ["evaluate", str(run.path), *names])
    _, test, _ = split_train_test(source, require_labels=not recipe.no_labels)
    test = sample(test, min(NUM_IMAGES, len(test)))
    test, _ = load_into_memory(test, int(recipe.cache_gib * 2**30))
    with torch.no_grad():
        views = make_training_views(
            test, np.arange(len(test)), recipe, VIEW_STEP, device, view_count=1 + NUM_VIEWS
        )
        z = [model.projector(model.backbone(x)) for x in views]
        mean = torch.stack([F.normalize(other, dim=1) for other in z[1:]]).mean(0)
        p1, z1 = model.predictor(z[0]), z[0]
        cos_p, cos_z = (F.cosine_similarity(x, mean).mean().item() for x in (p1, z1))
    cosines = {
        "cos_p_mean": round(cos_p, 5),
        "cos_z_mean": round(cos_z, 5),
        "h_gain": round(cos_p - cos_z, 5),
    }
    run.write("laboratory.json", cosines)
    return cosines
