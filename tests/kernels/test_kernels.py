"""The compiled kernels against the float64 specification: awkward shapes, dtypes, strides and values."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from zest_fast import kernels

# One element, primes, one off a vector (16 lanes), a step (32) and a block (2,048), several blocks and chunks.
LENGTHS = [1, 2, 7, 15, 16, 17, 31, 33, 2047, 2048, 2049, 6151, 70_001, 600_011]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Both sides read the same rounded entries, so the dtype does not enter: float32 lanes hold at most 64 terms.
RELATIVE = 1e-6


def assert_close(found: kernels.Moments, expected: kernels.Moments) -> None:
    assert found.count == expected.count
    assert found.nonfinite == expected.nonfinite
    # Where all entries are equal their deviation is 0, and rounding is relative to the entries themselves.
    tiny = 1e-12 * expected.abs_mean if expected.count else 0.0
    assert found.std == pytest.approx(expected.std, rel=RELATIVE, abs=tiny, nan_ok=True)
    assert found.abs_std == pytest.approx(
        expected.abs_std, rel=RELATIVE, abs=RELATIVE * expected.std + tiny, nan_ok=True
    )
    assert found.mean == pytest.approx(expected.mean, abs=RELATIVE * expected.std, rel=RELATIVE, nan_ok=True)
    assert found.abs_mean == pytest.approx(expected.abs_mean, abs=RELATIVE * expected.std, rel=RELATIVE, nan_ok=True)
    assert found.norm == pytest.approx(expected.norm, rel=RELATIVE, nan_ok=True)


def assert_gradient_close(found: kernels.GradientMoments, expected: kernels.GradientMoments) -> None:
    assert_close(found.gradient, expected.gradient)
    assert found.weight_mean == pytest.approx(expected.weight_mean, abs=RELATIVE * expected.weight_std, rel=RELATIVE)
    assert found.weight_std == pytest.approx(expected.weight_std, rel=RELATIVE)
    assert found.weight_norm == pytest.approx(expected.weight_norm, rel=RELATIVE)
    assert found.product_abs_sum == pytest.approx(expected.product_abs_sum, rel=RELATIVE)
    assert found.product_sum == pytest.approx(expected.product_sum, abs=RELATIVE * expected.product_abs_sum)


def compare(x: torch.Tensor) -> None:
    assert_close(kernels.moments([x])[0], kernels.moments([x], backend="reference")[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
def test_moments(n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(n)
    compare((torch.randn(n) * 0.02 + 0.01).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
def test_gradient_moments(n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(n)
    dw, w = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    assert_gradient_close(kernels.gradient_moments(dw, w), kernels.gradient_moments(dw, w, backend="reference"))


def test_moments_match_plain_torch() -> None:
    """The specification itself, against torch's own words for the same things."""
    x, w = torch.randn(37, 11, dtype=torch.float64), torch.randn(37, 11, dtype=torch.float64)
    m = kernels.moments([x], backend="reference")[0]
    assert m.mean == pytest.approx(x.mean().item(), abs=1e-15)
    assert m.std == pytest.approx(x.std(correction=0).item())
    assert m.abs_mean == pytest.approx(x.abs().mean().item())
    assert m.abs_std == pytest.approx(x.abs().std(correction=0).item())
    assert m.norm == pytest.approx(x.norm().item())
    assert m.sum == pytest.approx(x.sum().item())
    assert m.abs_sum == pytest.approx(x.abs().sum().item())
    g = kernels.gradient_moments(x, w, backend="reference")
    assert g.product_abs_sum == pytest.approx((x * w).abs().sum().item())
    assert g.product_sum == pytest.approx((x * w).sum().item())
    assert g.weight_std == pytest.approx(w.std(correction=0).item())


