"""Kernels beside their peers: each is compared with the float64 reference first, and a wrong one is never timed.

Cold, by default: each call takes the next of several inputs that do not fit the last level cache together, which is
flushed before each window of calls. Warm: one input, again and again. A window has as many calls as take four
milliseconds.
The read bandwidth is that of the fastest of three passes of torch (sum, dot, amax) over memory as cold or as warm, in
the same rounds; the rate of products that of torch.mm, on the matrices of the case and on square ones.

After the rounds every candidate gets an input that it has not seen: one that keeps its first result is found out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zest_fast.benchmarking.kernel_cases import DTYPES, Candidate, Problem, random_numbers
from zest_fast.benchmarking.machine import last_level_cache
from zest_fast.benchmarking.results import Case, Measured
from zest_fast.benchmarking.timers import CpuTimer, CudaTimer, Timer, flushing
from zest_fast.benchmarking.timing import ROUNDS_OF_AN_INTERVAL, Run, interleave, median, ratio, seconds_of_one
from zest_fast.foundation.text_table import first_line

ABOVE_ROOF = 1.05  #: times a bandwidth or a rate of products: more is no speed but a mistake of the measurement
_WINDOW = 4e-3  # seconds between two readings of the clock
_MOST_CALLS, _MOST_COPIES, _CALLS_OF_A_GRAPH = 1000, 1024, 64
_SLOW = 0.2  # seconds of a call that is made in the fewest rounds only
_READ_AT_ONCE = 8 << 20  # bytes: a cold pass over less is mostly the call itself
_SQUARE = 512  # rows and columns of the matrices whose product is a roof
_READERS: dict[str, Callable[[Tensor], object]] = {
    "read_sum": torch.sum,
    "read_dot": lambda x: torch.dot(x, x),
    "read_amax": torch.amax,
}
_GB = 1e9


@dataclass
class Site:
    """Where and how kernels are measured.

    device: of the tensors. warm: one input, which may stay in the caches. rounds: interleaved. timer, cache: for tests;
    by default those of the device.
    """

    device: torch.device
    warm: bool = False
    rounds: int = 11
    timer: Timer | None = None
    cache: int | None = None
    _flush: Run | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.cache = last_level_cache(self.device) if self.cache is None else self.cache
        if not self.warm:
            self._flush = flushing(self.device, self.cache)
        if self.timer is None:
            self.timer = CudaTimer(self._flush) if self.device.type == "cuda" else CpuTimer(self._flush)

    @property
    def on_gpu(self) -> bool:
        return isinstance(self.timer, CudaTimer)

    def copies(self, size: int) -> int:
        """How many inputs of this many bytes do not fit the cache together."""
        assert self.cache is not None
        return 1 if self.warm else max(2, min(_MOST_COPIES, -(-2 * self.cache // max(1, size))))

    def read_at_once(self, size: int) -> int:
        """Bytes of the buffers by which the read bandwidth is measured, for a case of this many."""
        return size if self.warm else max(size, _READ_AT_ONCE)

    def seconds(self, window: Run) -> float:
        assert self.timer is not None
        return self.timer.seconds(window)


class _Checked:
    """A candidate on one problem: whether it is right, and why not. Once it has failed it is not called again."""

    def __init__(self, candidate: Candidate, problem: Problem, on_gpu: bool) -> None:
        self.candidate, self.problem = candidate, problem
        self.run: Callable[..., object] = candidate.call if on_gpu else candidate.on_cpu
        self.error: float | None = None
        self.tolerance: float | None = None
        self.match: bool | None = None
        self.why = ""

    def check(self, tensors: Sequence[Tensor], when: str = "", given: Sequence[Tensor] | None = None) -> None:
        """Call it on copies, and compare its result with the reference and the copies with what they were.

        when: for the message. given: the copies. Whatever it raises is the finding, since it is somebody's code.
        """
        given, threads = given or [x.clone() for x in tensors], torch.get_num_threads()
        try:
            result = self.candidate.call(*given)
            changed = [place for place, (x, y) in enumerate(zip(given, tensors, strict=True), 1) if not _equal(x, y)]
            if changed:
                self._refuse(f"changes its input (argument {changed[0]}){when}")
            elif torch.get_num_threads() != threads:
                self._refuse(f"changes the number of torch's threads to {torch.get_num_threads()}{when}")
            elif self.candidate.read is not None:
                self._judge(self.candidate.read(result), tensors, when)
        except (Exception, SystemExit) as error:
            self._refuse(_raised(error) + when)
        finally:
            torch.set_num_threads(threads)

    def _judge(self, found: Any, tensors: Sequence[Tensor], when: str) -> None:
        verdict = self.problem.judge(found, *tensors)
        self.error = verdict.error if verdict.error < float("inf") else None
        self.tolerance = verdict.tolerance
        self.match = verdict.match
        if not verdict.match:
            self._refuse(f"wrong: {verdict}{when}")

    def _refuse(self, why: str) -> None:
        self.match, self.why = False if self.candidate.read is not None else None, why

    def guarded(self, inputs: Iterator[tuple[Tensor, ...]], calls: int) -> Run:
        """A window of calls; the first error ends them, and is kept."""
        threads = torch.get_num_threads()

        def window() -> None:
            if self.why:
                return
            try:
                for _ in range(calls):
                    self.run(*next(inputs))
            except (Exception, SystemExit) as error:
                if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                    raise  # a graph that cannot be, not a kernel that cannot
                self._refuse(_raised(error) + " (while it was timed)")
            if (now := torch.get_num_threads()) != threads:  # the others would be timed on as many
                torch.set_num_threads(threads)
                self._refuse(f"changes the number of torch's threads to {now} (while it was timed)")

        return window


def _equal(x: Tensor, before: Tensor) -> bool:
    return x.shape == before.shape and x.dtype == before.dtype and torch.equal(x, before)


def _raised(error: BaseException) -> str:
    return f"raises {type(error).__name__}: {first_line(error, '')}"


def measure_kernel(problem: Problem, candidates: Sequence[Candidate], site: Site) -> Case:
    """All candidates on one problem, the first of them the baseline."""
    first = problem.inputs(site.device)
    buffers = [first, *(tuple(x.clone() for x in first) for _ in range(site.copies(problem.bytes) - 1))]
    checked = [_Checked(candidate, problem, site.on_gpu) for candidate in candidates]
    for one in checked:
        one.check(first)
    roofs = _roofs(problem, site)
    inputs: dict[str, Iterator[tuple[Tensor, ...]]] = {one.candidate.name: itertools.cycle(buffers) for one in checked}
    runs: dict[str, Callable[[int], Run]] = {
        one.candidate.name: partial(one.guarded, inputs[one.candidate.name]) for one in checked if not one.why
    }
    times, how = _rounds({**runs, **roofs}, site)
    _look_again(checked, first)
    measured = [_measured(one, candidates[0].name, times, problem) for one in checked]
    return _case(problem, measured, times, how, site)


def _look_again(checked: Sequence[_Checked], tensors: tuple[Tensor, ...]) -> None:
    """At an input that none of them has seen, where the one that they were timed on lies."""
    changed = [x.roll(1) * -0.75 for x in tensors]
    for one in checked:
        if not one.why:
            for x, y in zip(tensors, changed, strict=True):
                x.copy_(y)
            one.check(changed, " (on another input, after it was timed)", given=tensors)


def _rounds(runs: Mapping[str, Callable[[int], Run]], site: Site) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of one call of each, an entry a round, and how they were taken. runs: a window of so many calls."""
    calls, windows = {}, {}
    for name, window_of in runs.items():
        calls[name] = (
            _CALLS_OF_A_GRAPH
            if site.on_gpu
            else max(1, min(_MOST_CALLS, round(_WINDOW / seconds_of_one(window_of(1)))))
        )
        windows[name] = window_of(calls[name])
    once = {name: site.seconds(window) / calls[name] for name, window in windows.items()}
    slow = {name: min(ROUNDS_OF_AN_INTERVAL, site.rounds) for name, seconds in once.items() if seconds > _SLOW}
    raw = interleave(windows, site.rounds, limits=slow, warmup=0, collect=False, timed=site.seconds)
    assert site.timer is not None
    how = {name: site.timer.how(window) for name, window in windows.items()}
    return {name: [t / calls[name] for t in values] for name, values in raw.items()}, how


