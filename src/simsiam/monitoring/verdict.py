"""The verdict on a run, read from its gauges."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

MIN_VERDICT_STEPS = 200


class Verdict(NamedTuple):
    verdict: str
    remedy: str


REMEDIES = {
    "healthy": "Nothing to mend. More epochs usually help: compare kNN, or simply use the backbone.",
    "too early": f"Fewer than {MIN_VERDICT_STEPS} steps say nothing yet: train longer, or take a smaller batch to get more "
    "steps from the same images.",
    "collapsed": "All images get nearly the same output, so the backbone has learned nothing. Check that the "
    "cells are the row's in `simsiam methods` (simsiam: a predictor, the gradient stopped); then lower --base-lr by 4 "
    "and start again.",
    "partial collapse": "The outputs use only a few directions. Lower --base-lr by 2 to 4, try a larger backbone or "
    "more varied views (a smaller --crop-min), and start again.",
    "not converging": "The loss stays high. Check that a predictor is trained (not fixed) and that its output has no "
    "batch norm; then lower --base-lr by 4, or add --warmup-epochs 10. For swav on few images, first add --equal-terms "
    "--prototypes 128 --sinkhorn-epsilon 0.02.",
    "diverged": "The loss is no longer a number. Lower --base-lr by 4, or add --warmup-epochs 10, and start again; "
    "--precision float32 rules out rounding.",
}


def judge_run(
    lines: Sequence[Mapping[str, Any]],
    steps: int,
    *,
    diverged: bool = False,
    high_loss_threshold: float | None = -0.25,
    supervised: bool = False,
) -> Verdict:
    """The verdict on a run from its logged lines (those of metrics.jsonl that have a loss) after so many steps.

    A loss above `high` is not converging; a criterion that cannot say its range has None. With `labels` z are logits,
    whose rank is that of the classes: the loss alone speaks.
    """
    lines = [line for line in lines if "loss" in line]
    if diverged:
        return Verdict("diverged", REMEDIES["diverged"])
    if steps < MIN_VERDICT_STEPS or not lines:
        return Verdict("too early", REMEDIES["too early"])
    recent = lines[-max(3, len(lines) // 10) :]
    loss, std, rank = (
        median(line[key] for line in recent) for key in ("loss", "z_std_sqrt_d", "z_rank")
    )
    if not supervised and (std < 0.1 or rank <= 2):
        word = "collapsed"
    elif high_loss_threshold is not None and loss > high_loss_threshold:
        word = "not converging"
    elif not supervised and (std < 0.5 or rank <= 3):
        word = "partial collapse"
    else:
        word = "healthy"
    return Verdict(word, REMEDIES[word])
