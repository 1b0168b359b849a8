"""Confidence intervals."""

from math import sqrt


def wilson_interval(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the confidence interval of a proportion (Wilson, 1927).

    Args:
        correct: Number of successes.
        n: Number of trials, at least 1.
        z: Quantile of the normal distribution; the default gives 95 % confidence.

    Returns:
        The lower and the upper end, from 0 to 1.
    """
    p, weight = correct / n, 1 / (1 + z * z / n)
    center = weight * (p + z * z / (2 * n))
    half = weight * z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return center - half, center + half
