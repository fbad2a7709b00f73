"""The part of a tensor that lies on this process. A DTensor is known by its `full_tensor`: no import is needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_distributed(tensor: Any) -> bool:
    """Whether several processes hold parts or copies of one tensor."""
    return hasattr(tensor, "full_tensor")


def local_part(tensor: Tensor) -> Tensor:
    """The shard (or copy) of this process, without a graph and without a collective; a plain tensor itself."""
    part: Any = tensor
    if is_distributed(part):
        with torch.no_grad():
            part = part.to_local()
    return part.wait() if hasattr(part, "trigger_wait") else part  # what a collective makes may be on its way


def stands_for(held: Tensor | None, parameter: Tensor) -> bool:
    """Whether what a module holds in a call is its parameter: FSDP2 puts the gathered one in the place of the shard."""
    return held is parameter or (
        is_distributed(parameter) and type(held) is nn.Parameter and held.shape == parameter.shape
    )
