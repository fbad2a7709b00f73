"""Frozen nn.Linear layers whose weights are mapped: read when they are used, in forward and in backward, then dropped.

On a CPU they multiply by the mapped pages themselves. For a device these stay untouched, and the weight passes through
a buffer there (buffer_ring.py). What is computed is what nn.Linear and QuantisedLinear compute, bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zest_fast.finetuning.quantised_weights import QuantisedLinear
from zest_fast.foundation.torch_private import current_task, forward_mode_is_on, transforms_are_active
from zest_fast.streaming.buffer_ring import BufferRing, CopiedWeight
from zest_fast.streaming.mapped_files import Pages, copies_refused, pages_of
from zest_fast.streaming.stays_in_place import StaysInPlace


class Ahead(Protocol):
    """What can be asked for before it is used."""

    def prefetch(self) -> None: ...


class Prefetch:
    """Which weight is used after which, so that the next one is read while this one multiplies.

    others: pages of what is mapped and no streamed layer (embeddings, the head): dropped when the next layer runs.
    last: what is used after the last layer.
    """

    def __init__(self, others: Iterable[Pages] = (), last: Iterable[Ahead] = ()) -> None:
        self._others, self._last = tuple(others), tuple(last)
        self._thread = threading.local()
        self._knows_the_order = False
        self.passes = 0

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise copies_refused()

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
            for blocks in self._last:
                blocks.prefetch()

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

    device = torch.device("cpu")

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

    @contextmanager
    def using(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """What to compute with in place of these mapped tensors, for as long as it takes."""
        try:
            yield tensors
        finally:
            self.drop()


class CopiedLayer(StreamedWeight):
    """The weight of one layer, which goes through a buffer of the device. Its pages are not touched."""

    def __init__(self, prefetch: Prefetch, ring: BufferRing, weight: CopiedWeight) -> None:
        super().__init__(prefetch, ())
        self.device = ring.transfer.device
        self._ring, self._weight = ring, weight

    def prefetch(self) -> None:
        self._ring.prefetch(self._weight)

    @contextmanager
    def using(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        with self._ring.holding(self._weight) as copied:
            here = dict(zip(self._weight.pages, copied, strict=True))
            found = [here.get(pages) if (pages := pages_of(tensor)) is not None else None for tensor in tensors]
            # What has no pages of this layer is small and on the device, or was put into the layer since.
            yield tuple(
                tensor.to(self.device) if one is None else one for tensor, one in zip(tensors, found, strict=True)
            )


class StreamedLinear(StaysInPlace):
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
            return F.linear(x, self.weight.to(x.device), self.bias)
        self.streamed.before_forward()
        if is_used_plainly(self.weight):
            try:
                return F.linear(x, self.weight.to(x.device), self.bias)
            finally:
                self.streamed.drop()
        return multiply(x, self.weight, self.bias, self.streamed)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def is_used_plainly(weight: Tensor) -> bool:
    """Whether it takes operators that know every kind of differentiation; on a device autograd keeps a copy then."""
    return weight.requires_grad or transforms_are_active() or forward_mode_is_on()


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, streamed: StreamedWeight) -> Tensor:
    """F.linear, with which nothing of the weight is kept but that it is on disk."""
    result: Tensor = _MappedLinear.apply(x, bias, weight, streamed)
    return result


class _MappedLinear(torch.autograd.Function):
    """Keeps the mapped weight, as torch's own does, and never what is used in its place: a buffer is overwritten."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Tensor, streamed: StreamedWeight) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.streamed, ctx.dtype, ctx.bias_dtype = streamed, x.dtype, None if bias is None else bias.dtype
        with streamed.using(weight) as (here,):
            return F.linear(x, here, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (weight,) = grads, ctx.saved_tensors
        dx = db = None
        if ctx.needs_input_grad[0]:
            ctx.streamed.before_backward()
            if torch.is_grad_enabled():  # create_graph=True: what multiplies is kept for a second derivative
                dx = torch.matmul(g, weight.to(g.device, g.dtype)).to(ctx.dtype)
                ctx.streamed.drop()
            else:
                with ctx.streamed.using(weight) as (here,):
                    dx = torch.matmul(g, here.to(g.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            db = g.reshape(-1, g.shape[-1]).sum(0).to(ctx.bias_dtype)
        return dx, db, None, None


class StreamedQuantisedLinear(StaysInPlace, QuantisedLinear):
    """A QuantisedLinear whose packed weight is mapped: its pages are dropped as soon as it is unpacked."""

    streamed: StreamedWeight

    def unpack(self, packed: Tensor, scale: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().unpack(packed.to(self.streamed.device), scale.to(self.streamed.device))
        if current_task() != -1:
            self.streamed.before_backward()
        with self.streamed.using(self.packed, self.scale) as here:
            return super().unpack(*here)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.streamed.before_forward()
        return super().forward(x)
