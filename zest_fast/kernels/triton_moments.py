"""Moments of many tensors in one launch, and of a gradient with its weight: one read of memory, float64 out.

A table [tensors, 16] of int64 on the device (address, count, dtype, sizes, strides, ...) tells the kernel where each
tensor lies, so tensors of any length and dtype share one launch. Statistics do not depend on the order of entries: a
tensor that is dense in any order of its dimensions (contiguous, channels_last, transposed) is read as one line, 128
bits a thread and load; its unaligned ends, and other strides, take a slower path. Bytes moved: those of the tensors,
once.

A thread holds 32 entries (4 loads of 8 x 16 bit, 8 of 4 x 32 bit), finds their mean first and then squares their
deviations from it, both in registers: neither an offset nor an outlier costs digits, and values of 1e-30 or 1e30 are
squared in units of their mean size. Groups merge in float64 by Chan's formula, threads at the end of a chunk, chunks
(at most 1,024 a tensor, their borders a function of length and alignment alone) in a second launch in a fixed order:
same input, same bits. Entries that are not finite are counted in a second look at their chunk only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from zest_fast.kernels.layout import DTYPE_NUMBER
from zest_fast.kernels.triton_launch import on_device_of

_COLUMNS = tl.constexpr(16)  # address, entries, dtype, dense, 4 sizes, 4 strides, repeat, blocks a chunk, 2 unused
_BLOCK = tl.constexpr(4096)  # entries that a program of 4 warps reads at once
_WIDE_BLOCK = tl.constexpr(1024)  # of float64, which fills registers sooner
_MAX_CHUNKS = 1024
_EDGE = tl.constexpr(512)  # entries at once on the path for ends and strides
_MAX_DIMS = 4  # dimensions that the table holds after merging; more are copied
WARPS = 4


@triton.jit
def thread_moments(x):
    """Mean and squares about it of the entries of each thread, x [4, threads, vector] -> (mean, Σ(x-mean)²) [threads].

    The mean is float32, off by a rounding error e at most; the squares about it exceed those about the true mean by
    count x e², less than float32 can see.
    """
    count: tl.constexpr = x.shape[0] * x.shape[2]
    mean = tl.sum(tl.sum(x * (1.0 / count), 2), 0)
    size = tl.sum(tl.sum(tl.abs(x) * (1.0 / count), 2), 0)
    unit = tl.where((size > 1e-37) & (size < 1e37), size, 1.0)
    scaled = (x - mean[None, :, None]) * (1.0 / unit)[None, :, None]
    rest = tl.sum(tl.sum(scaled, 2), 0).to(tl.float64) * unit / count
    square = tl.sum(tl.sum(scaled * scaled, 2), 0).to(tl.float64) * unit * unit
    return mean.to(tl.float64) + rest, tl.maximum(square - rest * rest * count, 0.0)


@triton.jit
def entries_of_block(THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """Numbers of the entries of a block [4, THREADS, VECTOR]: each thread loads VECTOR neighbours, four times."""
    return (
        tl.arange(0, 4)[:, None, None] * (THREADS * VECTOR)
        + tl.arange(0, THREADS)[None, :, None] * VECTOR
        + tl.arange(0, VECTOR)[None, None, :]
    )


@triton.jit
def first_group(x):
    """(reference, Σ(mean-reference), Σ(mean-reference)², Σ squares) of each thread in float64, of its first group."""
    mean, square = thread_moments(x)
    return mean, tl.zeros_like(mean), tl.zeros_like(mean), square


@triton.jit
def add_group(state, x):
    """The same with one group more."""
    reference, shift, shift_square, squares = state
    mean, square = thread_moments(x)
    delta = mean - reference
    return reference, shift + delta, shift_square + delta * delta, squares + square


@triton.jit
def merge_threads(state, groups, group_size):
    """(mean, m2) of all threads of a program, each of which added `groups` groups of `group_size` entries."""
    reference, shift, shift_square, squares = state
    mean = reference + shift / groups
    square = squares + group_size * (shift_square - shift * (shift / groups))
    total = tl.sum(mean) / mean.shape[0]
    deviation = mean - total
    return total, tl.sum(square) + groups * group_size * tl.sum(deviation * deviation)


@triton.jit
def chan(count, mean, m2, other_count, other_mean, other_m2):
    """(mean, m2) of two parts together (Chan, Golub, LeVeque 1983); either may be empty, not both."""
    share = other_count / (count + other_count)
    delta = other_mean - mean
    return mean + delta * share, m2 + other_m2 + delta * delta * count * share


@triton.jit
def masked_moments(x, inside, count):
    """(mean, m2) of the entries inside, x in float64."""
    mean = tl.sum(tl.where(inside, x, 0.0)) / count
    deviation = tl.where(inside, x - mean, 0.0)
    return mean, tl.sum(deviation * deviation)


@triton.jit
def add_masked(count, mean, m2, x, inside, inside_count):
    """(mean, m2) with the entries inside, of which there are some; x in float64."""
    part_mean, part_m2 = masked_moments(x, inside, inside_count)
    return chan(count, mean, m2, inside_count, part_mean, part_m2)


@triton.jit
def store_row(row, values):
    """A tuple of numbers into the columns of a row, from its first on."""
    for column in tl.static_range(len(values)):
        tl.store(row + column, values[column])


@triton.jit
def nonfinite_entries(x):
    return tl.sum(tl.where(tl.abs(x) < float("inf"), 0.0, 1.0).to(tl.float64))


@triton.jit
def chunk_borders(blocks, each, chunk):
    """First block and the one after the last of a chunk; none where the tensor has fewer chunks."""
    first = tl.minimum(chunk * each, blocks)
    return first, tl.minimum(first + each, blocks)


@triton.jit
def strided_offsets(index, shape_row):
    """Offset in elements of entry number `index` by four sizes and four strides."""
    offset = tl.zeros_like(index)
    for d in tl.static_range(4):
        size = tl.load(shape_row + 3 - d)
        offset += index % size * tl.load(shape_row + 7 - d)
        index = index // size
    return offset


@triton.jit
def chunk_moments(address, row, chunk, DTYPE: tl.constexpr, BITS: tl.constexpr):
    """count, mean, m2, abs_mean, abs_m2, nonfinite of one chunk of one tensor, in float64."""
    VECTOR: tl.constexpr = 128 // BITS
    BLOCK: tl.constexpr = _WIDE_BLOCK if BITS == 64 else _BLOCK
    THREADS: tl.constexpr = BLOCK // (4 * VECTOR)
    GROUP: tl.constexpr = 4 * VECTOR
    COMPUTE: tl.constexpr = tl.float64 if BITS == 64 else tl.float32
    entries = tl.load(row + 1)
    dense = tl.load(row + 3)
    head = address % 16 // (BITS // 8)  # entries between a 128-bit border and the tensor
    first, last = chunk_borders(tl.cdiv(head + entries, BLOCK), tl.load(row + 13), chunk)
    whole_first, whole_last = first, tl.minimum(last, (head + entries) // BLOCK)
    if (head > 0) & (first == 0):
        whole_first += 1
    if dense == 0:
        whole_last = whole_first
    aligned = (address - address % 16).to(tl.pointer_type(DTYPE))
    index = entries_of_block(THREADS, VECTOR)

    count = tl.zeros((), tl.float64)
    mean, m2, abs_mean, abs_m2, nonfinite = count, count, count, count, count
    if whole_first < whole_last:
        start = tl.multiple_of(aligned + whole_first * BLOCK, 16)
        x = tl.load(start + index).to(COMPUTE)
        state, abs_state = first_group(x), first_group(tl.abs(x))
        for block in range(whole_first + 1, whole_last):
            start = tl.multiple_of(aligned + block * BLOCK, 16)
            x = tl.load(start + index).to(COMPUTE)
            state, abs_state = add_group(state, x), add_group(abs_state, tl.abs(x))
        groups = (whole_last - whole_first).to(tl.float64)
        count = groups * BLOCK
        mean, m2 = merge_threads(state, groups, GROUP)
        abs_mean, abs_m2 = merge_threads(abs_state, groups, GROUP)
        if (abs_mean < float("inf")) == 0:
            for block in range(whole_first, whole_last):
                start = tl.multiple_of(aligned + block * BLOCK, 16)
                nonfinite += nonfinite_entries(tl.load(start + index).to(COMPUTE))

    pointer = address.to(tl.pointer_type(DTYPE))
    for block in range(first, last):
        if (block < whole_first) | (block >= whole_last):
            for part in range(0, BLOCK, _EDGE):
                entry = block * BLOCK + part - head + tl.arange(0, _EDGE)
                inside = (entry >= 0) & (entry < entries)
                offset = strided_offsets(tl.where(inside, entry, 0), row + 4)
                x = tl.load(pointer + offset, mask=inside, other=0.0).to(tl.float64)
                part_count = tl.sum(inside.to(tl.float64))
                if part_count > 0.0:
                    mean, m2 = add_masked(count, mean, m2, x, inside, part_count)
                    abs_mean, abs_m2 = add_masked(count, abs_mean, abs_m2, tl.abs(x), inside, part_count)
                    nonfinite += nonfinite_entries(x)
                    count += part_count
    return count, mean, m2, abs_mean, abs_m2, nonfinite


@triton.jit
def moments_of_chunks(table, partials, chunks):
    """Program (tensor, chunk) -> partials [tensors, chunks, 6]."""
    program = tl.program_id(0)
    tensor = program // chunks
    row = table + tensor * _COLUMNS
    address = tl.load(row)
    dtype = tl.load(row + 2)
    chunk = (program % chunks).to(tl.int64)
    if dtype == 0:
        count, mean, m2, abs_mean, abs_m2, nonfinite = chunk_moments(address, row, chunk, tl.float32, 32)
    elif dtype == 1:
        count, mean, m2, abs_mean, abs_m2, nonfinite = chunk_moments(address, row, chunk, tl.float64, 64)
    elif dtype == 2:
        count, mean, m2, abs_mean, abs_m2, nonfinite = chunk_moments(address, row, chunk, tl.bfloat16, 16)
    else:
        count, mean, m2, abs_mean, abs_m2, nonfinite = chunk_moments(address, row, chunk, tl.float16, 16)
    store_row(partials + program.to(tl.int64) * 6, (count, mean, m2, abs_mean, abs_m2, nonfinite))


@triton.jit
def merge_chunks(count, total, mean, m2):
    """Chan's formula for many parts at once: (mean, m2) of parts with counts, means and squares [LANES]."""
    merged = tl.sum(count * mean) / total
    deviation = tl.where(count > 0.0, mean - merged, 0.0)
    return merged, tl.sum(m2 + count * deviation * deviation)


