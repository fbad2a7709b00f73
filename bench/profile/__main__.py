"""`python -m bench.profile`: the whole zest_fast.profile() beside a plain forward + backward, and beside its peers.

    plain           forward + backward of the same model, all parameters trainable: the baseline of every ratio
    profile         zest_fast.profile(model, batch), all 15 metrics
    after_backward  (a) .backward(), then one torch expression per metric
    hook_and_drop   (b) the strongest peer: hooks, shared sums, the gradient dropped at once
    zero_cost_nas   (c) snip, grad_norm, plain and fisher as published, a pass each
    backpack/opacus (d) per-sample gradient norms, the nearest that these libraries have

Writes bench/results/profile.json. The full run takes about ten minutes on two cores. `--where` instead tells what a
profile spends above a plain pass (`where.py`), and writes bench/results/profile_where.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import zest_fast
from bench.measure import write_result
from bench.profile import libraries, peers, where
from bench.profile.cases import LARGE, STANDARD, TINY
from bench.profile.memory import measure_peaks
from zest_fast.benchmarking.models import Batch, Case
from zest_fast.benchmarking.timing import interleave, median, ratio

SLOW_ROUNDS = 3  # of candidates that take several passes or answer another question
LARGE_ROUNDS = 6  # of the larger batches
MIB = 2**20


def main() -> None:
    """Parse the command line, measure, print and write."""
    options = _options()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    console = Console(width=130)
    if options.where:
        _tell_where(options, console)
        return
    cases = [(case, True) for case in (TINY if options.quick else STANDARD)]
    cases += [(case, False) for case in (() if options.quick or options.no_large else LARGE)]
    results = []
    for case, thorough in cases:
        if case.model in options.models:
            console.print(f"[bold]{case}[/]")
            rounds = options.rounds if thorough else min(LARGE_ROUNDS, options.rounds)
            results.append(measure(case, rounds, thorough=thorough))
            console.print(_table(results[-1]))
    settings = {"rounds": options.rounds, "quick": options.quick, "library_quantity": libraries.QUANTITY}
    console.print(f"wrote {write_result('profile', settings, results, options.out)}")


def _tell_where(options: argparse.Namespace, console: Console) -> None:
    torch.set_num_threads(1)  # a thread's clock sees no others
    cases = [case for case in (TINY if options.quick else STANDARD) if case.model in options.models]
    results = [where.where(case, options.rounds) for case in cases]
    console.print(where.table(results))
    settings = {"rounds": options.rounds, "quick": options.quick, "clock": "processor time of one thread"}
    console.print(f"wrote {write_result('profile_where', settings, results, options.out, module='profile')}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description="profile() beside its peers")
    models = [case.model for case in STANDARD]
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default 9)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--quick", action="store_true", help="tiny models: checks that everything runs, says nothing")
    parser.add_argument("--no-large", action="store_true", help="leave the larger batches out")
    parser.add_argument("--where", action="store_true", help="what a profile spends above a plain pass, by parts")
    parser.add_argument("--out", type=Path, help="folder for the JSON (default bench/results)")
    return parser.parse_args()


def measure(case: Case, rounds: int, *, thorough: bool) -> dict[str, object]:
    """Times and peaks of one model; a thorough case has all peers and the memory, another only the strongest peer."""
    model, batch = case.build()
    candidates: dict[str, Callable[[], object]] = {
        "plain": partial(peers.plain, model, batch),
        "profile": partial(zest_fast.profile, model, batch),
        "hook_and_drop": partial(peers.hook_reductions, model, batch),
    }
    slow: dict[str, Callable[[], object]] = {}
    failed: dict[str, str] = {}
    if thorough:
        candidates["after_backward"] = partial(peers.reductions_after_backward, model, batch)
        slow, failed = _library_candidates(model, batch)
        slow["zero_cost_nas"] = partial(peers.zero_cost_nas, model, batch)
    times = interleave(candidates | slow, rounds, limits=dict.fromkeys(slow, min(SLOW_ROUNDS, rounds)))
    return {
        "model": case.model,
        "shape": case.shape,
        "layers": len(peers.profiled_layers(model)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": {name: median(values).as_dict() for name, values in times.items()},
        "ratio_to_plain": {name: ratio(times, name, "plain").as_dict() for name in times if name != "plain"},
        "profile_to_hook_and_drop": ratio(times, "profile", "hook_and_drop").as_dict(),
        "failed": failed,
        "peak_bytes": measure_peaks(case) if thorough else {},
    }


def _library_candidates(model: nn.Module, batch: Batch) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Libraries that run on this model, and why the others do not: whatever they raise is the finding."""
    working, failed = {}, {}
    for name, prepare in libraries.LIBRARIES.items():
        try:
            run = partial(prepare(model), batch)
            run()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            working[name] = run
    return working, failed


def _table(result: dict) -> Table:
    table = Table("", "ms", "x plain", "95 % interval", "rounds", "peak MiB", "checkpointed")
    stored, checkpointed = (result["peak_bytes"].get(key, {}) for key in ("stored", "checkpointed"))
    for name in dict.fromkeys([*result["seconds"], *stored]):
        time, relative = result["seconds"].get(name), result["ratio_to_plain"].get(name)
        table.add_row(
            name,
            f"{time['median'] * 1e3:.1f}" if time else "",
            f"{relative['median']:.3f}" if relative else "",
            f"{relative['low']:.3f} to {relative['high']:.3f}" if relative else "",
            str(time["n"]) if time else "",
            f"{stored[name] / MIB:.1f}" if name in stored else "",
            f"{checkpointed[name] / MIB:.1f}" if name in checkpointed else "",
        )
    for name, reason in result["failed"].items():
        table.add_row(name, reason)
    to_peer = result["profile_to_hook_and_drop"]
    table.caption = f"profile / hook_and_drop: {to_peer['median']:.3f} ({to_peer['low']:.3f} to {to_peer['high']:.3f})"
    return table


if __name__ == "__main__":
    main()
