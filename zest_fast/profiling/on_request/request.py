"""The metrics that take passes of their own: grasp, synflow and gradient agreement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from zest_fast.kernels import Collector
from zest_fast.profiling.layers import Weight
from zest_fast.profiling.metrics import AGREEMENT, GRASP, METRICS, SYNFLOW, LayerStatistics
from zest_fast.profiling.on_request.agreement import GradientAgreement
from zest_fast.profiling.on_request.gradient_pass import GradientPass
from zest_fast.profiling.on_request.grasp import Grasp
from zest_fast.profiling.on_request.measure import Asked, Measure
from zest_fast.profiling.on_request.synflow import Synflow

MEASURES: dict[str, Callable[[Asked], Measure]] = {GRASP: Grasp, SYNFLOW: Synflow, AGREEMENT: GradientAgreement}
"""By the kind of statistics that metrics need of it."""


class OnRequest:
    """What was asked for beyond the one pass: checked at once, measured after it.

    Args:
        metrics: every name that was asked for.
        model, batch, loss_fn, closure: as in ``profile``, and checked.
        backend: as in ``profile``.
        lenient: what cannot be had is NaN with a note instead of an error.
        refused: why nothing of it can be had here; empty where it can.

    Raises:
        ValueError, TypeError: a metric that this batch, or a closure, cannot yield.
        NotImplementedError: ``refused``.
    """

    def __init__(
        self,
        metrics: Iterable[str],
        model: nn.Module,
        batch: Any,
        loss_fn: Callable[[Any, Any], Tensor] | None,
        closure: Callable[[], Tensor] | None,
        backend: str,
        *,
        lenient: bool,
        refused: str = "",
    ) -> None:
        self._collector = Collector(backend)
        self._lenient = lenient
        self.notes: list[str] = []
        """What was measured in another way, and why what is missing could not be."""
        names = {kind: [name for name in metrics if kind in METRICS[name].needs] for kind in MEASURES}
        self._names = {kind: found for kind, found in names.items() if found}
        self._measures: dict[str, Measure] = {}
        for kind, (first, *_) in self._names.items():
            with self._noting(kind):
                if refused:
                    raise NotImplementedError(f"metrics: {first!r} {refused}")
                self._measures[kind] = MEASURES[kind](Asked(first, model, batch, loss_fn, closure))

    @property
    def wanted(self) -> bool:
        """Whether there is anything to measure."""
        return bool(self._measures)

    def measure(self, passes: GradientPass) -> None:
        """Runs what has to be run; raises what the model raises."""
        for kind, measure in self._measures.items():
            with self._noting(kind):
                self._note(measure.measure(passes, self._collector))

    def add_to(self, statistics: LayerStatistics, weight: Weight, loss_scale: float) -> None:
        """Fills in what is known of a layer with this weight, for a loss that carries a factor."""
        for measure in self._measures.values():
            measure.add_to(statistics, weight, loss_scale)

    def _note(self, note: str) -> None:
        if note:
            self.notes.append(note)

    @contextmanager
    def _noting(self, kind: str) -> Iterator[None]:
        """Turns a failure into a note, where that was asked for."""
        try:
            yield
        except (RuntimeError, ValueError, TypeError) as error:
            if not self._lenient:
                raise
            reason = str(error).partition("\n")[0].removeprefix("agree_*: ")
            self._note(f"{', '.join(self._names[kind])} undefined: {reason}")
