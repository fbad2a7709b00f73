"""The statistics of one logged step: those of a profile's pass, but nothing of them may end the user's training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from zest_fast.profiling.layers import Layer, Weight, unsupported
from zest_fast.profiling.observer import Statistics
from zest_fast.watching.calls import Call

REFUSALS = (ValueError, TypeError, NotImplementedError)
"""Of kernels."""


class WindowStatistics(Statistics):
    """What a kernel refuses is a reason why a cell is NaN.

    Args:
        needed: as of Statistics, of weights and gradients always.
        backend: as of Statistics.
        call: the call of the model that runs, which keeps outputs until it counts; None = outputs are not wanted.
        may_be_written: as of Statistics.
    """

    def __init__(
        self,
        needed: frozenset[str],
        backend: str,
        call: Callable[[], Call | None] = lambda: None,
        may_be_written: Callable[[Tensor], bool] = lambda y: True,
    ) -> None:
        super().__init__(needed, backend, may_be_written)
        self._call = call
        self._before: list[tuple[dict[Layer, list[Any]], dict[Layer, int]]] = []
        self.missed_weights: dict[Weight, str] = {}
        """Weights whose gradient could not be read, and why."""

    @property
    def counted_outputs(self) -> dict[Layer, list[Callable[[], object]]]:
        """Where a call puts the outputs that belong to the step."""
        return self._outputs  # type: ignore[return-value]

    def output(self, layer: Layer, y: Tensor) -> Callable[[], None] | None:
        call = self._call()
        if call is None:
            return None
        try:
            call.add(layer, self._output_moments(y))
        except REFUSALS as error:
            self.missed(layer, str(error), outputs=True)
        return call.count

    def output_gradient(self, layer: Layer, y: Callable[[], Tensor], g: Tensor, only_use: bool) -> None:
        try:
            super().output_gradient(layer, y, g, only_use)
        except REFUSALS as error:
            self.missed(layer, str(error), outputs=False)

    def weight_gradient(self, weight: Weight, dw: Tensor) -> None:
        try:
            super().weight_gradient(weight, dw)
        except REFUSALS as error:
            self.missed_weights[weight] = str(error)

    def untouched(self, layer: Layer) -> None:
        if self.reached(layer.weight):
            self.missed(layer, "a gradient reached its weight, and none was seen at its output", outputs=False)
        else:
            super().untouched(layer)

    def begin_pass(self) -> None:
        """A backward pass begins, which may turn out to be no part of the step."""
        self._before = [(found, {layer: len(of) for layer, of in found.items()}) for found in self._of_uses()]

    def forget_pass(self) -> None:
        """It was none: outputs that it counted are not the step's."""
        for found, before in self._before:
            for layer in list(found):
                del found[layer][before.get(layer, 0) :]
                if not found[layer]:
                    del found[layer]
        self._products.clear()
        self._fisher.clear()

    def _of_uses(self) -> list[dict[Layer, list[Any]]]:
        return [self._outputs, self._outputs_again]

    def forget_gradient(self, weight: Weight) -> None:
        """It was cleared, and is no part of what the step will take."""
        self._gradients.pop(weight, None)

    def reached(self, weight: Weight) -> bool:
        """Whether a gradient of it was read."""
        return weight in self._gradients

    def finish(self, layers: Iterable[Layer]) -> None:
        for weight in self.missed_weights:
            self._gradients.pop(weight, None)
        super().finish([layer for layer in layers if not unsupported(layer.weight.parameter)])
        for layer in self.overwritten:
            self.missed_gradients.setdefault(layer, "its output was written to past autograd")
            self.fisher.pop(layer, None)
