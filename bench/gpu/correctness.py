"""Every kernel of every backend that runs, on the device, against the float64 definitions: worst error, and a Match."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from bench.gpu.site import Site
from zest_fast import kernels
from zest_fast.benchmarking.accuracy import TOLERANCE, worst_error
from zest_fast.kernels import collector, reference

LENGTHS = (1, 1023, 8193, 1_000_003)
LINEARS = ((1, 17, 9), (129, 100, 65), (300, 768, 257), (512, 1024, 1024))  # T, I, O
OUTPUTS = ((2, 5, 3), (4, 196, 130), (8, 512, 768))  # N, P, K
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check(site: Site) -> list[dict[str, object]]:
    """A row for each kernel, backend and dtype: the worst error over its shapes, and whether it is within tolerance."""
    rows = []
    for backend in backends(site):
        for dtype_name, dtype in DTYPES.items():
            for kernel, problems in KERNELS.items():
                if kernel == "linear_gradient_moments" and not _has_linear(site, backend, dtype):
                    continue
                worst = max(problems(site, dtype, backend))
                rows.append(
                    {
                        "section": "correctness",
                        "kernel": kernel,
                        "backend": backend,
                        "dtype": dtype_name,
                        "error": worst if math.isfinite(worst) else None,
                        "tolerance": TOLERANCE,
                        "match": worst <= TOLERANCE,
                    }
                )
    return rows


def backends(site: Site) -> list[str]:
    """The GPU backends that run on the site's device."""
    return [name for name in ("triton", "cuda") if collector.availability(name, site.device)]


def _has_linear(site: Site, backend: str, dtype: torch.dtype) -> bool:
    """CUDA C++ leaves dW to the library; Triton's interpreter multiplies the raw bits of bfloat16 (triton #11584)."""
    return backend == "triton" and not (site.dry and dtype == torch.bfloat16)


def _moments(site: Site, dtype: torch.dtype, backend: str) -> Iterator[float]:
    lengths = LENGTHS[:3] if site.dry else LENGTHS
    tensors = [site.random(n, dtype=dtype) + 0.5 for n in lengths]
    for found, x in zip(kernels.moments(tensors, backend=backend), tensors, strict=True):
        yield worst_error(found, reference.moments(x))


def _gradient_moments(site: Site, dtype: torch.dtype, backend: str) -> Iterator[float]:
    for _, i, o in LINEARS[: 2 if site.dry else None]:
        dw, w = site.random(o, i, dtype=dtype), site.random(o, i, dtype=dtype)
        found = kernels.gradient_moments(dw, w, backend=backend)
        yield worst_error(found, reference.gradient_moments(dw, w))


def _linear_gradient_moments(site: Site, dtype: torch.dtype, backend: str) -> Iterator[float]:
    for t, i, o in LINEARS[: 2 if site.dry else None]:
        x, g, w = site.random(t, i, dtype=dtype), site.random(t, o, dtype=dtype), site.random(o, i, dtype=dtype)
        found = kernels.linear_gradient_moments(x, g, w, backend=backend)
        yield worst_error(found, reference.linear_gradient_moments(x, g, w))


def _channel_products(site: Site, dtype: torch.dtype, backend: str) -> Iterator[float]:
    for shape in OUTPUTS[: 2 if site.dry else None]:
        y, g = site.random(*shape, dtype=dtype), site.random(*shape, dtype=dtype)
        size = (y.double() * g.double()).abs().sum(1)
        error = kernels.channel_products(y, g, backend=backend) - reference.channel_products(y, g)
        yield float((error.abs() / size).max())


KERNELS: dict[str, Callable[[Site, torch.dtype, str], Iterator[float]]] = {
    "moments": _moments,
    "gradient_moments": _gradient_moments,
    "linear_gradient_moments": _linear_gradient_moments,
    "channel_products": _channel_products,
}
