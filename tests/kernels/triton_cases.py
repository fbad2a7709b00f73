"""Triton's kernels against the float64 specification. Collected by test_triton_kernels.py in its own process.

On a machine with a GPU the tensors live there. Elsewhere Triton's interpreter runs the kernels on CPU tensors, which
has to be chosen before Triton is imported: hence the process
(`TRITON_INTERPRET=1 pytest tests/kernels/triton_cases.py`).
"""

from __future__ import annotations

import math
import os
import sys

import pytest
import torch
from torch import Tensor

from zest_fast import kernels
from zest_fast.kernels import lean_reference, reference, triton_kernels
from zest_fast.kernels.moments import GradientMoments, Moments
from zest_fast.lean.apply import apply_lean

pytestmark = pytest.mark.skipif(not triton_kernels.availability(), reason=triton_kernels.availability().reason)

DEVICE = "cpu" if triton_kernels.interpreted() else "cuda"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GEMM_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RELATIVE = 2e-6  # float32 sums of a thread's 32 entries, or of a tile's up to 64, against float64


@pytest.fixture(autouse=True, scope="module")
def widened_dot() -> None:
    """The interpreter multiplies the raw bit patterns of bfloat16 (triton #11584); it gets the operands in float32."""
    if not triton_kernels.interpreted() or not triton_kernels.availability():
        return
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    plain = InterpreterBuilder.create_dot

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.view(np.uint16).astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return plain(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot


def moments(tensors: list[Tensor]) -> list[Moments]:
    out = torch.full((len(tensors), 6), -1.0, dtype=torch.float64, device=DEVICE)
    triton_kernels.moments_into(tensors, out)
    return [Moments.checked(*row) for row in out.tolist()]


def gradient(function, *tensors: Tensor) -> GradientMoments:
    out = torch.full((11,), -1.0, dtype=torch.float64, device=DEVICE)
    function(*tensors, out)
    row = out.tolist()
    return GradientMoments.checked(Moments.checked(*row[:6]), *row[6:])


def same(found: float, expected: float, relative: float = RELATIVE, absolute: float = 0.0) -> bool:
    if math.isnan(expected):
        return math.isnan(found)
    return abs(found - expected) <= relative * abs(expected) + absolute


def assert_moments_close(found: Moments, expected: Moments, relative: float = RELATIVE) -> None:
    assert (found.count, found.nonfinite) == (expected.count, expected.nonfinite)
    spread = 0.0 if math.isnan(expected.std) else expected.std
    floor = 0.0 if math.isnan(expected.mean) else abs(expected.mean) * 1e-7  # what float32 sees of an offset
    assert same(found.mean, expected.mean, 1e-7, relative * spread), (found, expected)
    assert same(found.abs_mean, expected.abs_mean, relative), (found, expected)
    assert same(found.std, expected.std, relative, floor), (found, expected)
    assert same(found.abs_std, expected.abs_std, relative, floor), (found, expected)


def assert_gradient_close(found: GradientMoments, expected: GradientMoments, relative: float = RELATIVE) -> None:
    assert_moments_close(found.gradient, expected.gradient, relative)
    assert found.weight_nonfinite == expected.weight_nonfinite
    spread = 0.0 if math.isnan(expected.weight_std) else expected.weight_std
    assert same(found.weight_mean, expected.weight_mean, 1e-7, RELATIVE * spread), (found, expected)
    assert same(found.weight_std, expected.weight_std, RELATIVE, 1e-7 * abs(expected.weight_mean)), (found, expected)
    assert same(found.product_abs_sum, expected.product_abs_sum, relative), (found, expected)
    assert same(found.product_sum, expected.product_sum, relative, relative * expected.product_abs_sum), (
        found,
        expected,
    )


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def test_the_kernels_run_where_this_process_means_them_to() -> None:
    assert triton_kernels.availability()
    assert triton_kernels.interpreted() == (os.environ.get("TRITON_INTERPRET") == "1")


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_of_awkward_lengths(dtype: torch.dtype) -> None:
    lengths = [0, 1, 2, 3, 31, 511, 513, 1023, 1024, 1025, 4095, 4096, 4097, 8191, 12_289]
    tensors = [randn(n, dtype=dtype) + 0.5 for n in lengths]
    for found, x in zip(moments(tensors), tensors, strict=True):
        assert_moments_close(found, reference.moments(x))


def test_moments_of_many_tensors_of_different_dtype_and_length() -> None:
    tensors = [randn(100 + 1111 * i, dtype=DTYPES[i % 4], seed=i) for i in range(9)]
    for found, x in zip(moments(tensors), tensors, strict=True):
        assert_moments_close(found, reference.moments(x))


def views() -> dict[str, Tensor]:
    image = randn(2, 6, 17, 19)
    return {
        "scalar": randn(1)[0],
        "misaligned": randn(9000)[1:],
        "misaligned 16 bit": randn(9000, dtype=torch.bfloat16)[3:],
        "misaligned short": randn(5, dtype=torch.float16)[1:3],
        "transposed": randn(70, 80).t(),
        "channels_last": image.to(memory_format=torch.channels_last),
        "columns": randn(60, 100)[:, 10:70],
        "every other": randn(5000)[::2],
        "inner of four": image[:, 1:-1, 2:-2, 3:-3],
        "permuted and cut": image.permute(3, 0, 2, 1)[1:, :, ::3],
        "expanded": randn(1, 50).expand(40, 50),
        "expanded inside": randn(5, 1, 7).expand(5, 3, 7),
        "expanded from one": randn(1).expand(3, 4),
        "five dimensions": randn(3, 4, 5, 6, 7)[::2, ::2, ::2, ::2, ::2],
        "empty": randn(0, 5),
    }


@pytest.mark.parametrize("name", views())
def test_moments_of_views(name: str) -> None:
    x = views()[name]
    assert_moments_close(moments([x])[0], reference.moments(x))


@pytest.mark.parametrize("offset", [0.0, 1.0, -1e2, 1e4])
def test_an_offset_costs_no_digits(offset: float) -> None:
    x = randn(20_001) + offset
    expected = reference.moments(x)
    found = moments([x])[0]
    assert same(found.std, expected.std, 1e-5) and same(found.abs_std, expected.abs_std, 1e-5)
    assert same(found.mean, expected.mean, 0, 1e-5 * expected.std)
    pair = gradient(triton_kernels.gradient_moments_into, x, x)
    assert same(pair.gradient.std, expected.std, 1e-5) and same(pair.weight_std, expected.std, 1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_values_whose_squares_do_not_fit_float32(scale: float) -> None:
    x, w = randn(9000) * scale, randn(9000, seed=1)
    assert_moments_close(moments([x])[0], reference.moments(x))
    pair = gradient(triton_kernels.gradient_moments_into, x, w)
    assert_gradient_close(pair, reference.gradient_moments(x, w))


@pytest.mark.parametrize("outlier", [1e3, -1e4, 1e6])
def test_an_outlier_in_front_does_not_spoil_its_chunk(outlier: float) -> None:
    x = randn(8192)
    x[0] = outlier
    assert_moments_close(moments([x])[0], reference.moments(x))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 5000, 8999])
