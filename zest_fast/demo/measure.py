"""Seconds and bytes of one training step of each arm, measured side by side."""

import statistics
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zest_fast.demo.arms import Arm, batches, optimizer_for, put, trainable, training_step
from zest_fast.demo.task import Task
from zest_fast.foundation.torch_private import storage_key

COUNTS = (
    "peak memory counts the storages of tensors alive at once in a training step: weights, buffers, batch, gradients, "
    "optimizer states, saved activations and intermediate results; scratch space inside operators is not seen"
)


@dataclass(frozen=True)
class Cost:
    seconds: float  # median over rounds
    relative: float  # median over rounds of the ratio to full fine-tuning in the same round
    peak_bytes: int
    parameters: int  # trained


class PeakMemory(TorchDispatchMode):
    """Counts the storages of all tensors that operators return, until they die, on top of those given.

    Views share a storage and count once. `peak` is the most bytes alive at once.
    """

    def __init__(self, present: Iterable[Tensor] = ()):
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0
        for tensor in present:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        if key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def measure_steps(task: Task, arms: list[Arm], full: Arm, *, seed: int) -> dict[str, Cost]:
    """Cost of each arm by name. Each round times one step of each, so that all see the same load."""
    inputs, labels = next(batches(task.splits["train"], task.budget.batch_size, 1, seed))
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    peaks: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for turn in range(task.budget.timing_rounds + 1):
        for arm in arms:
            with trainable(task, arm.layers) as parameters:
                start = {name: p.detach().clone() for name, p in parameters.items()}
                optimizer = optimizer_for(task, parameters, arm.scales[0])
                training_step(task, optimizer, inputs, labels)  # optimizer states exist from here on
                if turn == 0:  # counting slows the step down, so it has a round of its own
                    peaks[arm.name] = _peak_of_step(task, optimizer, inputs, labels)
                    sizes[arm.name] = sum(p.numel() for p in parameters.values())
                else:
                    began = time.perf_counter()
                    training_step(task, optimizer, inputs, labels)
                    seconds[arm.name].append(time.perf_counter() - began)
                put(parameters, start)
    return {
        arm.name: Cost(
            seconds=statistics.median(seconds[arm.name]),
            relative=statistics.median(a / b for a, b in zip(seconds[arm.name], seconds[full.name], strict=True)),
            peak_bytes=peaks[arm.name],
            parameters=sizes[arm.name],
        )
        for arm in arms
    }


def _peak_of_step(task: Task, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor) -> int:
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    with PeakMemory([*task.model.parameters(), *task.model.buffers(), *states, inputs, labels]) as memory:
        training_step(task, optimizer, inputs, labels)
    return memory.peak
