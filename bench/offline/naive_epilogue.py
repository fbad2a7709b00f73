"""The epilogue that one writes first: each statistic a sum of its own over the masked tile, two-pass centring.

The yardstick of `python -m bench.offline`. It computes what `reduced_gradient` of zest_fast.kernels.triton_linear does,
inside the same main loop, the way a matrix product is usually ended: five sums over dW (ΣdW, Σ|dW|, Σ(dW-mean)², ΣW⊙dW,
Σ|W⊙dW|) and two over W, every load and every sum under the tile's mask. Nothing but the benchmark uses it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zest_fast.kernels.triton_linear import gradient_tile


@triton.jit
def naive_reduced_gradient(
    x,
    g,
    w,
    gradient_sums,
    partials,
    rows,
    columns_x,
    columns_g,
    stride_x,
    stride_g,
    stride_w,
    tiles,
    sum_parts,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BAND: tl.constexpr,
    SUM_LANES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program, first_o, first_i, d = gradient_tile(
        x, g, rows, columns_x, columns_g, stride_x, stride_g, BLOCK_O, BLOCK_I, BLOCK_T, BAND, PRECISION
    )
    o = first_o + tl.arange(0, BLOCK_O)
    i = first_i + tl.arange(0, BLOCK_I)
    inside = (o[:, None] < columns_g) & (i[None, :] < columns_x)
    weight = tl.load(w + o.to(tl.int64)[:, None] * stride_w + i[None, :], mask=inside, other=0.0).to(tl.float32)
    count = tl.sum(inside.to(tl.float32))

    total = tl.sum(tl.where(inside, d, 0.0))
    deviation = tl.where(inside, d - total / count, 0.0)
    weight_total = tl.sum(tl.where(inside, weight, 0.0))
    weight_deviation = tl.where(inside, weight - weight_total / count, 0.0)
    out = partials + program
    tl.store(out, total)
    tl.store(out + tiles, tl.sum(tl.where(inside, tl.abs(d), 0.0)))
    tl.store(out + 2 * tiles, tl.sum(deviation * deviation))
    tl.store(out + 3 * tiles, tl.sum(tl.where(inside, weight * d, 0.0)))
    tl.store(out + 4 * tiles, tl.sum(tl.where(inside, tl.abs(weight * d), 0.0)))
    tl.store(out + 5 * tiles, weight_total)
    tl.store(out + 6 * tiles, tl.sum(weight_deviation * weight_deviation))
