"""The part of a tensor that lies on this process. A DTensor is known by its `full_tensor`: nothing is imported for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_distributed(tensor: Any) -> bool:
    """Whether several processes hold parts or copies of one tensor."""
    return hasattr(tensor, "full_tensor")


def local_part(tensor: Tensor) -> Tensor:
    """The shard (or copy) of this process, without a graph and without a collective; the tensor itself if it is plain."""
    if is_distributed(tensor):
        with torch.no_grad():
            tensor = tensor.to_local()  # type: ignore[attr-defined]
    return tensor.wait() if hasattr(tensor, "trigger_wait") else tensor  # a collective may still be on its way


def stands_for(held: Tensor | None, parameter: Tensor) -> bool:
    """Whether what a module holds in a call is its parameter: FSDP2 puts the gathered one in the place of the shard."""
    return held is parameter or (
        is_distributed(parameter) and type(held) is nn.Parameter and held.shape == parameter.shape
    )
