"""Histograms of weights and gradients, of their finite entries."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

BINS = 64
_AT_ONCE = 1 << 22  # entries: float32 counts are exact to 16.7 million


def histogram(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(counts, edges) as ``numpy.histogram`` has them, in equal bins from the least to the greatest finite entry."""
    x = x.detach()
    if x.layout != torch.strided:
        x = x.coalesce().to_dense()
    flat = x.reshape(-1)
    low, high, every = float("inf"), float("-inf"), True
    for part in flat.split(_AT_ONCE) if flat.numel() else ():
        least, greatest = map(float, part.aminmax())
        if not (math.isfinite(least) and math.isfinite(greatest)):
            every = False
            part = part[torch.isfinite(part)]
            if not part.numel():
                continue
            least, greatest = map(float, part.aminmax())
        low, high = min(low, least), max(high, greatest)
    if low > high:
        return np.zeros(BINS), np.linspace(0.0, 1.0, BINS + 1)
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = np.zeros(BINS)
    wide = x.dtype == torch.float64 or high - low > torch.finfo(torch.float32).max
    dtype = torch.float64 if wide else torch.float32
    for part in flat.split(_AT_ONCE):
        part = part if every else part[torch.isfinite(part)]
        counts += torch.histc(part.to(dtype), BINS, low, high).double().cpu().numpy()
    return counts, np.linspace(low, high, BINS + 1)
