"""FSDP2: the gradient of each backward pass by itself, of this process's micro-batch.

No hook on a shard ever fires. Autograd knows the whole parameters that FSDP2 puts in the place of shards: these are
hooked when they have been gathered.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from zest_fast.foundation.torch_private import fsdp_groups, fsdp_whole
from zest_fast.profiling.layers import Weight
from zest_fast.profiling.processes.layout import Layout
from zest_fast.profiling.taps import ModuleHook
from zest_fast.watching.gradients import PartGradients, Receive


class GatheredPartGradients(PartGradients):
    """As PartGradients.

    Args:
        weights, receive, in_parts: as of PartGradients.
        layout: of FSDP2.
    """

    def __init__(self, weights: Iterable[Weight], receive: Receive, in_parts: set[int], layout: Layout) -> None:
        super().__init__(weights, receive, in_parts)
        self._units = layout.units
        self._by_shard = {id(weight.parameter): weight for weight in self._weights}
        self._handles: list[Any] = []
        self.gathered: dict[Weight, Tensor] = {}
        """The whole parameters that are hooked."""

    def hook(self) -> list[Any]:
        units = [unit.register_forward_pre_hook(ModuleHook(self._is_gathered)) for unit in self._units]
        return [*units, self]

    def remove(self) -> None:
        """Takes the hooks on whole parameters away."""
        while self._handles:
            self._handles.pop().remove()
        self.gathered.clear()

    def _is_gathered(self, unit: nn.Module, args: Any) -> None:
        for group in fsdp_groups(unit):
            for shard, whole in fsdp_whole(group):
                weight = self._by_shard.get(id(shard))
                if weight is not None and self.gathered.get(weight) is not whole and whole.requires_grad:
                    self._handles.append(whole.register_hook(self._arriving(weight)))
                    self.gathered[weight] = whole
