"""Tensors of random shapes, strides, offsets, dtypes and values, as models hand them to kernels."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SPECIALS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40)


def entries(chance: random.Random, count: int, special: bool) -> Tensor:
    values = torch.randn(count, generator=torch.Generator().manual_seed(chance.getrandbits(32)))
    if special:
        for _ in range(1 + count // 200):
            values[chance.randrange(count)] = chance.choice(SPECIALS)
    return values


def view(chance: random.Random, shape: list[int], special: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of a shape whose memory is permuted, stepped, padded and offset, and ends with its last entry."""
    order = chance.sample(range(len(shape)), len(shape))
    strides, step = [0] * len(shape), chance.choice((1, 1, 1, 2, 3))
    for dimension in order:
        strides[dimension] = step
        step *= max(1, shape[dimension])
        step += chance.choice((0, 0, 1, 5))
    offset = chance.choice((0, 0, 1, 3, 16))
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if 0 not in shape else -1
    memory = entries(chance, offset + reach + 1, special) if offset + reach + 1 else torch.empty(0)
    return memory.to(dtype or chance.choice(DTYPES)).as_strided(shape, strides, offset)
