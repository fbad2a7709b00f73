"""The statistics of one logged step of a model that lies on several processes: what of it this process counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from zest_fast.kernels.storage import has_storage
from zest_fast.profiling.layers import Layer, Weight
from zest_fast.profiling.processes.layout import DDP, FSDP2, Layout
from zest_fast.profiling.processes.local import is_distributed
from zest_fast.profiling.processes.shared_statistics import SharedStatistics
from zest_fast.watching.calls import Call
from zest_fast.watching.window_statistics import REFUSALS, WindowStatistics

_ALONE = "the processes did not agree on watching this step, and its parts cannot be summed up by one of them"


class SharedWindowStatistics(SharedStatistics, WindowStatistics):
    """Reduces what lies on this process; what a kernel refuses is a reason why a cell is NaN.

    Args:
        needed, backend, call, may_be_written: as of WindowStatistics.
        layout: who shares the model.
        layers: the rows, in the same order on every process.
        together: whether all processes watch this step, so that collectives may run (tensor parallelism).
    """

    def __init__(
        self,
        needed: frozenset[str],
        backend: str,
        call: Callable[[], Call | None],
        may_be_written: Callable[[Tensor], bool],
        layout: Layout,
        layers: Sequence[Layer],
        together: bool,
    ) -> None:
        super().__init__(needed, backend, may_be_written, layout, layers)
        self._call = call
        self._together = together

    def output(self, layer: Layer, y: Tensor) -> Callable[[], None] | None:
        if self._call() is None:
            return None  # before anything is brought together for it
        if self._is_in_parts(y) and not self._together:
            self.missed(layer, _ALONE, outputs=True)
            return None
        try:
            return super().output(layer, y)
        except REFUSALS as error:
            self.missed(layer, str(error), outputs=True)
            return None

    def output_gradient(self, layer: Layer, y: Callable[[], Tensor], g: Tensor, only_use: bool) -> None:
        if is_distributed(g) and not self._together:
            self.missed(layer, _ALONE, outputs=False)
            return
        try:
            super().output_gradient(layer, y, g, only_use)
        except REFUSALS as error:
            self.missed(layer, str(error), outputs=False)

    def weight_gradient(self, weight: Weight, dw: Tensor) -> None:
        p: Any = weight.parameter
        if self._layout.kind == FSDP2 and not is_distributed(p):
            self.missed_weights[weight] = "it is not sharded as the model was when the watch began"
            return
        if is_distributed(p) and not self._together and getattr(dw, "placements", None) != p.placements:
            self.missed_weights[weight] = _ALONE
            return
        try:
            super().weight_gradient(weight, dw)
        except REFUSALS as error:
            self.missed_weights[weight] = str(error)

    def untouched(self, layer: Layer) -> None:
        WindowStatistics.untouched(self, layer)  # how many samples it had counts validation in between as well

    def is_a_copy(self, weight: Weight) -> bool:
        """Whether what this process holds of a weight, and of its gradient, another one counts."""
        return self._weight_is_copy(weight, whole_on_each=False)

    @staticmethod
    def _is_in_parts(y: Any) -> bool:
        return is_distributed(y) and any(placement.is_partial() for placement in y.placements)

    def _weight_is_copy(self, weight: Weight, whole_on_each: bool) -> bool:
        if self._layout.kind == DDP:  # whose gradients are those of all processes
            return not self._is_first
        return super()._weight_is_copy(weight, whole_on_each)


class WholeWeights(WindowStatistics):
    """Of FSDP2, one backward pass by itself: gradients of this process's micro-batch, of weights that are gathered.

    Args:
        needed, backend: as of WindowStatistics.
        gathered: the whole parameter of each weight.
    """

    def __init__(self, needed: frozenset[str], backend: str, gathered: Mapping[Weight, Tensor]) -> None:
        super().__init__(needed, backend)
        self._gathered = gathered

    def weight_gradient(self, weight: Weight, dw: Tensor) -> None:
        whole = self._gathered[weight].detach()
        if not has_storage(whole):
            self.missed_weights[weight] = "its weight was sharded again before its gradient was there"
            return
        try:
            self.reduce(weight, dw, whole)
        except REFUSALS as error:
            self.missed_weights[weight] = str(error)
