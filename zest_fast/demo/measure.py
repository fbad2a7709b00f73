"""Seconds and bytes of one training step of each arm, measured side by side."""

import statistics
import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from zest_fast.demo.arms import Arm, batches, optimizer_for, put, trainable, training_step
from zest_fast.demo.task import Task
from zest_fast.planning.counted_memory import held_bytes, peak_bytes

COUNTS = (
    "peak memory is what a training step holds at once: weights, buffers, batch and optimizer states, and all that the "
    "allocator hands out on top (gradients, saved activations, intermediate results, scratch inside operators)"
)


@dataclass(frozen=True)
class Cost:
    seconds: float  # median over rounds
    relative: float  # median over rounds of the ratio to full fine-tuning in the same round
    peak_bytes: int
    parameters: int  # trained


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
    states = [value for state in optimizer.state.values() for value in state.values()]
    held = held_bytes((*task.model.parameters(), *task.model.buffers(), *states, inputs, labels))
    return held + peak_bytes(partial(training_step, task, optimizer, inputs, labels))
