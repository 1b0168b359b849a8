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

Values = Mapping[str, Mapping[int, Mapping[str, Any]]]  # cell -> seed -> metric -> number, None or absent if not known
HOLDS, NOT, NOISE = "holds", "does not hold", "within noise"


class Ruling(NamedTuple):
    verdict: str  # HOLDS, NOT or NOISE
    mean: float | None
    interval: tuple[float, float] | None
    n: int  # seeds


@dataclass(frozen=True, kw_only=True)
class Claim:
    """`low` < the sum of weight * metric over cells < `high`."""

    says: str
    of: Mapping[str, float]  # cell -> weight
    metric: str = "linear"
    low: float = -inf
    high: float = inf

    @property
    def rule(self) -> str:
        """The predicate in words."""
        terms = [f"{'+' if w > 0 else '−'} {'' if abs(w) == 1 else f'{abs(w):g} '}[{c}]" for c, w in self.of.items()]
        total = " ".join(terms).removeprefix("+ ")
        low, high = (f"{self.low:g} < " if self.low > -inf else ""), (f" < {self.high:g}" if self.high < inf else "")
        return f"{self.metric}: {low}{total}{high}"

    def judge(self, values: Values) -> Ruling:
        """What the seeds that have the metric in all cells of the claim say."""
        cells = [values.get(cell, {}) for cell in self.of]
        found = []
        for seed in sorted(set.intersection(*map(set, cells))):
            numbers = [x for cell in cells if (x := cell[seed].get(self.metric)) is not None]
            if len(numbers) == len(cells):
                found.append(fsum(w * x for w, x in zip(self.of.values(), numbers, strict=True)))
        if len(found) < 2:
            return Ruling(NOISE, fmean(found) if found else None, None, len(found))
        low, high = interval(found)
        inside, outside = self.low < low and high < self.high, high <= self.low or self.high <= low
        return Ruling(HOLDS if inside else NOT if outside else NOISE, fmean(found), (low, high), len(found))


def interval(numbers: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of two or more numbers, by Student's t."""
    from scipy.stats import t

    half = float(t.ppf(0.975, len(numbers) - 1)) * stdev(numbers) / sqrt(len(numbers))
    return fmean(numbers) - half, fmean(numbers) + half


def above(says: str, better: str, worse: str, by: float = 0.0, metric: str = "linear") -> Claim:
    """One cell exceeds another by more than `by`."""
    return Claim(says=says, of={better: 1, worse: -1}, metric=metric, low=by)


def alike(says: str, one: str, other: str, within: float, metric: str = "linear") -> Claim:
    """Two cells differ by less than `within`."""
    return Claim(says=says, of={one: 1, other: -1}, metric=metric, low=-within, high=within)


def lies(says: str, cell: str, metric: str, *, low: float = -inf, high: float = inf) -> Claim:
    """A metric of one cell lies in a range."""
    return Claim(says=says, of={cell: 1}, metric=metric, low=low, high=high)


def is_so(says: str, cell: str, metric: str) -> Claim:
    """Of a metric that is 1 for yes and 0 for no: yes, for every seed."""
    return lies(says, cell, metric, low=0.5)


def is_not(says: str, cell: str, metric: str) -> Claim:
    """No, for every seed."""
    return lies(says, cell, metric, high=0.5)
