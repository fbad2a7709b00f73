"""Bytes that a run really holds on the CPU: the one counter of it, for the demo and the benchmarks alike.

It is the running sum of the CPU allocator's own events (torch.profiler, profile_memory=True). That sees what a
TorchDispatchMode over the outputs of operators cannot: scratch inside an operator and inside C++ autograd nodes. It
does not see what bypasses the allocator (oneDNN's and MKL's packing buffers, NumPy arrays).

A step that is only planned allocates nothing, so there is no event to count: its books are ledger.py, which enters
storages of fake tensors by what they are for. tests/bench/test_bench.py holds the two against each other.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable

from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profiler

from zest_fast.foundation.torch_private import storage_key


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes that `run` held at once beyond what was alive before it, scratch included."""
    gc.collect()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it logs every start and stop
    with torch_profiler(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def held_bytes(tensors: Iterable[object]) -> int:
    """Bytes of the storages of `tensors`, each once however many views it has; what is no tensor holds none."""
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return sum({storage_key(storage): storage.nbytes() for storage in storages}.values())
