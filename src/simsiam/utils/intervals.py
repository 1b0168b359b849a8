"""Confidence intervals."""

from math import sqrt


def wilson_interval(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval for a share of which `right` of n were seen, with 95 % confidence (Wilson, 1927)."""
    p, weight = correct / n, 1 / (1 + z * z / n)
    center, half = (
        weight * (p + z * z / (2 * n)),
        weight * z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)),
    )
    return center - half, center + half
