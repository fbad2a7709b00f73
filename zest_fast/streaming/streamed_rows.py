"""Weights of which some rows at a time are used: the head of a language model by blocks, embeddings by look-ups.

On a CPU both keep their class, and the head's pages are dropped block by block. For a device a block goes through a
buffer, and rows that are looked up are read from the file.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zest_fast.lean.head_blocks import row_blocks
from zest_fast.streaming.buffer_ring import BufferRing, CopiedWeight, Part
from zest_fast.streaming.mapped_files import Pages
from zest_fast.streaming.stays_in_place import StaysInPlace
from zest_fast.streaming.streamed_linear import Prefetch, StreamedWeight, is_used_plainly, multiply


class MappedBlocks:
    """What `weight_blocks` asks on a CPU: blocks of the mapped weight, each dropped when the next is asked for."""

    def __init__(self, weight: nn.Parameter, pages: Pages) -> None:
        self._all = pages
        self._blocks = [(rows, pages.rows(weight, rows.start, rows.stop)) for rows in row_blocks(weight)]

    def prefetch(self) -> None:
        self._all.will_need()

    def __call__(self, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        following = [pages for _, pages in self._blocks[1:]]
        for (rows, pages), after in zip(self._blocks, [*following, None], strict=True):
            if after is not None:
                after.will_need()
            try:
                yield rows, weight.detach()[rows]
            finally:
                pages.drop()


class CopiedBlocks(StreamedWeight):
    """What it asks where the model is on a device; `using` puts the weight together for who computes with all of it."""

    def __init__(self, ring: BufferRing, name: str, weight: nn.Parameter, pages: Pages) -> None:
        super().__init__(Prefetch(), ())
        self.device = ring.transfer.device
        self._ring = ring
        self._blocks = [(rows, CopiedWeight(name, (_part_of(weight, pages, rows),))) for rows in row_blocks(weight)]

    def __call__(self, weight: Tensor) -> Generator[tuple[slice, Tensor]]:
        """The loss goes round, so the first block comes after the last one."""
        following = [copied for _, copied in self._blocks[1:]]
        for (rows, copied), after in zip(self._blocks, [*following, self._blocks[0][1]], strict=True):
            self._ring.prefetch(copied)
            self._ring.prefetch(after)
            with self._ring.holding(copied) as (block,):
                yield rows, block

    def prefetch(self) -> None:
        self._ring.prefetch(self._blocks[0][1])

    @contextmanager
    def using(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        (weight,) = tensors
        whole = torch.empty(weight.shape, dtype=weight.dtype, device=self.device)
        with closing(self(weight)) as blocks:
            for rows, block in blocks:
                whole[rows].copy_(block)
        yield (whole,)


def largest_block(weight: Tensor) -> int:
    """Its bytes."""
    first = row_blocks(weight)[0]
    return (first.stop - first.start) * weight.shape[1] * weight.itemsize


def _part_of(weight: nn.Parameter, pages: Pages, rows: slice) -> Part:
    shape = (rows.stop - rows.start, *weight.shape[1:])
    return Part(pages.rows(weight, rows.start, rows.stop), weight.dtype, shape)


class CopiedHead(StaysInPlace, nn.Linear):
    """What the head of a language model is on a device, and every nn.Linear that shares its weight with another module.

    The loss over chunks (lean) takes it by blocks. Whoever asks for logits has all of it there while it multiplies.
    """

    streamed: CopiedBlocks

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or is_used_plainly(self.weight) or not _is_own(self.weight, self.streamed):
            return F.linear(x, self.weight.to(x.device), self.bias)
        return multiply(x, self.weight, self.bias, self.streamed)


class LookedUp:
    """The rows of an embedding that are used, read from the file."""

    def __init__(self, pages: Pages, device: torch.device) -> None:
        self._pages, self.device = pages, device

    def rows(self, numbers: Tensor, count: int) -> Tensor:
        """Those of a sorted tensor of numbers, on the device. Raises IndexError for one that is not there, as torch."""
        wanted = numbers.tolist()
        if wanted and not 0 <= wanted[0] <= wanted[-1] < count:
            raise IndexError(f"index out of range: {wanted[0]} to {wanted[-1]} of {count} rows of an embedding")
        return self._pages.read_rows(wanted).to(self.device)

    def reads(self, weight: Tensor) -> bool:
        return getattr(weight, "pages", None) is self._pages


class LookedUpEmbedding(StaysInPlace, nn.Embedding):
    """What an nn.Embedding is on a device: each row that is looked up is read once."""

    streamed: LookedUp

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or is_used_plainly(self.weight) or not self.streamed.reads(self.weight):
            return F.embedding(input, self.weight.to(input.device), self.padding_idx)
        numbers, places = torch.unique(input, return_inverse=True)
        return F.embedding(places, self.streamed.rows(numbers, self.num_embeddings))


def _is_own(weight: Any, blocks: CopiedBlocks) -> bool:
    return getattr(weight, "blocks", None) is blocks