@triton.jit
def merge_moments(table, partials, out, chunks, LANES: tl.constexpr):
    """Program = tensor: its chunks -> out [tensors, 6]; an expanded entry counts as often as it appears."""
    tensor = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    row = partials + (tensor * chunks + lane) * 6
    inside = lane < chunks
    repeat = tl.load(table + tensor * _COLUMNS + 12).to(tl.float64)
    count = tl.load(row, mask=inside, other=0.0)
    total = tl.sum(count)
    divisor = tl.maximum(total, 1.0)
    mean, m2 = merge_chunks(
        count, divisor, tl.load(row + 1, mask=inside, other=0.0), tl.load(row + 2, mask=inside, other=0.0)
    )
    abs_mean, abs_m2 = merge_chunks(
        count, divisor, tl.load(row + 3, mask=inside, other=0.0), tl.load(row + 4, mask=inside, other=0.0)
    )
    nonfinite = tl.sum(tl.load(row + 5, mask=inside, other=0.0))
    store_row(out + tensor * 6, (total * repeat, mean, m2 * repeat, abs_mean, abs_m2 * repeat, nonfinite * repeat))


def merged_dimensions(*tensors: Tensor) -> list[tuple[int, tuple[int, ...]]]:
    """(size, stride in each tensor), outermost first: tensors of one shape in as few dimensions as they need.

    Dimensions are sorted by stride and neighbours merged where every tensor allows it: one that is contiguous,
    channels_last or transposed becomes a single dimension of stride 1.
    """
    sizes = tensors[0].shape
    dims = [(n, tuple(x.stride(d) for x in tensors)) for d, n in enumerate(sizes) if n != 1]
    dims.sort(key=lambda dim: dim[1], reverse=True)
    merged: list[tuple[int, tuple[int, ...]]] = []
    for size, strides in dims:
        if merged and all(outer == inner * size for outer, inner in zip(merged[-1][1], strides, strict=True)):
            merged[-1] = (merged[-1][0] * size, strides)
        else:
            merged.append((size, strides))
    return merged


