"""dW = GᵀX of a linear layer, reduced in the epilogue of its GEMM: every statistic of dW, and dW never reaches memory.

X [T, I] and G [T, O] of one dtype, rows dense with any row stride; W [O, I] of any dtype. Each program forms one tile
of dW in float32 accumulators, adds up Σ|dW|, ΣdW², ΣW⊙dW, Σ|W⊙dW|, ΣW and ΣW² over it and writes these six numbers.
Bytes moved: X and G as any GEMM reads them, W once, 32 per tile; a GEMM that stores dW and a pass over it move
2 x O x I x 4 bytes more.

The epilogue is short: eight instructions an entry. Accumulators stay in their registers and are added there, a quarter
of the tile's columns upon the other, before anything crosses threads; beyond the edge both dW and W are 0, so no sum
needs a mask; ΣdW = Σ_t (Σ_i X_ti)(Σ_k G_tk) comes from a first kernel that reads X and G once. ΣW⊙dW is summed in the
tile: its product is there for Σ|W⊙dW|, so it costs one addition, and the closed form would need Y.

Squares are summed about 0, which is exact enough where a tile's mean is not large against its deviation. Where it is
(tested with the tile's sums), or a sum of squares leaves the range of float32, or an entry is not finite, that tile
alone is summed again, about the mean of dW, which is known before the GEMM starts, and about W's own. Σ(|dW|-mean)²
follows in float64 from Σ|dW| and ΣdW² under the same test. A third kernel merges the tiles in float64, by Chan's
formula and in a fixed order: same input, same bits.

Programs walk the tiles in bands of rows, so that the rows of X and G in flight stay in L2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zest_fast.kernels.triton_launch import on_device_of
from zest_fast.kernels.triton_moments import store_row

_SUM_PROGRAMS = 512  # of the first kernel, at most
_BAND = 8  # rows of tiles
_MERGE_LANES = 1024
_MAX_ROW_STRIDE = 2**24  # 128 rows of it stay below 2^31, so that offsets inside a tile fit 32 bits


@triton.jit
def gradient_sum(x, g, out, rows, columns_x, columns_g, stride_x, stride_g, rows_each, BLOCK: tl.constexpr):
    """out[program] = Σ_t (Σ_i x_ti)(Σ_k g_tk) over the program's rows."""
    program = tl.program_id(0)
    first = tl.cast(program, tl.int64) * rows_each
    total = tl.zeros((), tl.float64)
    lane = tl.arange(0, BLOCK)
    for t in range(rows_each):
        row = first + t
        end_x = tl.where(row < rows, columns_x, 0)
        end_g = tl.where(row < rows, columns_g, 0)
        sum_x = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, columns_x, BLOCK):
            sum_x += tl.load(x + row * stride_x + start + lane, mask=start + lane < end_x, other=0.0).to(tl.float32)
        sum_g = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, columns_g, BLOCK):
            sum_g += tl.load(g + row * stride_g + start + lane, mask=start + lane < end_g, other=0.0).to(tl.float32)
        total += tl.sum(sum_x.to(tl.float64), 0) * tl.sum(sum_g.to(tl.float64), 0)
    tl.store(out + program, total)


@triton.jit
def tile_of(program, tiles_o, tiles_i, BAND: tl.constexpr):
    """Row and column of the program's tile: bands of BAND rows of tiles, column by column inside a band."""
    band_size = BAND * tiles_i
    first = program // band_size * BAND
    height = tl.maximum(tl.minimum(tiles_o - first, BAND), 1)  # 1 for lanes beyond the last tile, which are masked
    inside = program % band_size
    return first + inside % height, inside // height


