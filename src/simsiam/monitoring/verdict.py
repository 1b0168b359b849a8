"""The verdict on a run: one word and one remedy, read from the logged gauges.

Where the thresholds come from. They were written down before the runs that test them
(results/README.md), but after a first look at the ranks of healthy runs on `shapes`: 3 to 4 with
d = 512, 5 to 6 with d = 2048, the demo's.

- `collapsed`: `z_std_sqrt_d` is below 0.1, that is ‖mean ẑ‖² above 0.99 if all channels have the
  same variance: every image is within a few degrees of one vector. Or the effective rank of z is at
  most 2: what is left is a line or a plane. r directions have 2^r orthants, so no more than four
  groups of images can be told apart. Isotropic z have a rank near min(N, d).
- `partial collapse`: `z_std_sqrt_d` is below 0.5, so three quarters of the energy of each vector
  are common to all images. Or the rank is at most 3, which is eight orthants: fewer than the number
  of kinds of images in most data sets.
- `not converging`: the loss has covered less than a quarter of the way from unrelated vectors to
  its minimum. (Table 1b: a fixed predictor leaves the loss high. That is no collapse, although the
  accuracy is near chance too.) For SwAV, and with K clusters: the loss is within 2 % of log K,
  where it stays if the codes are uniform. This bound was chosen after the runs: a stuck one had
  1.00, one that learned 0.92 times log K.
- `too early`: fewer than 200 steps. SGD's momentum forgets in 10 steps, the running averages of
  batch norm in about as many, and a network with its predictor needs some dozens of these periods
  to leave its initialization. Nothing is decided before that.
- `diverged`: the loss was not a finite number.
- `learned little`: none of these, but the features are not better, beyond noise, than raw pixels, a
  color histogram or the network before its first step (`simsiam.monitoring.worth`).

The gauges are medians over the last tenth of the logged records (at least three), so that one noisy
batch decides nothing.

With clusters as targets z are the logits of a classifier that begins anew in each epoch. What all
of them share says nothing, and a few steps of a classifier decide their rank. What is clustered,
and kept, is h: the rank is that of h, with the same thresholds (healthy runs of the other methods
on `shapes` have 3.6 to 7.8; results/README.md). And the loss begins at log K in each epoch, so that
only the records of the second halves of epochs count, if there are any.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

MIN_VERDICT_STEPS = 200
WARNING_FIRST_STEP = 20
# Of the effective rank of z at the first step. With the default recipes more than a quarter is left
# after 200 steps.
WARNING_RANK_SHARE = 0.22
GOOD_STEPS = 10_000  # that runs on small images need before features are good: docs/label_free.md
# What a table of features calls the network before its first step and after its last one, and the
# simple features that it has to be better than.
START, END, PIXELS, COLOR = "start", "end", "pixels", "color histogram"
# No label-free number orders features as labels do on every set: results/label_free_numbers.
UNCERTAIN = (
    "Without labels, how good features are cannot be judged for certain: the score can mislead "
    "(docs/closed_form.md). A few labels decide: give each class a folder, then `simsiam evaluate`."
)
FEATURE_NAMES = {
    START: "those of the untrained network",
    PIXELS: "raw pixels",
    COLOR: "a color histogram",
}


class Verdict(NamedTuple):
    """The verdict on a run and what to do about it.

    Attributes:
        verdict: One of the keys of REMEDIES.
        remedy: One line of advice.
    """

    verdict: str
    remedy: str


COLLAPSE_REMEDY = (
    "Compare the settings of the method with its row in `simsiam methods` (simsiam: with a "
    "predictor and with the stop-gradient); then divide --base-lr by 4 and start again."
)
REMEDIES = {
    "healthy": "Nothing to fix. More epochs usually help: compare kNN, or simply use the backbone.",
    "too early": f"Fewer than {MIN_VERDICT_STEPS} steps are too few for a verdict: train longer, "
    "or use a smaller batch to get more steps from the same images.",
    "collapsed": "All images get nearly the same output z, so training has nothing left to teach. "
    f"{COLLAPSE_REMEDY}",
    "partial collapse": "The outputs use only a few directions. Divide --base-lr by 2 to 4, try a "
    "larger backbone or more varied views (a smaller --crop-min), and start again.",
    "not converging": "The loss stays high. A run of some hundred steps has to be longer. In a "
    "longer one, check that the predictor, if there is one, is trained (not fixed) and that its "
    "output has no batch norm; then divide --base-lr by 4, or add --warmup-epochs 10. For swav on "
    "few images, first add --equal-terms --prototypes 128 --sinkhorn-epsilon 0.02; for deepcluster "
    "and instance_discrimination, see docs/understand/neighbors.md.",
    "diverged": "The loss is no longer a finite number. Divide --base-lr by 4, or add "
    "--warmup-epochs 10, and start again; --precision float32 rules out rounding as the cause.",
}


def judge_run(
    lines: Sequence[Mapping[str, float]],
    steps: int,
    *,
    diverged: bool = False,
    high_loss_threshold: float | None = -0.25,
    fixed_target: bool = False,
    clusters: bool = False,
) -> Verdict:
    """Judge a run by its logged gauges.

    Args:
        lines: The records of metrics.jsonl. Those that lack one of the gauges are ignored.
        steps: Number of steps done.
        diverged: Whether the loss stopped being finite.
        high_loss_threshold: A loss above this is `not converging`; None if the criterion does not
            know the range of its loss.
        fixed_target: Whether the targets are labels, or features of a teacher. Then z are logits,
            whose rank is that of the classes, or what is predicted of the teacher so far. The
            targets cannot collapse, and the verdict depends on the loss alone.
        clusters: Whether the targets are clusters that are found anew in each epoch. Then the
            gauges are the loss and the rank of h in the second halves of epochs.

    Returns:
        The verdict and its remedy.
    """
    gauges = ("loss", "z_std_sqrt_d", "h_rank" if clusters else "z_rank")
    records = [x for x in lines if all(x.get(gauge) is not None for gauge in gauges)]
    if clusters:
        records = [record for record in records if -record["epoch"] % 1 < 0.5] or records
    if diverged:
        return _verdict("diverged")
    if steps < MIN_VERDICT_STEPS or not records:
        return _verdict("too early")
    recent = records[-max(3, len(records) // 10) :]
    loss, std, rank = (median(record[gauge] for record in recent) for gauge in gauges)
    std = 1.0 if clusters else std
    if not fixed_target and (std < 0.1 or rank <= 2):
        return _verdict("collapsed")
    if high_loss_threshold is not None and loss > high_loss_threshold:
        return _verdict("not converging")
    if not fixed_target and (std < 0.5 or rank <= 3):
        return _verdict("partial collapse")
    return _verdict("healthy")


def early_warning(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """Warn of a bad beginning: of outputs that become alike within the first steps.

    The median of three records counts, from step WARNING_FIRST_STEP on. The threshold of the
    standard deviation is that of `partial collapse`, that of the rank a share of the rank at the
    first step, but not below that of `partial collapse`. There is one warning in a run.

    Args:
        lines: The records of metrics.jsonl so far, the latest one last.

    Returns:
        The warning, or None.
    """
    steps = range(WARNING_FIRST_STEP, MIN_VERDICT_STEPS + 1)
    measured = [x for x in lines if None not in (x.get("z_rank"), x.get("z_std_sqrt_d"))]
    records = [x for x in measured if x["step"] in steps]
    if len(records) < 3 or any("warning" in record for record in lines):
        return None
    std, rank = (
        median(record[key] for record in records[-3:]) for key in ("z_std_sqrt_d", "z_rank")
    )
    first = measured[0]["z_rank"]
    if std >= 0.5 and rank > max(3, WARNING_RANK_SHARE * first):
        return None
    return (
        f"the outputs z of all images become alike (effective rank {rank:.1f}, standard deviation "
        f"{std:.2f} of 1); if this goes on, the run collapses. {COLLAPSE_REMEDY}"
    )


def judge_worth(
    verdict: Verdict, unbeaten: Sequence[str], *, init: str | None, steps: int
) -> Verdict:
    """Turn `healthy` into `learned little` if simpler features are as good.

    Args:
        verdict: What the gauges say.
        unbeaten: Names of simpler features that are not worse.
        init: The initial weights, or None.
        steps: Number of steps done.

    Returns:
        The verdict and its remedy.
    """
    if verdict.verdict != "healthy" or not unbeaten:
        return verdict
    if init is not None and START in unbeaten:
        remedy = (
            "The features are not better than those of the initial weights: keep these, or divide "
            "--base-lr by 10 and start again."
        )
    else:
        others = " or ".join(FEATURE_NAMES[name] for name in unbeaten)
        factor = max(4, math.ceil(GOOD_STEPS / steps))
        remedy = (
            f"The features are not better than {others}: train {factor} times as many epochs, with "
            "half the --width if that takes too long; with few images, `simsiam adapt SOURCE` "
            "finds better features in minutes."
        )
    return Verdict("learned little", remedy)


def advise_features(name: str, value: str, *, init: str | None) -> str:
    """Name the best features that were measured, and the command that uses them.

    Args:
        name: Their name in the table of features.
        value: How good they are, in words.
        init: The initial weights, or None.

    Returns:
        One sentence.
    """
    best = "The best features measured are"
    if name.startswith(f"{END} beside "):
        return (
            f"{best} those of this run {name.removeprefix(END).strip()} ({value}): "
            "`simsiam adapt SOURCE --init RUN` makes them."
        )
    if name.startswith(END):
        changed = (
            name.removeprefix(END).replace(" + ", ", with the ").replace(" centered", ", centered")
        )
        return f"{best} those of this run{changed} ({value}): use them with `simsiam embed`."
    if name == START and init is not None:
        return f"{best} those of the initial weights ({value}): `simsiam embed {init}` uses them."
    if name not in FEATURE_NAMES:  # patches
        return f"{best} {name} ({value}): `simsiam adapt SOURCE` uses them."
    return f"{best} {FEATURE_NAMES[name]} ({value}): `simsiam adapt SOURCE` looks for better ones."


def features_table(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Make a table of the features that were measured at the end of a run.

    Args:
        summary: What summary.json says.

    Returns:
        The headings, then a row for each encoder: its name, score and kNN accuracy, with 95 %
        intervals; nothing if there are no measurements.
    """
    rows = [("features", "label-free score", "kNN accuracy, %")]
    for row in summary.get("features", []):
        low, high = row["score_interval"]
        score, accuracy = f"{row['score']:.3f} ({low:.3f} to {high:.3f})", ""
        if {"knn_top1", "interval", "n"} <= row.keys():
            low, high = row["interval"]
            accuracy = f"{row['knn_top1']:.1f} ({low:.1f} to {high:.1f}), n = {row['n']}"
        rows.append((row["features"], score, accuracy))
    return rows if len(rows) > 1 else []


def _verdict(name: str) -> Verdict:
    return Verdict(name, REMEDIES[name])
