"""The way that Adam would move each layer at first: mean gradient over its root mean square, of many batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zest_fast.probing.budget import BATCH
from zest_fast.probing.samples import Samples
from zest_fast.profiling.loss import call_model
from zest_fast.sweeping.inputs import rows_of
from zest_fast.sweeping.volatile_state import preserved

MEMORY = 1 << 30
"""Bytes of gradients and moments that may be held at a time."""
_COPIES = 3 * 4  # bytes for each entry: the gradient of a batch, the mean and the mean square, in float32


def groups_of(weights: Sequence[nn.Parameter]) -> list[list[int]]:
    """Which weights get their directions in one pass: as many as MEMORY holds, at least one."""
    groups: list[list[int]] = []
    held = 0
    for place, weight in enumerate(weights):
        size = _COPIES * weight.numel()
        if not groups or held + size > MEMORY:
            groups.append([])
            held = 0
        groups[-1].append(place)
        held += size
    return groups


def directions_of(model: nn.Module, weights: Sequence[nn.Parameter], samples: Samples) -> list[Tensor]:
    """For each weight, float32 of its shape, entries -1 to 1: 1 where all batches agree, less where they do not.

    Nothing of it stays in the model. 0 where the loss does not depend on the weight.
    """
    means = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    squares = [torch.zeros_like(mean) for mean in means]
    batches = torch.arange(len(samples)).split(BATCH)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for rows in batches:
            with torch.enable_grad(), preserved(model):
                loss = samples.loss(call_model(model, rows_of(samples.inputs, rows)), rows)
            share = len(rows) / len(samples)
            found = torch.autograd.grad(loss, list(weights), allow_unused=True)
            for mean, square, gradient in zip(means, squares, found, strict=True):
                if gradient is not None:
                    gradient = gradient.detach().float()
                    mean.add_(gradient, alpha=share)
                    square.addcmul_(gradient, gradient, value=share)
            del found, loss
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return [
        mean.div_(square.sqrt_().clamp_min_(torch.finfo(torch.float32).tiny))
        for mean, square in zip(means, squares, strict=True)
    ]
