"""What the options of public functions may be, for type checkers and editors; the functions refuse anything else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

Backend: TypeAlias = Literal["auto", "reference", "cpu", "triton", "cuda"]
Checkpoint: TypeAlias = Literal["above-cut"]
Frozen: TypeAlias = Literal["int8", "nf4"]
Preference: TypeAlias = Literal["score", "cheap-cut"]
PlannedDevice: TypeAlias = Literal["cuda", "cpu"]
FeatureSet: TypeAlias = Literal["all", "metrics"]
MetricName: TypeAlias = Literal[
    "weight_mean",
    "weight_std",
    "act_mean",
    "act_std",
    "act_abs_mean",
    "act_abs_std",
    "grad_mean",
    "grad_std",
    "grad_abs_mean",
    "grad_abs_std",
    "grad_norm",
    "plain",
    "snip",
    "fisher",
    "rgn",
    "grasp",
    "synflow",
    "agree_dot",
    "agree_sign",
    "agree_cos",
]
# Names that were computed are plain strings; a single string, which is an Iterable[str] as well, is no list of names.
MetricNames: TypeAlias = Iterable[MetricName] | list[str] | tuple[str, ...] | Literal["all"]