def table_row(x: Tensor) -> tuple[list[int], Tensor]:
    """The table's row of a tensor, and the tensor that it describes (a copy if x has too many dimensions)."""
    repeat = 1
    for d, stride in enumerate(x.stride()):
        if stride == 0 and x.shape[d] > 1:
            repeat *= x.shape[d]
            x = x.narrow(d, 0, 1)
    dims = merged_dimensions(x)
    if len(dims) > _MAX_DIMS:
        x = x.contiguous()
        dims = merged_dimensions(x)
    dense = not dims or (len(dims) == 1 and dims[0][1] == (1,))
    dims = [(1, (0,))] * (_MAX_DIMS - len(dims)) + dims
    sizes, strides = [max(size, 1) for size, _ in dims], [stride for _, (stride,) in dims]
    row = [x.data_ptr(), x.numel(), DTYPE_NUMBER[x.dtype], int(dense), *sizes, *strides, repeat, _blocks_each(x), 0, 0]
    return row, x


def moments_into(tensors: Sequence[Tensor], out: Tensor) -> None:
    """Moments of each tensor into out [len(tensors), 6], float64, on the device of the tensors.

    Args:
        tensors: float32, float64, bfloat16 or float16; any shapes and strides.
        out: contiguous; a row is count, mean, m2, abs_mean, abs_m2, nonfinite.
    """
    if not tensors:
        return
    rows, kept = zip(*(table_row(x.detach()) for x in tensors), strict=True)
    chunks = max(triton.cdiv(_blocks(x), _blocks_each(x)) for x in kept)
    with on_device_of(out):
        table = torch.tensor(rows, dtype=torch.int64)
        if out.is_cuda:
            table = table.pin_memory().to(out.device, non_blocking=True)
        partials = torch.empty(len(rows), chunks, 6, dtype=torch.float64, device=out.device)
        moments_of_chunks[(len(rows) * chunks,)](table, partials, chunks, num_warps=WARPS, enable_fp_fusion=True)
        merge_moments[(len(rows),)](
            table, partials, out, chunks, LANES=triton.next_power_of_2(chunks), num_warps=WARPS, enable_fp_fusion=True
        )
    del kept  # copies live until their kernels are queued; the allocator orders reuse by stream


def _blocks(x: Tensor) -> int:
    """Blocks that a tensor is cut into, at most: its unaligned start may add one."""
    return (x.numel() + 7) // (_WIDE_BLOCK if x.dtype == torch.float64 else _BLOCK).value + 1


def _blocks_each(x: Tensor) -> int:
    return triton.cdiv(_blocks(x), _MAX_CHUNKS)
