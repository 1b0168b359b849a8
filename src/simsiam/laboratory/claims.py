"""Claims of the paper as statistical tests, fixed before the runs. Loads no torch.

A claim takes one number from every seed: a weighted sum of a metric over one or more cells, so
cells are paired by seed. It holds if the 95 % interval of the mean lies inside the claim's range,
does not hold if it lies outside, and is within noise otherwise. With fewer than two seeds there is
no interval, and the claim is within noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum, inf, sqrt
from statistics import fmean, stdev
from typing import Any, NamedTuple

# Seed -> metric -> number; None or absent if it is unknown.
SeedValues = Mapping[int, Mapping[str, Any]]
MetricValues = Mapping[str, SeedValues]  # by cell
HOLDS, DOES_NOT_HOLD, WITHIN_NOISE = "holds", "does not hold", "within noise"


class ClaimResult(NamedTuple):
    """The outcome of testing a claim."""

    verdict: str  # HOLDS, DOES_NOT_HOLD or WITHIN_NOISE
    mean: float | None  # over seeds; None without seeds
    interval: tuple[float, float] | None  # of 95 %; None with fewer than two seeds
    n: int  # seeds


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The claim that `low` < sum over cells of weight * metric < `high`."""

    statement: str  # in the words of the paper
    weights: Mapping[str, float]  # by cell
    metric: str = "linear"
    low: float = -inf
    high: float = inf

    @property
    def rule(self) -> str:
        """The inequality as text."""
        terms = [
            f"{'+' if w > 0 else '−'} {'' if abs(w) == 1 else f'{abs(w):g} '}[{c}]"
            for c, w in self.weights.items()
        ]
        total = " ".join(terms).removeprefix("+ ")
        low = f"{self.low:g} < " if self.low > -inf else ""
        high = f" < {self.high:g}" if self.high < inf else ""
        return f"{self.metric}: {low}{total}{high}"

    def evaluate(self, values: MetricValues) -> ClaimResult:
        """Test the claim on the seeds that have the metric in all of its cells.

        Args:
            values: The measured metrics.

        Returns:
            The verdict, with the mean and its interval.
        """
        cells = [values.get(cell, {}) for cell in self.weights]
        totals = []
        for seed in sorted(set.intersection(*map(set, cells))):
            numbers = [x for cell in cells if (x := cell[seed].get(self.metric)) is not None]
            if len(numbers) == len(cells):
                weights = self.weights.values()
                totals.append(fsum(w * x for w, x in zip(weights, numbers, strict=True)))
        if len(totals) < 2:
            return ClaimResult(WITHIN_NOISE, fmean(totals) if totals else None, None, len(totals))
        low, high = confidence_interval(totals)
        inside, outside = self.low < low and high < self.high, high <= self.low or self.high <= low
        verdict = HOLDS if inside else DOES_NOT_HOLD if outside else WITHIN_NOISE
        return ClaimResult(verdict, fmean(totals), (low, high), len(totals))


def confidence_interval(numbers: Sequence[float]) -> tuple[float, float]:
    """Compute the 95 % confidence interval of a mean by Student's t.

    Args:
        numbers: At least two numbers.

    Returns:
        The lower and the upper end.
    """
    from scipy.stats import t

    half = float(t.ppf(0.975, len(numbers) - 1)) * stdev(numbers) / sqrt(len(numbers))
    return fmean(numbers) - half, fmean(numbers) + half


def claim_greater(
    statement: str, better: str, worse: str, margin: float = 0.0, metric: str = "linear"
) -> Claim:
    """Claim that one cell exceeds another by more than a margin.

    Args:
        statement: The claim in the words of the paper.
        better: The cell that is higher.
        worse: The cell that is lower.
        margin: The smallest difference, in units of the metric.
        metric: The metric.

    Returns:
        The claim.
    """
    return Claim(statement=statement, weights={better: 1, worse: -1}, metric=metric, low=margin)


def claim_similar(
    statement: str, cell: str, other_cell: str, margin: float, metric: str = "linear"
) -> Claim:
    """Claim that two cells differ by less than a margin.

    Args:
        statement: The claim in the words of the paper.
        cell: One cell.
        other_cell: The other cell.
        margin: The largest difference, in units of the metric.
        metric: The metric.

    Returns:
        The claim.
    """
    return Claim(
        statement=statement,
        weights={cell: 1, other_cell: -1},
        metric=metric,
        low=-margin,
        high=margin,
    )


def claim_in_range(
    statement: str, cell: str, metric: str, *, low: float = -inf, high: float = inf
) -> Claim:
    """Claim that a metric of one cell lies in a range.

    Args:
        statement: The claim in the words of the paper.
        cell: The cell.
        metric: The metric.
        low: The lower end of the range.
        high: The upper end of the range.

    Returns:
        The claim.
    """
    return Claim(statement=statement, weights={cell: 1}, metric=metric, low=low, high=high)


def claim_true(statement: str, cell: str, metric: str) -> Claim:
    """Claim that a metric, 1 for yes and 0 for no, is yes for every seed.

    Args:
        statement: The claim in the words of the paper.
        cell: The cell.
        metric: The metric.

    Returns:
        The claim.
    """
    return claim_in_range(statement, cell, metric, low=0.5)


def claim_false(statement: str, cell: str, metric: str) -> Claim:
    """Claim that a metric, 1 for yes and 0 for no, is no for every seed.

    Args:
        statement: The claim in the words of the paper.
        cell: The cell.
        metric: The metric.

    Returns:
        The claim.
    """
    return claim_in_range(statement, cell, metric, high=0.5)
