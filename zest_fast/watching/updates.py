"""How far one step moves each weight: ‖W_after - W_before‖ and ‖W_before‖."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zest_fast.kernels import Collector
from zest_fast.profiling.layers import Weight
from zest_fast.profiling.processes.local import local_part


class Updates:
    """A copy of each weight from before an optimizer's step to after it, and norms of what is between.

    Args:
        weights: those that train.
        backend: as of ``profile``.
    """

    def __init__(self, weights: list[Weight], backend: str) -> None:
        self._by_parameter = {id(weight.parameter): weight for weight in weights}
        self._backend = backend
        self._before: dict[Weight, Tensor] = {}
        self.norms: dict[Weight, tuple[float, float]] = {}
        """‖W_after - W_before‖, ‖W_before‖: of the shard of this process, until those of others are there."""

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer is about to step."""
        for group in optimizer.param_groups:
            for p in group["params"]:
                weight = self._by_parameter.get(id(p))
                if weight is not None:
                    self._before[weight] = local_part(p.detach()).clone()

    def after(self) -> None:
        """It has stepped."""
        for weight in list(self._before):
            before = self._before.pop(weight)
            wide = torch.promote_types(before.dtype, torch.float32)  # two weights of bfloat16 differ by what it lacks
            difference = local_part(weight.parameter.detach()).to(wide) - before
            collector = Collector(self._backend)
            moved, was = collector.moments([difference, before])
            collector.fetch()
            once = weight not in self.norms  # two optimizers that move one weight: from where to where is not known
            self.norms[weight] = (moved().norm, was().norm) if once else (math.nan, math.nan)
