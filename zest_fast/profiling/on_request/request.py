"""The metrics that take passes of their own: grasp, synflow and gradient agreement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from zest_fast.kernels import Collector
from zest_fast.profiling.layers import Weight
from zest_fast.profiling.loss import loss_of
from zest_fast.profiling.metrics import AGREEMENT, GRASP, METRICS, SYNFLOW, Agreement, LayerStatistics
from zest_fast.profiling.on_request.agreement import agreement, halves
from zest_fast.profiling.on_request.gradient_pass import GradientPass
from zest_fast.profiling.on_request.grasp import grasp
from zest_fast.profiling.on_request.synflow import synflow


class OnRequest:
    """What was asked for beyond the one pass: checked at once, measured after it.

    Args:
        metrics: every name that was asked for.
        model, batch, loss_fn, closure: as in ``profile``, and checked.
        backend: as in ``profile``.
        lenient: what cannot be had is NaN with a note instead of an error.

    Raises:
        ValueError, TypeError: a metric that this batch, or a closure, cannot yield.
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
    ) -> None:
        self._model = model
        self._collector = Collector(backend)
        self._lenient = lenient
        self._grasp: dict[Weight, float] = {}
        self._synflow: dict[Weight, float] = {}
        self._agreement: dict[Weight, Agreement] = {}
        self.notes: list[str] = []
        """What was measured in another way, and why what is missing could not be."""
        self._names = {kind: [name for name in metrics if kind in METRICS[name].needs] for kind in _MEASURES}
        self._sources: dict[str, Any] = {}
        for kind in (kind for kind, names in self._names.items() if names):
            with self._noting(kind):
                self._sources[kind] = self._source(kind, batch, loss_fn, closure)

    @property
    def wanted(self) -> bool:
        """Whether there is anything to measure."""
        return bool(self._sources)

    def measure(self, passes: GradientPass) -> None:
        """Runs what has to be run; raises what the model raises."""
        for kind, source in self._sources.items():
            with self._noting(kind):
                _MEASURES[kind](self, passes, source)

    def add_to(self, statistics: LayerStatistics, weight: Weight, loss_scale: float) -> None:
        """Fills in what is known of a layer with this weight, for a loss that carries a factor."""
        if weight in self._grasp:
            statistics.grasp = self._grasp[weight] / loss_scale**2
        if weight in self._synflow:
            statistics.synflow = self._synflow[weight]
        if weight in self._agreement:
            found = self._agreement[weight]
            statistics.agreement = Agreement(
                found.dot / loss_scale**2, found.sign_dot / loss_scale, found.norms / loss_scale**2
            )

    def _source(
        self,
        kind: str,
        batch: Any,
        loss_fn: Callable[[Any, Any], Tensor] | None,
        closure: Callable[[], Tensor] | None,
    ) -> Any:
        """What the passes of a kind start from."""
        if kind == GRASP:
            return loss_of(self._model, batch, loss_fn, closure)
        if closure is not None:
            what = "replaces the inputs" if kind == SYNFLOW else "splits the samples"
            raise ValueError(f"metrics: {self._names[kind][0]!r} {what}, which a closure hides; pass batch= instead")
        if kind == AGREEMENT:
            return [loss_of(self._model, half, loss_fn, None) for half in halves(batch)]
        if not isinstance(batch, Mapping):
            return batch[0]
        return batch if loss_fn is None else {key: value for key, value in batch.items() if key != "labels"}

    def _measure_grasp(self, passes: GradientPass, compute_loss: Callable[[], Tensor]) -> None:
        recurrent = any(isinstance(module, nn.RNNBase) for module in self._model.modules())
        self._grasp, note = grasp(passes, compute_loss, self._collector, recurrent)
        self._note(note)

    def _measure_synflow(self, passes: GradientPass, inputs: Any) -> None:
        self._synflow, note = synflow(passes, self._model, inputs, self._collector)
        self._note(note)

    def _measure_agreement(self, passes: GradientPass, losses: list[Callable[[], Tensor]]) -> None:
        self._agreement = agreement(passes, *losses)

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


_MEASURES: dict[str, Callable[[OnRequest, GradientPass, Any], None]] = {
    GRASP: OnRequest._measure_grasp,
    SYNFLOW: OnRequest._measure_synflow,
    AGREEMENT: OnRequest._measure_agreement,
}