@triton.jit
def gradient_tile(
    x,
    g,
    rows,
    columns_x,
    columns_g,
    stride_x,
    stride_g,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The program's number, first row and column, and tile of GᵀX in float32; entries beyond the edge are 0."""
    program = tl.program_id(0)
    tile_o, tile_i = tile_of(program, tl.cdiv(columns_g, BLOCK_O), tl.cdiv(columns_x, BLOCK_I), BAND)
    first_o, first_i = tile_o * BLOCK_O, tile_i * BLOCK_I
    t = tl.arange(0, BLOCK_T)
    o = first_o + tl.arange(0, BLOCK_O)
    i = first_i + tl.arange(0, BLOCK_I)
    x_tile = x + (t[:, None] * stride_x + i[None, :])
    g_tile = g + (t[:, None] * stride_g + o[None, :])
    step_x = tl.cast(stride_x, tl.int64) * BLOCK_T
    step_g = tl.cast(stride_g, tl.int64) * BLOCK_T
    acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for start in range(0, rows, BLOCK_T):
        inside = t[:, None] < rows - start
        x_part = tl.load(x_tile, mask=inside & (i[None, :] < columns_x), other=0.0)
        g_part = tl.load(g_tile, mask=inside & (o[None, :] < columns_g), other=0.0)
        acc = tl.dot(tl.trans(g_part), x_part, acc, input_precision=PRECISION)
        x_tile += step_x
        g_tile += step_g
    return program, first_o, first_i, acc


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BY_ROWS: tl.constexpr):
    """Upper and lower, or left and right, half of [ROWS, COLUMNS, 2]."""
    if BY_ROWS:
        return tl.split(tl.permute(tl.reshape(tile, (2, ROWS // 2, COLUMNS, 2)), (1, 2, 3, 0)))
    else:
        return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2, 2)), (0, 2, 3, 1)))


