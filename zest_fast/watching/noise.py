"""The gradient noise scale (McCandlish, Kaplan, Amodei et al. 2018, An Empirical Model of Large-Batch Training, A.1).

B_simple = tr(Σ) / |G|², G being the gradient of the expected loss and Σ the covariance of the gradient of one sample.
Both follow without bias from two batch sizes: |g|² is |G|² + tr(Σ)/B in the mean. Numerator and denominator are
averaged apart, since the mean of ratios is not the ratio of means.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

STEPS = 100
"""Logged steps over which numerator and denominator are averaged: the noise scale grows during training."""


@dataclass(frozen=True)
class Estimate:
    """Without bias of |G|² and of tr(Σ)."""

    square: float
    trace: float


def estimate(squares: Sequence[float], square_of_mean: float, sizes: Sequence[float]) -> Estimate:
    """From the parts of one batch that weigh the same.

    squares: |g_i|² of the mean gradient of each part. square_of_mean: |mean g_i|² over all parts. sizes: samples of
    each part; unequal ones enter by their harmonic mean.
    """
    parts = len(squares)
    mean = sum(squares) / parts
    square = (parts * square_of_mean - mean) / (parts - 1)
    return Estimate(square, (mean - square) / (sum(1 / size for size in sizes) / len(sizes)))


def ratio_and_error(squares: np.ndarray, traces: np.ndarray) -> tuple[float, float]:
    """mean(traces) / mean(squares) and its standard error by the delta method; NaN where the mean square is not above 0
    (too few steps to tell the gradient from its noise), the error also for one step."""
    n, square, trace = len(squares), float(np.mean(squares)), float(np.mean(traces))
    if not square > 0:
        return math.nan, math.nan
    ratio = trace / square
    if n < 2:
        return ratio, math.nan
    return ratio, float(np.std(traces - ratio * squares, ddof=1)) / (math.sqrt(n) * square)


class RunningNoise:
    """Estimates of the last logged steps, by layer (None: all together)."""

    def __init__(self) -> None:
        self._estimates: dict[Hashable, deque[Estimate]] = {}

    def add(self, key: Hashable, found: Estimate) -> None:
        if math.isfinite(found.square) and math.isfinite(found.trace):
            self._estimates.setdefault(key, deque(maxlen=STEPS)).append(found)

    def scale(self, key: Hashable) -> tuple[float, float]:
        """The noise scale and its standard error."""
        found = self._estimates.get(key)
        if not found:
            return math.nan, math.nan
        return ratio_and_error(np.array([e.square for e in found]), np.array([e.trace for e in found]))
