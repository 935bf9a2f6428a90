"""Means over seeds, and how sure they are: 95 % confidence intervals by Student's t."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev

CONFIDENCE = 0.95
HALVINGS = 60
"""of an angle below a right one, by which it is as exact as a float"""


@dataclass(frozen=True)
class Estimate:
    """The mean of `n` samples; its confidence interval reaches `half_width` to both sides.

    One sample has no half width.
    """

    mean: float
    half_width: float | None
    n: int


def estimate(samples: Sequence[float]) -> Estimate | None:
    """The mean and its 95 % confidence interval; None where there are no samples."""
    if not samples:
        return None
    n = len(samples)
    half_width = t_quantile(n - 1) * stdev(samples) / math.sqrt(n) if n > 1 else None
    return Estimate(fmean(samples), half_width, n)


@cache
def t_quantile(degrees: int) -> float:
    """The t that |T| exceeds with a probability of 5 %, for T of Student's distribution.

    Found by halving the angle of Abramowitz and Stegun, with which their probability grows.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(HALVINGS):
        angle = (low + high) / 2
        low, high = (angle, high) if probability_within(angle, degrees) < CONFIDENCE else (low, angle)
    return math.sqrt(degrees) * math.tan(low)


def probability_within(angle: float, degrees: int) -> float:
    """The probability of |T| <= t, where t is the tangent of `angle` times the root of the degrees.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 for odd degrees, 26.7.4 for even ones.
    """
    odd = degrees % 2
    cosine = math.cos(angle)
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + math.sin(angle) * total)
