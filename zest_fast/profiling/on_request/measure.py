"""What a metric on request is: one object, which takes what was asked for, measures, and adds what it found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from zest_fast.kernels import Collector
from zest_fast.profiling.layers import Weight
from zest_fast.profiling.metrics import LayerStatistics
from zest_fast.profiling.on_request.gradient_pass import GradientPass


@dataclass(frozen=True)
class Asked:
    """Arguments of ``profile``, checked, and the name of the metric that was asked for."""

    metric: str
    model: nn.Module
    batch: Any
    loss_fn: Callable[[Any, Any], Tensor] | None
    closure: Callable[[], Tensor] | None

    def batch_for(self, what: str) -> Any:
        """The batch, for a metric that does ``what`` with it. Raises ValueError where a closure hides it."""
        if self.closure is not None:
            raise ValueError(f"metrics: {self.metric!r} {what}, which a closure hides; pass batch= instead")
        return self.batch


class Measure(Protocol):
    """One kind of statistics (``metrics.ON_REQUEST``) with passes of its own."""

    def __init__(self, asked: Asked) -> None:
        """Raises ValueError or TypeError where this batch, or a closure, cannot yield it."""

    def measure(self, passes: GradientPass, collector: Collector) -> str:
        """Runs its passes; returns a note where it was had in another way, else "". Raises what the model raises."""

    def add_to(self, statistics: LayerStatistics, weight: Weight, loss_scale: float) -> None:
        """Fills in what is known of a layer with this weight, for a loss that carries a factor."""
