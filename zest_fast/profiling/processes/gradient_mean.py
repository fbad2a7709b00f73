"""DDP: gradients of the batches of all processes -> the shard of their mean that this process reduces to statistics.

Σ|dW| is not linear, so that statistics of the mean cannot be had from those of its parts: the mean of one dW after the
other is formed by a reduce-scatter, and each process sees its shard of it. A collective needs the same order on every
process, gradients arrive in that of autograd. The order is agreed upon after the forward pass: from the last layer that
was called to the first, which is autograd's own, so that a gradient does not wait. Where control flow differs between
processes some do, and who has none sends zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from zest_fast.profiling.layers import Weight


class GradientMeans:
    """Forms the means of one backward pass.

    Args:
        group: of the processes.
        take: gets (weight, the shard of the mean gradient, the same entries of the weight), both flat.
        order: weights, the same on all processes: what comes first is reduced first.
        absent: those of which no gradient will come on this process.
    """

    def __init__(
        self,
        group: Any,
        take: Callable[[Weight, Tensor, Tensor], None],
        order: Sequence[Weight],
        absent: Collection[Weight],
    ) -> None:
        self._group = group
        self._take = take
        self._order = list(order)
        self._known = set(order)
        self._absent = set(absent)
        self._next = 0
        self._waiting: dict[Weight, Tensor] = {}
        self.most_waiting = 0
        """How many gradients were held at once, at most: 1 where they arrive in the agreed order."""
        distributed = torch.distributed
        self._rank, self._processes = distributed.get_rank(group), distributed.get_world_size(group)
        # Renamed in torch 2.13, where the old name warns.
        self._scatter: Any = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor

    def arrived(self, weight: Weight, dw: Tensor) -> bool:
        """The gradient of this process; False where it is one too many, and nothing is done with it."""
        if weight not in self._known:
            raise NotImplementedError(
                "a gradient reached its weight on this process that the graph of the loss did not show (a backward "
                "pass inside of the backward pass): gradients of several processes cannot be brought together then; "
                "profile the model without DistributedDataParallel"
            )
        if weight in self._order[: self._next]:
            return False  # in several parts: the taps count, and run the pass again
        self._waiting[weight] = dw
        self.most_waiting = max(self.most_waiting, len(self._waiting))
        self._go_on(is_over=False)
        return True

    def finish(self) -> None:
        """The backward pass is over (or has failed): what has not come will not, and counts as zero."""
        self._go_on(is_over=True)

    def _go_on(self, is_over: bool) -> None:
        while self._next < len(self._order):
            weight = self._order[self._next]
            dw = self._waiting.pop(weight, None)
            if dw is None and not is_over and weight not in self._absent:
                return
            self._next += 1  # first: whatever fails from here on, the others wait for the next one
            self._reduce(weight, dw)

    def _reduce(self, weight: Weight, dw: Tensor | None) -> None:
        w = weight.parameter.detach().reshape(-1)
        dtype = torch.float32 if w.dtype.itemsize < 4 else w.dtype  # sums of half precision would be rounded
        if dw is None:
            flat = torch.zeros(len(w), dtype=dtype, device=w.device)
        else:
            flat = (dw if dw.layout == torch.strided else dw.coalesce().to_dense()).detach().to(dtype).reshape(-1)
        length = -(-len(w) // self._processes)
        if missing := length * self._processes - len(w):
            flat = torch.nn.functional.pad(flat, (0, missing))
        shard = torch.empty(length, dtype=dtype, device=w.device)
        self._scatter(shard, flat.contiguous(), group=self._group)
        start = self._rank * length
        own = w[start : start + length]
        self._take(weight, shard[: len(own)].div_(self._processes), own)
