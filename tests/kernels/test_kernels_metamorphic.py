"""What kernels have to answer of inputs that were changed in a known way, from seeds that are kept.

No specification is asked: sums add over parts, moments follow affine maps, products are bilinear, and no statistic
knows the order of what it sums or how that lies in memory.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import pytest
import torch
from awkward_tensors import DTYPES, view
from test_kernels import RELATIVE, assert_close, assert_gradient_close
from torch import Tensor

from zest_fast import kernels

FEW, MANY = range(8), range(8, 1_000)
BOTH_SIDES = 2 * RELATIVE  # either answer may be off by RELATIVE


def assert_products_close(found: Tensor, expected: Tensor, y: Tensor, g: Tensor) -> None:
    """Errors of a sum are relative to the sum of the magnitudes, [samples, channels] of y and g [N, P, K]."""
    size = (y.double() * g.double()).abs().sum(1)
    assert ((found - expected).abs() <= BOTH_SIDES * size).all()


def vector(chance: random.Random, dtype: torch.dtype | None = None) -> Tensor:
    return view(chance, [chance.choice((1, 2, 15, 33, 2_049, chance.randint(1, 20_000)))], dtype=dtype)


def outputs(chance: random.Random, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    sizes = [chance.randint(2, 4), chance.randint(2, 40), chance.randint(2, 70)]
    dtype = dtype or chance.choice(DTYPES)
    return view(chance, sizes, dtype=dtype), view(chance, sizes, dtype=dtype)


def linear(chance: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, I], g [T, O], w [O, I]; float64, since tiles are rounded to the dtype of x."""
    t, i, o = chance.randint(2, 150), chance.randint(2, 40), chance.randint(2, 40)
    return tuple(view(chance, sizes, dtype=torch.float64) for sizes in ([t, i], [t, o], [o, i]))


def cuts(chance: random.Random, length: int) -> list[int]:
    """Sizes of three parts of a length, some of them empty."""
    first, second = sorted(chance.randint(0, length) for _ in range(2))
    return [first, second - first, length - second]


def moments_of_parts_merge(chance: random.Random) -> None:
    x = vector(chance)
    parts = kernels.moments(x.split(cuts(chance, len(x))))
    assert_close(functools.reduce(kernels.Moments.merge, parts), kernels.moments([x])[0])


def gradient_moments_of_parts_merge(chance: random.Random) -> None:
    dw = vector(chance)
    w = view(chance, list(dw.shape))
    sizes = cuts(chance, len(dw))
    parts = map(kernels.gradient_moments, dw.split(sizes), w.split(sizes))
    assert_gradient_close(functools.reduce(kernels.GradientMoments.merge, parts), kernels.gradient_moments(dw, w))


def moments_follow_an_affine_map(chance: random.Random) -> None:
    x, a, b = vector(chance, torch.float64), chance.uniform(-5, 5), chance.uniform(-5, 5)
    before, after = kernels.moments([x, a * x + b])
    assert after.mean == pytest.approx(a * before.mean + b, abs=BOTH_SIDES * after.abs_mean)
    tiny = 1e-12 * after.abs_mean  # of a single entry, whose deviation is 0
    assert after.std == pytest.approx(abs(a) * before.std, rel=BOTH_SIDES, abs=tiny)
    square = a**2 * before.norm**2 + 2 * a * b * before.sum + before.count * b**2
    magnitude = (abs(a) * before.norm + abs(b) * before.count**0.5) ** 2
    assert after.norm**2 == pytest.approx(square, abs=BOTH_SIDES * magnitude)


def a_power_of_two_scales_every_statistic(chance: random.Random) -> None:
    """Entries are as exact as before, in any dtype; a change of sign leaves those of |x|."""
    dw = vector(chance, chance.choice([torch.float32, torch.float64, torch.bfloat16]))
    w, a = view(chance, list(dw.shape), dtype=dw.dtype), chance.choice((-1.0, 2.0**40, -(2.0**-40), 0.5))
    before, after = kernels.gradient_moments(dw, w), kernels.gradient_moments(a * dw, w)
    b = before.gradient
    scaled = kernels.Moments(b.count, a * b.mean, a**2 * b.m2, abs(a) * b.abs_mean, a**2 * b.abs_m2)
    products = a * before.product_sum, abs(a) * before.product_abs_sum
    weight = before.weight_mean, before.weight_m2, before.weight_nonfinite
    assert_gradient_close(after, kernels.GradientMoments(scaled, *weight, *products))


