"""Backward of silu(gate) * up in one pass: against float64, for every layout and type that it takes."""

import pytest
import torch

from zest_fast.kernels import lean_kernels, lean_reference
from zest_fast.kernels.cpu import silu_gated_backward

# Of the terms that add up to a gradient. float32: 12 roundings (e^x has 4, it enters twice, and so on); bfloat16: those
# and the one at the end, to a significand of 8 bits.
ROUNDING = {torch.float32: 12 * 2**-24, torch.bfloat16: 2**-8 + 12 * 2**-24}


def terms(g, gate, up):
    """Sizes of what adds up to the two gradients: g up s and g up gate s (1 - s), for s the sigmoid; g gate s."""
    g, gate, up = (x.double() for x in (g, gate, up))
    s = gate.sigmoid()
    return (g * up).abs() * s * (1 + gate.abs() * (-gate).sigmoid()), (g * gate).abs() * s


def operands(dtype, *shape):
    torch.manual_seed(0)
    return tuple((scale * torch.randn(shape)).to(dtype) for scale in (1, 4, 1))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 5, 33), (300, 257)])  # the last one on several threads
def test_gradients_against_float64(dtype, shape):
    g, gate, up = operands(dtype, *shape)
    gradients, sizes = silu_gated_backward(g, gate, up), terms(g, gate, up)
    for found, wanted, size in zip(gradients, lean_reference.gated_backward("silu", g, gate, up), sizes, strict=True):
        assert found.dtype == dtype and found.shape == g.shape
        assert ((found.double() - wanted).abs() <= ROUNDING[dtype] * size + 1e-37).all()


@pytest.mark.parametrize("dtype", ROUNDING)
def test_halves_of_one_tensor_are_read_in_place(dtype):
    g, gate, up = operands(dtype, 2, 5, 33)
    halves = torch.cat((gate, up), dim=-1).chunk(2, dim=-1)
    for found, wanted in zip(silu_gated_backward(g, *halves), silu_gated_backward(g, gate, up), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_extreme_gates(dtype):
    gate = torch.tensor([[-1e30, -200, -88, -30, -1e-30, 0, 1e-30, 30, 88, 200, 1e30, float("nan")]]).to(dtype)
    g = up = torch.ones_like(gate)
    gradients, sizes = silu_gated_backward(g, gate, up), terms(g, gate, up)
    for found, wanted, size in zip(gradients, lean_reference.gated_backward("silu", g, gate, up), sizes, strict=True):
        assert torch.isnan(found[0, -1]) and torch.isfinite(found[0, :-1]).all()
        near = (found.double() - wanted).abs() <= ROUNDING[dtype] * size + 1e-7
        assert near[0, :-1].all()


@pytest.mark.parametrize(
    "change",
    [
        lambda g, gate, up: (g.double(), gate.double(), up.double()),
        lambda g, gate, up: (g, gate.bfloat16(), up),
        lambda g, gate, up: (g.t(), gate.t(), up.t()),
        lambda g, gate, up: (g[:1], gate, up),
        lambda g, gate, up: (g.to("meta"), gate, up),
        lambda g, gate, up: (g[:0], gate[:0], up[:0]),
        lambda g, gate, up: (g[0], gate[0], up[0]),
    ],
    ids=["float64", "mixed", "transposed", "shapes", "meta", "empty", "vectors"],
)
def test_what_it_does_not_take(change):
    assert silu_gated_backward(*change(*operands(torch.float32, 4, 6))) is None


@pytest.mark.parametrize("activation", lean_reference.ACTIVATIONS)
def test_the_choice_of_a_kernel(activation, monkeypatch):
    """On the CPU the compiled one, for SiLU; Triton's where it takes the tensors."""
    g, gate, up = operands(torch.float32, 3, 8)
    both = torch.cat((gate, up), dim=-1)
    monkeypatch.setattr(lean_kernels.triton_kernels, "interpreted", lambda: False)
    compiled = silu_gated_backward(g, gate, up) if activation == "silu" else None
    found, halves = (
        lean_kernels.gated_backward(activation, g, gate, up),
        lean_kernels.gated_halves_backward(activation, g, both),
    )
    if compiled is None:
        assert found is None and halves is None
    else:
        assert all(map(torch.equal, found, compiled)) and torch.equal(halves, torch.cat(compiled, dim=-1))
    monkeypatch.setattr(lean_kernels.triton_kernels, "gated_backward", lambda *_: (gate, up))
    assert lean_kernels.gated_backward(activation, g, gate, up) == (gate, up)
