"""S[n, k] = Σ_p y[n, p, k] · g[n, p, k]: what fisher needs, in one read of Y and G (2 x N x P x K entries).

One kernel for both dense layouts: tiles are wide along the dense dimension, channels (Linear, channels_last) or
positions (convolutions), so that neighbouring threads read neighbouring entries; other strides are read as they are.
A tile's products are added in float32, tiles in float64. Where samples and channels alone make too few programs, the
positions are cut into parts, whose results are added in a fixed order at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zest_fast.kernels.triton_launch import on_device_of

_ENOUGH_PROGRAMS = 1024


@triton.jit
def products_of_part(
    y,
    g,
    out,
    positions,
    channels,
    y_sample,
    y_position,
    y_channel,
    g_sample,
    g_position,
    g_channel,
    blocks,
    part_length,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Program (sample, block of channels, part of the positions) -> out [part, sample, channel]."""
    program = tl.program_id(0)
    part = tl.program_id(1)
    sample = (program // blocks).to(tl.int64)
    channel = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    p = tl.arange(0, POSITIONS)
    first = tl.cast(part, tl.int64) * part_length
    y_tile = y + sample * y_sample + (p[:, None].to(tl.int64) * y_position + channel[None, :].to(tl.int64) * y_channel)
    g_tile = g + sample * g_sample + (p[:, None].to(tl.int64) * g_position + channel[None, :].to(tl.int64) * g_channel)
    total = tl.zeros((CHANNELS,), tl.float64)
    for start in range(0, part_length, POSITIONS):
        position = first + start
        inside = (
            (p[:, None] < positions - position) & (p[:, None] < part_length - start) & (channel[None, :] < channels)
        )
        product = tl.load(y_tile + position * y_position, mask=inside, other=0.0).to(COMPUTE)
        product *= tl.load(g_tile + position * g_position, mask=inside, other=0.0).to(COMPUTE)
        total += tl.sum(product, 0).to(tl.float64)
    samples = tl.num_programs(0) // blocks
    row = out + (tl.cast(part, tl.int64) * samples + sample) * channels
    tl.store(row + channel, total, mask=channel < channels)


def channel_products(y: Tensor, g: Tensor) -> Tensor:
    """S [N, K] in float64 for y, g [N, P, K] of any strides and dtypes."""
    samples, positions, channels = y.shape
    if y.numel() == 0:
        return torch.zeros(samples, channels, dtype=torch.float64, device=y.device)
    y, g = y.detach(), g.detach()
    by_position = positions > 1 and y.stride(1) == 1 and y.stride(2) != 1
    tile_positions, tile_channels = (256, 8) if by_position else (16, 128)
    blocks = triton.cdiv(channels, tile_channels)
    tiles = triton.cdiv(positions, tile_positions)
    parts = min(tiles, triton.cdiv(_ENOUGH_PROGRAMS, samples * blocks))
    part_length = triton.cdiv(tiles, parts) * tile_positions
    parts = triton.cdiv(positions, part_length)
    out = torch.empty(parts, samples, channels, dtype=torch.float64, device=y.device)
    wide = torch.float64 in (y.dtype, g.dtype)
    with on_device_of(y):
        products_of_part[(samples * blocks, parts)](
            y,
            g,
            out,
            positions,
            channels,
            *y.stride(),
            *g.stride(),
            blocks,
            part_length,
            POSITIONS=tile_positions,
            CHANNELS=tile_channels,
            COMPUTE=tl.float64 if wide else tl.float32,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out[0] if parts == 1 else out.sum(0)