def the_order_of_entries_is_nothing_to_moments(chance: random.Random) -> None:
    dw = vector(chance)
    w = view(chance, list(dw.shape))
    order = torch.tensor(chance.sample(range(len(dw)), len(dw)))
    assert_gradient_close(kernels.gradient_moments(dw[order], w[order]), kernels.gradient_moments(dw, w))


def layouts_are_nothing_to_moments(chance: random.Random) -> None:
    sizes = [chance.randint(1, 9) for _ in range(chance.randint(1, 5))]
    dw, w = view(chance, sizes), view(chance, sizes)
    found = kernels.gradient_moments(dw, w)
    assert_gradient_close(kernels.gradient_moments(dw.contiguous(), w.contiguous()), found)
    order = chance.sample(range(len(sizes)), len(sizes))
    assert_gradient_close(kernels.gradient_moments(dw.permute(order), w.permute(order)), found)


def what_is_expanded_counts_as_often_as_it_appears(chance: random.Random) -> None:
    x, times = vector(chance), chance.randint(2, 40)
    once, often = kernels.moments([x, x.expand(times, -1)])
    assert_close(often, functools.reduce(kernels.Moments.merge, [once] * times))


def channel_products_are_bilinear(chance: random.Random) -> None:
    y, g = outputs(chance, torch.float64)
    other, a = view(chance, list(y.shape), dtype=torch.float64), chance.uniform(-5, 5)
    parts = a * kernels.channel_products(y, g) + kernels.channel_products(other, g)
    size = (a * y).abs() + other.abs()
    assert_products_close(kernels.channel_products(a * y + other, g), parts, size, g)
    assert_products_close(kernels.channel_products(g, a * y + other), parts, size, g)


def channel_products_add_over_positions(chance: random.Random) -> None:
    y, g = outputs(chance)
    sizes = cuts(chance, y.shape[1])
    parts = sum(map(kernels.channel_products, y.split(sizes, 1), g.split(sizes, 1)))
    assert_products_close(kernels.channel_products(y, g), parts, y, g)


def channel_products_join_over_samples_and_channels(chance: random.Random) -> None:
    y, g = outputs(chance)
    whole, total = kernels.channel_products(y, g), kernels.squared_channel_products(y, g)
    for dim, of_products in ((0, 0), (2, 1)):
        sizes = cuts(chance, y.shape[dim])
        parts = list(zip(y.split(sizes, dim), g.split(sizes, dim), strict=True))
        assert_products_close(torch.cat([kernels.channel_products(*part) for part in parts], of_products), whole, y, g)
        assert sum(kernels.squared_channel_products(*part) for part in parts) == pytest.approx(total, rel=1e-9)


def the_order_of_positions_samples_and_channels(chance: random.Random) -> None:
    y, g = outputs(chance)
    samples, positions, channels = (torch.tensor(chance.sample(range(n), n)) for n in y.shape)
    mixed_y, mixed_g = (t[samples][:, positions][:, :, channels] for t in (y, g))
    whole = kernels.channel_products(y, g)[samples][:, channels]
    assert_products_close(kernels.channel_products(mixed_y, mixed_g), whole, mixed_y, mixed_g)


