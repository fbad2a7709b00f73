"""Outputs of layers seen as [samples, positions, channels]."""

from __future__ import annotations

import itertools
import math

from torch import Tensor


def by_channel(x: Tensor, channel_dim: int) -> Tensor:
    """x seen as [N, P, K], samples first; copied only where its positions do not lie on one stride."""
    x = x.detach()
    if x.dim() == 2:
        return x.unsqueeze(1)
    channel_dim %= x.dim()
    sizes, strides = list(x.shape), list(x.stride())
    channels, channel_stride = sizes.pop(channel_dim), strides.pop(channel_dim)
    positions = [(size, stride) for size, stride in zip(sizes[1:], strides[1:], strict=True) if size != 1]
    for (_, outer), (size, inner) in itertools.pairwise(positions):
        if outer != inner * size:
            return x.movedim(channel_dim, -1).flatten(1, -2)
    shape = (sizes[0], math.prod(sizes[1:]), channels)
    position_stride = positions[-1][1] if positions else 1
    return x.as_strided(shape, (strides[0], position_stride, channel_stride), x.storage_offset())
