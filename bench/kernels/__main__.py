"""`python -m bench.kernels`: each public kernel in ms and GB/s beside torch reductions and the read bandwidth.

Bytes are those that a kernel has to read at least once: x for moments; dW and W for gradient_moments; Y and G for
channel_products; x, g and W for linear_gradient_moments, which a matrix product bounds instead, so its floor is the
bare torch.mm and it has GFLOP/s (2 T I O). The read bandwidth is that of the fastest of three read-only passes
(torch.sum, torch.dot and torch.amax, all threads) over as many bytes, measured in the same rounds. Where these fit in a
cache, so does the kernel's input: a percentage compares like with like at every size.

Writes bench/results/kernels.json. The full run takes about three minutes on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.measure import write_result
from zest_fast.benchmarking.kernel_cases import (
    LAYOUTS,
    Compiled,
    Problem,
    candidates_of,
    linear_problem,
    problem_of,
    random_numbers,
)
from zest_fast.benchmarking.timing import Run, interleave, median, ratio, seconds_of_one

MIB = 2**20
SIZES = (MIB // 4, 4 * MIB, 32 * MIB, 256 * MIB)
DTYPES = ("float32", "bfloat16")
LINEARS = ((768, 768, 3072), (384, 1024, 2816), (96, 4096, 4096))  # T, I, O
READERS = ("read_sum", "read_dot", "read_amax")
CPU = torch.device("cpu")


def main() -> None:
    """Parse the command line, measure, print and write."""
    options = _options()
    console = Console(width=130)
    results = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        compiled = None if options.quick or options.no_compile else Compiled()
        for problem in _problems((64 * 1024,) if options.quick else SIZES, options.quick):
            results.append(_measure(problem, _runs(problem, compiled), options.rounds, options.seconds))
    for kernel in dict.fromkeys(result["kernel"] for result in results):
        console.print(_table(kernel, [result for result in results if result["kernel"] == kernel]))
    settings = {"rounds": options.rounds, "quick": options.quick}
    console.print(f"wrote {write_result('kernels', settings, results, options.out)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description="the kernels beside torch reductions")
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds at most (default 11)")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="time for one input, but 5 rounds at least (default 1)"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--quick", action="store_true", help="one small size: checks that everything runs")
    parser.add_argument("--out", type=Path, help="folder for the JSON (default bench/results)")
    return parser.parse_args()


def _problems(sizes: tuple[int, ...], quick: bool) -> Iterator[Problem]:
    for dtype in DTYPES:
        for size in sizes:
            yield problem_of("moments", size, dtype)
            yield problem_of("gradient_moments", size, dtype)
            for layout in LAYOUTS:
                yield problem_of("channel_products", size, dtype, layout)
        for sizes_of_linear in ((8, 16, 32),) if quick else LINEARS:
            yield linear_problem(*sizes_of_linear, dtype)


def _runs(problem: Problem, compiled: Compiled | None) -> dict[str, Run]:
    """One input for all, as warm as the caches allow; alive until they are measured."""
    tensors = problem.inputs(CPU)
    runs: dict[str, Run] = {one.name: partial(one.on_cpu, *tensors) for one in candidates_of(problem, CPU, compiled)}
    return runs if problem.flop else runs | _readers(problem.bytes)


def _readers(size: int) -> dict[str, Run]:
    buffer = random_numbers(size // 4, dtype=torch.float32)
    return {"read_sum": buffer.sum, "read_dot": lambda: torch.dot(buffer, buffer), "read_amax": buffer.amax}


def _measure(problem: Problem, runs: dict[str, Run], rounds: int, seconds: float) -> dict[str, object]:
    once = {name: seconds_of_one(run) for name, run in runs.items()}
    repeats = {name: max(1, min(200, round(1e-3 / t))) for name, t in once.items()}  # about 1 ms between clock readings
    rounds = max(min(rounds, 5), min(rounds, int(seconds / sum(t * repeats[name] for name, t in once.items()))))
    slow = {name: min(rounds, 3) for name, t in once.items() if t > 0.2}
    windows = {name: partial(_repeat, run, repeats[name]) for name, run in runs.items()}
    raw = interleave(windows, rounds, limits=slow, warmup=0, collect=False)
    times = {name: [t / repeats[name] for t in values] for name, values in raw.items()}
    return _result(problem, times)


def _repeat(run: Run, count: int) -> None:
    for _ in range(count):
        run()


def _result(problem: Problem, times: dict[str, list[float]]) -> dict[str, object]:
    seconds = {name: median(values) for name, values in times.items()}
    peers = [name for name in times if name.startswith("torch_")]
    result: dict[str, object] = {
        "kernel": problem.label,
        "shape": problem.shape,
        "dtype": problem.dtype,
        "threads": torch.get_num_threads(),
        "bytes": problem.bytes,
        "seconds": {name: value.as_dict() for name, value in seconds.items()},
        "gb_per_s": problem.bytes / seconds["zest_fast"].median / 1e9,
        "speedup": {name: ratio(times, name, "zest_fast").as_dict() for name in peers},
    }
    if problem.flop:
        result["gflop_per_s"] = problem.flop / seconds["zest_fast"].median / 1e9
        result["time_to_bare_mm"] = ratio(times, "zest_fast", "bare_mm").as_dict()
    else:
        fastest = [min(reads) for reads in zip(*(times[name] for name in READERS), strict=True)]
        result["read_gb_per_s"] = problem.bytes / median(fastest).median / 1e9
        paired = {"read": fastest, "zest_fast": times["zest_fast"]}
        result["share_of_read_bandwidth"] = ratio(paired, "read", "zest_fast").as_dict()
    return result


def _table(kernel: str, results: list[dict]) -> Table:
    linear = kernel == "linear_gradient_moments"
    limit = ("GFLOP/s", "x bare mm") if linear else ("read GB/s", "% of read")
    table = Table("shape", "dtype", "threads", "ms", "GB/s", *limit, "x separate", "x lean", "x compiled", title=kernel)
    for r in results:
        if linear:
            reached, share = f"{r['gflop_per_s']:.0f}", f"{r['time_to_bare_mm']['median']:.2f}"
        else:
            percent = 100 * r["share_of_read_bandwidth"]["median"]
            reached, share = (
                f"{r['read_gb_per_s']:.1f}",
                f"{percent:.0f}" + (" (!)" if percent > 105 else ""),
            )
        speedups = [r["speedup"].get(f"torch_{peer}") for peer in ("separate", "lean", "compiled")]
        table.add_row(
            "x".join(map(str, r["shape"])),
            r["dtype"],
            str(r["threads"]),
            f"{r['seconds']['zest_fast']['median'] * 1e3:.3f}",
            f"{r['gb_per_s']:.1f}",
            reached,
            share,
            *(f"{speedup['median']:.1f}" if speedup else "" for speedup in speedups),
        )
    return table


if __name__ == "__main__":
    main()
