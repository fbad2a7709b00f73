"""The ways in which training would move a layer: Adam's steps along the gradients of some batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zest_fast.probing.samples import Samples
from zest_fast.profiling.loss import call_model
from zest_fast.sweeping.inputs import rows_of
from zest_fast.sweeping.volatile_state import preserved

_DAMPING = 1e-3  # of the root mean square over all entries: those that hardly ever have a gradient hardly move


@dataclass(frozen=True)
class Directions:
    """Of one weight, from one half of the samples."""

    ways: Tensor
    """float32 [directions, entries]: gradient / root mean square, about -1 to 1 each: what a rate is multiplied by."""
    gram: Tensor
    """float64 [directions, directions]: gradient of a direction's batch along each way."""


@contextmanager
def trainable(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside they require gradients."""
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)


def directions_of(
    model: nn.Module, weights: Sequence[nn.Parameter], samples: Samples, count: int, classes: Tensor | None
) -> list[Directions]:
    """`count` directions for each weight. Nothing of it stays in the model.

    classes: int64 [samples]: a batch holds samples of as few classes as possible, so that directions differ and
    training can go further in one than in the other, as a loss whose residuals change does. None = batches at random.
    """
    order = torch.arange(len(samples)) if classes is None else torch.argsort(classes.cpu(), stable=True)
    gradients = [torch.zeros(count, weight.numel(), dtype=torch.float32, device=weight.device) for weight in weights]
    with trainable(weights):
        for place, rows in enumerate(order.tensor_split(count)):
            with preserved(model):
                loss = samples.loss(call_model(model, rows_of(samples.inputs, rows)), rows)
                found = torch.autograd.grad(loss, list(weights), allow_unused=True)
            for held, gradient in zip(gradients, found, strict=True):
                if gradient is not None:
                    held[place] = gradient.detach().flatten()
            del loss, found
    return [_of_one(held) for held in gradients]


def _of_one(gradients: Tensor) -> Directions:
    """gradients: [directions, entries], which become the ways."""
    rms = gradients.square().mean(0).sqrt_()
    rms += _DAMPING * rms.square().mean().sqrt() + torch.finfo(torch.float32).tiny
    ways = gradients / rms
    return Directions(ways, (gradients @ ways.T).double().cpu())
