"""Gradients that lean saving takes from inputs alone, each in one pass over memory: gated blocks and frozen norms.

Gated: reads g, gate and up and writes two gradients, where running again and autograd read and write act(gate) and its
kin once more. Norm: reads g and x, writes the gradient of x; a row stays in registers, so its mean is known before
squares about it are added. All in float32, whatever the types are; each is rounded once, when it is stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zest_fast.kernels.triton_launch import on_device_of

GATED_BLOCK = 1024  # entries of a program of 4 warps: 128 bits of bfloat16 a thread
WIDEST_ROW = 16384  # of a norm: more do not fit the registers of 16 warps without spills
_TILE = 1024  # entries of the smallest tile of a norm: short rows share a program


@triton.jit
def act_and_slope(x, ACTIVATION: tl.constexpr):
    """act(x) and its derivative, x in float32."""
    if ACTIVATION == "silu":
        share = tl.sigmoid(x)
        return x * share, share * (1.0 + x * (1.0 - share))
    elif ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * share, share + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    else:  # gelu_tanh: 0.5 (1 + tanh u) is sigmoid(2u)
        share = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        rise = share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return x * share, share + x * rise


@triton.jit
def gated_gradients(
    g,
    gate,
    up,
    d_gate,
    d_up,
    columns,
    g_row,
    gate_row,
    up_row,
    d_gate_row,
    d_up_row,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    gradient = tl.load(g + row * g_row + column, mask=inside, other=0.0).to(tl.float32)
    value, slope = act_and_slope(
        tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32), ACTIVATION
    )
    factor = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(d_gate + row * d_gate_row + column, (gradient * factor * slope).to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + row * d_up_row + column, (gradient * value).to(d_up.dtype.element_ty), mask=inside)


@triton.jit
def norm_gradients(
    g,
    x,
    weight,
    out,
    rows,
    columns,
    g_row,
    x_row,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (rows): gradient of x for y = (weight + OFFSET) x / sqrt(mean(x²) + EPS), x less its mean if CENTRED."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    value = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        value = tl.where(inside, value - (tl.sum(value, 1) / columns)[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(value * value, 1) / columns + EPS)[:, None]
    value *= inverse
    gradient = tl.load(g + row * g_row + column, mask=inside, other=0.0).to(tl.float32)
    gradient *= tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32) + OFFSET
    result = gradient - value * (tl.sum(gradient * value, 1) / columns)[:, None]
    if CENTRED:
        result -= (tl.sum(gradient, 1) / columns)[:, None]
    tl.store(out + row * columns + column, (result * inverse).to(out.dtype.element_ty), mask=inside)


def gated_backward(activation: str, g: Tensor, gate: Tensor, up: Tensor, d_gate: Tensor, d_up: Tensor) -> None:
    """The gradients of gate and up, given that of act(gate) * up, into d_gate and d_up, whose rows lie dense.

    activation: "silu", "gelu" or "gelu_tanh". All of one shape, not empty.
    """
    columns = g.shape[-1]
    operands = [_dense_rows(x) for x in (g, gate, up)] + [d.view(-1, columns) for d in (d_gate, d_up)]
    with on_device_of(g):
        gated_gradients[(len(operands[0]), triton.cdiv(columns, GATED_BLOCK))](
            *operands,
            columns,
            *(x.stride(0) for x in operands),
            ACTIVATION=activation,
            BLOCK=GATED_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )


def norm_backward(g: Tensor, x: Tensor, weight: Tensor, eps: float, *, offset: float, centred: bool) -> Tensor:
    """The gradient of x, in its type, for g of its shape, not empty, and rows of at most WIDEST_ROW entries."""
    columns = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    g, x = _dense_rows(g), _dense_rows(x)
    rows, block, warps = norm_tile(columns)
    with on_device_of(x):
        norm_gradients[(triton.cdiv(len(x), rows),)](
            g,
            x,
            weight.detach().contiguous(),
            out,
            len(x),
            columns,
            g.stride(0),
            x.stride(0),
            EPS=eps,
            OFFSET=offset,
            CENTRED=centred,
            ROWS=rows,
            COLUMNS=block,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return out


def norm_tile(columns: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps, for rows of that many entries."""
    block = triton.next_power_of_2(columns)
    rows = max(1, _TILE // block)
    return rows, block, min(16, max(4, rows * block // 512))


def _dense_rows(x: Tensor) -> Tensor:
    """x as a matrix whose rows (last dimension) lie dense; a copy only where its strides leave no other way."""
    x = x.detach().reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()