def test_entries_that_are_not_finite_are_counted(bad: float, where: int) -> None:
    x, w = randn(9000), randn(9000, seed=1)
    x[where] = bad
    assert moments([x])[0].nonfinite == 1 and math.isnan(moments([x])[0].std)
    assert_gradient_close(gradient(triton_kernels.gradient_moments_into, x, w), reference.gradient_moments(x, w))
    assert_gradient_close(gradient(triton_kernels.gradient_moments_into, w, x), reference.gradient_moments(w, x))


@pytest.mark.parametrize("w_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_moments(dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    for shape in [(1, 1), (3, 7), (64, 33), (70, 90)]:
        dw, w = randn(*shape, dtype=dtype), randn(*shape, dtype=w_dtype, seed=1) + 0.25
        found = gradient(triton_kernels.gradient_moments_into, dw, w)
        assert_gradient_close(found, reference.gradient_moments(dw, w))


def test_gradient_moments_of_views() -> None:
    image = randn(4, 6, 9, 11)
    last = image.to(memory_format=torch.channels_last)
    pairs = [
        (last, randn(4, 6, 9, 11, seed=1).to(memory_format=torch.channels_last)),
        (last, image + 1),
        (randn(40, 50).t(), randn(50, 40)),
        (randn(50, 80)[:, 3:43], randn(50, 40, seed=1)),
        (randn(1, 40).expand(50, 40), randn(50, 40)),
        (randn(2001)[1:], randn(2000)),
        (randn(3, 4, 5, 6, 7)[::2, ::2, ::2, ::2, ::2], randn(2, 2, 3, 3, 4)),
        (randn(0, 3), randn(0, 3)),
    ]
    for dw, w in pairs:
        assert_gradient_close(gradient(triton_kernels.gradient_moments_into, dw, w), reference.gradient_moments(dw, w))


SHAPES = [(1, 1, 1), (5, 3, 7), (0, 4, 6), (3, 64, 64), (129, 31, 65), (64, 130, 70), (33, 200, 257), (300, 129, 1)]


def linear_case(t: int, i: int, o: int, dtype: torch.dtype, w_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return randn(t, i, dtype=dtype), randn(t, o, dtype=dtype, seed=1), randn(o, i, dtype=w_dtype, seed=2)


@pytest.mark.parametrize("dtype", GEMM_DTYPES)
@pytest.mark.parametrize(("t", "i", "o"), SHAPES)
def test_linear_gradient_moments(t: int, i: int, o: int, dtype: torch.dtype) -> None:
    x, g, w = linear_case(t, i, o, dtype, dtype)
    found = gradient(triton_kernels.linear_gradient_moments_into, x, g, w)
    expected = reference.linear_gradient_moments(x, g, w)
    assert_gradient_close(found, expected, 1e-5)  # dW itself is rounded to float32 T times


@pytest.mark.parametrize("w_dtype", DTYPES)
def test_linear_gradient_moments_of_a_weight_of_another_dtype(w_dtype: torch.dtype) -> None:
    x, g, w = linear_case(70, 90, 80, torch.bfloat16, w_dtype)
    found = gradient(triton_kernels.linear_gradient_moments_into, x, g, w)
    assert_gradient_close(found, reference.linear_gradient_moments(x, g, w), 1e-5)


@pytest.mark.parametrize("strided", ["x", "g", "rows", "expanded g", "expanded row", "w", "w columns"])
def test_linear_gradient_moments_of_views(strided: str) -> None:
    x, g, w = linear_case(50, 40, 30, torch.float32, torch.float32)
    if strided == "x":
        x = randn(50, 80)[:, ::2]
    elif strided == "g":
        g = randn(30, 50).t()
    elif strided == "rows":
        x, g = randn(100, 60)[::2, 7:47], randn(50, 90)[:, :30]
    elif strided == "expanded g":
        g = randn(1, 1).expand(50, 30)
    elif strided == "expanded row":
        g = randn(1, 30).expand(50, 30)
    elif strided == "w":
        w = randn(40, 30).t()
    else:
        w = randn(30, 80)[:, ::2]
    found = gradient(triton_kernels.linear_gradient_moments_into, x, g, w)
    assert_gradient_close(found, reference.linear_gradient_moments(x, g, w), 1e-5)


def test_linear_gradient_moments_of_offset_gradients_and_weights() -> None:
    """Every tile, or some tiles only, take the careful path: means far from 0 against the deviation."""
    for shift in ("all", "some"):
        x, g, w = linear_case(64, 200, 190, torch.float32, torch.float32)
        x, g = x * 0.01 + (1 if shift == "all" else (torch.arange(200, device=DEVICE) < 100).float()), g * 0.01 + 1
        w = w + 1e3
        found = gradient(triton_kernels.linear_gradient_moments_into, x, g, w)
        assert_gradient_close(found, reference.linear_gradient_moments(x, g, w), 2e-5)


def test_linear_gradient_moments_of_equal_entries() -> None:
    x, g, w = (torch.ones(s, device=DEVICE) for s in ((8, 70), (8, 90), (90, 70)))
    found = gradient(triton_kernels.linear_gradient_moments_into, x, g, w)
    assert (found.gradient.mean, found.gradient.std, found.gradient.abs_std, found.weight_std) == (8.0, 0.0, 0.0, 0.0)
    assert (found.product_sum, found.product_abs_sum) == (8.0 * 6300, 8.0 * 6300)


@pytest.mark.parametrize("scale", [1e-14, 1e14])
def test_linear_gradients_whose_squares_do_not_fit_float32(scale: float) -> None:
    x, g, w = linear_case(20, 70, 66, torch.float32, torch.float32)
    found = gradient(triton_kernels.linear_gradient_moments_into, x * scale, g * scale, w)
    assert_gradient_close(found, reference.linear_gradient_moments(x * scale, g * scale, w), 1e-5)


@pytest.mark.parametrize("where", ["x", "g", "w"])
def test_linear_entries_that_are_not_finite_are_counted(where: str) -> None:
    x, g, w = linear_case(20, 70, 66, torch.float32, torch.float32)
    {"x": x, "g": g, "w": w}[where][3, 5] = math.inf
    found = gradient(triton_kernels.linear_gradient_moments_into, x, g, w)
    assert_gradient_close(found, reference.linear_gradient_moments(x, g, w), 1e-5)


def test_float64_and_mixed_gemms_are_left_to_the_next_backend() -> None:
    x, g, w = linear_case(4, 5, 6, torch.float64, torch.float64)
    with pytest.raises(NotImplementedError, match="float64"):
        gradient(triton_kernels.linear_gradient_moments_into, x, g, w)
    with pytest.raises(NotImplementedError, match="float16"):
        gradient(triton_kernels.linear_gradient_moments_into, x.float(), g.half(), w)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 3), (3, 49, 130), (2, 600, 9), (1, 17, 257), (0, 3, 4), (2, 0, 4)])
