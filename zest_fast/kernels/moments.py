"""What the kernels return: named float64 statistics. The same definitions as csrc/moments.h, and no tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

_NAN = math.nan


@dataclass(frozen=True, slots=True)
class Moments:
    """Sufficient statistics of the entries x of one tensor.

    An empty tensor has count 0 and zero sums; its means and deviations are NaN. One entry that is NaN or infinite
    turns every statistic into NaN, and ``nonfinite`` counts such entries.
    """

    count: float
    """Number of entries; an expanded entry counts as often as it appears."""
    mean: float
    m2: float
    """Sum of (x - mean)²."""
    abs_mean: float
    abs_m2: float
    """Sum of (|x| - abs_mean)²."""
    nonfinite: float = 0.0

    @classmethod
    def checked(cls, count: float, mean: float, m2: float, abs_mean: float, abs_m2: float, nonfinite: float) -> Moments:
        """The moments as a kernel found them, made NaN where an entry was not finite or none was there."""
        if nonfinite:
            return cls(count, _NAN, _NAN, _NAN, _NAN, nonfinite)
        if count == 0:
            return cls(0.0, _NAN, 0.0, _NAN, 0.0, 0.0)
        return cls(count, mean, m2, abs_mean, abs_m2, 0.0)

    @property
    def sum(self) -> float:
        """Sum of x."""
        return self.count * self.mean if self.count else 0.0

    @property
    def abs_sum(self) -> float:
        """Sum of |x|."""
        return self.count * self.abs_mean if self.count else 0.0

    @property
    def std(self) -> float:
        """Standard deviation of x, divided by the count (correction 0)."""
        return math.sqrt(self.m2 / self.count) if self.count else _NAN

    @property
    def abs_std(self) -> float:
        """Standard deviation of |x|, correction 0."""
        return math.sqrt(self.abs_m2 / self.count) if self.count else _NAN

    @property
    def norm(self) -> float:
        """Euclidean norm of x."""
        return math.sqrt(self.m2 + self.count * self.mean**2) if self.count else 0.0

    def merge(self, other: Moments) -> Moments:
        """Moments of both tensors together, by Chan's formula (Chan, Golub, LeVeque 1983)."""
        if self.count == 0 or other.count == 0:
            return self if other.count == 0 else other
        count = self.count + other.count
        share = other.count / count
        delta, abs_delta = other.mean - self.mean, other.abs_mean - self.abs_mean
        return Moments.checked(
            count,
            self.mean + delta * share,
            self.m2 + other.m2 + delta**2 * self.count * share,
            self.abs_mean + abs_delta * share,
            self.abs_m2 + other.abs_m2 + abs_delta**2 * self.count * share,
            self.nonfinite + other.nonfinite,
        )


@dataclass(frozen=True, slots=True)
class GradientMoments:
    """Statistics of a weight W and of its gradient dW that need both at once."""

    gradient: Moments
    """Of dW."""
    weight_mean: float
    weight_m2: float
    """Sum of (W - weight_mean)²."""
    weight_nonfinite: float
    product_sum: float
    """Sum of W ⊙ dW."""
    product_abs_sum: float
    """Sum of |W ⊙ dW|, which is snip."""

    @classmethod
    def checked(
        cls, gradient: Moments, weight_mean: float, weight_m2: float, weight_nonfinite: float, *products: float
    ) -> GradientMoments:
        """The statistics as a kernel found them, NaN where an entry that enters them was not finite."""
        if weight_nonfinite:
            weight_mean = weight_m2 = _NAN
        elif gradient.count == 0:
            weight_mean = _NAN
        if weight_nonfinite or gradient.nonfinite:
            products = (_NAN, _NAN)
        return cls(gradient, weight_mean, weight_m2, weight_nonfinite, *products)

    @classmethod
    def from_row(cls, *row: float) -> GradientMoments:
        """``checked`` of a row as kernels write it: the six of dW, then the rest."""
        return cls.checked(Moments.checked(*row[:6]), *row[6:])

    def merge(self, other: GradientMoments) -> GradientMoments:
        """The statistics of two parts of one weight together."""
        n, other_n = self.gradient.count, other.gradient.count
        if n == 0 or other_n == 0:
            return self if other_n == 0 else other
        share, delta = other_n / (n + other_n), other.weight_mean - self.weight_mean
        return GradientMoments.checked(
            self.gradient.merge(other.gradient),
            self.weight_mean + delta * share,
            self.weight_m2 + other.weight_m2 + delta**2 * n * share,
            self.weight_nonfinite + other.weight_nonfinite,
            self.product_sum + other.product_sum,
            self.product_abs_sum + other.product_abs_sum,
        )

    @property
    def weight_std(self) -> float:
        """Standard deviation of W, correction 0."""
        return math.sqrt(self.weight_m2 / self.gradient.count) if self.gradient.count else _NAN

    @property
    def weight_norm(self) -> float:
        """Euclidean norm of W."""
        n = self.gradient.count
        return math.sqrt(self.weight_m2 + n * self.weight_mean**2) if n else 0.0


@dataclass(frozen=True, slots=True)
class SquaredProducts:
    """Of S [N, K] = Σ_p Y⊙G of one output of a layer."""

    total: float
    """Σ_nk S²."""
    samples: float
    """N."""

    @property
    def fisher(self) -> float:
        """Σ_k ½ mean_n S² (Theis et al. 2018)."""
        return 0.5 * self.total / self.samples if self.samples else 0.0

    def merge(self, other: SquaredProducts) -> SquaredProducts:
        """Those of both batches together."""
        return SquaredProducts(self.total + other.total, self.samples + other.samples)
