"""Tensors that the taps keep from forward to backward, as autograd keeps its own."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from zest_fast.foundation.torch_private import StorageWeakRef, saved_tensors_are_moved, storage_key


class Overwritten(Exception):
    """A tensor that was kept for the backward pass was modified in place after that."""


class Held(Protocol):
    """A tensor that is kept. Detached, so that it holds no graph and no reference cycle arises."""

    def get(self) -> Tensor:
        """The tensor as it was when it was kept.

        Raises:
            Overwritten: it is not any more.
        """


class Keeper:
    """Keeps the tensors of one pass. Where hooks on saved tensors are at work (checkpointing, offloading), these see
    and move them; elsewhere no node is made for them, which would cost time in every call of a layer.

    Args:
        anchor: a scalar that requires a gradient, of which the kept tensors' nodes hang.
    """

    def __init__(self, anchor: Tensor) -> None:
        self._anchor = anchor
        # By address of the storage object, which a weak reference keeps from being given to another one.
        self._storages: dict[int, StorageWeakRef] = {}

    def keep(self, tensor: Tensor) -> Held:
        if not saved_tensors_are_moved():
            return _HeldHere(tensor.detach())
        storage = tensor.untyped_storage()
        if storage_key(storage) not in self._storages:
            self._storages[storage_key(storage)] = StorageWeakRef(storage)
        return _HeldByAutograd(self, _Hold.apply(self._anchor, tensor.detach()), tensor._version)

    def knows(self, tensor: Tensor) -> bool:
        """Whether the tensor lies in memory that was kept as it is, not in a copy that a hook on saved tensors made."""
        return storage_key(tensor.untyped_storage()) in self._storages


class _HeldHere:
    """The tensor itself; its version number is the one of what it was detached from."""

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._version = tensor._version

    def get(self) -> Tensor:
        if self._tensor._version != self._version:
            raise Overwritten
        return self._tensor


class _HeldByAutograd:
    """A tensor in the care of autograd."""

    def __init__(self, keeper: Keeper, output: Tensor, version: int) -> None:
        self._keeper = keeper
        self._output = output  # below torch 2.13 what the node saved dies with its output
        self._version = version

    def get(self) -> Tensor:
        try:
            (tensor,) = self._output.grad_fn.saved_tensors  # type: ignore[union-attr]
        except RuntimeError as error:
            if "modified by an inplace operation" in str(error):
                raise Overwritten from None
            raise
        # Checkpointing hands back what it recomputed without looking. A copy has a version number of its own, and what
        # it is a copy of was as it should be when it was made.
        if tensor._version > self._version and self._keeper.knows(tensor):
            raise Overwritten
        return tensor


class _Hold(torch.autograd.Function):
    """Keeps a tensor as autograd keeps its own; the output is never used."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None