@triton.jit
def quarters(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BY_ROWS: tl.constexpr):
    """Four quarters of [ROWS, COLUMNS, 2] whose entries lie in the same threads.

    A 16-bit W is brought into the accumulator's layout, where a thread holds many columns; to a 32-bit W the compiler
    brings the accumulator instead, in whose layout a thread holds many rows.
    """
    first, second = halves(tile, ROWS, COLUMNS, BY_ROWS)
    if BY_ROWS:
        a, b = halves(first, ROWS // 2, COLUMNS, True)
        c, d = halves(second, ROWS // 2, COLUMNS, True)
    else:
        a, b = halves(first, ROWS, COLUMNS // 2, False)
        c, d = halves(second, ROWS, COLUMNS // 2, False)
    return a, b, c, d


@triton.jit
def quarter_terms(part, total, FIRST: tl.constexpr):
    """Adds |d|, d², wd, |wd|, w, w² of a quarter (d, w) of the tile, entry by entry, to the quarters before it."""
    d, w = tl.split(part)
    product = w * d
    if FIRST:
        return tl.abs(d), d * d, product, tl.abs(product), w, w * w
    else:
        return (
            total[0] + tl.abs(d),
            tl.fma(d, d, total[1]),
            total[2] + product,
            total[3] + tl.abs(product),
            total[4] + w,
            tl.fma(w, w, total[5]),
        )


@triton.jit
def two_sums(a, b):
    """Sums of two matrices, which cross the threads together."""
    return tl.split(tl.sum(tl.reshape(tl.join(a, b), (a.numel, 2)), 0))


@triton.jit
def four_sums(a, b, c, d):
    joined = tl.join(tl.join(a, b), tl.join(c, d))
    left, right = tl.split(tl.sum(tl.reshape(joined, (a.numel, 2, 2)), 0))
    sum_a, sum_b = tl.split(left)
    sum_c, sum_d = tl.split(right)
    return sum_a, sum_b, sum_c, sum_d


@triton.jit
def tile_sums(d, w, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BY_ROWS: tl.constexpr):
    """Σ|d|, Σd², Σwd, Σ|wd|, Σw, Σw² of a tile; both are 0 beyond the edge, so no sum needs a mask."""
    quarter_0, quarter_1, quarter_2, quarter_3 = quarters(tl.join(d, w), ROWS, COLUMNS, BY_ROWS)
    total = quarter_terms(quarter_0, 0, True)
    total = quarter_terms(quarter_1, total, False)
    total = quarter_terms(quarter_2, total, False)
    total = quarter_terms(quarter_3, total, False)
    abs_sum, square, product, product_abs = four_sums(total[0], total[1], total[2], total[3])
    w_sum, w_square = two_sums(total[4], total[5])
    return abs_sum, square, product, product_abs, w_sum, w_square


@triton.jit
def entries_inside(o, i, columns_o, columns_i):
    return (o[:, None] < columns_o) & (i[None, :] < columns_i)


@triton.jit
def is_trusted(total, square, count):
    """Whether a float32 sum of squares holds enough digits of the squares about the mean, total / count.

    Not where it overflowed, nor where the mean makes up nine tenths of it, nor where it is so small that underflow may
    have taken digits: below about 1e-26 / count, the number that is added here.
    """
    return (tl.fma(total, total, 1e-26) < 0.9 * count * square) & (square < float("inf"))


@triton.jit
def careful_square(x, center, unit, inside):
    """Σ(x-center) and Σ(x-center)² in float64, squared in units of about the size of x."""
    unit = tl.where((unit > 1e-37) & (unit < 1e37), unit, 1.0)
    scaled = tl.where(inside, (x - center) * (1.0 / unit), 0.0)
    return tl.sum(scaled).to(tl.float64) * unit, tl.sum(scaled * scaled).to(tl.float64) * unit * unit


@triton.jit
def count_nonfinite(x, inside):
    """Entries that are not finite; beyond the edge an infinite X or G leaves NaN, which is nobody's entry."""
    return tl.sum(tl.where((tl.abs(x) < float("inf")) | (inside == 0), 0.0, 1.0)).to(tl.float64)


@triton.jit
def reduced_gradient(
    x,
    g,
    w,
    gradient_sums,
    sums,
    careful_sums,
    rows,
    columns_x,
    columns_g,
    stride_x,
    stride_g,
    stride_w,
    sum_parts,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BAND: tl.constexpr,
    SUM_LANES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of dW -> row `program` of sums [tiles, 6]; careful_sums [tiles, 8] where these cannot be trusted."""
    BY_ROWS: tl.constexpr = w.dtype.element_ty.primitive_bitwidth >= 32
    program, first_o, first_i, acc = gradient_tile(
        x, g, rows, columns_x, columns_g, stride_x, stride_g, BLOCK_O, BLOCK_I, BLOCK_T, BAND, PRECISION
    )

    o = first_o + tl.arange(0, BLOCK_O)
    i = first_i + tl.arange(0, BLOCK_I)
    local_o, local_i = tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_I)
    w_tile = w + (tl.cast(first_o, tl.int64) * stride_w + first_i) + (local_o[:, None] * stride_w + local_i[None, :])
    height, width = tl.minimum(columns_g - first_o, BLOCK_O), tl.minimum(columns_x - first_i, BLOCK_I)
    if (height == BLOCK_O) & (width == BLOCK_I):
        weight = tl.load(w_tile).to(tl.float32)
        abs_sum, square, product, product_abs, w_sum, w_square = tile_sums(acc, weight, BLOCK_O, BLOCK_I, BY_ROWS)
    else:
        inside = entries_inside(o, i, columns_g, columns_x)
        weight = tl.load(w_tile, mask=inside, other=0.0).to(tl.float32)
        abs_sum, square, product, product_abs, w_sum, w_square = tile_sums(acc, weight, BLOCK_O, BLOCK_I, BY_ROWS)

    count = tl.cast(height * width, tl.float32)
    trusted = is_trusted(abs_sum, square, count)
    w_trusted = is_trusted(w_sum, w_square, count)
    store_row(sums + tl.cast(program, tl.int64) * 6, (abs_sum, square, product, product_abs, w_sum, w_square))

    out = careful_sums + tl.cast(program, tl.int64) * 8  # each number as it is there: as a row they hold registers
    if trusted == 0:
        inside = entries_inside(o, i, columns_g, columns_x)
        mean = gradient_mean(gradient_sums, sum_parts, columns_x, columns_g, SUM_LANES).to(tl.float32)
        abs_mean = abs_sum / count
        rest, careful = careful_square(acc, mean, abs_mean, inside)
        abs_rest, abs_careful = careful_square(tl.abs(acc), abs_mean, abs_mean, inside)
        tl.store(out, rest)
        tl.store(out + 1, careful)
        tl.store(out + 2, abs_mean + abs_rest / count)
        tl.store(out + 3, abs_careful - abs_rest * (abs_rest / count))
        tl.store(out + 4, count_nonfinite(acc, inside))
    if w_trusted == 0:
        inside = entries_inside(o, i, columns_g, columns_x)
        weight = tl.load(w_tile, mask=inside, other=0.0).to(tl.float32)
        w_mean = w_sum / count
        rest, careful = careful_square(weight, w_mean, tl.sum(tl.abs(weight)) / count, inside)
        tl.store(out + 5, w_mean + rest / count)
        tl.store(out + 6, careful - rest * (rest / count))
        tl.store(out + 7, count_nonfinite(weight, inside))


@triton.jit
def gradient_mean(gradient_sums, sum_parts, columns_x, columns_g, LANES: tl.constexpr):
    """Mean of dW, from its closed form, in float64."""
    lane = tl.arange(0, LANES)
    total = tl.sum(tl.load(gradient_sums + lane, mask=lane < sum_parts, other=0.0))
    return total / (tl.cast(columns_x, tl.float64) * columns_g)


@triton.jit
def tile_rows(
    sums, careful_sums, first, tiles, columns_x, columns_g,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BAND: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """LANES tiles from `first` on: their counts (0 beyond the last) and where their rows lie."""
    tile = first + tl.arange(0, LANES)
    tile_o, tile_i = tile_of(tile, tl.cdiv(columns_g, BLOCK_O), tl.cdiv(columns_x, BLOCK_I), BAND)
    height = tl.minimum(columns_g - tile_o * BLOCK_O, BLOCK_O)
    width = tl.minimum(columns_x - tile_i * BLOCK_I, BLOCK_I)
    inside = tile < tiles
    row = tl.where(inside, tile, 0).to(tl.int64)
    return tl.where(inside, (height * width).to(tl.float64), 0.0), inside, sums + row * 6, careful_sums + row * 8


@triton.jit
def read(column, inside):
    return tl.load(column, mask=inside, other=0.0).to(tl.float64)


@triton.jit
def is_trusted_row(total, count, inside):
    """What the tile itself found of its total and square: the same multiplications of the same float32 numbers."""
    square = tl.load(total + 1, mask=inside, other=1.0)
    return is_trusted(tl.load(total, mask=inside, other=0.0), square, count.to(tl.float32)) | (inside == 0)


@triton.jit
def tile_means(count, inside, row, careful):
    """Mean of |dW| and of W in each tile, and whether its squares are those of the epilogue or the careful ones."""
    trusted = is_trusted_row(row, count, inside)
    w_trusted = is_trusted_row(row + 4, count, inside)
    divisor = tl.maximum(count, 1.0)
    abs_mean = tl.where(trusted, read(row, inside) / divisor, read(careful + 2, inside & (trusted == 0)))
    w_mean = tl.where(w_trusted, read(row + 4, inside) / divisor, read(careful + 5, inside & (w_trusted == 0)))
    return abs_mean, w_mean, trusted, w_trusted


@triton.jit
def merge_tiles(
    gradient_sums, sums, careful_sums, out, tiles, sum_parts, columns_x, columns_g,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BAND: tl.constexpr, SUM_LANES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The rows of all tiles -> out [11]: means first, then squares about them."""
    entries = tl.cast(columns_x, tl.float64) * columns_g
    mean = gradient_mean(gradient_sums, sum_parts, columns_x, columns_g, SUM_LANES)
    zero = tl.zeros((LANES,), tl.float64)
    abs_sum, w_sum, product, product_abs, nonfinite, w_nonfinite = zero, zero, zero, zero, zero, zero
    for first in range(0, tiles, LANES):
        count, inside, row, careful = tile_rows(
            sums, careful_sums, first, tiles, columns_x, columns_g, BLOCK_O, BLOCK_I, BAND, LANES
        )
        abs_mean, w_mean, trusted, w_trusted = tile_means(count, inside, row, careful)
        abs_sum += count * abs_mean
        w_sum += count * w_mean
        product += read(row + 2, inside)
        product_abs += read(row + 3, inside)
        nonfinite += read(careful + 4, inside & (trusted == 0))
        w_nonfinite += read(careful + 7, inside & (w_trusted == 0))
    abs_total = tl.sum(abs_sum) / entries
    w_total = tl.sum(w_sum) / entries

    square, careful_rest, abs_m2, w_m2, plain_tiles = zero, zero, zero, zero, zero
    rounding = mean.to(tl.float32).to(tl.float64) - mean  # careful tiles are centred at the float32 mean
    for first in range(0, tiles, LANES):
        count, inside, row, careful = tile_rows(
            sums, careful_sums, first, tiles, columns_x, columns_g, BLOCK_O, BLOCK_I, BAND, LANES
        )
        abs_mean, w_mean, trusted, w_trusted = tile_means(count, inside, row, careful)
        by_hand, w_by_hand = inside & (trusted == 0), inside & (w_trusted == 0)
        plain = read(row + 1, inside)
        square += tl.where(trusted, plain - count * mean * mean, read(careful + 1, by_hand))
        careful_rest += tl.where(trusted, 0.0, read(careful, by_hand) + count * rounding)
        plain_tiles += tl.where(trusted, count, 0.0)
        abs_m2 += tl.where(trusted, plain - count * abs_mean * abs_mean, read(careful + 3, by_hand))
        abs_m2 += count * (abs_mean - abs_total) * (abs_mean - abs_total)
        w_plain = read(row + 5, inside) - count * w_mean * w_mean
        w_m2 += tl.where(w_trusted, w_plain, read(careful + 6, w_by_hand))
        w_m2 += count * (w_mean - w_total) * (w_mean - w_total)
    # Σ(d-μ)² = Σd² - nμ² - 2μΣ(d-μ) over the plain tiles, and Σ(d-μ) over all tiles is 0
    cross = tl.where(tl.sum(plain_tiles) > 0.0, 2.0 * mean * tl.sum(careful_rest), 0.0)
    several = entries > 1.0  # of a single entry the deviation is 0, not a rounding error
    m2 = tl.where(several, tl.maximum(tl.sum(square) + cross, 0.0), 0.0)
    abs_square = tl.where(several, tl.maximum(tl.sum(abs_m2), 0.0), 0.0)
    store_row(out, (entries, mean, m2, abs_total, abs_square, tl.sum(nonfinite)))
    w_square = tl.maximum(tl.sum(w_m2), 0.0)
    store_row(out + 6, (w_total, w_square, tl.sum(w_nonfinite), tl.sum(product), tl.sum(product_abs)))


class Tile(NamedTuple):
    """A configuration of ``reduced_gradient``."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def tile_for(item_size: int, outputs: int, inputs: int) -> Tile:
    """The tile for dW [outputs, inputs]. ``python -m bench.offline`` compiles each and shows why others are not here.

    128 x 128 with 8 warps has the most products per byte read that leaves registers for the epilogue (with 4 warps, or
    256 columns, it spills). Where that gives a large GPU's 132 processors less than one tile each, 64 x 64. Float32 is
    multiplied three times as TF32, whose parts need registers of their own: smaller tiles.
    """
    large, small = TILES[item_size]
    few = triton.cdiv(outputs, large.rows) * triton.cdiv(inputs, large.columns) < 132
    return small if few else large


TILES = {
    2: (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3)),
    4: (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
}
"""Bytes per entry of X and G -> large and small tile, on every architecture from Ampere on."""


def linear_gradient_moments_into(x: Tensor, g: Tensor, w: Tensor, out: Tensor) -> None:
    """Statistics of dW = gᵀx and of w into out [11], float64.

    Args:
        x: [T, I], float32, bfloat16 or float16; any T, also 0.
        g: [T, O], of x's dtype.
        w: [O, I], any of these dtypes or float64.

    Raises:
        NotImplementedError: x and g are float64, or a dimension has 2^31 entries or more.
    """
    if x.dtype == torch.float64 or g.dtype != x.dtype:
        raise NotImplementedError(
            f"x is {x.dtype}, g is {g.dtype}; the Triton GEMM multiplies float32, bfloat16 and float16 with their like"
        )
    if max(*x.shape, *g.shape) >= 2**31 - 256:
        raise NotImplementedError(f"x {tuple(x.shape)}, g {tuple(g.shape)}: a dimension has 2^31 entries or more")
    if w.numel() == 0:
        out.zero_()
        return
    if w.stride(1) != 1 and w.stride(0) == 1:  # the statistics of dWᵀ = XᵀG are the same
        x, g, w = g, x, w.t()
    x, g, w = (_with_dense_rows(m.detach()) for m in (x, g, w))
    rows, inputs, outputs = x.shape[0], x.shape[1], g.shape[1]
    tile = tile_for(x.element_size(), outputs, inputs)
    tiles = triton.cdiv(outputs, tile.rows) * triton.cdiv(inputs, tile.columns)
    rows_each = triton.cdiv(max(rows, 1), _SUM_PROGRAMS)
    sum_parts = triton.cdiv(max(rows, 1), rows_each)
    with on_device_of(w):
        gradient_sums = torch.empty(sum_parts, dtype=torch.float64, device=w.device)
        sums = torch.empty(tiles, 6, dtype=torch.float32, device=w.device)
        careful_sums = torch.empty(tiles, 8, dtype=torch.float64, device=w.device)
        gradient_sum[(sum_parts,)](
            x,
            g,
            gradient_sums,
            rows,
            inputs,
            outputs,
            x.stride(0),
            g.stride(0),
            rows_each,
            BLOCK=1024,
            num_warps=4,
            enable_fp_fusion=True,
        )
        reduced_gradient[(tiles,)](
            x,
            g,
            w,
            gradient_sums,
            sums,
            careful_sums,
            rows,
            inputs,
            outputs,
            x.stride(0),
            g.stride(0),
            w.stride(0),
            sum_parts,
            BLOCK_O=tile.rows,
            BLOCK_I=tile.columns,
            BLOCK_T=tile.depth,
            BAND=_BAND,
            SUM_LANES=_SUM_PROGRAMS,
            PRECISION="tf32x3" if x.dtype == torch.float32 else "ieee",
            num_warps=tile.warps,
            enable_fp_fusion=True,
            num_stages=tile.stages,
        )
        merge_tiles[(1,)](
            gradient_sums,
            sums,
            careful_sums,
            out,
            tiles,
            sum_parts,
            inputs,
            outputs,
            BLOCK_O=tile.rows,
            BLOCK_I=tile.columns,
            BAND=_BAND,
            SUM_LANES=_SUM_PROGRAMS,
            LANES=_MERGE_LANES,
            num_warps=8,
            enable_fp_fusion=True,
        )


def _with_dense_rows(x: Tensor) -> Tensor:
    """A matrix whose rows are dense; copied where they are not, or lie too far apart for 32-bit offsets in a tile."""
    return x if x.stride(1) == 1 and x.stride(0) <= _MAX_ROW_STRIDE else x.contiguous()
