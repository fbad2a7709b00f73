"""What the ranker sees of a layer: metrics and sizes relative to the other layers of its profile. No torch.

Three views of each metric: its rank in the group, its rank among the layers of its kind, and the z-score of its
logarithm; where the layer is known a fourth, how far that z-score is from what is usual for the layer. None of them
changes when the loss or the batch is scaled. Beside the metrics of the profile stand FIRST_ORDER, what theory predicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from zest_fast.ranking.groups import Group

SIGNED_METRICS = (
    *("weight_mean", "act_mean", "grad_mean", "plain", "grasp", "agree_dot", "agree_sign", "agree_cos", "agreed_gain"),
)
METRICS = (
    *("weight_mean", "weight_std", "act_mean", "act_std", "act_abs_mean", "act_abs_std"),
    *("grad_mean", "grad_std", "grad_abs_mean", "grad_abs_std", "grad_norm"),
    *("plain", "snip", "fisher", "rgn"),
    *("grasp", "synflow", "agree_dot", "agree_sign", "agree_cos"),
)
ON_REQUEST = METRICS[-5:]
"""A default profile holds the others."""
STATIC_METRICS = ("weight_mean", "weight_std", "synflow")
"""Constants of the model, whatever the data: within one model they tell which layer it is."""


def is_of_weights(feature: str) -> bool:
    """Whether a feature is of a metric that is a constant of the model, whatever the data."""
    return any(feature.startswith(f"{metric}_") for metric in STATIC_METRICS)


GRADIENT_L1, STEP_GAIN, AGREED_GAIN = FIRST_ORDER = ("gradient_l1", "step_gain", "agreed_gain")
"""By how much the loss falls, to first order, when every weight of a layer moves by the same step against the sign of
its gradient, as Adam does at first: Σ|dW| x step. The step is 1, or the layer's rate in the recipe of the sweeps, which
is proportional to RMS(W) up to a limit. `agreed_gain` is step x Σ sign(dW_a)·dW_b of two halves of the batch, so that
it does not count noise as progress, and can be negative; it needs agreement."""
EXPECTED_RANKS = tuple(f"{name}_rank" for name in FIRST_ORDER)
_LARGEST_RMS = 0.2
"""Where the limit of that rate begins: max_layer_lr over layer_lr_factor of `sweeping.recipe.Recipe`."""

DYNAMIC_METRICS = (*(metric for metric in METRICS if metric not in STATIC_METRICS), *FIRST_ORDER)

LAYER_PRIOR, KIND_PRIOR = PRIORS = ("layer_prior", "kind_prior")
STRUCTURE = (
    *("relative_depth", "numel_rank", "numel_rank_in_kind", "numel_z", "fan_in_z", "fan_out_z"),
    *("widening", "kernel_area", "is_linear", "is_depthwise"),
)
SURPRISES = tuple(f"{metric}_surprise" for metric in DYNAMIC_METRICS)
FEATURES = (
    *PRIORS,
    *STRUCTURE,
    *(f"{metric}_{view}" for metric in (*METRICS, *FIRST_ORDER) for view in ("rank", "rank_in_kind", "z")),
    *SURPRISES,
)
OF_KNOWN_LAYERS = (LAYER_PRIOR, *SURPRISES)
"""NaN where the architecture is new."""
DYNAMIC_FEATURES = tuple(
    f"{metric}_{view}" for metric in DYNAMIC_METRICS if metric not in FIRST_ORDER for view in ("rank", "z")
)
"""Those that see the batch and nothing of the architecture: for the ablation."""
FEATURE_SETS = {"all": FEATURES, "metrics": DYNAMIC_FEATURES}

_MOST_DEVIATIONS = 4.0  # a layer that is far out says no more than that
_DIGITS = 6  # so that the last bit of a sum does not decide on which side of a threshold a layer falls


def features_of(group: Group, layer_prior: np.ndarray, kind_prior: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """float64 [layers, FEATURES], NaN where undefined.

    The priors are expected positions in (0, 1), [layers]; usual: what `metric_z` is for each layer on other data,
    [layers, DYNAMIC_METRICS]. Each may be NaN.
    """
    names = (*METRICS, *FIRST_ORDER, "numel")
    raw = np.column_stack([_metrics(group, names[:-1]), group.numels])
    ranks, in_kind = positions(raw), _positions_in_kind(raw, group.kinds)
    columns: dict[str, np.ndarray] = {LAYER_PRIOR: layer_prior, KIND_PRIOR: kind_prior, **_structure(group)}
    for column, name in enumerate(names):
        columns[f"{name}_rank"] = ranks[:, column]
        columns[f"{name}_rank_in_kind"] = in_kind[:, column]
        columns[f"{name}_z"] = z_scores(_scaled(raw[:, column], signed=name in SIGNED_METRICS))
    for column, name in enumerate(DYNAMIC_METRICS):
        columns[f"{name}_surprise"] = columns[f"{name}_z"] - usual[:, column]
    return np.round(np.column_stack([columns[name] for name in FEATURES]), _DIGITS)


def metric_z(group: Group) -> np.ndarray:
    """The z-scores of the metrics that depend on the data, [layers, DYNAMIC_METRICS]."""
    raw = _metrics(group, DYNAMIC_METRICS)
    columns = [
        z_scores(_scaled(raw[:, column], signed=name in SIGNED_METRICS)) for column, name in enumerate(DYNAMIC_METRICS)
    ]
    return np.column_stack(columns)


def _metrics(group: Group, names: Sequence[str]) -> np.ndarray:
    """float [layers, names]: what is not finite, or not in the profile, is NaN."""
    absent = np.full(len(group), np.nan)
    found = {metric: group.metrics.get(metric, absent) for metric in METRICS}
    with np.errstate(over="ignore", invalid="ignore"):  # of infinities and of sizes near the largest: no number either
        found |= first_order(found, group.numels)
    raw = np.column_stack([found[name] for name in names])
    return np.where(np.isfinite(raw), raw, np.nan)


def first_order(metrics: Mapping[str, np.ndarray], numels: np.ndarray) -> dict[str, np.ndarray]:
    """FIRST_ORDER of the layers of one profile, [layers] each."""
    gradient_l1 = numels * metrics["grad_abs_mean"]
    step = np.minimum(np.hypot(metrics["weight_std"], metrics["weight_mean"]), _LARGEST_RMS)
    return {
        GRADIENT_L1: gradient_l1,
        STEP_GAIN: step * gradient_l1,
        AGREED_GAIN: step * metrics["agree_sign"],
    }


def positions(values: np.ndarray) -> np.ndarray:
    """[layers, columns] -> where each value stands in its column: 0 = smallest, 1 = largest, ties in the middle, NaN
    stays NaN."""
    found = np.full(values.shape, np.nan)
    for column, own in enumerate(values.T):
        defined = ~np.isnan(own)
        ordered = np.sort(own[defined])
        ranks = np.searchsorted(ordered, own, "left") + np.searchsorted(ordered, own, "right")
        found[defined, column] = (ranks[defined] / 2) / max(1, len(ordered))  # the mean rank of a tie, less 1/2
    return found


def _positions_in_kind(values: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    found = np.empty(values.shape)
    for kind in np.unique(kinds):
        found[kinds == kind] = positions(values[kinds == kind])
    return found


def z_scores(values: np.ndarray) -> np.ndarray:
    """[layers] -> distances from the mean in standard deviations, at most 4; 0 where all are equal, NaN stays NaN."""
    defined = values[~np.isnan(values)]
    if not len(defined):
        return values
    deviation = defined.std()
    if deviation < 1e-12 * max(1.0, np.abs(defined).max()):
        return values * 0.0
    return np.clip((values - defined.mean()) / deviation, -_MOST_DEVIATIONS, _MOST_DEVIATIONS)


def _scaled(values: np.ndarray, *, signed: bool) -> np.ndarray:
    """Logarithms; those of signed values are symmetric, and linear below the median size."""
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    if not len(sizes):
        return values * 0.0
    if signed:
        return np.arcsinh(values / np.median(sizes))
    return np.log(np.maximum(values, sizes.min()))  # what is zero counts as the smallest that is not


def _structure(group: Group) -> dict[str, np.ndarray]:
    outputs = np.array([shape[0] for shape in group.shapes], dtype=np.float64)
    return {
        "relative_depth": group.depths,
        "fan_in_z": z_scores(np.log(np.maximum(1.0, group.numels / np.maximum(1.0, outputs)))),
        "fan_out_z": z_scores(np.log(np.maximum(1.0, outputs))),
        "widening": group.traits.widening,
        "kernel_area": group.traits.kernel_area,
        "is_linear": (group.kinds == "linear").astype(np.float64),
        "is_depthwise": (group.kinds == "depthwise").astype(np.float64),
    }


def columns_of(features: Sequence[str]) -> list[int]:
    """Where they stand among FEATURES."""
    return [FEATURES.index(name) for name in features]
