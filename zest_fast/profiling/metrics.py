"""Statistics of a layer -> named metrics. A new metric is one line here if the statistics have it.

Definitions and sources: docs/profile.md; the paper is "ZEST: zero-shot sparse fine-tuning".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from zest_fast.foundation.nearest import nearest
from zest_fast.kernels import Moments

NAN = math.nan
_UNKNOWN = Moments(NAN, NAN, NAN, NAN, NAN)


@dataclass(frozen=True)
class Agreement:
    """Of two gradients a and b of one weight."""

    dot: float = NAN
    """Σ a⊙b."""
    sign_dot: float = NAN
    """Mean of Σ sign(a)⊙b and Σ a⊙sign(b)."""
    norms: float = NAN
    """‖a‖ ‖b‖."""


_NO_AGREEMENT = Agreement()


@dataclass
class LayerStatistics:
    """What one pass knows of a layer; NaN where it does not know. Gradients are those of the unscaled loss."""

    count: float = NAN
    """Entries of the weight W."""
    weight_mean: float = NAN
    weight_std: float = NAN
    weight_norm: float = NAN
    output: Moments = _UNKNOWN
    """Of the output Y before any non-linearity, all uses."""
    gradient: Moments = _UNKNOWN
    """Of dW = ∂L/∂W, all uses of the weight together."""
    product_sum: float = NAN
    """Σ W⊙dW."""
    product_abs_sum: float = NAN
    """Σ |W⊙dW|."""
    fisher: float = NAN
    """Σ_k ½ mean_n S_nk² with S = Σ_p Y⊙G (Theis et al. 2018)."""
    grasp: float = NAN
    """−Σ W⊙(Hg), g the gradient of all profiled layers and H its derivative (Wang et al. 2020)."""
    synflow: float = NAN
    """Σ |W⊙∂R/∂W|, R = the sum of the outputs for positive weights and an input of ones (Tanaka et al. 2020)."""
    agreement: Agreement = _NO_AGREEMENT
    """Of the gradients of the even and of the odd samples."""


WEIGHT, OUTPUT, GRADIENT, GRADIENT_ABS, PRODUCT, PRODUCT_ABS, FISHER = (
    "weight", "output", "gradient", "gradient_abs", "product", "product_abs", "fisher",
)  # fmt: skip
BACKWARD = frozenset({GRADIENT, GRADIENT_ABS, PRODUCT, PRODUCT_ABS, FISHER})
GRASP, SYNFLOW, AGREEMENT = "grasp", "synflow", "agreement"
ON_REQUEST = frozenset({GRASP, SYNFLOW, AGREEMENT})
"""What takes passes of its own (on_request/)."""
NEEDS_TILES = frozenset({GRADIENT_ABS, PRODUCT_ABS})
"""The rest of a linear layer's gradient statistics have closed forms in its input and output gradient."""


@dataclass(frozen=True)
class Metric:
    value: Callable[[LayerStatistics], float]
    needs: frozenset[str]


def _metric(*needs: str) -> Callable[[Callable[[LayerStatistics], float]], Metric]:
    return lambda value: Metric(value, frozenset(needs))


def _ratio(a: float, b: float) -> float:
    """a / b as IEEE has it, for b >= 0."""
    return a / b if b else a * math.inf


METRICS: dict[str, Metric] = {
    "weight_mean": _metric(WEIGHT)(lambda s: s.weight_mean),
    "weight_std": _metric(WEIGHT)(lambda s: s.weight_std),
    "act_mean": _metric(OUTPUT)(lambda s: s.output.mean),
    "act_std": _metric(OUTPUT)(lambda s: s.output.std),
    "act_abs_mean": _metric(OUTPUT)(lambda s: s.output.abs_mean),
    "act_abs_std": _metric(OUTPUT)(lambda s: s.output.abs_std),
    "grad_mean": _metric(GRADIENT)(lambda s: s.gradient.mean),
    "grad_std": _metric(GRADIENT)(lambda s: s.gradient.std),
    "grad_abs_mean": _metric(GRADIENT_ABS)(lambda s: s.gradient.abs_mean),
    "grad_abs_std": _metric(GRADIENT_ABS)(lambda s: s.gradient.abs_std),
    "grad_norm": _metric(GRADIENT)(lambda s: s.gradient.norm),
    "plain": _metric(PRODUCT)(lambda s: _ratio(s.product_sum, s.count)),
    "snip": _metric(PRODUCT_ABS)(lambda s: s.product_abs_sum),
    "fisher": _metric(FISHER)(lambda s: s.fisher),
    "rgn": _metric(GRADIENT, WEIGHT)(lambda s: _ratio(s.gradient.norm, s.weight_norm)),
    "grasp": _metric(GRASP)(lambda s: s.grasp),
    "synflow": _metric(SYNFLOW)(lambda s: s.synflow),
    "agree_dot": _metric(AGREEMENT)(lambda s: s.agreement.dot),
    "agree_sign": _metric(AGREEMENT)(lambda s: s.agreement.sign_dot),
    "agree_cos": _metric(AGREEMENT)(lambda s: _ratio(s.agreement.dot, s.agreement.norms)),
}
ALL_METRIC_NAMES = tuple(METRICS)
METRIC_NAMES = tuple(name for name, metric in METRICS.items() if not metric.needs & ON_REQUEST)
"""What one pass yields."""


def select_metrics(metrics: Iterable[str] | str | None) -> list[str]:
    """The names that were asked for, in the order of METRICS; None = those of one pass, "all" = every one.

    Raises:
        TypeError: not an iterable of names.
        ValueError: an unknown name (the nearest is suggested) or none at all.
    """
    if metrics is None:
        return list(METRIC_NAMES)
    if isinstance(metrics, str):
        if metrics == "all":
            return list(ALL_METRIC_NAMES)
        raise TypeError(f'metrics is a string; pass a list, [{metrics!r}], or "all"')
    metrics = list(metrics)
    if not metrics:
        raise ValueError("metrics is empty; pass None for all that one pass yields")
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"metrics: unknown name {name!r}; {nearest(name, ALL_METRIC_NAMES)}")
    return [name for name in ALL_METRIC_NAMES if name in metrics]


def statistics_needed(metrics: Iterable[str]) -> frozenset[str]:
    """The kinds of statistics that these metrics are computed from."""
    return frozenset().union(*(METRICS[name].needs for name in metrics))
