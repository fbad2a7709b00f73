"""What the benchmarks share: interleaved timing, ratios with an interval, a JSON that says where it ran.

A shared machine drifts by tens of percent within a minute, so candidates run in rounds (A B C, C A B, ...), each round
in another order, and a ratio is taken inside a round before the median is taken over rounds. Bytes are counted by
`zest_fast.planning.counted_memory`.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    limits: Mapping[str, int] | None = None,
    warmup: int = 1,
    seed: int = 0,
    collect: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each candidate, one entry a round, in an order that changes with every round.

    The order is shuffled with a fixed seed and reversed in the following round, so that of two candidates each comes
    first equally often.

    limits: candidates that run in the first so many rounds only (the slow ones), without a warm-up.
    collect: collect garbage before each run, so that what one candidate leaves in cycles does not burden the next (tens
    of ms: not for kernels). The collector is off during a run in any case.
    """
    limits = limits or {}
    for name, run in candidates.items():
        for _ in range(warmup if name not in limits else 0):
            run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order, shuffler = list(candidates), random.Random(seed)
    for index in range(rounds):
        order.reverse() if index % 2 else shuffler.shuffle(order)
        for name in order:
            if index < limits.get(name, rounds):
                times[name].append(_timed(candidates[name], clock, collect))
    return times


def _timed(run: Callable[[], object], clock: Callable[[], float], collect: bool) -> float:
    if collect:
        gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        start = clock()
        run()
        return clock() - start
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True)
class Median:
    """A median with an interval of order statistics; `coverage` is that interval's exact confidence."""

    median: float
    low: float
    high: float
    coverage: float
    n: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def median(values: list[float], confidence: float = 0.95) -> Median:
    """Median and the narrowest [x_(k), x_(n+1-k)] that covers the true median with `confidence` (all of them if n is
    too small).

    P(x_(k) <= m <= x_(n+1-k)) = 1 - 2 * Binomial(n, 1/2).cdf(k - 1): five runs give 93.75 %, six 96.9 %, at best.
    """
    if not values:
        raise ValueError("median: no values; every candidate needs at least one round")
    ordered, n = sorted(values), len(values)
    k, coverage = 1, _order_coverage(n, 1)
    while k + 1 <= (n + 1) // 2 and _order_coverage(n, k + 1) >= confidence:
        k, coverage = k + 1, _order_coverage(n, k + 1)
    return Median(statistics.median(ordered), ordered[k - 1], ordered[n - k], coverage, n)


def _order_coverage(n: int, k: int) -> float:
    return max(0.0, 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n)


def ratio(times: Mapping[str, list[float]], name: str, baseline: str) -> Median:
    """Median of time(name) / time(baseline), each quotient taken inside one round."""
    return median([t / base for t, base in zip(times[name], times[baseline], strict=False)])


def describe_machine() -> dict[str, object]:
    """CPU, cores, threads, memory and load: what a reader needs to judge a figure."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "ram_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def describe_versions() -> dict[str, str]:
    """Versions of what is measured and what it is measured against, and the commit of this checkout."""
    names = ("torch", "transformers", "numpy", "backpack-for-pytorch", "opacus")
    return {"python": platform.python_version(), **{n: _version(n) for n in names}, "zest_fast": _commit()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", "zest_fast", "csrc", "bench/*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_result(
    name: str, settings: dict[str, object], results: list[dict], out: Path | None = None, module: str | None = None
) -> Path:
    """Write bench/results/<name>.json (or into `out`) with machine, versions and command line beside the results.

    module: of bench, that the command runs; None = the one of that name.
    """
    folder = out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "benchmark": name,
        "command": " ".join(["python", "-m", f"bench.{module or name}", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "settings": settings,
        "results": results,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    return path
