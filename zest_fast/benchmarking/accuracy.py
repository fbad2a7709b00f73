"""Right before fast: how far statistics are from the float64 reference, and how far they may be.

An error is relative: of a mean to the deviation, of a mean product to the mean of its magnitudes, of S to Σ|Y⊙G| of the
same sample and channel, of the rest to the value itself. The tolerance is that of whole profiles, 2e-5. A result that
comes back in the 16 bits of its input is allowed four units in the last place of these, since no sum of it can be
closer to the reference than its own rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zest_fast.foundation.nearest import nearest
from zest_fast.kernels import GradientMoments, Moments

TOLERANCE = 2e-5
_LAST_PLACES = 4
_UNIT_OF_A_MEAN = {"mean": "std", "weight_mean": "weight_std"}


@dataclass(frozen=True)
class Verdict:
    """Whether a result is right; `where` is the statistic with the worst error."""

    error: float
    tolerance: float
    where: str

    @property
    def match(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        return f"{self.where} is off by {self.error:.2g}, and {self.tolerance:.2g} is allowed"


def statistics_of(found: Moments | GradientMoments) -> dict[str, float]:
    """What kernels return, by the names that peers and kernels of users give the same statistics."""
    if isinstance(found, Moments):
        return {"mean": found.mean, "std": found.std, "abs_mean": found.abs_mean, "abs_std": found.abs_std}
    return {
        **statistics_of(found.gradient),
        "norm": found.gradient.norm,
        "weight_mean": found.weight_mean,
        "weight_std": found.weight_std,
        "weight_norm": found.weight_norm,
        "plain": found.product_sum / found.gradient.count if found.gradient.count else math.nan,
        "snip": found.product_abs_sum,
    }


def judge(found: Any, expected: Mapping[str, float], dtype: torch.dtype, count: int) -> Verdict:
    """The statistics that a kernel found of `count` entries of type `dtype`, against the reference's.

    found: a mapping of name to number or tensor of one entry. Raises TypeError for anything else, ValueError where
    names are missing or unknown.
    """
    if not isinstance(found, Mapping):
        raise TypeError(f"it returned a {type(found).__name__}; a mapping of {', '.join(expected)} is needed")
    for name in found:
        if name not in expected:
            raise ValueError(f"it returned {name!r}, which is unknown; {nearest(str(name), expected)}")
    if missing := [name for name in expected if name not in found]:
        raise ValueError(f"it returned no {', '.join(missing)}")
    for name, value in found.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"it returned {name!r} of shape {list(value.shape)}; one number is needed")
    verdicts = [_of_one(name, found[name], expected, dtype, count) for name in expected]
    return max(verdicts, key=lambda verdict: verdict.error / verdict.tolerance)


def _of_one(name: str, value: Any, expected: Mapping[str, float], dtype: torch.dtype, count: int) -> Verdict:
    target = expected[name]
    if name == "plain":
        unit = expected["snip"] / count
    else:
        unit = expected.get(_UNIT_OF_A_MEAN.get(name, name), math.nan) or abs(target)
    tolerance = tolerance_of(dtype, value.dtype if isinstance(value, Tensor) else None)
    return Verdict(relative_error(float(value), target, abs(unit)), tolerance, name)


def judge_products(found: Any, expected: Tensor, magnitude: Tensor, dtype: torch.dtype) -> Verdict:
    """S [N, K] of outputs of type `dtype` against the reference's; magnitude: Σ|Y⊙G| [N, K].

    Raises TypeError for anything but a tensor, ValueError for another shape.
    """
    if not isinstance(found, Tensor):
        raise TypeError(f"it returned a {type(found).__name__}; the tensor S [N, K] is needed")
    if found.shape != expected.shape:
        raise ValueError(
            f"it returned {list(found.shape)}; S [N, K] is needed, which is {list(expected.shape)} for this input"
        )
    errors = (found.double() - expected).abs() / magnitude.clamp_min(torch.finfo(torch.float64).tiny)
    return Verdict(_or_infinite(float(errors.nan_to_num(math.inf).max())), tolerance_of(dtype, found.dtype), "S")


def tolerance_of(of_input: torch.dtype, of_result: torch.dtype | None) -> float:
    """of_result: None = a number of Python's."""
    if of_result is None or of_result != of_input or of_result not in (torch.bfloat16, torch.float16):
        return TOLERANCE
    return max(TOLERANCE, _LAST_PLACES * torch.finfo(of_result).eps)


def relative_error(value: float, target: float, unit: float) -> float:
    """|value - target| / unit; infinite where one of them is no number, or the unit is zero and they differ."""
    difference = abs(value - target)
    if difference == 0:
        return 0.0
    return difference / unit if unit > 0 and math.isfinite(difference) else math.inf


def worst_error(found: Moments | GradientMoments, expected: Moments | GradientMoments) -> float:
    """Of two results of kernels; infinite where they count other numbers of entries."""
    counts = [one.count if isinstance(one, Moments) else one.gradient.count for one in (found, expected)]
    if counts[0] != counts[1]:
        return math.inf
    return judge(statistics_of(found), statistics_of(expected), torch.float64, int(counts[0])).error


def _or_infinite(error: float) -> float:
    return error if math.isfinite(error) else math.inf
