"""Modules whose weights are read from disk: neither copied, nor moved, nor converted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.streaming.mapped_files import copies_refused


class StaysInPlace(nn.Module):
    """Of a class that comes behind it in the bases. streamed: says the device that the model was opened for."""

    streamed: Any

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        weight: Any = self._parameters.get("weight", self)  # a packed layer has a dtype of its own
        refuse_moves(weight.dtype, self.streamed.device, fn)
        return self

    def __deepcopy__(self, memo: Any) -> StaysInPlace:
        raise copies_refused()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise copies_refused()


def refuse_moves(dtype: torch.dtype, device: torch.device, fn: Callable[[Tensor], Tensor]) -> None:
    """Raise where `fn`, of `.to()` and the like, would move a weight or give it another dtype."""
    after = fn(torch.empty(0, dtype=dtype, device=device))
    if after.device != device:
        raise NotImplementedError(
            f"weights that are read from disk as they are used cannot be moved from {str(device)!r} to "
            f"{str(after.device)!r}: a model is opened for a device, zest_fast.open_streamed(..., device='cpu' or "
            "'cuda'); or load it with from_pretrained"
        )
    if after.dtype != dtype:
        raise NotImplementedError(
            f"weights that are read from disk as they are used stay in the dtype of the file, {dtype}, and "
            f"{after.dtype} was asked for; save the model in that dtype and open it again"
        )
