"""The ways in which training would move a layer: Adam's steps along the gradients of some batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from zest_fast.prefix.inputs import rows_of
from zest_fast.prefix.volatile_state import preserved
from zest_fast.probing.samples import Samples
from zest_fast.profiling.loss import call_model

_DAMPING = 1e-3  # of the root mean square over all entries: those that hardly ever have a gradient hardly move


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


def flat_gradients(loss: Tensor, weights: Sequence[nn.Parameter], *, retain_graph: bool = False) -> list[Tensor]:
    """Of each weight, float32 [entries]; zeros where the loss does not depend on it."""
    found = torch.autograd.grad(loss, list(weights), allow_unused=True, retain_graph=retain_graph)
    return [
        (torch.zeros_like(weight) if gradient is None else gradient).flatten().float()
        for weight, gradient in zip(weights, found, strict=True)
    ]


def find_directions(
    model: nn.Module, weights: Sequence[nn.Parameter], samples: Samples, classes: Tensor | None, ways: Sequence[Tensor]
) -> list[Tensor]:
    """Fill `ways`, float32 [directions, entries] for each weight: gradient over root mean square, about -1 to 1 each,
    what a rate is multiplied by. Nothing of it stays in the model.

    classes: int64 [samples]: a batch holds samples of as few classes as possible, so that directions differ and
    training can go further in one than in the other, as a loss whose residuals change does. None = batches at random.

    Returns, for each weight, float64 [directions, directions]: the gradient of a direction's batch along each way.
    """
    order = torch.arange(len(samples)) if classes is None else torch.argsort(classes.cpu(), stable=True)
    with trainable(weights):
        for place, rows in enumerate(order.tensor_split(len(ways[0]))):
            with preserved(model):
                loss = samples.loss(call_model(model, rows_of(samples.inputs, rows)), rows)
                found = flat_gradients(loss, weights)
            for held, gradient in zip(ways, found, strict=True):
                held[place] = gradient
            del loss, found
    return [_scaled(held) for held in ways]


def _scaled(gradients: Tensor) -> Tensor:
    """gradients: [directions, entries], which become the ways."""
    root = torch.linalg.vector_norm(gradients, dim=0).div_(len(gradients) ** 0.5)  # their squares would be a copy
    root += _DAMPING * root.square().mean().sqrt() + torch.finfo(torch.float32).tiny
    root.sqrt_()
    gradients /= root
    gram = (gradients @ gradients.T).double().cpu()
    gradients /= root
    return gram
