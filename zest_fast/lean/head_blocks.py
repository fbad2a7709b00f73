"""The weight of a language model's head, a block of rows at a time, for who needs no more of it at once.

A block is as large wherever the weight is: the same products, in the same order, are the same bits. A parameter whose
rows are read from disk has `blocks`, which yields them (`zest_fast.streaming`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zest_fast.foundation.torch_private import FakeTensor

BLOCK = 1 << 25  #: bytes at most: few products for a head, and next to nothing beside what is read of a layer
_MULTIPLE = 64  # rows
_PLAIN = (Tensor, nn.Parameter, FakeTensor)  # others (sharded, quantised) need not know how to be sliced


def row_blocks(weight: Tensor) -> list[slice]:
    """Of a matrix, from the first row to the last."""
    count = max(_MULTIPLE, BLOCK // max(1, weight.shape[1] * weight.itemsize) // _MULTIPLE * _MULTIPLE)
    return [slice(start, min(start + count, len(weight))) for start in range(0, len(weight), count)]


def weight_blocks(weight: Any) -> Iterator[tuple[slice, Tensor]]:
    """Each block, and which rows it is; not to be kept, since it may be overwritten once the next is asked for."""
    if hasattr(weight, "blocks"):
        yield from weight.blocks(weight)
        return
    blocks = row_blocks(weight)
    if len(blocks) == 1 or type(weight) not in _PLAIN:
        yield slice(0, len(weight)), weight
    else:
        for rows in blocks:
            yield rows, weight[rows]


def linear_by_blocks(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of x [n, width], outside of any graph."""
    out = None
    for rows, block in weight_blocks(weight):
        part = F.linear(x, block, None if bias is None else bias[rows])
        if len(block) == len(weight):
            return part
        if out is None:
            out = part.new_empty(len(x), len(weight))
        out[:, rows] = part
    assert out is not None
    return out


def times_by_blocks(g: Tensor, weight: Tensor) -> Tensor:
    """g [n, rows] @ weight, outside of any graph; sums of several blocks in float32 at least."""
    total = None
    for rows, block in weight_blocks(weight):
        part = g[:, rows] @ block.to(g.dtype)
        if len(block) == len(weight):
            return part
        total = part.to(torch.promote_types(part.dtype, torch.float32)) if total is None else total.add_(part)
    assert total is not None
    return total
