"""What turning a switch did, in words. Every sentence is chosen by a rule on measured values.

Two numbers are compared, both of the last record of a run: the effective rank of z and the kNN
accuracy of h. The rules were written down before the runs.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from typing_extensions import TypedDict

from simsiam.laboratory.switches.recording import Recording
from simsiam.monitoring.verdict import MIN_VERDICT_STEPS, judge_run

RANK_FACTOR = 1.5  # a rank that changes by less is "about the same"
# Percentage points of kNN accuracy; about twice the standard error of the difference between two
# accuracies on 300 images.
KNN_MARGIN = 8.0
SIMILAR_STD = 0.5  # below this share, they are similar; both limits are those of the verdict
SAME_STD = 0.1  # a standard deviation × √d below this: the z of all images are nearly the same
STD_MARGIN = 0.1  # of the standard deviation × √d: a smaller difference is not mentioned
Change = Literal["lower", "about the same", "higher"]


class Ending(NamedTuple):
    """A run at its last record.

    Attributes:
        steps: The number of steps.
        loss: The loss.
        std: The standard deviation of z/|z|, times sqrt(d).
        rank: The effective rank of z.
        knn: The kNN accuracy of h in percent, None without labels.
        state: "collapsed", "partial collapse", "spread" (none of these) or "diverged".
    """

    steps: int
    loss: float
    std: float
    rank: float
    knn: float | None
    state: str

    @property
    def collapsed(self) -> bool:
        """Whether the outputs collapsed, not only partly."""
        return self.state == "collapsed"


class Turn(TypedDict):
    """What turning one switch did, as the page reads it."""

    rank: Change
    knn: Change | None
    seeds_agree: bool | None  # None if one of the cells has a single seed
    sentences: list[str]


def read_ending(recording: Recording, *, diverged: bool = False) -> Ending:
    """Read the last record of a run.

    Args:
        recording: The recording, with at least one record.
        diverged: Whether the loss stopped being finite.

    Returns:
        Its ending; the state is judged by the rule of `simsiam.monitoring.verdict`.
    """
    loss, std, rank = (recording[key][-1] for key in ("loss", "z_std_sqrt_d", "z_rank"))
    gauges = {"loss": loss, "z_std_sqrt_d": std, "z_rank": rank}
    verdict = judge_run([gauges], MIN_VERDICT_STEPS, high_loss_threshold=None).verdict
    state = "diverged" if diverged else {"healthy": "spread"}.get(verdict, verdict)
    return Ending(recording["steps"][-1], loss, std, rank, recording["knn_top1"][-1], state)


def compare_ranks(before: float, after: float) -> Change:
    """Compare two effective ranks.

    Args:
        before: The rank before the switch was turned.
        after: The rank after it was turned.
    """
    if after * RANK_FACTOR <= before:
        return "lower"
    return "higher" if after >= before * RANK_FACTOR else "about the same"


def compare_accuracies(before: float | None, after: float | None) -> Change | None:
    """Compare two kNN accuracies in percent.

    Args:
        before: The accuracy before the switch was turned.
        after: The accuracy after it was turned.

    Returns:
        The change; None if an accuracy is missing.
    """
    if before is None or after is None:
        return None
    if abs(after - before) < KNN_MARGIN:
        return "about the same"
    return "higher" if after > before else "lower"


def describe_ending(ending: Ending, chance: float | None) -> str:
    """Say in one or two sentences how a run ended.

    Args:
        ending: The run at its last record.
        chance: The accuracy of guessing in percent, None without labels.
    """
    if ending.state == "diverged":
        return "Diverged: the loss stopped being a finite number. The last record before is shown."
    std = f"standard deviation × √d: {ending.std:.2f}"
    if ending.collapsed and ending.std < SAME_STD:
        text = f"Collapsed: all images get nearly the same z ({std})."
    elif ending.collapsed:
        text = f"Collapsed: z uses only {ending.rank:.1f} directions ({std})."
    elif ending.state == "partial collapse" and ending.std < SIMILAR_STD:
        text = (
            f"Partly collapsed: a large part of z is the same for all images ({std}); the rest "
            f"uses {ending.rank:.1f} directions."
        )
    elif ending.state == "partial collapse":
        text = f"Partly collapsed: z uses {ending.rank:.1f} directions ({std})."
    else:
        text = f"Not collapsed: z uses {ending.rank:.1f} directions ({std})."
    if ending.knn is not None and chance is not None:
        text += f" kNN accuracy {ending.knn:.0f} %; guessing gives {chance:.0f} %."
    return text


def describe_turn(
    switch: str,
    before: Mapping[int, Ending],
    after: Mapping[int, Ending],
    *,
    turned_on: bool,
    predictor: bool,
) -> Turn:
    """Say what turning one switch did and, where a rule allows it, why.

    Args:
        switch: "stop_gradient", "predictor", "batch_norm" or "batch_size".
        before: The endings before, by seed; seed 0 is shown.
        after: The endings after, by seed.
        turned_on: Whether the switch is on after the turn; of no meaning for "batch_size".
        predictor: Whether there is a predictor before and after, for "stop_gradient".

    Returns:
        The changes of seed 0, whether the other seeds agree, and the sentences.
    """
    changes = {
        seed: (
            compare_ranks(before[seed].rank, after[seed].rank),
            compare_accuracies(before[seed].knn, after[seed].knn),
        )
        for seed in sorted(before.keys() & after.keys())
    }
    on, off = (after[0], before[0]) if turned_on else (before[0], after[0])
    if "diverged" in (on.state, off.state):
        reason = "One of the two runs diverged, so their last records say little."
    elif switch == "batch_size":
        reason = explain_batch_size(before[0], after[0])
    elif switch == "batch_norm":
        reason = explain_batch_norm(on, off)
    elif switch == "predictor":
        reason = explain_predictor(on, off)
    elif predictor:
        reason = explain_stop_gradient(on, off)
    else:
        reason = explain_lone_stop_gradient(on, off)
    agree = len(set(changes.values())) == 1
    return {
        "rank": changes[0][0],
        "knn": changes[0][1],
        "seeds_agree": agree if len(changes) > 1 else None,
        "sentences": [reason, describe_seeds(before, after, agree=agree)],
    }


def describe_seeds(
    before: Mapping[int, Ending], after: Mapping[int, Ending], *, agree: bool
) -> str:
    """Say whether other seeds give the same result.

    Args:
        before: The endings before, by seed.
        after: The endings after, by seed.
        agree: Whether rank and kNN accuracy change in the same way with all seeds.
    """
    others = sorted((before.keys() & after.keys()) - {0})
    if not others:
        return "This comparison was made with one seed only; another seed may differ."
    if agree:
        return "For a second pair of runs, with another seed, the same words are true."
    numbers = "; ".join(
        f"rank {before[s].rank:.1f} before and {after[s].rank:.1f} now"
        + _format_knn(before[s], after[s])
        for s in others
    )
    return f"A second pair of runs, with another seed, differs: {numbers}. So do not conclude yet."


def _format_knn(before: Ending, after: Ending) -> str:
    if before.knn is None or after.knn is None:
        return ""
    return f", kNN {before.knn:.0f} % before and {after.knn:.0f} % now"


# --- why ------------------------------------------------------------------------------------------


def explain_stop_gradient(on: Ending, off: Ending) -> str:
    """Explain a turn of the stop-gradient where there is a predictor.

    Args:
        on: The run with stop-gradient.
        off: The run without.
    """
    if off.collapsed and not on.collapsed:
        text = (
            "Without the stop-gradient the gradient flows into both sides of the loss, so both "
            "can move to one answer for all images. With it, one side counts as "
            "fixed, and the run with it did not collapse."
        )
        if off.loss < on.loss:
            text += (
                f" The collapsed run has the lower loss, {off.loss:.2f} against {on.loss:.2f}: a "
                "low loss alone says nothing about the features."
            )
        return text + _mention_accuracy(on, off)
    return _compare_states("stop-gradient", on, off)


def explain_lone_stop_gradient(on: Ending, off: Ending) -> str:
    """Explain a turn of the stop-gradient where there is no predictor.

    Args:
        on: The run with stop-gradient.
        off: The run without.
    """
    return (
        "There is no predictor, so z of one view is compared with z of the other, in both "
        "directions. Then the stop-gradient only halves the gradient; its direction is that of "
        f"the loss without stop-gradient. {_compare_states('stop-gradient', on, off)}"
    )


def explain_predictor(on: Ending, off: Ending) -> str:
    """Explain a turn of the predictor.

    Args:
        on: The run with a predictor.
        off: The run without.
    """
    if off.collapsed and not on.collapsed:
        return (
            "Without a predictor both sides of the loss are z, and they agree best if all images "
            "give the same z, or z on one line. The run with a predictor did not collapse."
        ) + _mention_accuracy(on, off)
    return _compare_states("predictor", on, off)


def explain_batch_norm(on: Ending, off: Ending) -> str:
    """Explain a turn of batch norm in the heads.

    Args:
        on: The run with batch norm.
        off: The run without.
    """
    text = (
        "Batch norm subtracts from each number its mean over the batch: the part that all images "
        "have in common."
    )
    if off.std <= on.std - STD_MARGIN:
        text += (
            " Without it, this part can become large, and the standard deviation × √d small: it "
            f"is {off.std:.2f} without batch norm and {on.std:.2f} with it."
        )
    else:
        text += (
            f" Yet the standard deviation × √d is {off.std:.2f} without batch norm and "
            f"{on.std:.2f} with it."
        )
    return f"{text} {_compare_states('batch norm', on, off)}"


def explain_batch_size(before: Ending, after: Ending) -> str:
    """Explain a change of the batch size.

    Args:
        before: The run with the old batch size.
        after: The run with the new one.
    """
    text = (
        "All runs have the same number of epochs, so this changes the number of steps: "
        f"{after.steps:,} instead of {before.steps:,}."
    )
    few, many = sorted((before, after), key=lambda ending: ending.steps)
    if few.collapsed and many.collapsed:
        return f"{text} Both runs collapsed: the batch size did not prevent it."
    if few.collapsed or many.collapsed:
        steps = (few if few.collapsed else many).steps
        return f"{text} Only the run of {steps:,} steps collapsed."
    if compare_accuracies(before.knn, after.knn) == "about the same":
        return f"{text} The kNN accuracy is about the same."
    if few.knn is not None and many.knn is not None and few.knn < many.knn:
        text += " The run with fewer steps has the lower kNN accuracy"
        if few.loss > many.loss:
            return (
                f"{text}: it is less far in its training, as its higher loss shows "
                f"({few.loss:.2f} against {many.loss:.2f})."
            )
        return f"{text}, although its loss is not the higher one."
    return f"{text} Why this changed the result so, these numbers do not say."


def _mention_accuracy(on: Ending, off: Ending) -> str:
    """Say that the kNN accuracy of a collapsed run, `off`, is not lower, if that is so."""
    change = compare_accuracies(on.knn, off.knn)
    if change in (None, "lower"):
        return ""
    return (
        f" Yet the kNN accuracy of the collapsed run is {change}. kNN uses h, which comes before "
        "the projector and can still be of use. Longer trainings may show a difference."
    )


def _compare_states(name: str, on: Ending, off: Ending) -> str:
    """Say how two runs ended where the values support no further explanation."""
    if on.state == off.state:
        both = {"spread": "Neither run collapsed", "collapsed": "Both runs collapsed"}
        return f"{both.get(on.state, 'Both runs collapsed partly')}, with {name} and without."
    words = {"spread": "did not collapse", "collapsed": "collapsed"}
    with_it, without = (words.get(run.state, "collapsed partly") for run in (on, off))
    return f"The run with {name} {with_it}, the run without it {without}."
