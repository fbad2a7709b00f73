"""What one logged step of training yields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from zest_fast.profiling.layer_profile import LayerProfile


@dataclass(frozen=True)
class WatchedStep:
    """One step of a watched run, as sinks get it and a log gives it back."""

    step: int
    """Optimizer steps finished before this one; the first is 0."""
    profile: LayerProfile
    """A row for each watched layer; metrics, then extra columns ("update_ratio", "noise_scale", ...)."""
    seconds: float
    """Since the watch began."""
    overflow: bool
    """The accumulated gradient was not finite, or the GradScaler skipped the step."""
    notes: tuple[str, ...]
    """What could not be seen and why; dead and exploding layers in words."""
    parts: tuple[LayerProfile, ...] = ()
    """Of each micro-batch, where asked for."""
    totals: Mapping[str, float] = field(default_factory=dict)
    """Over all watched layers."""
    histograms: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)
    """Layer -> "weight" or "gradient" -> counts and edges."""
