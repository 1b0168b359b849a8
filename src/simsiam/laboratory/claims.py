"""A sentence of the paper as a predicate, with its rule and margin written down before the runs. Loads no torch.

Of every seed a claim takes one number: a metric of one cell, or of two or more, weighted, which pairs them by seed. It
holds if the 95 % interval of the mean lies inside the claim's range, does not hold if it lies outside, and is within
noise otherwise. Fewer than two seeds have no interval: within noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum, inf, sqrt
from statistics import fmean, stdev
from typing import Any, NamedTuple

MetricValues = Mapping[
    str, Mapping[int, Mapping[str, Any]]
]  # cell -> seed -> metric -> number, None or absent if not known
HOLDS, DOES_NOT_HOLD, WITHIN_NOISE = "holds", "does not hold", "within noise"


class ClaimResult(NamedTuple):
    verdict: str  # HOLDS, NOT or NOISE
    mean: float | None
    interval: tuple[float, float] | None
    n: int  # seeds


@dataclass(frozen=True, kw_only=True)
class Claim:
    """`low` < the sum of weight * metric over cells < `high`."""

    statement: str
    weights: Mapping[str, float]  # cell -> weight
    metric: str = "linear"
    low: float = -inf
    high: float = inf

    @property
    def rule(self) -> str:
        """The predicate in words."""
        terms = [
            f"{'+' if w > 0 else '−'} {'' if abs(w) == 1 else f'{abs(w):g} '}[{c}]"
            for c, w in self.weights.items()
        ]
        total = " ".join(terms).removeprefix("+ ")
        low, high = (
            (f"{self.low:g} < " if self.low > -inf else ""),
            (f" < {self.high:g}" if self.high < inf else ""),
        )
        return f"{self.metric}: {low}{total}{high}"

    def evaluate(self, values: MetricValues) -> ClaimResult:
        """What the seeds that have the metric in all cells of the claim say."""
        cells = [values.get(cell, {}) for cell in self.weights]
        found = []
        for seed in sorted(set.intersection(*map(set, cells))):
            numbers = [x for cell in cells if (x := cell[seed].get(self.metric)) is not None]
            if len(numbers) == len(cells):
                found.append(
                    fsum(w * x for w, x in zip(self.weights.values(), numbers, strict=True))
                )
        if len(found) < 2:
            return ClaimResult(WITHIN_NOISE, fmean(found) if found else None, None, len(found))
        low, high = confidence_interval(found)
        inside, outside = self.low < low and high < self.high, high <= self.low or self.high <= low
        return ClaimResult(
            HOLDS if inside else DOES_NOT_HOLD if outside else WITHIN_NOISE,
            fmean(found),
            (low, high),
            len(found),
        )


def confidence_interval(numbers: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of two or more numbers, by Student's t."""
    from scipy.stats import t

    half = float(t.ppf(0.975, len(numbers) - 1)) * stdev(numbers) / sqrt(len(numbers))
    return fmean(numbers) - half, fmean(numbers) + half


def claim_greater(
    statement: str, better: str, worse: str, margin: float = 0.0, metric: str = "linear"
) -> Claim:
    """One cell exceeds another by more than `by`."""
    return Claim(statement=statement, weights={better: 1, worse: -1}, metric=metric, low=margin)


def claim_similar(
    statement: str, cell: str, other_cell: str, margin: float, metric: str = "linear"
) -> Claim:
    """Two cells differ by less than `within`."""
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
    """A metric of one cell lies in a range."""
    return Claim(statement=statement, weights={cell: 1}, metric=metric, low=low, high=high)


def claim_true(statement: str, cell: str, metric: str) -> Claim:
    """Of a metric that is 1 for yes and 0 for no: yes, for every seed."""
    return claim_in_range(statement, cell, metric, low=0.5)


def claim_false(statement: str, cell: str, metric: str) -> Claim:
    """No, for every seed."""
    return claim_in_range(statement, cell, metric, high=0.5)