def layouts_are_nothing_to_channel_products(chance: random.Random) -> None:
    """Images [N, K, H, W] of any strides, channels in the second dimension or moved to the last."""
    sizes, dtype = [chance.randint(1, 9) for _ in range(4)], chance.choice(DTYPES)
    y, g = view(chance, sizes, dtype=dtype), view(chance, sizes, dtype=dtype)
    flat_y, flat_g = (t.flatten(2).transpose(1, 2) for t in (y, g))
    found, total = kernels.channel_products(y, g), kernels.squared_channel_products(y, g)
    for as_y, as_g, dim in (
        (y.contiguous(), g, 1),
        (y, g.contiguous(memory_format=torch.channels_last), 1),
        (y.movedim(1, -1), g.movedim(1, -1), 3),
        (y.transpose(2, 3), g.transpose(2, 3), 1),
    ):
        again = kernels.channel_products(as_y, as_g, channel_dim=dim)
        assert_products_close(again, found, flat_y, flat_g)
        squares = kernels.squared_channel_products(as_y, as_g, channel_dim=dim)
        bound = (flat_y.double() * flat_g.double()).abs().sum(1).square().sum()
        assert squares == pytest.approx(total, abs=2 * BOTH_SIDES * float(bound))


def sums_over_tokens_add(chance: random.Random) -> None:
    """ΣdW and ΣW⊙dW do, Σ|dW| and Σ|W⊙dW| do not exceed theirs."""
    x, g, w = linear(chance)
    sizes = cuts(chance, len(x))
    whole = kernels.linear_gradient_moments(x, g, w)
    parts = [kernels.linear_gradient_moments(*p, w) for p in zip(x.split(sizes), g.split(sizes), strict=True)]
    magnitude = sum(part.gradient.abs_sum for part in parts)
    assert sum(part.gradient.sum for part in parts) == pytest.approx(whole.gradient.sum, abs=BOTH_SIDES * magnitude)
    assert whole.gradient.abs_sum <= (1 + BOTH_SIDES) * magnitude
    magnitude = sum(part.product_abs_sum for part in parts)
    assert sum(part.product_sum for part in parts) == pytest.approx(whole.product_sum, abs=BOTH_SIDES * magnitude)
    assert whole.product_abs_sum <= (1 + BOTH_SIDES) * magnitude


def outputs_of_a_linear_merge(chance: random.Random) -> None:
    x, g, w = linear(chance)
    sizes = cuts(chance, len(w))
    parts = [kernels.linear_gradient_moments(x, *p) for p in zip(g.split(sizes, 1), w.split(sizes), strict=True)]
    merged = functools.reduce(kernels.GradientMoments.merge, parts)
    assert_gradient_close(merged, kernels.linear_gradient_moments(x, g, w))


def tokens_inputs_and_outputs_of_a_linear_in_another_order(chance: random.Random) -> None:
    x, g, w = linear(chance)
    found = kernels.linear_gradient_moments(x, g, w)
    tokens, inputs, channels = (torch.tensor(chance.sample(range(n), n)) for n in (len(x), *w.shape[::-1]))
    mixed = kernels.linear_gradient_moments(x[tokens][:, inputs], g[tokens][:, channels], w[channels][:, inputs])
    assert_gradient_close(mixed, found)
    assert_gradient_close(kernels.linear_gradient_moments(g, x, w.t()), found)
    assert_gradient_close(kernels.linear_gradient_moments(x.contiguous(), g.contiguous(), w.contiguous()), found)


RELATIONS: list[Callable[[random.Random], None]] = [
    moments_of_parts_merge,
    gradient_moments_of_parts_merge,
    moments_follow_an_affine_map,
    a_power_of_two_scales_every_statistic,
    the_order_of_entries_is_nothing_to_moments,
    layouts_are_nothing_to_moments,
    what_is_expanded_counts_as_often_as_it_appears,
    channel_products_are_bilinear,
    channel_products_add_over_positions,
    channel_products_join_over_samples_and_channels,
    the_order_of_positions_samples_and_channels,
    layouts_are_nothing_to_channel_products,
    sums_over_tokens_add,
    outputs_of_a_linear_merge,
    tokens_inputs_and_outputs_of_a_linear_in_another_order,
]


@pytest.mark.parametrize("seed", FEW)
@pytest.mark.parametrize("relation", RELATIONS)
def test_relation(relation: Callable[[random.Random], None], seed: int) -> None:
    relation(random.Random(seed))


@pytest.mark.slow
@pytest.mark.parametrize("relation", RELATIONS)
def test_relation_of_many(relation: Callable[[random.Random], None]) -> None:
    for seed in MANY:
        relation(random.Random(seed))
