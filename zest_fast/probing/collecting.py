"""Enough samples for a probe, from a loader whose batches may be padded to different lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.profiling.heads import unwrap

SAMPLES = 1024
"""Of which a probe at 5 % of a sweep uses all."""
_IGNORED = -100  # the label that transformers' losses leave out


def collect(
    model: nn.Module, loader: Iterable[Any], move: Callable[[Any], Any] = lambda batch: batch, samples: int = SAMPLES
) -> list[Any]:
    """The first batches that hold so many samples, or all there are; tokens are padded to the length of the longest.

    move: brings a batch to the model's device.
    """
    batches, count = [], 0
    for batch in loader:
        batches.append(move(dict(batch) if isinstance(batch, Mapping) else batch))
        count += _samples_in(batches[-1])
        if count >= samples:
            break
    masked = [b for b in batches if isinstance(b, Mapping) and isinstance(b.get("attention_mask"), Tensor)]
    if len(masked) < len(batches) or not batches:
        return batches
    length = max(batch["attention_mask"].shape[1] for batch in batches)
    token = getattr(getattr(unwrap(model), "config", None), "pad_token_id", None)
    return [_padded(batch, length, token if isinstance(token, int) else 0) for batch in batches]


def _padded(batch: Mapping[str, Any], length: int, token: int) -> dict[str, Any]:
    short = batch["attention_mask"].shape[1]
    fills = {"input_ids": token, "labels": _IGNORED}

    def longer(name: str, value: Any) -> Any:
        if short == length or not isinstance(value, Tensor) or value.dim() != 2 or value.shape[1] != short:
            return value
        if value.is_floating_point():
            return value
        tail = value.new_full((value.shape[0], length - short), fills.get(name, 0))
        return torch.cat([value, tail], dim=1)

    return {name: longer(name, value) for name, value in batch.items()}


def _samples_in(batch: Any) -> int:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else [batch]
    return max((value.shape[0] for value in values if isinstance(value, Tensor) and value.dim()), default=1)
