"""Training steps that really run, with their memory counted: what the planner's dry runs are held against."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import zest_fast
from bench.measure import peak_bytes
from zest_fast.finetuning.planning.optimizers import build_optimizer
from zest_fast.profiling.layers import find_layers


def counted_step(
    model: nn.Module, batch: dict[str, Tensor], layers: Sequence[str] | str, optimizer: str, **options: Any
) -> int:
    """Peak bytes of the second of two steps on the CPU: what is there before it, and what the allocator hands out.

    layers, options: names and more for SelectiveBackward, or "all". The model comes back trained.
    """
    selective = nullcontext() if layers == "all" else zest_fast.SelectiveBackward(model, layers, **options)
    with selective as tuned:
        parameters = list(model.parameters() if tuned is None else tuned.parameters())
        update = build_optimizer(optimizer, parameters)

        def step() -> None:
            model(**batch).loss.backward()
            update.step()
            update.zero_grad()

        step()
        states: list[Any] = [value for state in update.state.values() for value in state.values()]
        return _held((*model.parameters(), *model.buffers(), *batch.values(), *states)) + peak_bytes(step)


def upper_half(model: nn.Module, count: int = 5) -> list[str]:
    """`count` layers without the head, evenly over the upper half of the model."""
    rows = [layer.name for layer in find_layers(dict(model.named_modules())) if not layer.is_embedding]
    upper = rows[len(rows) // 2 : -1]
    return [upper[place * (len(upper) - 1) // (count - 1)] for place in range(count)]


def _held(tensors: Iterable[object]) -> int:
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def in_dtype(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    """Both in `dtype`; integers stay."""
    return model.to(dtype), {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}
