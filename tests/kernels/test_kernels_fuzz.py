"""Random shapes, strides, offsets, dtypes and values, from seeds that are kept: kernels against the specification.

tests/sanitizers/driver.cpp does the same below Python; its run.sh runs this file with a sanitized extension, too.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from test_kernels import DTYPES, RELATIVE, assert_close, assert_gradient_close
from torch import Tensor

from zest_fast import kernels

SPECIALS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40)
FEW, MANY = range(100), range(100, 6_100)


def entries(chance: random.Random, count: int, special: bool) -> Tensor:
    values = torch.randn(count, generator=torch.Generator().manual_seed(chance.getrandbits(32)))
    if special:
        for _ in range(1 + count // 200):
            values[chance.randrange(count)] = chance.choice(SPECIALS)
    return values


def view(chance: random.Random, shape: list[int], special: bool = False) -> Tensor:
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
    return memory.to(chance.choice(DTYPES)).as_strided(shape, strides, offset)


def shape(chance: random.Random, dimensions: int) -> list[int]:
    limit = {0: 1, 1: 200_000, 2: 500, 3: 50}.get(dimensions, 12)
    return [
        chance.choice((0, 1, 2, 15, 16, 17)) if chance.random() < 0.1 else chance.randint(1, limit)
        for _ in range(dimensions)
    ]


def check(seed: int) -> None:
    chance = random.Random(seed)
    sizes, special = shape(chance, chance.randrange(5)), chance.random() < 0.3
    dw, w = view(chance, sizes, special), view(chance, sizes, special)
    assert_close(kernels.moments([dw])[0], kernels.moments([dw], backend="reference")[0])
    found, expected = kernels.gradient_moments(dw, w), kernels.gradient_moments(dw, w, backend="reference")
    if special or not w.numel():  # of a pair that is not finite, or empty, counts are what is promised
        assert_close(found.gradient, expected.gradient)
        assert found.weight_nonfinite == expected.weight_nonfinite
    else:
        assert_gradient_close(found, expected)
    sizes = [chance.randrange(5), chance.randrange(60), chance.randint(1, 300)]
    y, g = view(chance, sizes), view(chance, sizes)
    scale = kernels.channel_products(y.abs(), g.abs(), backend="reference")
    difference = kernels.channel_products(y, g) - kernels.channel_products(y, g, backend="reference")
    assert (difference.abs() <= RELATIVE * scale).all()


@pytest.mark.parametrize("seed", FEW)
def test_random_views_and_values(seed: int) -> None:
    check(seed)


@pytest.mark.slow
def test_many_random_views_and_values() -> None:
    for seed in MANY:
        check(seed)
