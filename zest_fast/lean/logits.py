"""Logits that are computed when someone looks at them: a loss over chunks of the tokens never does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from zest_fast.foundation.torch_private import make_wrapper_subclass, without_torch_function
from zest_fast.lean.forward import plain_forward

_DESCRIBE = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "requires_grad", "ndim")),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point),
    }
)


class DeferredLogits(Tensor):
    """head(hidden) in the guise of a tensor: shape and type are known, any other use computes the values.

    hidden [..., width], logits [..., vocabulary]; in the type that the head yields, or another.
    """

    hidden: Tensor
    head: nn.Linear
    computed: Tensor | None

    @staticmethod
    def __new__(cls, hidden: Tensor, head: nn.Linear, dtype: torch.dtype | None = None) -> DeferredLogits:
        kind = hidden.device.type
        if dtype is None:
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        logits = make_wrapper_subclass(
            cls, (*hidden.shape[:-1], head.out_features), dtype=dtype, device=hidden.device, requires_grad=True
        )
        logits.hidden, logits.head, logits.computed = hidden, head, None
        return logits

    def compute(self) -> Tensor:
        """The logits themselves, part of the graph; computed once."""
        if self.computed is None:
            self.computed = plain_forward(self.head)(self.hidden).to(self.dtype)
        return self.computed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with without_torch_function():
            if func in _DESCRIBE:
                return func(*args, **(kwargs or {}))
            if func is Tensor.float:  # accelerate converts all outputs under mixed precision
                return cls(args[0].hidden, args[0].head, torch.float32)
            args, kwargs = tree_map_only(DeferredLogits, DeferredLogits.compute, (args, kwargs or {}))
            return func(*args, **kwargs)

    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]