VIEWS = {
    "transposed": lambda x: x.transpose(0, 2),
    "sliced": lambda x: x[1:, ::2, :-1],
    "channels_last": lambda x: x.permute(0, 3, 1, 2),
    "one row": lambda x: x[2, 1],
    "every third": lambda x: x.flatten()[::3],
    "expanded": lambda x: x[:, :1].expand(-1, 9, -1, -1),
    "expanded scalar": lambda x: x[0, 0, 0, 0].expand(5, 300),
    "of size one": lambda x: x[:1, :1, :1, :1],
    "empty": lambda x: x[:, :0],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_strides(view: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = VIEWS[view](torch.randn(6, 5, 7, 33).to(dtype))
    compare(x)
    if x.numel() > 1:
        other = torch.randn(x.shape, dtype=dtype)
        for dw, weight in ((x, other), (other, x)):
            assert_gradient_close(
                kernels.gradient_moments(dw, weight), kernels.gradient_moments(dw, weight, backend="reference")
            )


def test_dtypes_may_differ_between_gradient_and_weight() -> None:
    w = torch.randn(129, 65)
    for dtype in DTYPES:
        dw = torch.randn(129, 65).to(dtype)
        assert_gradient_close(kernels.gradient_moments(dw, w), kernels.gradient_moments(dw, w, backend="reference"))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_offset_data_keep_their_deviation(sign: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = sign * (1e4 + torch.randn(300_001, dtype=torch.float64)).to(dtype)
    found, expected = kernels.moments([x])[0], kernels.moments([x], backend="reference")[0]
    assert found.std == pytest.approx(expected.std, rel=1e-5)
    assert found.abs_std == pytest.approx(expected.abs_std, rel=1e-5)
    assert found.mean == pytest.approx(expected.mean, abs=1e-5 * expected.std)
    dw = kernels.gradient_moments(x, x)
    assert dw.gradient.std == pytest.approx(expected.std, rel=1e-5)
    assert dw.weight_std == pytest.approx(expected.std, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-15, 1e15, 1e30])
def test_values_whose_squares_do_not_fit_float32(scale: float) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(5_000) * scale, torch.randn(5_000)
    compare(x)
    assert_gradient_close(kernels.gradient_moments(x, w), kernels.gradient_moments(x, w, backend="reference"))


def test_an_outlier_in_front_does_not_spoil_its_block() -> None:
    for outlier in (1e3, -1e4, 1e6):  # as in the first token of a large language model
        x = torch.randn(4_096)
        x[0] = outlier
        compare(x)


def test_signs_of_equal_size() -> None:
    compare(torch.where(torch.rand(9_000) < 0.3, -1.0, 1.0) + 1e-3 * torch.randn(9_000))


def test_every_finite_float16() -> None:
    bits = torch.arange(65_536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    compare(bits[bits.isfinite()])
    assert kernels.moments([bits])[0].nonfinite == 2 * 1024
    subnormal = torch.arange(1, 1024, dtype=torch.int16).view(torch.float16)
    compare(subnormal)
    compare(subnormal.flip(0)[::2])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 17, 2_500, 4_999])
def test_entries_that_are_not_finite_are_counted_and_spoil_what_they_enter(bad: float, where: int) -> None:
    x, w = torch.randn(5_000), torch.randn(5_000)
    x[where] = bad
    m = kernels.moments([x])[0]
    assert m.nonfinite == 1
    assert math.isnan(m.mean) and math.isnan(m.std) and math.isnan(m.abs_mean) and math.isnan(m.abs_std)
    g = kernels.gradient_moments(x, w)
    assert (g.gradient.nonfinite, g.weight_nonfinite) == (1, 0)
    assert math.isnan(g.product_abs_sum) and g.weight_std == pytest.approx(w.std(correction=0).item(), rel=1e-5)
    g = kernels.gradient_moments(w, x)
    assert (g.gradient.nonfinite, g.weight_nonfinite) == (0, 1)
    assert math.isnan(g.product_sum) and math.isnan(g.weight_mean)
    assert g.gradient.std == pytest.approx(w.std(correction=0).item(), rel=1e-5)


@pytest.mark.parametrize("n", [3, 2_049, 100_003, 3_000_017])
def test_any_number_of_threads_gives_the_same_bits(n: int) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(n), torch.randn(n)
    y, g = (t[: n // 99 * 99].view(3, -1, 33) for t in (x, w))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            products = kernels.channel_products(y, g).flatten().tolist() if n >= 99 else []
            by_channel = kernels.channel_products(y, g, channel_dim=1).flatten().tolist() if n >= 99 else []
            results.append((kernels.moments([x])[0], kernels.gradient_moments(x, w), products, by_channel))
    finally:
        torch.set_num_threads(before)
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "i", "o"), [(1, 1, 1), (5, 3, 7), (0, 4, 6), (513, 31, 65), (64, 1030, 1300)])
def test_linear_gradient_moments(t: int, i: int, o: int, dtype: torch.dtype) -> None:
    """No worse than the same expression on a gradient that exists as a whole."""
    torch.manual_seed(0)
    x, g, w = torch.randn(t, i).to(dtype), torch.randn(t, o).to(dtype), torch.randn(o, i).to(dtype)
    found = kernels.linear_gradient_moments(x, g, w)
    expected = kernels.linear_gradient_moments(x, g, w, backend="reference")
    whole = kernels.gradient_moments(g.t() @ x, w, backend="reference")
    for name in ("std", "abs_mean", "abs_std", "norm"):
        exact = getattr(expected.gradient, name)
        allowed = abs(getattr(whole.gradient, name) - exact) + 2e-6 * abs(exact)
        assert abs(getattr(found.gradient, name) - exact) <= allowed + (0.02 * exact if dtype.itemsize == 2 else 0), (
            name
        )
    allowed = abs(whole.product_abs_sum - expected.product_abs_sum) + 2e-6 * expected.product_abs_sum
    slack = 0.02 * expected.product_abs_sum if dtype.itemsize == 2 else 0
    assert abs(found.product_abs_sum - expected.product_abs_sum) <= allowed + slack
    assert found.weight_std == pytest.approx(expected.weight_std, rel=RELATIVE, abs=1e-12)


@pytest.mark.parametrize("strided", ["x", "g", "expanded g", "w"])
def test_linear_gradient_moments_of_views(strided: str) -> None:
    torch.manual_seed(0)
    x, g, w = torch.randn(50, 20), torch.randn(50, 30), torch.randn(30, 20)
    if strided == "x":
        x = torch.randn(50, 40)[:, ::2]
    elif strided == "g":
        g = torch.randn(30, 50).t()
    elif strided == "expanded g":
        g = torch.randn(1, 1).expand(50, 30)
    else:
        w = torch.randn(20, 30).t()
    found, expected = (kernels.linear_gradient_moments(x, g, w, backend=b) for b in ("cpu", "reference"))
    assert found.gradient.norm == pytest.approx(expected.gradient.norm, rel=1e-5)
    assert found.product_abs_sum == pytest.approx(expected.product_abs_sum, rel=1e-5)


SHAPES = [(2, 3), (1, 1), (4, 5, 3), (2, 600, 700), (3, 2, 4, 5), (2, 513, 9, 9), (2, 5, 3, 4, 2), (0, 3), (2, 0, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_channel_products(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    y, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    for dim in {1, len(shape) - 1}:
        moved_y, moved_g = y.double().movedim(dim, -1), g.double().movedim(dim, -1)
        n, k = shape[0], shape[dim]
        positions = math.prod(shape) // (n * k) if n * k else 0
        expected = (moved_y * moved_g).reshape(n, positions, k).sum(1)
        size = (moved_y * moved_g).abs().reshape(n, positions, k).sum(1)
        found = kernels.channel_products(y, g, channel_dim=dim)
        assert found.shape == (n, k) and found.dtype == torch.float64
        assert bool(((found - expected).abs() <= 1e-6 * size).all())
        squares = kernels.squared_channel_products(y, g, channel_dim=dim)
        assert squares == pytest.approx(found.square().sum().item(), rel=1e-12)


@pytest.mark.parametrize("layout", ["channels_last", "expanded g", "mixed", "sliced"])
def test_channel_products_of_views(layout: str) -> None:
    torch.manual_seed(0)
    y, g = torch.randn(3, 8, 5, 6), torch.randn(3, 8, 5, 6)
    if layout == "channels_last":
        y, g = y.to(memory_format=torch.channels_last), g.to(memory_format=torch.channels_last)
    elif layout == "expanded g":
        g = torch.randn(3, 8, 1, 1).expand(3, 8, 5, 6)
    elif layout == "mixed":
        g = g.to(memory_format=torch.channels_last)
    else:
        y = torch.randn(3, 8, 7, 9)[:, :, 1:-1, 2:-1]
    found = kernels.channel_products(y, g)
    torch.testing.assert_close(found, (y.double() * g.double()).sum((2, 3)), rtol=1e-6, atol=1e-6)


def test_channel_products_of_a_slice_with_a_dimension_of_one() -> None:
    torch.manual_seed(0)
    y, g = torch.randn(2, 3, 4, 1, 6)[..., :5], torch.randn(2, 3, 4, 1, 5)
    torch.testing.assert_close(kernels.channel_products(y, g), (y.double() * g.double()).sum((2, 3, 4)))


@pytest.mark.parametrize("dim", [1, 3])
def test_channel_products_below_the_range_of_float32(dim: int) -> None:
    torch.manual_seed(0)
    y, g = torch.randn(3, 8, 5, 6) * 1e-20, torch.randn(3, 8, 5, 6) * 1e-22
    found = kernels.channel_products(y, g, channel_dim=dim)
    torch.testing.assert_close(found, kernels.channel_products(y, g, channel_dim=dim, backend="reference"))
    assert bool((found != 0).all())


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channel_products_beyond_the_range_of_float32(dtype: torch.dtype, dim: int) -> None:
    torch.manual_seed(0)
    y, g = (torch.randn(3, 8, 5, 6) * 1e22).to(dtype), (torch.randn(3, 8, 5, 6) * 1e20).to(dtype)
    y[0, 0, 0, 0] = math.inf
    found = kernels.channel_products(y, g, channel_dim=dim)
    torch.testing.assert_close(found, kernels.channel_products(y, g, channel_dim=dim, backend="reference"))
    assert int(found.isinf().sum()) == 1
    squares = kernels.squared_channel_products(y[1:], g[1:], channel_dim=dim)
    assert squares == pytest.approx(float(found[1:].square().sum()))


def test_moments_of_parts_merge() -> None:
    x, w = torch.randn(10_000) + 3, torch.randn(10_000)
    parts = kernels.moments([x[:1], x[1:4_000], x[4_000:4_000], x[4_000:]])
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert_close(merged, kernels.moments([x], backend="reference")[0])
    pair = kernels.gradient_moments(x[:33], w[:33]).merge(kernels.gradient_moments(x[33:], w[33:]))
    assert_gradient_close(pair, kernels.gradient_moments(x, w, backend="reference"))


BAD = {
    "a tensor instead of a list": (lambda: kernels.moments(torch.ones(2)), TypeError, "pass a list"),
    "no tensor": (lambda: kernels.moments([[1.0]]), TypeError, r"tensors\[0\] is a list"),
    "integers": (
        lambda: kernels.moments([torch.ones(2), torch.ones(2, dtype=torch.int32)]),
        TypeError,
        r"tensors\[1\]",
    ),
    "complex": (lambda: kernels.moments([torch.ones(2, dtype=torch.complex64)]), TypeError, "complex64"),
    "sparse": (lambda: kernels.moments([torch.eye(2).to_sparse()]), ValueError, "to_dense"),
    "meta": (lambda: kernels.moments([torch.ones(2, device="meta")]), ValueError, "meta device"),
    "shapes": (lambda: kernels.gradient_moments(torch.ones(2, 3), torch.ones(3, 2)), ValueError, r"\(2, 3\)"),
    "no matrices": (
        lambda: kernels.linear_gradient_moments(torch.ones(2), torch.ones(2, 2), torch.ones(2, 2)),
        ValueError,
        "x has shape",
    ),
    "linear shapes": (
        lambda: kernels.linear_gradient_moments(torch.ones(4, 2), torch.ones(5, 3), torch.ones(3, 2)),
        ValueError,
        "do not fit",
    ),
    "linear dtypes": (
        lambda: kernels.linear_gradient_moments(torch.ones(4, 2), torch.ones(4, 3).half(), torch.ones(3, 2)),
        ValueError,
        "float16",
    ),
    "one dimension": (lambda: kernels.channel_products(torch.ones(3), torch.ones(3)), ValueError, "samples"),
    "sample as channel": (
        lambda: kernels.channel_products(torch.ones(3, 2), torch.ones(3, 2), channel_dim=0),
        ValueError,
        "channel_dim is 0",
    ),
    "unknown backend": (lambda: kernels.moments([torch.ones(2)], backend="gpu"), ValueError, "'gpu'"),
    "GPU backend on the CPU": (
        lambda: kernels.moments([torch.ones(2)], backend="triton"),
        ValueError,
        "Triton runs on a GPU",
    ),
    "CUDA on the CPU": (
        lambda: kernels.moments([torch.ones(2)], backend="cuda"),
        ValueError,
        "tensors on a CUDA device",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_one_openmp_runtime_whatever_is_imported_first() -> None:
    """Two of them slow torch's own reductions 4-13 times (the extension's would be the system's)."""
    code = (
        "import zest_fast, torch\n"
        "zest_fast.kernels.moments([torch.ones(1 << 20)]); torch.ones(1 << 20).sum()\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "print(len({m for m in maps if 'libgomp' in m or 'libomp' in m or 'libiomp' in m}))"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "1"
