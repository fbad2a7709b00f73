"""Random shapes, strides, offsets, dtypes and values, from seeds that are kept: kernels against the specification.

tests/sanitizers/driver.cpp does the same below Python; its run.sh runs this file with a sanitized extension, too.
"""

from __future__ import annotations

import random

import pytest
from awkward_tensors import view
from test_kernels import RELATIVE, assert_close, assert_gradient_close

from zest_fast import kernels

FEW, MANY = range(100), range(100, 6_100)


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
