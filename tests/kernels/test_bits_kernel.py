"""One bit an element: the compiled kernels against plain comparisons, to the bit, for every type and length."""

import math

import pytest
import torch

from zest_fast.kernels import lean_reference
from zest_fast.kernels.cpu import interval_bits, masked_into
from zest_fast.lean.bits import pack, unpack

TYPES = [torch.float32, torch.float64, torch.bfloat16]
SIZES = [1, 7, 8, 63, 64, 65, 1000, 200_003]  # the last one on several threads
SPECIAL = [0.0, -0.0, 6.0, -6.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40, 5.9999995, 6.0000005]


def numbers(count, dtype):
    torch.manual_seed(0)
    x = 6 * torch.randn(count, dtype=torch.float64)
    x[: len(SPECIAL)] = torch.tensor(SPECIAL, dtype=torch.float64)[:count]
    return x.to(dtype)


def packed(mask):
    bits = torch.empty((len(mask) + 7) // 8, dtype=torch.uint8)
    pack(mask, bits)
    return bits


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count", SIZES)
def test_interval_bits(dtype, count):
    x = numbers(count, dtype)
    for low, high in ((0.0, 6.0), (-1.0, 1.0), (0.0, math.nan), (0.1, 0.2)):
        bound_low, bound_high = (torch.tensor(bound, dtype=dtype) for bound in (low, high))
        inside = ~((x <= bound_low) | (x >= bound_high))
        if dtype == torch.bfloat16:  # which torch and the kernel compare in float32
            inside = ~((x.float() <= low) | (x.float() >= high))
        assert torch.equal(interval_bits(x, low, high), packed(inside)), (low, high)
        if dtype == torch.float64:  # of the others the bounds are rounded to the type first
            assert torch.equal(lean_reference.interval_bits(x, low, high), packed(inside)), (low, high)


@pytest.mark.parametrize("dtype", [*TYPES, torch.float16])
@pytest.mark.parametrize("count", SIZES)
def test_masked(dtype, count):
    g = numbers(count, dtype)
    bits = packed(numbers(count, torch.float64).nan_to_num() > 0)
    out = torch.full_like(g, 7)
    assert masked_into(g, bits, out)
    wanted = torch.where(unpack(bits, count) != 0, g, torch.zeros_like(g))
    assert torch.equal(lean_reference.masked(g, bits).nan_to_num(), wanted.nan_to_num())
    size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[g.element_size()]
    assert torch.equal(out.view(size), wanted.view(size))  # also of NaN and of -0


def test_threads_do_not_show():
    x = numbers(500_000, torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            out = torch.empty_like(x)
            masked_into(x, interval_bits(x, 0.0, 6.0), out)
            found.append(out.view(torch.int32))  # NaN included
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found)


def test_what_they_do_not_take():
    x = numbers(64, torch.float32)
    bits, out = interval_bits(x, 0.0, 6.0), torch.full((64,), 7.0)
    assert interval_bits(x[::2], 0.0, 6.0) is None and interval_bits(x.half(), 0.0, 6.0) is None
    assert interval_bits(x.to("meta"), 0.0, 6.0) is None
    assert not masked_into(x[::2], bits, out[:32]) and not masked_into(x.double(), bits, out)
    assert not masked_into(x.long(), bits, out.long()) and (out == 7.0).all()
