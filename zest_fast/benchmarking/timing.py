"""Interleaved timing, and medians and ratios with an interval.

A shared machine drifts by tens of percent within a minute, so candidates run in rounds (A B C, C A B, ...), each round
in another order, and a ratio is taken inside a round before the median is taken over rounds. Bytes are counted by
`zest_fast.planning.counted_memory`.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial

Run = Callable[..., object]
CONFIDENCE = 0.95  #: of an interval
ROUNDS_OF_AN_INTERVAL = 6  #: of fewer no interval of order statistics covers the median with 95 %


def interleave(
    candidates: Mapping[str, Run],
    rounds: int,
    *,
    limits: Mapping[str, int] | None = None,
    warmup: int = 1,
    seed: int = 0,
    collect: bool = True,
    clock: Callable[[], float] = time.perf_counter,
    timed: Callable[[Run], float] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each candidate, one entry a round, in an order that changes with every round.

    The order is shuffled with a fixed seed and reversed in the following round, so that of two candidates each comes
    first equally often.

    limits: candidates that run in the first so many rounds only (the slow ones), without a warm-up.
    collect: collect garbage before each run, so that what one candidate leaves in cycles does not burden the next: not
    for kernels. What is there before the rounds is passed over, which would take a fifth of a second each time. The
    collector is off during a run in any case.
    timed: runs a candidate and returns its seconds, in place of `clock`.
    """
    limits = limits or {}
    timed = timed or partial(seconds_of, clock=clock)
    for name, run in candidates.items():
        for _ in range(warmup if name not in limits else 0):
            run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    with _frozen() if collect else nullcontext():
        for name in _order(list(candidates), rounds, limits, seed):
            if collect:
                gc.collect()
            times[name].append(_without_collector(timed, candidates[name]))
    return times


def _order(names: list[str], rounds: int, limits: Mapping[str, int], seed: int) -> Iterator[str]:
    shuffler = random.Random(seed)
    for index in range(rounds):
        names.reverse() if index % 2 else shuffler.shuffle(names)
        yield from (name for name in names if index < limits.get(name, rounds))


@contextmanager
def _frozen() -> Iterator[None]:
    """The collector passes over what is alive now."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def seconds_of(run: Run, clock: Callable[[], float] = time.perf_counter) -> float:
    """Of one call."""
    start = clock()
    run()
    return clock() - start


def seconds_of_one(run: Run) -> float:
    """Of one call, and of the second where the first is short enough to be mostly warm-up."""
    elapsed = 0.0
    for _ in range(2):
        elapsed = max(seconds_of(run), 1e-7)
        if elapsed > 0.1:
            break
    return elapsed


def _without_collector(timed: Callable[[Run], float], run: Run) -> float:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return timed(run)
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


def median(values: list[float], confidence: float = CONFIDENCE) -> Median:
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