def _roofs(problem: Problem, site: Site) -> dict[str, Callable[[int], Run]]:
    """What nothing can be faster than, by name: passes over memory, and for products a square torch.mm."""
    size = site.read_at_once(problem.bytes)
    buffers = [random_numbers(size // 4, dtype=torch.float32).to(site.device) for _ in range(site.copies(size))]
    found: dict[str, Callable[[int], Run]] = {
        name: partial(_window, read, itertools.cycle([(x,) for x in buffers])) for name, read in _READERS.items()
    }
    if problem.flop:
        square = random_numbers(_SQUARE, _SQUARE, dtype=DTYPES[problem.dtype]).to(site.device)
        product = partial(torch.mm, out=torch.empty_like(square))
        found["square_mm"] = partial(_window, product, itertools.repeat((square, square)))
    return found


def _window(run: Callable[..., object], inputs: Iterator[tuple[Tensor, ...]], calls: int) -> Run:
    def window() -> None:
        for _ in range(calls):
            run(*next(inputs))

    return window


def _measured(one: _Checked, baseline: str, times: Mapping[str, list[float]], problem: Problem) -> Measured:
    name = one.candidate.name
    verdict: dict[str, Any] = {"match": one.match, "error": one.error, "tolerance": one.tolerance}
    if one.why:
        return Measured(name, one.candidate.role, why=one.why, **verdict)
    seconds = median(times[name])
    figures = {"gb_per_s": problem.bytes / seconds.median / _GB}
    if problem.flop:
        figures["gflop_per_s"] = problem.flop / seconds.median / _GB
    compared = ratio(times, name, baseline) if baseline in times else None
    return Measured(name, one.candidate.role, seconds=seconds, ratio=compared, figures=figures, **verdict)


def _case(
    problem: Problem,
    measured: Sequence[Measured],
    times: Mapping[str, list[float]],
    how: Mapping[str, str],
    site: Site,
) -> Case:
    size = site.read_at_once(problem.bytes)
    fastest = [min(reads) for reads in zip(*(times[name] for name in _READERS), strict=True)]
    figures = {"read_gb_per_s": size // 4 * 4 / median(fastest).median / _GB}
    if problem.flop:
        products = [one.figures["gflop_per_s"] for one in measured if one.role == "floor" and one.seconds]
        figures["mm_gflop_per_s"] = max(2 * _SQUARE**3 / median(times["square_mm"]).median / _GB, *products)
    shape = " x ".join(map(str, problem.shape))
    threads = torch.get_num_threads()
    return Case(
        name=f"{problem.label} {shape} {problem.dtype}, {threads} thread{'s' * (threads > 1)}",
        baseline=measured[0].name,
        measured=tuple(measured),
        settings={
            "kernel": problem.label,
            "shape": problem.shape,
            "dtype": problem.dtype,
            "bytes": problem.bytes,
            "threads": threads,
            "inputs": site.copies(problem.bytes),
        },
        figures=figures,
        warnings=(*_above_the_roof(measured, figures), *_not_captured(how, measured)),
    )


def _above_the_roof(measured: Sequence[Measured], figures: Mapping[str, float]) -> Iterator[str]:
    roofs = {"gb_per_s": ("read_gb_per_s", "GB/s", "reads"), "gflop_per_s": ("mm_gflop_per_s", "GFLOP/s", "multiplies")}
    for one in measured:
        for figure, (roof, unit, does) in roofs.items():
            if roof in figures and one.figures.get(figure, 0.0) > ABOVE_ROOF * figures[roof]:
                yield (
                    f"{one.name}: {one.figures[figure]:.1f} {unit} is above the roofline, where torch {does} at "
                    f"{figures[roof]:.1f}: the measurement is wrong, or it does not look at all of its input"
                )


def _not_captured(how: Mapping[str, str], measured: Sequence[Measured]) -> Iterator[str]:
    names = [one.name for one in measured if how.get(one.name) == "events"]
    if names:
        yield f"{', '.join(names)}: no CUDA graph could be made, so the processor's time between its kernels is counted"
