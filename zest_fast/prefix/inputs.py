"""Inputs of a model, row by row: a tensor, or a mapping of tensors that is passed as keywords."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zest_fast.profiling import loss

Inputs = Tensor | Mapping[str, Tensor]


def count(inputs: Inputs) -> int:
    """Samples in the inputs."""
    first = inputs if isinstance(inputs, Tensor) else next(iter(inputs.values()))
    return first.shape[0]


def rows_of(inputs: Inputs, rows: Tensor) -> Inputs:
    """The samples with these numbers, copied."""
    if isinstance(inputs, Tensor):
        return take(inputs, rows)
    return {name: take(tensor, rows) for name, tensor in inputs.items()}


def take(tensor: Tensor, rows: Tensor) -> Tensor:
    """`tensor[rows]` in the same memory format; on images in channels_last five times as fast as that."""
    rows = rows.to(tensor.device)
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return tensor.index_select(0, rows)


def logits_of(output: Any) -> Tensor:
    """[samples, classes]: the output itself, or the logits of a ModelOutput."""
    logits = loss.logits_of(output)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        shape = f"of shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
        raise ValueError(f"the model's output is {shape}; a sweep needs a classifier: logits [samples, classes]")
    return logits


def compared_of(output: Any) -> Tensor:
    """What two passes over the same samples are compared by: the logits, of any shape, or else the loss, as [1]."""
    found = loss.logits_of(output)
    if not isinstance(found, Tensor):
        found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the model returned a {type(output).__name__} without logits or a loss; one of them is needed"
        )
    return found.reshape(1) if found.dim() == 0 else found


def batches(samples: int, size: int) -> list[Tensor]:
    """Row numbers in order, in chunks."""
    return list(torch.arange(samples).split(size))
