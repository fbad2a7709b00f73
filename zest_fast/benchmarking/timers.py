"""How a window of calls is timed: by the clock on a CPU, by CUDA events around a graph of the calls on a GPU.

Before a window the last level cache is flushed, unless the measurement is a warm one, so that nobody finds there what
the one before read. The calls of a window take rotating inputs, together larger than that cache.

The timer of GPUs has not run on one: tests drive it through a stand-in for torch.cuda.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from zest_fast.benchmarking.timing import Run, seconds_of

_WARM_UP = 3  # calls on a side stream before a graph is captured, as torch asks for


class Timer(Protocol):
    """Seconds of a window of calls."""

    def seconds(self, window: Run) -> float: ...

    def how(self, window: Run) -> str:
        """In words, for the result."""


class CpuTimer:
    """By a clock. flush: runs before each window, outside of what is timed."""

    def __init__(self, flush: Run | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._flush, self._clock = flush, clock

    def seconds(self, window: Run) -> float:
        if self._flush is not None:
            self._flush()
        return seconds_of(window, self._clock)

    def how(self, window: Run) -> str:
        return "clock"


class CudaTimer:
    """By CUDA events, around a replayed graph of the window where it can be captured, else around its calls.

    A window that waits for the device, or allocates in a way that a graph does not allow, cannot be captured; the
    processor's time between its kernels is then part of the figure, and `how` says so. graphs: False for whole passes
    of a model, which are never captured. cuda: torch.cuda, or what stands in for it.
    """

    def __init__(self, flush: Run | None = None, *, graphs: bool = True, cuda: Any = torch.cuda) -> None:
        self._flush, self._capturing, self._cuda = flush, graphs, cuda
        self._graphs: dict[int, tuple[Run, Any]] = {}  # the window itself stays alive, so that its id stays its own

    def seconds(self, window: Run) -> float:
        run = self._replayed(window)
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        if self._flush is not None:
            self._flush()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def how(self, window: Run) -> str:
        return "events" if self._replayed(window) is window else "graph"

    def _replayed(self, window: Run) -> Run:
        """A replay of its graph, made at the first call; the window itself where there is none."""
        if id(window) not in self._graphs:
            self._graphs[id(window)] = window, self._captured(window) if self._capturing else None
        graph = self._graphs[id(window)][1]
        return window if graph is None else graph.replay

    def _captured(self, window: Run) -> Any:
        side = self._cuda.Stream()
        side.wait_stream(self._cuda.current_stream())
        with self._cuda.stream(side):
            for _ in range(_WARM_UP):
                window()
        self._cuda.current_stream().wait_stream(side)
        self._cuda.synchronize()
        graph = self._cuda.CUDAGraph()
        try:
            with self._cuda.graph(graph):
                window()
        except RuntimeError:  # what a capture does not allow
            self._cuda.synchronize()
            return None
        return graph


def flushing(device: torch.device, cache: int) -> Run:
    """A function that reads (on a GPU: writes) twice as many bytes as the cache has."""
    buffer = torch.ones(max(1, cache // 2), device=device)  # float32
    return buffer.zero_ if device.type == "cuda" else buffer.sum
