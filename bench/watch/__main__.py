"""`python -m bench.watch`: what a watched training loop costs beside one that is not, and beside what others do.

    plain                   forward, backward, AdamW, zero_grad: the baseline of every ratio
    watch                   a step that zest_fast.watch logs: ten metrics of every weight and its gradient
    watch, all metrics      metrics="all": also of every output, and fisher
    watch, histograms       histograms=True: also of every weight and gradient
    histograms              as wandb.watch: a hook on every parameter takes a histogram of its gradient
    reductions              after backward, one torch expression for each of the ten metrics and each layer
    cache                   as TransformerLens: module hooks keep every output and its gradient; nothing is computed
    cache, reduced          then one torch expression for each metric of "all"
    ... , not logged        a step between two that are logged

Processor time of one thread, interleaved, each step in hooks of its own; a round takes every kind of step once, and
the plain and the watched one that is not logged twice, each after a step that is not timed: a watch looks at an
optimizer that is new to it. The mean overhead at k is (logged + (k - 1) not logged) / k, relative to plain. Then the
same in two and four processes under DistributedDataParallel (gloo), by the clock, for a small BERT. Writes
bench/results/watch.json after every model and goes on where it stopped: about a quarter of an hour on an idle machine
of two cores.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.measure import RESULTS, write_result
from bench.watch.loops import Loop, loops_of
from bench.watch.processes import measure_processes
from zest_fast.benchmarking.models import STANDARD, TINY, Case, bert, llama
from zest_fast.benchmarking.timing import median

ROUNDS = 5
BETWEEN = 2  # steps of these in a round: their difference is what a watch costs between two logged steps
REPEATED = ("plain", "watch, not logged")
EVERY = (1, 10, 100)
PROCESSES = (2, 4)
CASES = (  # those of bench.profile, language models with half the batch
    Case("bert", "4x96", partial(bert, 4, 96)),
    Case("llama", "2x96", partial(llama, 2, 96)),
    *(case for case in STANDARD if case.model in ("resnet50", "mobilenetv2")),
)


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # of the first layer, and as meant
    path = (options.out or RESULTS) / "watch.json"
    done: dict[str, dict[str, Any]] = {}
    if path.exists() and not options.again:
        document = json.loads(path.read_text())
        if document["settings"]["tiny"] == options.tiny:
            done = {row["name"]: row for row in document["results"]}
    jobs: dict[str, Callable[[], dict[str, Any]]] = {}
    for case in TINY if options.tiny else CASES:
        if case.model in options.models:
            jobs[str(case)] = lambda case=case: measure(case, options.rounds)  # type: ignore[misc]
    for count in options.processes:
        jobs[f"{count} processes"] = lambda count=count: measure_processes(  # type: ignore[misc]
            count, options.rounds, tiny=options.tiny
        )
    for name, job in jobs.items():
        if name in done:
            print(f"{name}: measured already (--again measures it anew)", flush=True)
            continue
        began = time.perf_counter()
        done[name] = {"name": name, **job()}
        settings = {"rounds": options.rounds, "tiny": options.tiny, "repeated": BETWEEN}
        write_result("watch", settings, list(done.values()), options.out)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        for loop, spread in done[name]["to_plain"].items():
            print(f"    {loop:24} {spread['median']:.3f} ({spread['low']:.3f} to {spread['high']:.3f})", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.watch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = [case.model for case in CASES]
    parser.add_argument("--models", nargs="*", choices=models, default=models)
    parser.add_argument("--processes", nargs="*", type=int, default=list(PROCESSES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--tiny", action="store_true", help="tiny models: checks that everything runs, says nothing")
    parser.add_argument("--again", action="store_true", help="measure what the JSON has already")
    parser.add_argument("--out", type=Path, help="folder of the JSON, in place of bench/results")
    return parser.parse_args()


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """One model in this process."""
    model, batch = case.build()
    loops = loops_of(model, batch)
    gc.collect()
    gc.freeze()  # what is there by now is not looked at again before each step
    try:
        times = timed(loops, rounds, partial(one_step, clock=time.process_time))
    finally:
        gc.unfreeze()
    return {
        "model": case.model,
        "shape": case.shape,
        "parameters": sum(p.numel() for p in model.parameters()),
        **summary(times),
    }


def one_step(loop: Loop, before: int = 0, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds, once the hooks are in and so many steps were taken."""
    with loop:
        for _ in range(before):
            loop.step()
        gc.collect()
        gc.disable()
        try:
            began = clock()
            loop.step()
            return clock() - began
        finally:
            gc.enable()


def timed(loops: Mapping[str, Loop], rounds: int, take: Callable[[Loop, int], float]) -> dict[str, list[float]]:
    """Seconds of a step of each, an entry a round; a first round is not counted. Orders are mirrored as in
    zest_fast.benchmarking.timing."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    order, shuffler = [*loops, *REPEATED * (BETWEEN - 1)], random.Random(0)
    for index in range(rounds + 1):
        order.reverse() if index % 2 else shuffler.shuffle(order)
        found: dict[str, list[float]] = {name: [] for name in loops}
        for name in order:
            found[name].append(take(loops[name], int(name in REPEATED)))
        for name, seconds in found.items():
            times[name] += [sum(seconds) / len(seconds)] * (index > 0)
    return times


def summary(times: Mapping[str, list[float]]) -> dict[str, Any]:
    """Seconds, ratios to plain within the rounds, and the mean ratio where each k-th step is logged."""
    plain = times["plain"]
    at: dict[str, dict[str, Any]] = {}
    for name, logged in times.items():
        if name == "plain" or name.endswith(", not logged"):
            continue
        between = times.get(f"{name.split(',')[0]}, not logged", plain)
        at[name] = {
            str(k): median(
                [(a + (k - 1) * b) / k / p for a, b, p in zip(logged, between, plain, strict=True)]
            ).as_dict()
            for k in EVERY
        }
    return {
        "seconds": {name: median(values).as_dict() for name, values in times.items()},
        "to_plain": {
            name: median([t / p for t, p in zip(values, plain, strict=True)]).as_dict()
            for name, values in times.items()
            if name != "plain"
        },
        "at_every": at,
    }


if __name__ == "__main__":
    main()
