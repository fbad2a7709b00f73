"""Whether a kernel may read a tensor where it lies: asked once, before any address is taken.

Kernels get addresses, sizes and strides, and know nothing of what torch hangs on a tensor: a wrapper without memory of
its own, a bit that says "negated", memory that was freed. An address of 0 would end the process.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zest_fast.foundation.torch_private import FakeTensor, is_functional, is_transform_wrapper

_PLAIN = (Tensor, torch.nn.Parameter)


def readable(x: Tensor, name: str) -> Tensor:
    """x as its memory has it: itself, or a copy where it is a negated view.

    Raises:
        ValueError: x has no memory of its own, or its memory was freed. The message starts with ``name``.
    """
    if not has_storage(x):
        raise ValueError(f"{name} is {why_no_storage(x)}")
    return x.resolve_neg() if x.is_neg() else x


def has_storage(x: Tensor) -> bool:
    """Whether every entry of x lies in memory that x itself holds (a view's bit for "negated" aside)."""
    if x.layout is not torch.strided or x.is_nested or x.is_meta:
        return False
    if x.numel() == 0:
        return True
    try:
        storage = x.untyped_storage()
        if type(x) not in _PLAIN and storage.device.type == "meta":  # a fake tensor
            return False
        if x.data_ptr() == 0:
            return False
    except RuntimeError:  # functorch's wrappers; NotImplementedError is one
        return False
    if x.is_contiguous():
        last = x.numel()
    else:
        last = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (x.storage_offset() + last) * x.element_size() <= storage.nbytes()


def is_fake(x: Tensor) -> bool:
    """Whether x is torch's own stand-in for a tensor: a shape without data, as plans are made of."""
    return isinstance(x, FakeTensor)


def is_as_it_seems(x: Tensor) -> bool:
    """Whether a kernel may read, and write, x as it lies: has storage, and no bit that changes what it says."""
    return has_storage(x) and not x.is_neg()


def why_no_storage(x: Tensor) -> str:
    """What a tensor is that ``has_storage`` denies, and what to do."""
    kind = type(x).__name__
    if hasattr(x, "full_tensor"):
        return "a DTensor (FSDP2, tensor parallel), which is not supported yet; pass .full_tensor() or .to_local()"
    if x.is_nested:
        return "a nested tensor, which has no single shape; pad it (.to_padded_tensor)"
    if x.layout != torch.strided:
        return f"of layout {x.layout}; call .to_dense() first"
    if x.device.type == "meta":
        return "on the meta device and has no data"
    if is_fake(x):
        return "a FakeTensor, which has a shape but no data; leave the FakeTensorMode"
    if is_transform_wrapper(x):
        return (
            "inside of a transform of torch.func (vmap, grad, jvp), where it has no memory of its own; call it outside"
        )
    if type(x) not in _PLAIN or is_functional(x):
        return f"a {kind} that wraps other tensors and has no memory of its own; a plain tensor is needed"
    return "a tensor whose storage was freed or shrunk (untyped_storage().resize_); bring its data back first"
