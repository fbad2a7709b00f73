"""Where bench.gpu measures: a CUDA device with its clock, memory and limits, or a dry run of the same code on a CPU.

Kernels are timed with CUDA events around several calls on rotating inputs (twice the L2 together, so that no call finds
its input there), behind a sleep that lets the CPU queue them all first. Candidates are interleaved as in
zest_fast.benchmarking.timing, since clocks drift.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from zest_fast.benchmarking.machine import driver_version
from zest_fast.benchmarking.timing import interleave
from zest_fast.planning.counted_memory import peak_bytes

Run = Callable[[int], object]  # called with the number of the call: it takes inputs[number % len(inputs)]
GB = 1e9
PEAKS = {  # part of the device's name -> dense TFLOP/s of 16 bit with float32 sums, of TF32, and GB/s, by data sheet
    "H200": (989.4, 494.7, 4800.0),
    "H100 80GB HBM3": (989.4, 494.7, 3352.0),
    "H100 PCIe": (756.0, 378.0, 2039.0),
    "A100-SXM4-80GB": (312.0, 156.0, 2039.0),
    "A100-SXM4-40GB": (312.0, 156.0, 1555.0),
    "A100 80GB PCIe": (312.0, 156.0, 1935.0),
    "L4": (121.0, 60.0, 300.0),
    "RTX 4090": (165.2, 82.6, 1008.0),
}


@dataclass(frozen=True)
class Site:
    """A device to measure on; dry: on a CPU, to show that the code runs, at sizes that say nothing."""

    device: torch.device
    dry: bool
    rounds: int

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize(self.device)

    def random(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Normal data: clocks of a GPU depend on how many bits flip."""
        return torch.randn(*shape, device=self.device, dtype=torch.float32).to(dtype)

    def copies(self, size: int) -> int:
        """How many inputs of this many bytes do not fit the L2 together."""
        if self.dry:
            return 2
        return max(2, min(128, -(-2 * torch.cuda.get_device_properties(self.device).L2_cache_size // size)))

    def peaks(self, dtype: str) -> tuple[float | None, float | None]:
        """TFLOP/s and GB/s that the device cannot exceed; None where its name is not known."""
        name = "" if self.dry else torch.cuda.get_device_name(self.device)
        half, tf32, bandwidth = next((peak for part, peak in PEAKS.items() if part in name), (None, None, None))
        if dtype == "float32":  # three TF32 products (tf32x3) for each product
            return tf32 and tf32 / 3, bandwidth
        return half, bandwidth

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """Most bytes allocated at once while ``run`` runs, those of the model included (on a GPU)."""
        if self.dry:
            return peak_bytes(run)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device)

    @contextmanager
    def capped(self, gigabytes: int) -> Iterator[None]:
        """No more memory than a card of that size has; a dry run has no such limit."""
        if self.dry:
            yield
            return
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * GB / total), self.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)

    def describe(self) -> dict[str, object]:
        """The device and the software that drives it."""
        if self.dry:
            return {"dry_run": True, "device": "dry run on a CPU: no figure means anything", "driver": None}
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "dry_run": False,
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / GB, 1),
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
            "driver": driver_version(),
            "cuda": torch.version.cuda,
        }

    def times(self, candidates: Mapping[str, Run], *, calls: int = 8) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Seconds of one call of each candidate, an entry a round; and why others do not run (whatever they raise)."""
        working, failed = {}, {}
        for name, run in candidates.items():
            try:
                for number in range(1 if self.dry else 3):  # compiles, and warms up
                    run(number)
                self.synchronize()
                working[name] = run
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        timed = partial(self._seconds, calls=1 if self.dry else calls)
        return interleave(working, self.rounds, warmup=0, collect=False, timed=timed), failed

    def _seconds(self, run: Run, calls: int) -> float:
        if self.dry:
            start = time.perf_counter()
            run(0)
            return time.perf_counter() - start
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(2_000_000)  # about a millisecond: the calls are queued before the first one starts
        start.record()
        for number in range(calls):
            run(number)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