def test_channel_products(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, p, k = shape
    by_channel = randn(n, p, k, dtype=dtype), randn(n, p, k, dtype=dtype, seed=1)
    by_position = tuple(randn(n, k, p, dtype=dtype, seed=s).transpose(1, 2) for s in (0, 1))
    mixed = by_channel[0], by_position[1]
    cut = randn(n, 2 * p, k + 3, dtype=dtype)[:, ::2, 1:-2], by_channel[1]
    for y, g in (by_channel, by_position, mixed, cut):
        size = (y.double() * g.double()).abs().sum(1)
        error = (triton_kernels.channel_products(y, g) - reference.channel_products(y, g)).abs()
        assert bool((error <= 1e-6 * size).all())


def halves(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return randn(2, rows, columns, dtype=dtype), randn(2, rows, 2 * columns, dtype=dtype, seed=1)


def assert_gradients_close(found: Tensor, expected: Tensor) -> None:
    """Float32 arithmetic, then one rounding to the type of the result."""
    assert found.shape == expected.shape
    rounding = torch.finfo(found.dtype).eps
    scale = expected.abs().amax(-1, keepdim=True)
    assert bool(((found.double() - expected).abs() <= rounding * expected.abs() + 4e-6 * scale).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", lean_reference.ACTIVATIONS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (2, 1024), (5, 1029)])
def test_lean_gated_gradients(rows: int, columns: int, activation: str, dtype: torch.dtype) -> None:
    g, both = halves(rows, columns, dtype)
    expected = lean_reference.gated_backward(activation, g, *both.chunk(2, -1))
    separate = triton_kernels.gated_backward(activation, g, *both.chunk(2, -1))
    together = triton_kernels.gated_halves_backward(activation, g, both)
    assert separate is not None and together is not None
    for found, half, exact in zip(separate, together.chunk(2, -1), expected, strict=True):
        assert found.dtype == dtype and torch.equal(found, half)
        assert_gradients_close(found, exact)


def test_lean_gated_gradients_far_from_zero_and_of_views() -> None:
    gate = torch.tensor([-1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4], device=DEVICE).repeat(4, 1)
    up = randn(7, 4).t() + 1e3
    g = randn(1, 1).expand(4, 7)
    for activation in lean_reference.ACTIVATIONS:
        expected = lean_reference.gated_backward(activation, g, gate, up)
        for found, exact in zip(triton_kernels.gated_backward(activation, g, gate, up), expected, strict=True):
            assert_gradients_close(found, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.0, 1e2])
@pytest.mark.parametrize(("centred", "offset"), [(False, 0.0), (False, 1.0), (True, 0.0)])
@pytest.mark.parametrize("columns", [2, 7, 128, 1030, 4096])
def test_lean_norm_gradients(columns: int, centred: bool, offset: float, shift: float, dtype: torch.dtype) -> None:
    g, w = randn(5, 3, columns, dtype=dtype), randn(columns, dtype=dtype, seed=1)
    x = (randn(columns, 5, 3, seed=2).permute(1, 2, 0) + shift).to(dtype)
    found = triton_kernels.norm_backward(g, x, w, 1e-5, offset=offset, centred=centred)
    expected = lean_reference.norm_backward(g, x, w, 1e-5, offset=offset, centred=centred)
    value = x.double() - x.double().mean(-1, keepdim=True) if centred else x.double()
    assert found is not None and found.dtype == dtype and found.is_contiguous()
    # A result that cancels is as exact as its terms; a mean near `shift` is rounded, in units of the deviation.
    inverse = torch.rsqrt(value.square().mean(-1, keepdim=True) + 1e-5)
    terms = (g.double() * (w.double() + offset)).abs().amax(-1, keepdim=True) * inverse
    allowed = torch.finfo(dtype).eps * expected.abs() + (4e-6 + 2e-7 * shift * centred * inverse) * terms
    assert bool(((found.double() - expected).abs() <= allowed).all())


def test_lean_kernels_leave_the_rest_to_torch() -> None:
    x = randn(2, 6)
    wide = randn(1, 16385)
    assert triton_kernels.gated_backward("silu", *(x.double(),) * 3) is None
    assert triton_kernels.gated_backward("silu", x, x, randn(2, 5)) is None
    assert triton_kernels.gated_halves_backward("silu", x, x) is None
    assert triton_kernels.gated_backward("silu", *(randn(0, 6),) * 3) is None
    assert triton_kernels.norm_backward(wide, wide, wide[0], 1e-6, offset=0.0, centred=False) is None


@pytest.mark.parametrize("kind", ["rms", "silu", "gelu", "halves"])
def test_lean_modules_take_the_kernels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = lean_module(kind).to(DEVICE).requires_grad_(False)
    x = randn(3, 5, 8).requires_grad_(True)
    (plain,) = torch.autograd.grad(module(x * 1.0), x, randn(3, 5, 8, seed=1))
    name = {"rms": "norm_backward", "halves": "gated_halves_backward"}.get(kind, "gated_backward")
    kernel, calls = getattr(triton_kernels, name), []
    monkeypatch.setattr(triton_kernels, name, lambda *a, **k: calls.append(kernel(*a, **k)) or calls[-1])
    with apply_lean(module) as handle:
        assert handle.applied
        calls.clear()  # those of the trial
        (lean,) = torch.autograd.grad(module(x * 1.0), x, randn(3, 5, 8, seed=1))
    assert len(calls) == 1 and calls[0] is not None
    assert_gradients_close(lean, plain.double())


class PlainRMSNorm(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(randn(8, seed=3)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.double()  # kept by plain autograd
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class PlainGated(torch.nn.Module):
    def __init__(self, act: torch.nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (torch.nn.Linear(8, 8) for _ in range(3))
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class PlainHalves(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = torch.nn.Linear(8, 16), torch.nn.Linear(8, 8)
        self.act_fn = torch.nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(self.act_fn(gate) * up)


def lean_module(kind: str) -> torch.nn.Module:
    if kind == "rms":
        return PlainRMSNorm()
    return PlainHalves() if kind == "halves" else PlainGated(torch.nn.SiLU() if kind == "silu" else torch.nn.GELU())


def test_the_same_input_gives_the_same_bits() -> None:
    tensors = [randn(5000 + i, dtype=DTYPES[i % 4]) for i in range(4)]
    assert moments(tensors) == moments(tensors)
    assert moments(tensors)[2] == moments([tensors[2]])[0]
    x, g, w = linear_case(70, 150, 140, torch.bfloat16, torch.float32)
    first = gradient(triton_kernels.linear_gradient_moments_into, x, g, w)
    assert first == gradient(triton_kernels.linear_gradient_moments_into, x, g, w)
    dw = g.t() @ x
    first = gradient(triton_kernels.gradient_moments_into, dw, w)
    assert first == gradient(triton_kernels.gradient_moments_into, dw, w)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU with 6 GB")
def test_more_than_two_to_the_31_entries() -> None:
    x = torch.zeros(2**31 + 4097, dtype=torch.bfloat16, device=DEVICE)
    x[-1] = 3.0
    found = moments([x])[0]
    assert found.count == 2**31 + 4097 and found.sum == pytest.approx(3.0)


def test_import_of_the_library_leaves_triton_alone() -> None:
    assert kernels.__name__ in sys.modules and "triton" not in vars(triton_kernels)
