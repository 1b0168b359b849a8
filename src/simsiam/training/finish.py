"""The end of a run: what its features are worth, the verdict, the advice, and the files with it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import nn

from simsiam.config.method import FIXED_TARGETS
from simsiam.distributed.process_group import rank_zero_only
from simsiam.model.encoder import Encoder
from simsiam.monitoring.candidates import Candidate, choose
from simsiam.monitoring.label_free_monitor import MONITOR_SAMPLE_SIZE, advise_training_length
from simsiam.monitoring.verdict import (
    END,
    START,
    UNCERTAIN,
    Verdict,
    advise_features,
    judge_run,
    judge_worth,
)
from simsiam.monitoring.worth import (
    Start,
    best_features,
    measure_end,
    not_beaten,
    table_row,
    worse_than,
)
from simsiam.runs.encoder import eval_transform
from simsiam.runs.run_folder import Run
from simsiam.training.loop import Outcome
from simsiam.training.prepare import RunData
from simsiam.training.pretrain import Pretraining


@dataclass(frozen=True)
class Worth:
    """What was measured at the end of a run.

    Attributes:
        candidates: The trained network with its best map first, then all other encoders.
        choice: Rows of the choice between the network unchanged, centered and with its map.
    """

    candidates: Sequence[Candidate] = ()
    choice: Sequence[dict[str, object]] = field(default=())

    def summary(self) -> dict[str, object]:
        """Return what summary.json says: the table, and its rows `start` and `end`."""
        rows = [table_row(candidate) for candidate in self.candidates]
        by_name = {row["features"]: row for row in rows}
        ends = {name: by_name[name] for name in (START, END) if {START, END} <= by_name.keys()}
        return {**ends, "features": rows} if rows else {}


@rank_zero_only
def finish(
    run: Run,
    training: Pretraining,
    outcome: Outcome,
    lines: Sequence[dict[str, float]],
    data: RunData,
) -> Verdict:
    """Measure what a run is worth, judge it, and write its backbone and its summary.

    Args:
        run: The run folder, held by this process.
        training: The training that ended. If it diverged, its backbone gets the last good weights.
        outcome: How it ended. The features of a run that was stopped are not measured.
        lines: The records of metrics.jsonl.
        data: The images.

    Returns:
        The verdict.
    """
    recipe, model = run.recipe, training.evaluated
    if outcome.diverged and (checkpoint := run.checkpoint()):
        prefix, weights = "backbone.", checkpoint["model"]  # of all processes: rows of eta as well
        backbone = {k.removeprefix(prefix): x for k, x in weights.items() if k.startswith(prefix)}
        model.backbone.load_state_dict(backbone)
    worth = Worth()
    if outcome.step == outcome.steps and not outcome.diverged:
        worth = measure_worth(training, data)
    verdict = judge_run(
        lines,
        outcome.step,
        diverged=outcome.diverged,
        high_loss_threshold=training.model.high_loss_threshold(recipe.batch_size),
        fixed_target=recipe.method.target in FIXED_TARGETS,
        clusters=recipe.method.target == "kmeans",
    )
    unbeaten = not_beaten(worth.candidates, END) if worth.candidates else []
    verdict = judge_worth(verdict, unbeaten, init=recipe.init, steps=outcome.step)
    advice = []
    if worth.candidates:
        if recipe.init is not None and (loss := worse_than(worth.candidates, END, START)):
            advice.append(f"The features are worse than those of the initial weights: {loss}.")
        best = best_features(worth.candidates)
        advice.append(advise_features(best.name, best.describe(), init=recipe.init))
        if best.hits is None:
            advice.append(UNCERTAIN)
    if verdict.verdict == "healthy":
        counts = {
            "knn_top1": len(data.held_out or ()),
            "view_retrieval": min(MONITOR_SAMPLE_SIZE, len(data.train)),
        }
        advice.append(advise_training_length(lines, counts))
    knn = {"knn_top1": training.state["knn"]} if training.state["knn"] else {}
    images = outcome.step * training.batch_size
    run.finish(
        model.backbone.state_dict(),
        {
            "verdict": verdict.verdict,
            "remedy": verdict.remedy,
            "advice": " ".join(advice),
            "steps": outcome.step,
            "epochs": round(outcome.step / training.steps_per_epoch, 4),
            **knn,
            **worth.summary(),
            "images_per_second": round(images / max(training.seconds, 1e-9), 1),
            "training_seconds": round(training.seconds, 1),
            "unreadable": len(run.read_quarantine()),
        },
    )
    write_head(run, model.backbone, worth)
    return verdict


def measure_worth(training: Pretraining, data: RunData) -> Worth:
    """Measure a network that is trained, beside the network that it was and simpler encoders.

    Args:
        training: The training.
        data: The images.

    Returns:
        What was measured; nothing if the start was not measured, or there are too few images.
    """
    start, recipe = training.state.get("start"), training.run.recipe
    if start is None:
        return Worth()
    own, others = measure_end(
        cast(Start, start),
        training.evaluated.backbone,
        data.train,
        recipe,
        eval_transform(recipe),
        training.step,
        training.seconds,
        compute=training.compute,
    )
    if not own:
        return Worth()
    best, choice = choose(own)
    unchanged = own[0]
    return Worth([best, *([] if best is unchanged else [unchanged]), *others], choice)


def write_head(run: Run, backbone: nn.Module, worth: Worth) -> None:
    """Write head.json, and head.safetensors if the backbone alone is not the best.

    Args:
        run: The run folder, finished.
        backbone: Its backbone.
        worth: What was measured.
    """
    if not worth.choice:
        return
    taken = worth.candidates[0]
    run.write("head.json", {"chosen": taken.name, "candidates": worth.choice})
    if taken.heads[0] is not None:
        run.write_head(Encoder(backbone, taken.heads[0]))
