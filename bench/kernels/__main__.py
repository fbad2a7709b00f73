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
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.measure import write_result
from zest_fast import kernels
from zest_fast.benchmarking import torch_reductions as reductions
from zest_fast.benchmarking.timing import interleave, median, ratio

MIB = 2**20
SIZES = (MIB // 4, 4 * MIB, 32 * MIB, 256 * MIB)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = ("tokens", "pixels")
LINEARS = ((768, 768, 3072), (384, 1024, 2816), (96, 4096, 4096))  # T, I, O
READERS = ("read_sum", "read_dot", "read_amax")
Run = Callable[[], object]


@dataclass
class Problem:
    """One kernel on one input: what it reads, what it multiplies, and the candidates that compute it."""

    kernel: str
    shape: list[int]
    dtype: str
    bytes: int
    candidates: dict[str, Run]
    flop: int = 0
    threads: int = field(default_factory=torch.get_num_threads)


def main() -> None:
    """Parse the command line, measure, print and write."""
    options = _options()
    console = Console(width=130)
    results = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        compiled = {} if options.quick or options.no_compile else _compiled()
        for problem in _problems((64 * 1024,) if options.quick else SIZES, options.quick, compiled):
            results.append(_measure(problem, options.rounds, options.seconds))
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


def _compiled() -> dict[str, Callable]:
    torch.compiler.reset()
    return {
        "moments": reductions.compiled_moments(),
        "gradient_moments": reductions.compiled_gradient_moments(),
        "tokens": reductions.compiled_channel_products([1]),
        "pixels": reductions.compiled_channel_products([2, 3]),
    }


def _problems(sizes: tuple[int, ...], quick: bool, compiled: dict[str, Callable]) -> Iterator[Problem]:
    """Problems one at a time, so that no two large inputs are alive together."""
    for name, dtype in DTYPES.items():
        for size in sizes:
            yield _moments(size, name, dtype, compiled)
            yield _gradient_moments(size, name, dtype, compiled)
            for layout in LAYOUTS:
                yield _channel_products(size, layout, name, dtype, compiled)
        for sizes_of_linear in ((8, 16, 32),) if quick else LINEARS:
            yield _linear_gradient_moments(*sizes_of_linear, name, dtype)


def _moments(size: int, name: str, dtype: torch.dtype, compiled: dict[str, Callable]) -> Problem:
    x = _random(size // dtype.itemsize, dtype=dtype)
    candidates: dict[str, Run] = {
        "zest_fast": lambda: kernels.moments([x]),
        "torch_separate": lambda: _numbers(reductions.separate_moments(x)),
        "torch_lean": partial(_lean, reductions.lean_moments, x, scratch=reductions.Scratch()),
        **_compiled_candidate(compiled, "moments", x),
        **_readers(size),
    }
    return Problem("moments", list(x.shape), name, size, candidates)


def _gradient_moments(size: int, name: str, dtype: torch.dtype, compiled: dict[str, Callable]) -> Problem:
    n = size // dtype.itemsize // 2
    dw, w = _random(n, dtype=dtype), _random(n, dtype=dtype)
    candidates: dict[str, Run] = {
        "zest_fast": lambda: kernels.gradient_moments(dw, w),
        "torch_separate": lambda: _numbers(reductions.separate_gradient_moments(dw, w)),
        "torch_lean": partial(_lean, reductions.lean_gradient_moments, dw, w, scratch=reductions.Scratch()),
        **_compiled_candidate(compiled, "gradient_moments", dw, w),
        **_readers(size),
    }
    return Problem("gradient_moments", [n], name, size, candidates)


def _channel_products(size: int, layout: str, name: str, dtype: torch.dtype, compiled: dict[str, Callable]) -> Problem:
    shape, positions = _channel_shape(size // dtype.itemsize // 2, layout)
    y, g = _random(*shape, dtype=dtype), _random(*shape, dtype=dtype)
    scratch = reductions.Scratch()
    candidates: dict[str, Run] = {
        "zest_fast": lambda: kernels.channel_products(y, g),
        "torch_separate": lambda: reductions.separate_channel_products(y, g, positions),
        "torch_lean": lambda: reductions.lean_channel_products(y, g, positions, scratch),
        **_compiled_candidate(compiled, layout, y, g),
        **_readers(2 * y.nbytes),
    }
    return Problem(f"channel_products ({layout})", shape, name, 2 * y.nbytes, candidates)


def _channel_shape(numel: int, layout: str) -> tuple[list[int], list[int]]:
    """Shape of about `numel` elements and its positions: [8, tokens, 768], or [8, channels, side, side]."""
    if layout == "tokens":
        return [8, max(1, numel // (8 * 768)), 768], [1]
    side = 14 if numel < MIB else 56
    return [8, max(1, numel // (8 * side * side)), side, side], [2, 3]


def _linear_gradient_moments(t: int, i: int, o: int, name: str, dtype: torch.dtype) -> Problem:
    x, g, w = _random(t, i, dtype=dtype), _random(t, o, dtype=dtype), _random(o, i, dtype=dtype)
    scratch, out = reductions.Scratch(), w.new_empty(w.shape)

    def dw() -> Tensor:
        return torch.mm(g.t(), x, out=out)

    candidates: dict[str, Run] = {
        "zest_fast": lambda: kernels.linear_gradient_moments(x, g, w),
        "torch_separate": lambda: _numbers(reductions.separate_gradient_moments(g.t() @ x, w)),
        "torch_lean": lambda: _lean(reductions.lean_gradient_moments, dw(), w, scratch=scratch),
        "bare_mm": dw,
    }
    read = x.nbytes + g.nbytes + w.nbytes
    return Problem("linear_gradient_moments", [t, i, o], name, read, candidates, flop=2 * t * i * o)


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers, a million different ones repeated: drawing 256 MiB would outlast the benchmark."""
    drawn = torch.randn(min(math.prod(shape), MIB), generator=torch.Generator().manual_seed(0)).to(dtype)
    return drawn.repeat(-(-math.prod(shape) // len(drawn)))[: math.prod(shape)].view(shape)


def _numbers(sums: reductions.Sums) -> list[float]:
    return [value.item() for value in sums.values()]


def _lean(sums: Callable[..., reductions.Sums], *tensors: Tensor, scratch: reductions.Scratch) -> list[float]:
    return torch.stack(list(sums(*tensors, scratch).values())).tolist()


def _compiled_candidate(compiled: dict[str, Callable], key: str, *tensors: Tensor) -> dict[str, Run]:
    return {"torch_compiled": partial(compiled[key], *tensors)} if compiled else {}


def _readers(size: int) -> dict[str, Run]:
    buffer = _random(size // 4, dtype=torch.float32)
    return {"read_sum": buffer.sum, "read_dot": lambda: torch.dot(buffer, buffer), "read_amax": buffer.amax}


def _measure(problem: Problem, rounds: int, seconds: float) -> dict[str, object]:
    once = {name: _seconds_of_one(run) for name, run in problem.candidates.items()}
    repeats = {name: max(1, min(200, round(1e-3 / t))) for name, t in once.items()}  # about 1 ms between clock readings
    rounds = max(min(rounds, 5), min(rounds, int(seconds / sum(t * repeats[name] for name, t in once.items()))))
    slow = {name: min(rounds, 3) for name, t in once.items() if t > 0.2}
    runs = {name: partial(_repeat, run, repeats[name]) for name, run in problem.candidates.items()}
    raw = interleave(runs, rounds, limits=slow, warmup=0, collect=False)
    times = {name: [t / repeats[name] for t in values] for name, values in raw.items()}
    return _result(problem, times)


def _seconds_of_one(run: Run) -> float:
    """Seconds of one call; of the second where the first is short enough to be mostly warm-up."""
    elapsed = 0.0
    for _ in range(2):
        start = time.perf_counter()
        run()
        elapsed = max(time.perf_counter() - start, 1e-7)
        if elapsed > 0.1:
            break
    return elapsed


def _repeat(run: Run, count: int) -> None:
    for _ in range(count):
        run()


def _result(problem: Problem, times: dict[str, list[float]]) -> dict[str, object]:
    seconds = {name: median(values) for name, values in times.items()}
    peers = [name for name in times if name.startswith("torch_")]
    result: dict[str, object] = {
        "kernel": problem.kernel,
        "shape": problem.shape,
        "dtype": problem.dtype,
        "threads": problem.threads,
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
