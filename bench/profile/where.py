"""`python -m bench.profile --where`: what a profile costs above a plain pass, and where that goes.

Seconds of the processor on one thread, since waiting for a core is nobody's doing; plain and profile take turns.
Timers stand around the functions named in `Timers`, so a part holds what it calls but for the parts inside of it:

    around      before the first pass and after the last: discovery, checks, state kept and put back, the table
    hooks       in Python, in forward and backward: what is counted, kept and asked, but for the kernels
    moments     of Y, in forward
    products    S = Σ Y⊙G, in backward, which reads Y again
    gradient    moments of dW and W, and of their product

What is left is the pass itself: weights that a profile leaves out form no gradient (less), caches that were filled with
other things (more).
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

from rich.table import Table

import zest_fast
from bench.profile import peers
from zest_fast.benchmarking.models import Case
from zest_fast.benchmarking.timing import interleave, ratio
from zest_fast.kernels import cpu
from zest_fast.profiling import observer, profile, taps

KERNELS = ("moments", "products", "gradient")
PARTS = ("around", "hooks", *KERNELS)


class Timers(AbstractContextManager["Timers"]):
    """Inside of the context, seconds of this thread's processor in each part of a profile, and bytes that kernels
    read.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.bytes_read = 0
        self._running: list[float] = []  # seconds of the parts inside of each part that runs
        self._patches = ExitStack()

    def __enter__(self) -> Timers:
        for owner, name, part in (
            (profile._Pass, "_once", "pass"),
            (taps.ModuleHook, "__call__", "hooks"),
            (taps.Taps, "_gradient_arrived", "hooks"),
            (observer.Statistics, "weight_gradient", "hooks"),
            (cpu, "moments", "moments"),
            (cpu, "squared_channel_products", "products"),
            (cpu, "gradient_moments", "gradient"),
            (cpu.torch, "mm", "mm"),  # dW of linear layers, which a plain pass forms as well
        ):
            self._patches.enter_context(patch.object(owner, name, self._timed(getattr(owner, name), part)))
        return self

    def __exit__(self, *exception: object) -> None:
        self._patches.close()

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if part in KERNELS:
                self.bytes_read += sum(x.numel() * x.element_size() for x in args if isinstance(x, cpu.Tensor))
            self._running.append(0.0)
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.thread_time() - start
                self.seconds[part] += seconds - self._running.pop()
                if self._running:
                    self._running[-1] += seconds

        return timed

    def run(self, function: Callable[[], object]) -> None:
        self._timed(function, "around")()


def where(case: Case, rounds: int) -> dict[str, Any]:
    """Milliseconds of a plain pass, of a profile and of its parts (medians over rounds), and bytes read again."""
    model, batch = case.build()
    run = partial(zest_fast.profile, model, batch)
    times = interleave({"plain": partial(peers.plain, model, batch), "profile": run}, rounds, clock=time.thread_time)
    parts: dict[str, list[float]] = {part: [] for part in PARTS}
    for _ in range(rounds):
        with Timers() as timers:
            timers.run(run)
        for part in PARTS:
            parts[part].append(timers.seconds[part])
    return {
        "model": case.model,
        "shape": case.shape,
        "layers": len(peers.profiled_layers(model)),
        "ms": {name: _milliseconds(seconds) for name, seconds in (times | parts).items()},
        "ratio_to_plain": ratio(times, "profile", "plain").as_dict(),
        "bytes_read": timers.bytes_read,
    }


def _milliseconds(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e3


def table(results: list[dict[str, Any]]) -> Table:
    """The parts of each model's profile, in percent of its plain pass."""
    columns = Table("", "plain, ms", "profile", *(f"{part}, %" for part in PARTS), "hooks, µs a layer", "MiB read")
    for result in results:
        columns.add_row(f"{result['model']} {result['shape']}", *cells(result))
    return columns


def cells(result: dict[str, Any]) -> list[str]:
    """Of one model: a plain pass, profile as its multiple, the parts in percent of it, Python a layer, bytes."""
    ms = result["ms"]
    return [
        f"{ms['plain']:.0f}",
        f"{result['ratio_to_plain']['median']:.2f}",
        *(f"{100 * ms[part] / ms['plain']:.1f}" for part in PARTS),
        f"{1e3 * ms['hooks'] / result['layers']:.0f}",
        f"{result['bytes_read'] / 2**20:.0f}",
    ]
