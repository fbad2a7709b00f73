"""Tensors that FSDP2 (`fully_shard`) has spread over processes: read whole, written as shards.

Every function is a collective for such tensors: each process has to call it, for the same tensors in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from zest_fast.profiling.processes.local import is_distributed


def whole(tensor: Any) -> Tensor:
    """The tensor, gathered where it is sharded; without a graph."""
    return tensor.detach().full_tensor() if is_distributed(tensor) else tensor.detach()


@torch.no_grad()
def put(there: Any, value: Tensor) -> None:
    """Copy a whole tensor into `there`."""
    if is_distributed(there):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(there.device, there.dtype), there.device_mesh, there.placements)
    there.copy_(value)


def is_written_here(tensors: Iterable[Tensor]) -> bool:
    """Whether this process is the one to write them: the first, where any is sharded."""
    return not any(map(is_distributed, tensors)) or torch.distributed.get_rank() == 0
