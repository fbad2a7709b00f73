"""What one logged step of a watched run tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from zest_fast.profiling.layer_profile import LayerProfile

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class WatchedStep:
    """One logged step of a run that `zest_fast.watch` watches.

    Attributes:
        step: optimizer steps finished before this one; the first is 0. A step that overflows is told, and again when it
            is tried again.
        profile: a row for each watched layer; the metrics, then "update_ratio", "noise_scale" and "noise_scale_error"
            where asked for. Its loss is NaN where unknown. `.info[layer]["note"]` says why a cell is NaN.
        seconds: since the watch began.
        overflow: whether the accumulated gradient was not finite, or a GradScaler skipped the step.
        notes: sentences: what could not be seen and why, and dead and exploding layers in words.
        parts: where asked for the same of each micro-batch, as far as it follows from weights and gradients.
        totals: over all watched layers, a weight that several share once: "grad_norm", "update_ratio", "noise_scale",
            "noise_scale_error", "batch_size" (suggested by the noise scale).
        histograms: where asked for layer -> "weight" or "gradient" -> (counts, edges), as `numpy.histogram` has them.

    Examples:
        >>> import torch, zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with zest_fast.watch(model, every=1) as watched:
        ...     model(torch.randn(6, 4)).square().mean().backward()
        ...     optimizer.step()
        >>> watched.last.step, watched.last.overflow, watched.last.profile.names
        (0, False, ['0', '2'])
    """

    step: int
    profile: LayerProfile
    seconds: float
    overflow: bool
    notes: tuple[str, ...]
    parts: tuple[LayerProfile, ...] = ()
    totals: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)
