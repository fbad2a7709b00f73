"""What each command measures: all its cases for each number of threads, and a Result of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from zest_fast.benchmarking.kernel_cases import LAYOUTS, Candidate, Compiled, Problem, candidates_of, problem_of
from zest_fast.benchmarking.kernels import Site, measure_kernel
from zest_fast.benchmarking.passes import profile_case, step_case
from zest_fast.benchmarking.plans import plan_case
from zest_fast.benchmarking.results import Case, Result, result_of
from zest_fast.profiling.profile import profile
from zest_fast.ranking.ranking import rank

Build = Callable[[], tuple[nn.Module, Any]]
Say = Callable[[str], None]
TRAINED = 5  #: layers of a step, by default


def run_kernels(
    kernels: Sequence[str],
    own: Sequence[tuple[str, Candidate]],
    *,
    dtypes: Sequence[str],
    sizes: Sequence[int],
    threads: Sequence[int],
    site: Site,
    compiles: bool,
    say: Say,
) -> Result:
    """own: functions of the user's, each with the kernel that it computes. say: is told what is measured next."""
    cases: list[Case] = []
    with _threads_put_back():
        for count in threads:
            torch.set_num_threads(count)
            compiled = Compiled() if compiles else None
            for problem in _problems(kernels, dtypes, sizes):
                say(f"{problem.label}, {problem.dtype}, {problem.bytes:,} bytes")
                users = [candidate for kernel, candidate in own if kernel == problem.kernel]
                ours, *peers = candidates_of(problem, site.device, compiled)
                cases.append(measure_kernel(problem, [ours, *users, *peers], site))
    settings = {"rounds": site.rounds, "warm": site.warm, "device": str(site.device)}
    return result_of("kernels", settings, cases, site.device)


def _problems(kernels: Sequence[str], dtypes: Sequence[str], sizes: Sequence[int]) -> Iterator[Problem]:
    """Each once: two small sizes may come to the same shape."""
    found = [
        problem_of(kernel, size, dtype, layout)
        for kernel in kernels
        for dtype in dtypes
        for size in sizes
        for layout in (LAYOUTS if kernel == "channel_products" else ("",))
    ]
    yield from dict.fromkeys(found)


def run_passes(
    command: str,
    models: Mapping[str, Build],
    *,
    layers: Sequence[str] | None,
    rounds: int,
    threads: Sequence[int],
    device: torch.device,
    settings: Mapping[str, Any],
    say: Say,
) -> Result:
    """profile, step or plan on each model. layers: that train; None = the best five by the Ranker."""
    cases: list[Case] = []
    with _threads_put_back():
        for count in threads:
            torch.set_num_threads(count)
            for name, build in models.items():
                say(name)
                model, batch = build()
                if command == "profile":
                    cases.append(profile_case(name, model, batch, rounds))
                    continue
                measure = step_case if command == "step" else plan_case
                cases.append(measure(name, model, batch, layers or best_layers(model, batch), rounds))
    return result_of(command, {"rounds": rounds, "device": str(device), **settings}, cases, device)


def best_layers(model: nn.Module, batch: Any) -> tuple[str, ...]:
    """The first five of the Ranker, of a small model half of what it ranks."""
    ranking = rank(profile(model, batch))
    return tuple(ranking.top(max(1, min(TRAINED, len(ranking.names) // 2))))


@contextmanager
def _threads_put_back() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
