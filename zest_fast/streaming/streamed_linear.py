"""Frozen nn.Linear layers whose weights are mapped: read when they are used, in forward and in backward, then dropped.

What is computed is what nn.Linear and QuantisedLinear compute, bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zest_fast.finetuning.quantised_weights import QuantisedLinear
from zest_fast.foundation.torch_private import current_task, forward_mode_is_on, transforms_are_active
from zest_fast.streaming.mapped_files import Pages, copies_refused


class Prefetch:
    """Which weight is used after which, so that the next one is read while this one multiplies.

    others: pages of what is mapped and no streamed layer (embeddings, the head): dropped when the next layer runs.
    last: those of them that are used after the last layer.
    """

    def __init__(self, others: Iterable[Pages] = (), last: Iterable[Pages] = ()) -> None:
        self._others, self._last = tuple(others), tuple(last)
        self._thread = threading.local()
        self._knows_the_order = False
        self.passes = 0

    def begin(self) -> None:
        """Of a forward pass."""
        self._thread.last = None
        self.passes += 1

    def end(self) -> None:
        self._knows_the_order = getattr(self._thread, "last", None) is not None
        self._thread.last = None
        self.drop_others()

    def drop_others(self) -> None:
        for pages in self._others:
            pages.drop()

    def prefetch_last(self) -> None:
        if self._knows_the_order:
            for pages in self._last:
                pages.will_need()

    def reaches(self, weight: StreamedWeight) -> None:
        """A layer runs; the order is that of the latest forward pass, which what backward recomputes is none of."""
        self.drop_others()
        if current_task() == -1:
            last = getattr(self._thread, "last", None)
            if last is not None and last is not weight:
                last.next, weight.previous = weight, last
            self._thread.last = weight


class StreamedWeight:
    """The pages of one layer's weight, and which weights are used before and after it."""

    def __init__(self, prefetch: Prefetch, pages: Iterable[Pages]) -> None:
        self._prefetch, self._pages = prefetch, tuple(pages)
        self._prefetched_in: int | None = None  # the pass
        self.next: StreamedWeight | None = None
        self.previous: StreamedWeight | None = None

    def before_forward(self) -> None:
        self._prefetch.reaches(self)
        self.prefetch()
        if self.next is not None:
            self.next.prefetch()
        else:
            self._prefetch.prefetch_last()

    def before_backward(self) -> None:
        self._prefetch.drop_others()
        self.prefetch()
        if self.previous is not None:
            self.previous.prefetch()

    def prefetch(self) -> None:
        """Once for each use: that takes a millisecond for 100 MB, also where all of it has been read."""
        if self._prefetched_in != self._prefetch.passes:
            self._prefetched_in = self._prefetch.passes
            for pages in self._pages:
                pages.will_need()

    def drop(self) -> None:
        self._prefetched_in = None
        for pages in self._pages:
            pages.drop()


class StreamedLinear(nn.Module):
    """What an nn.Linear is while its weight is mapped; made by `open_streamed`.

    No nn.Linear: who takes such a layer apart (an adapter, a quantiser) would read the weight into memory.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    in_features: int
    out_features: int
    streamed: StreamedWeight

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return F.linear(x, self.weight, self.bias)
        self.streamed.before_forward()
        try:
            if self.weight.requires_grad or transforms_are_active() or forward_mode_is_on():
                return F.linear(x, self.weight, self.bias)  # which knows every kind of differentiation
            return _MappedLinear.apply(x, self.bias, self.weight, self.streamed)
        finally:
            self.streamed.drop()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StreamedLinear:
        refuse_moves(self.weight.dtype, fn)
        return self

    def __deepcopy__(self, memo: Any) -> StreamedLinear:
        raise copies_refused()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise copies_refused()


class _MappedLinear(torch.autograd.Function):
    """Keeps the mapped weight, as torch's own does, and drops its pages when it has multiplied by it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Tensor, streamed: StreamedWeight) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.streamed, ctx.dtype, ctx.bias_dtype = streamed, x.dtype, None if bias is None else bias.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (weight,) = grads, ctx.saved_tensors
        dx = db = None
        if ctx.needs_input_grad[0]:
            ctx.streamed.before_backward()
            dx = torch.matmul(g, weight.to(g.dtype)).to(ctx.dtype)
            ctx.streamed.drop()
        if ctx.needs_input_grad[1]:
            db = g.reshape(-1, g.shape[-1]).sum(0).to(ctx.bias_dtype)
        return dx, db, None, None


class StreamedQuantisedLinear(QuantisedLinear):
    """A QuantisedLinear whose packed weight is mapped: its pages are dropped as soon as it is unpacked."""

    streamed: StreamedWeight

    def unpack(self, packed: Tensor, scale: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().unpack(packed, scale)
        if current_task() != -1:
            self.streamed.before_backward()
        weight = super().unpack(packed, scale)
        self.streamed.drop()
        return weight

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.streamed.before_forward()
        return super().forward(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StreamedQuantisedLinear:
        refuse_moves(self.dtype, fn)
        return self

    def __deepcopy__(self, memo: Any) -> StreamedQuantisedLinear:
        raise copies_refused()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise copies_refused()


def refuse_moves(dtype: torch.dtype, fn: Callable[[Tensor], Tensor]) -> None:
    """Raise where `fn`, of `.to()` and the like, would move a mapped weight to a GPU or another dtype."""
    after = fn(torch.empty(0, dtype=dtype))
    if after.device.type != "cpu":
        raise NotImplementedError(
            f"weights that are read from disk as they are used cannot be on {str(after.device)!r}: there is no such "
            "way for a GPU yet; leave the model on the CPU, or load it with from_pretrained"
        )
    if after.dtype != dtype:
        raise NotImplementedError(
            f"weights that are read from disk as they are used stay in the dtype of the file, {dtype}, and "
            f"{after.dtype} was asked for; save the model in that dtype and open it again"
        )
