"""Kernels on a GPU beside what else computes the same: rows with ms, TFLOP/s, GB/s and shares of the device's limits.

    linear_gradient_moments   zest_fast (the epilogue), cublas (dW alone), cublas_pass (dW, then our fused pass over
                              it), cublas_compiled and cublas_naive (dW, then torch reductions), quack (dW reduced to
                              one sum of squares a row in the epilogue and not stored: less than ours computes)
    moments                   zest_fast, compiled, naive, read (torch.sum), copy (whose bandwidth is the measure)

FLOP are 2 T I O. Bytes are those that have to be moved: X, G and W once (a GEMM that stores dW moves it twice more);
for moments the tensor once, for the copy twice.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.gpu.correctness import DTYPES, backends
from bench.gpu.site import GB, Run, Site
from zest_fast.benchmarking import torch_reductions as reductions
from zest_fast.benchmarking.timing import median, ratio
from zest_fast.kernels import cuda, triton_kernels

TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)
SHAPES = ((4096, 4096), (4096, 11008), (768, 3072))  # I, O
SIZES = (2**20, 2**24, 2**28)  # bytes
Pass = Callable[[Tensor, Tensor], object]


def measure(site: Site) -> Iterator[dict[str, object]]:
    """Rows, one at a time."""
    compiled = None if site.dry else reductions.compiled_gradient_moments()  # needs a compiler at run time
    for shape in ((24, 40),) if site.dry else SHAPES:
        all_dtypes = shape == SHAPES[0]
        for dtype in ("float16",) if site.dry else ("bfloat16", "float16", "float32") if all_dtypes else ("bfloat16",):
            for tokens in (33,) if site.dry else TOKENS:
                yield _linear(site, tokens, *shape, dtype, compiled)
    for dtype in ("float32",) if site.dry else ("float32", "bfloat16"):
        for size in (2**15,) if site.dry else SIZES:
            yield _moments(site, size, dtype)


def _linear(site: Site, t: int, i: int, o: int, dtype: str, compiled: Pass | None) -> dict[str, object]:
    kind = DTYPES[dtype]
    size = (t * i + t * o + o * i) * kind.itemsize
    inputs = [
        (site.random(t, i, dtype=kind), site.random(t, o, dtype=kind), site.random(o, i, dtype=kind))
        for _ in range(site.copies(size))
    ]
    out = torch.empty(11, dtype=torch.float64, device=site.device)

    def on_each(run: Callable[[Tensor, Tensor, Tensor], object]) -> Run:
        return lambda number: run(*inputs[number % len(inputs)])

    candidates = {
        "zest_fast": on_each(lambda x, g, w: triton_kernels.linear_gradient_moments_into(x, g, w, out)),
        "cublas": on_each(lambda x, g, w: g.t() @ x),
        "cublas_pass": on_each(lambda x, g, w: triton_kernels.gradient_moments_into(g.t() @ x, w, out)),
        "cublas_naive": on_each(lambda x, g, w: reductions.separate_gradient_moments(g.t() @ x, w)),
    }
    if "cuda" in backends(site):
        candidates["cublas_cuda_pass"] = on_each(lambda x, g, w: cuda.gradient_moments_into(g.t() @ x, w, out))
    if compiled:
        candidates["cublas_compiled"] = on_each(lambda x, g, w: compiled(g.t() @ x, w))
    missing = {}
    if importlib.util.find_spec("quack") is None:
        missing["quack"] = "not installed"
    else:
        candidates["quack"] = on_each(_quack())
    row = {"section": "kernels", "kernel": "linear_gradient_moments", "shape": [t, i, o], "dtype": dtype}
    return row | _figures(site, candidates, missing, size, 2 * t * i * o, dtype, "cublas_pass")


def _quack() -> Callable[[Tensor, Tensor, Tensor], object]:
    """Its reduce-only epilogue (H100 and newer), at the configuration that it tunes itself."""
    found: list[Callable] = []

    def run(x: Tensor, g: Tensor, w: Tensor) -> object:
        if not found:  # here, so that what it raises on import is recorded as any other failure
            from quack.epi_ops import ColVecReduce
            from quack.gemm_epilogue import gemm_epilogue

            reduces = {"squares": ColVecReduce("squares", scaled=True)}
            found.append(gemm_epilogue(reduces=reduces)(lambda acc: {"D": acc, "squares": (acc, acc)}))
        return found[0](g.t(), x, store_d=False)

    return run


def _moments(site: Site, size: int, dtype: str) -> dict[str, object]:
    kind = DTYPES[dtype]
    inputs = [site.random(size // kind.itemsize, dtype=kind) for _ in range(site.copies(size))]
    out = torch.empty(1, 6, dtype=torch.float64, device=site.device)
    target = torch.empty_like(inputs[0])

    def on_each(run: Callable[[Tensor], object]) -> Run:
        return lambda number: run(inputs[number % len(inputs)])

    candidates = {
        "zest_fast": on_each(lambda x: triton_kernels.moments_into([x], out)),
        "naive": on_each(reductions.separate_moments),
        "read": on_each(torch.sum),
        "copy": on_each(target.copy_),
    }
    if "cuda" in backends(site):
        candidates["zest_fast_cuda"] = on_each(lambda x: cuda.moments_into([x], out))
    if not site.dry:
        candidates["compiled"] = on_each(reductions.compiled_moments())
    row = {"section": "kernels", "kernel": "moments", "shape": list(inputs[0].shape), "dtype": dtype}
    row |= _figures(site, candidates, {}, size, 0, dtype, "copy")
    both_ways = 2.0  # the copy reads and writes, so at equal bandwidth moments take half its time
    ours = row["ratio"].get("zest_fast")
    row["share_of_copy_bandwidth"] = 1 / (both_ways * ours["median"]) if ours else None
    return row


def _figures(
    site: Site, candidates: dict[str, Run], failed: dict[str, str], size: int, flop: int, dtype: str, baseline: str
) -> dict[str, object]:
    """Medians with intervals, ratios to the baseline, rates, shares of the limits; and what looks impossible."""
    times, raised = site.times(candidates)
    tflops, bandwidth = site.peaks(dtype)
    rates: dict[str, dict[str, float | None]] = {}
    warnings = []
    for name, values in times.items():
        seconds = median(values).median
        moved = 2 * size if name == "copy" else size
        rate = {"tflops": flop / seconds / 1e12 if flop else None, "gb_per_s": moved / seconds / GB}
        rate["share_of_peak_flops"] = rate["tflops"] / tflops if flop and tflops else None
        rate["share_of_peak_bandwidth"] = rate["gb_per_s"] / bandwidth if bandwidth else None
        rates[name] = rate
        for limit in ("share_of_peak_flops", "share_of_peak_bandwidth"):
            if (rate[limit] or 0) > 1:
                warnings.append(f"{name}: {limit} is {rate[limit]:.2f}, beyond the physical limit: do not trust it")
    return {
        "bytes": size,
        "flop": flop,
        "seconds": {name: median(values).as_dict() for name, values in times.items()},
        "baseline": baseline,
        "ratio": {name: ratio(times, name, baseline).as_dict() for name in times if baseline in times},
        "rates": rates,
        "failed": failed | raised,
        "warnings": warnings,
    }
