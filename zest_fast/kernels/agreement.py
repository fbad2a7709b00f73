"""How far two gradients of one weight agree: five sums in float64, by plain torch on any device."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_ENTRIES = 1 << 18  # turned to float64 at once: small enough for the cache of a CPU


def agreement_sums(a: Tensor, b: Tensor) -> Tensor:
    """Σ a⊙b, Σ sign(a)⊙b, Σ a⊙sign(b), Σ a², Σ b² of two dense tensors of one shape: float64 [5], on their device."""
    a, b = a.detach().reshape(-1), b.detach().reshape(-1)
    total = torch.zeros(5, dtype=torch.float64, device=a.device)
    for start in range(0, len(a), _BLOCK_ENTRIES):
        x = a[start : start + _BLOCK_ENTRIES].double()
        y = b[start : start + _BLOCK_ENTRIES].double()
        total += torch.stack([x @ y, x.sign() @ y, x @ y.sign(), x @ x, y @ y])
    return total
