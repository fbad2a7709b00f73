"""Moments of a gradient dW and its weight W, and Σ W⊙dW and Σ|W⊙dW|, in one read of both.

For a gradient that exists as a whole (convolutions, tied weights: the leaf route). Both tensors are read in the order
in which they lie in memory where they lie alike, 128 bits a thread and load; ends and other strides take a slower
path. Bytes moved: those of both tensors, once. Centring and merging are those of triton_moments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zest_fast.kernels.triton_launch import on_device_of
from zest_fast.kernels.triton_moments import (
    WARPS,
    add_group,
    add_masked,
    entries_of_block,
    first_group,
    merge_chunks,
    merge_threads,
    merged_dimensions,
    nonfinite_entries,
    store_row,
)

_BLOCK = tl.constexpr(2048)
_MAX_CHUNKS = 1024
_MAX_DIMS = 4


@triton.jit
def pair_offsets(index, n1, n2, n3, s0, s1, s2, s3):
    """Offset of entry number `index` by the three inner sizes and four strides, in int64."""
    offset = index % n3 * s3
    index = index // n3
    offset += index % n2 * s2
    index = index // n2
    return offset + index % n1 * s1 + index // n1 * s0


@triton.jit
def gradient_chunks(
    dw,
    w,
    partials,
    entries,
    blocks_each,
    n1,
    n2,
    n3,
    d0,
    d1,
    d2,
    d3,
    w0,
    w1,
    w2,
    w3,
    DENSE: tl.constexpr,
    VECTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Program = chunk -> partials [chunks, 12]: the eleven numbers of the chunk, its dW's count in front."""
    THREADS: tl.constexpr = _BLOCK // (4 * VECTOR)
    chunk = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(tl.cast(entries, tl.int64), _BLOCK)
    first = chunk * blocks_each
    last = tl.minimum(first + blocks_each, blocks)
    whole_last = tl.minimum(last, tl.cast(entries, tl.int64) // _BLOCK)
    if not DENSE:
        whole_last = first
    index = entries_of_block(THREADS, VECTOR)
    count = tl.zeros((), tl.float64)
    mean, m2, abs_mean, abs_m2, nonfinite = count, count, count, count, count
    w_mean, w_m2, w_nonfinite, product, product_abs = count, count, count, count, count
    if first < whole_last:
        d_tile = tl.load(dw + first * _BLOCK + index).to(COMPUTE)
        w_tile = tl.load(w + first * _BLOCK + index).to(COMPUTE)
        state, abs_state, w_state = first_group(d_tile), first_group(tl.abs(d_tile)), first_group(w_tile)
        products = tl.sum(tl.sum(d_tile * w_tile, 2), 0).to(tl.float64)
        products_abs = tl.sum(tl.sum(tl.abs(d_tile * w_tile), 2), 0).to(tl.float64)
        for block in range(first + 1, whole_last):
            d_tile = tl.load(dw + block * _BLOCK + index).to(COMPUTE)
            w_tile = tl.load(w + block * _BLOCK + index).to(COMPUTE)
            state, abs_state = add_group(state, d_tile), add_group(abs_state, tl.abs(d_tile))
            w_state = add_group(w_state, w_tile)
            products += tl.sum(tl.sum(d_tile * w_tile, 2), 0).to(tl.float64)
            products_abs += tl.sum(tl.sum(tl.abs(d_tile * w_tile), 2), 0).to(tl.float64)
        groups = tl.cast(whole_last - first, tl.float64)
        count = groups * _BLOCK
        mean, m2 = merge_threads(state, groups, 4 * VECTOR)
        abs_mean, abs_m2 = merge_threads(abs_state, groups, 4 * VECTOR)
        w_mean, w_m2 = merge_threads(w_state, groups, 4 * VECTOR)
        product, product_abs = tl.sum(products), tl.sum(products_abs)
        if (tl.abs(abs_mean) + tl.abs(w_mean) < float("inf")) == 0:
            for block in range(first, whole_last):
                nonfinite += nonfinite_entries(tl.load(dw + block * _BLOCK + index).to(COMPUTE))
                w_nonfinite += nonfinite_entries(tl.load(w + block * _BLOCK + index).to(COMPUTE))

    for part in range(whole_last * (_BLOCK // 512), last * (_BLOCK // 512)):
        entry = tl.cast(part, tl.int64) * 512 + tl.arange(0, 512)
        inside = entry < entries
        entry = tl.where(inside, entry, 0)
        d = tl.load(dw + pair_offsets(entry, n1, n2, n3, d0, d1, d2, d3), mask=inside, other=0.0).to(tl.float64)
        v = tl.load(w + pair_offsets(entry, n1, n2, n3, w0, w1, w2, w3), mask=inside, other=0.0).to(tl.float64)
        part_count = tl.sum(inside.to(tl.float64))
        if part_count > 0.0:
            mean, m2 = add_masked(count, mean, m2, d, inside, part_count)
            abs_mean, abs_m2 = add_masked(count, abs_mean, abs_m2, tl.abs(d), inside, part_count)
            w_mean, w_m2 = add_masked(count, w_mean, w_m2, v, inside, part_count)
            product += tl.sum(d * v)
            product_abs += tl.sum(tl.abs(d * v))
            nonfinite += nonfinite_entries(d)
            w_nonfinite += nonfinite_entries(v)
            count += part_count

    store_row(
        partials + chunk * 12,
        (count, mean, m2, abs_mean, abs_m2, nonfinite, w_mean, w_m2, w_nonfinite, product, product_abs),
    )


@triton.jit
def merge_gradient_chunks(partials, out, chunks, LANES: tl.constexpr):
    """All chunks [chunks, 12] -> out [11]."""
    lane = tl.arange(0, LANES)
    inside = lane < chunks
    row = partials + lane * 12
    count = tl.load(row, mask=inside, other=0.0)
    total = tl.sum(count)
    tl.store(out, total)
    for column in tl.static_range(1, 11):
        values = tl.load(row + column, mask=inside, other=0.0)
        if column == 1 or column == 3 or column == 6:
            mean, m2 = merge_chunks(count, total, values, tl.load(row + column + 1, mask=inside, other=0.0))
            tl.store(out + column, mean)
            tl.store(out + column + 1, m2)
        elif column == 5 or column >= 8:
            tl.store(out + column, tl.sum(values))


def gradient_moments_into(dw: Tensor, w: Tensor, out: Tensor) -> None:
    """Moments of dw and w (same shape, any strides and dtypes) and of their product into out [11], float64."""
    if w.numel() == 0:
        out.zero_()
        return
    dw, w = dw.detach(), w.detach()
    dims = merged_dimensions(dw, w)
    if len(dims) > _MAX_DIMS:
        dw = dw.contiguous()
        w = w.contiguous()
        dims = merged_dimensions(dw, w)
    dense = not dims or (len(dims) == 1 and dims[0][1] == (1, 1))
    dims = [(1, (0, 0))] * (_MAX_DIMS - len(dims)) + dims
    blocks = -(-w.numel() // _BLOCK.value)
    blocks_each = -(-blocks // _MAX_CHUNKS)
    chunks = -(-blocks // blocks_each)
    wide = torch.float64 in (dw.dtype, w.dtype)
    with on_device_of(w):
        partials = torch.empty(chunks, 12, dtype=torch.float64, device=w.device)
        gradient_chunks[(chunks,)](
            dw,
            w,
            partials,
            w.numel(),
            blocks_each,
            *(size for size, _ in dims[1:]),
            *(strides[0] for _, strides in dims),
            *(strides[1] for _, strides in dims),
            DENSE=dense,
            VECTOR=16 // max(dw.element_size(), w.element_size()),
            COMPUTE=tl.float64 if wide else tl.float32,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
        merge_gradient_chunks[(1,)](
            partials, out, chunks, LANES=triton.next_power_of_2(chunks), num_warps=WARPS, enable_fp_fusion=True
        )
