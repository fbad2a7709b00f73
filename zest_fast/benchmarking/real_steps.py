"""Training steps that really run, with their memory counted: what the planner's dry runs are held against."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves

from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.lean.optimizer import optimizer_in_backward
from zest_fast.planning.counted_memory import held_bytes, peak_bytes
from zest_fast.planning.optimizers import build_optimizer, is_in_backward
from zest_fast.profiling.layers import find_layers
from zest_fast.profiling.loss import loss_of


def counted_step(model: nn.Module, batch: Any, layers: Sequence[str] | str, optimizer: str, **options: Any) -> int:
    """Peak bytes of the second of two steps on the CPU: what is there before it, and what the allocator hands out.

    layers, options: names and more for SelectiveBackward, or "all". The model comes back trained.
    """
    with training(model, batch, layers, optimizer, options) as (step, held):
        step()
        return held() + peak_bytes(step)


def counted_and_timed_step(
    model: nn.Module, batch: Any, layers: Sequence[str] | str, optimizer: str, **options: Any
) -> tuple[int, float]:
    """The same, and the processor seconds of the faster of two more steps."""
    with training(model, batch, layers, optimizer, options) as (step, held):
        step()
        return held() + peak_bytes(step), min(_seconds(step) for _ in range(2))


@contextmanager
def training(
    model: nn.Module, batch: Any, layers: Sequence[str] | str, optimizer: str, options: dict[str, Any]
) -> Iterator[tuple[Callable[[], None], Callable[[], int]]]:
    """A function that takes a step, and one that says how many bytes are held between steps."""
    selective = nullcontext() if layers == "all" else SelectiveBackward(model, layers, **options)
    with selective as tuned:
        update = build_optimizer(optimizer, list(model.parameters() if tuned is None else tuned.parameters()))
        loss = loss_of(model, batch, None, None)

        def step() -> None:
            loss().backward()
            update.step()
            update.zero_grad()

        def held() -> int:
            states = [value for state in update.state.values() for value in state.values()]
            return held_bytes((*model.parameters(), *model.buffers(), *tree_leaves(batch), *states))

        with optimizer_in_backward(update) if is_in_backward(optimizer) else nullcontext():
            yield step, held


def _seconds(run: Callable[[], None]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def upper_half(model: nn.Module, count: int = 5) -> list[str]:
    """`count` layers without the head, evenly over the upper half of the model."""
    rows = [layer.name for layer in find_layers(dict(model.named_modules())) if not layer.is_embedding]
    upper = rows[len(rows) // 2 : -1]
    return [upper[place * (len(upper) - 1) // (count - 1)] for place in range(count)]
