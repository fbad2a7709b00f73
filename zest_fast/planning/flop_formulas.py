"""FLOPs of operators: torch's formulas, and what they lack.

torch leaves out attention's variants for the CPU, and takes the groups of a convolution for one in its backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from zest_fast.foundation.torch_private import called_with_tensors


def _convolution_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, *rest: Any, output_mask: Any = None, out_val: Any = None
) -> int:
    """dX and dW cost as much as the forward pass each, in groups or not."""
    mask = output_mask if output_mask is not None else rest[-1]
    transposed = rest[4]
    positions = x if transposed else gradient
    return 2 * positions.numel() * (weight.numel() // weight.shape[0]) * (bool(mask[0]) + bool(mask[1]))


_ATEN = torch.ops.aten
OWN: dict[Any, Callable[..., int]] = {
    _ATEN.convolution_backward: called_with_tensors(_convolution_backward),
    **{
        getattr(_ATEN, f"_scaled_dot_product_flash_attention_for_cpu{end}"): called_with_tensors(
            flop_registry[getattr(_ATEN, f"_scaled_dot_product_flash_attention{end}")]
        )
        for end in ("", "_backward")
    },
}
"""What differs from torch, as `FlopCounterMode(custom_mapping=)` takes it."""
FORMULAS: dict[Any, Callable[..., int]] = {**flop_registry, **OWN}
"""Operator -> formula(*arguments, out_val=result)."""


def flop_counter() -> FlopCounterMode:
    """torch's counter with our formulas where its own lack something."""
    return FlopCounterMode(display=False, custom_mapping=OWN)
