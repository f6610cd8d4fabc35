"""Percentiles and intervals of latency samples. Latencies are skewed: nothing here assumes a normal
distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def percentile(samples: Sequence[float], q: float) -> float:
    """The q-th percentile (0..100) with linear interpolation between order statistics."""
    return float(np.percentile(np.asarray(samples, dtype=np.float64), q))


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """(low, high, confidence reached) of the median, from order statistics.

    With n samples, the number below the median is Binomial(n, 1/2), so [x_(k), x_(n+1-k)] covers the median
    with probability 1 - 2 P(B < k) whatever the distribution. k is the largest rank that still reaches
    `confidence`; when there are too few samples (under 6 for 95 %), the range is returned with the confidence
    it has.
    """
    ordered = sorted(samples)
    n = len(ordered)
    k, tail = 1, _binomial_half(n, 0)
    while k < (n + 1) // 2 and 1 - 2 * (tail + _binomial_half(n, k)) >= confidence:
        tail += _binomial_half(n, k)
        k += 1
    return ordered[k - 1], ordered[n - k], max(0.0, 1 - 2 * tail)


def _binomial_half(n: int, k: int) -> float:
    """C(n, k) / 2^n."""
    return math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))


def paired_ratio_interval(
    samples: Sequence[float], baseline: Sequence[float], confidence: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Interval of median(samples) / median(baseline) when sample i of both was taken in the same round.

    Rounds are resampled, so what slows both models in one round cancels. Deterministic (fixed seed).
    """
    a, b = np.asarray(samples), np.asarray(baseline)
    if len(a) != len(b):
        raise ValueError(f"paired samples differ in number: {len(a)} and {len(b)}")
    rounds = np.random.default_rng(0).integers(0, len(a), (resamples, len(a)))
    return _quantiles(np.median(a[rounds], axis=1) / np.median(b[rounds], axis=1), confidence)


def ratio_interval(
    samples: Sequence[float], baseline: Sequence[float], confidence: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Interval of median(samples) / median(baseline), the two taken apart: each is resampled on its own."""
    rng = np.random.default_rng(0)
    a, b = np.asarray(samples), np.asarray(baseline)
    above = np.median(a[rng.integers(0, len(a), (resamples, len(a)))], axis=1)
    below = np.median(b[rng.integers(0, len(b), (resamples, len(b)))], axis=1)
    return _quantiles(above / below, confidence)


def _quantiles(ratios: np.ndarray, confidence: float) -> tuple[float, float]:
    edge = 50 * (1 - confidence)
    low, high = np.percentile(ratios, [edge, 100 - edge])
    return float(low), float(high)


def settled(samples: Sequence[float], window: int = 5, tolerance: float = 0.05) -> bool:
    """Whether the medians of the last two windows agree within `tolerance`: the warm-up may end."""
    if len(samples) < 2 * window:
        return False
    before, now = np.median(samples[-2 * window : -window]), np.median(samples[-window:])
    return bool(abs(now - before) <= tolerance * before)
