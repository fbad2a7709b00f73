"""What stands in the place of an output that was not kept, and how a pass ends that has yielded what it was run for."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from zest_fast.prefix.boundaries import NotReusable, Rows

_LOOKS = {
    "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__", "item", "tolist", "numpy",
    "is_nonzero", "equal", "allclose", "nonzero", "unique", "masked_select",
}  # fmt: skip
_SHAPES = {
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones",
    "new_full", "new_empty", "new_tensor",
}  # fmt: skip
"""Functions that take no more than the shape, the type and the device from it."""


def writes(func: Any, kwargs: Any) -> bool:
    """Whether a function writes into its first argument or one that is called `out`."""
    name = getattr(func, "__name__", "")
    in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    return in_place or (kwargs or {}).get("out") is not None


class Unkept(Tensor):
    """NaN in the place of an output that does not matter; what is computed from it is one too, whatever its value is.

    Raises NotReusable where Python looks at a value.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _LOOKS:
            raise NotReusable("the way of the pass depends on an output that was not kept")
        if writes(func, kwargs) and not isinstance((kwargs or {}).get("out", args[0] if args else None), cls):
            raise NotReusable("an output that was not kept is written into another tensor")
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result.as_subclass(Tensor) if name in _SHAPES else result


class Reached(BaseException):
    """Ends a pass that has yielded all it was run for; no model catches it by accident."""


def filled(leaf: Any, samples: int, value: float, writable: bool) -> Any:
    """In the place of an output that does not matter; it takes no memory unless the model writes into it."""
    if not isinstance(leaf, Rows):
        if isinstance(leaf, Tensor):
            if not leaf.is_floating_point():
                return leaf.clone()
            entries = torch.full_like(leaf, value)
            return entries.as_subclass(Unkept) if math.isnan(value) else entries
        return leaf
    one = torch.full((1,), value, dtype=leaf.dtype, device=leaf.device)
    entries = leaf.empty(samples).fill_(value) if writable else one.expand(leaf.shape_of(samples))
    return entries.as_subclass(Unkept) if math.isnan(value) else entries
