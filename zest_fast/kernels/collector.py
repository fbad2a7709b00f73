"""The one choice of backend, and where results wait: those of the CPU are numbers at once, those of a GPU are rows of a
device buffer that is copied to the host once, so that a whole pass queues its kernels without waiting for any.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar, get_args

import torch
from torch import Tensor

from zest_fast.foundation.options import Backend
from zest_fast.kernels.availability import AVAILABLE, Availability
from zest_fast.kernels.backends import NumbersBackend, numbers_backend, rows_backend
from zest_fast.kernels.channels import by_channel
from zest_fast.kernels.layout import GRADIENT_MOMENTS, MOMENTS
from zest_fast.kernels.moments import GradientMoments, Moments
from zest_fast.kernels.storage import readable

T = TypeVar("T")
BACKENDS: tuple[str, ...] = get_args(Backend)

_BUFFER = 8192  # float64 of a device buffer: 450 layers with all that is known of them
# Where "auto" reduces dW in the epilogue of its GEMM. From a roofline model (bench/roofline.py), not measured: with
# many rows the GEMM alone is long, and a small dW stays in the cache between two steps.
_EPILOGUE_ROWS = 2048
_EPILOGUE_ENTRIES = 1 << 20
_BLOCK_BYTES = 32 << 20  # of dW that exist at once in two steps
_PRODUCT_ENTRIES = 1 << 21  # of S [N, K] that exist at once on a GPU (16 MiB)


def pick_backend(backend: str, device: torch.device) -> str:
    """The backend that serves ``device`` when ``backend`` was asked for.

    "auto" is "cpu" on the CPU; on a CUDA device "cuda" where it was built and the driver takes it, else "triton", else
    "reference" with one warning that says why.

    Args:
        backend: one of ``BACKENDS``.
        device: of the tensors.

    Returns:
        A name of ``BACKENDS``, never "auto".

    Raises:
        ValueError: unknown name, or a backend that does not run on this device, with the reason.

    Examples:
        >>> import torch, zest_fast
        >>> zest_fast.kernels.pick_backend("auto", torch.device("cpu"))
        'cpu'
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; one of {', '.join(BACKENDS)} is needed")
    if backend == "auto":
        return _best_or_warn(device)
    if not (able := availability(backend, device)):
        raise ValueError(f"backend {backend!r} cannot run on {device}: {able.reason}")
    return backend


def availability(backend: str, device: torch.device) -> Availability:
    """Whether a backend can run on a device, and why not."""
    if backend == "reference":
        return AVAILABLE
    if backend == "cpu":
        return AVAILABLE if device.type == "cpu" else Availability("it is for tensors on the CPU; use 'auto'")
    if backend == "triton":
        from zest_fast.kernels import triton_kernels

        if device.type == "cpu" and not triton_kernels.interpreted():
            return Availability("Triton runs on a GPU (or, to check it, on CPU tensors under TRITON_INTERPRET=1)")
        return triton_kernels.availability()
    from zest_fast.kernels import cuda

    return cuda.availability(device) if device.type == "cuda" else Availability("it is for tensors on a CUDA device")


def best_backend(device: torch.device) -> tuple[str, list[str]]:
    """What "auto" takes on a device, and why not the ones before it."""
    if device.type == "cpu":
        return "cpu", []
    reasons = [] if device.type == "cuda" else [f"there are no kernels for {device.type}"]
    for backend in ("cuda", "triton") if device.type == "cuda" else ():
        able = availability(backend, device)
        if able:
            return backend, reasons
        reasons.append(f"{backend}: {able.reason}")
    return "reference", reasons


@functools.cache
def _best_or_warn(device: torch.device) -> str:
    """Once for each device, so that the warning comes once."""
    backend, reasons = best_backend(device)
    if backend == "reference":
        why = "; ".join(reasons)
        warnings.warn(f"zest_fast uses the slow float64 reference on {device} ({why})", RuntimeWarning, stacklevel=2)
    return backend


class Collector:
    """Runs kernels for one pass and hands out functions that give the results once ``fetch`` was called.

    Checks that tensors have memory to read, since what has none would end the process, and nothing else: for tensors
    that are known to fit. Raises ValueError for one that has none.
    """

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._chosen: dict[torch.device, str] = {}
        self._serving: dict[torch.device, NumbersBackend | None] = {}
        self._buffers: dict[torch.device, _Rows] = {}
        self.used: set[str] = set()
        """Backends that ran."""

    def moments(self, tensors: Sequence[Tensor], names: Sequence[str] | None = None) -> list[Callable[[], Moments]]:
        """Moments of tensors on one device; ``names`` are what an error calls them."""
        if not tensors:
            return []
        names = names or [f"tensors[{i}]" for i in range(len(tensors))]
        tensors = [readable(x, name) for x, name in zip(tensors, names, strict=True)]
        if at_once := self._at_once(tensors[0].device):
            return [_known(at_once.moments(x)) for x in tensors]
        out, later = self._rows(tensors[0].device).take(len(tensors), MOMENTS, Moments.checked)
        rows_backend(self._pick(tensors[0].device)).moments_into(tensors, out)
        return later

    def moments_of(self, x: Tensor, name: str) -> Callable[[], Moments]:
        """Moments of one tensor, which an error calls ``name``."""
        x = readable(x, name)
        if at_once := self._at_once(x.device):
            return _known(at_once.moments(x))
        return self.moments([x], [name])[0]

    def gradient_moments(self, dw: Tensor, w: Tensor) -> Callable[[], GradientMoments]:
        """Moments of dw and w (same shape) and of their product."""
        dw, w = readable(dw, "dw"), readable(w, "w")
        if at_once := self._at_once(w.device):
            return _known(at_once.gradient_moments(dw, w))
        out, (later,) = self._rows(w.device).take(1, GRADIENT_MOMENTS, GradientMoments.from_row)
        rows_backend(self._pick(w.device)).gradient_moments_into(dw, w, out[0])
        return later

    def linear_gradient_moments(self, x: Tensor, g: Tensor, w: Tensor) -> Callable[[], GradientMoments]:
        """``gradient_moments`` of dW = gᵀx for x [T, I], g [T, O], w [O, I], without dW where the backend can."""
        x, g, w = readable(x, "x"), readable(g, "g"), readable(w, "w")
        name = self._pick(w.device)
        if at_once := numbers_backend(name):
            self.used.add(name)
            return _known(at_once.linear_gradient_moments(x, g, w))
        if not self._takes_the_epilogue(name, x, w):
            return self._in_two_steps(x, g, w)
        from zest_fast.kernels import triton_kernels  # the only kernel with such an epilogue, for "cuda" as well

        self.used.add("triton")
        out, (later,) = self._rows(w.device).take(1, GRADIENT_MOMENTS, GradientMoments.from_row)
        triton_kernels.linear_gradient_moments_into(x, g, w, out[0])
        return later

    def _takes_the_epilogue(self, name: str, x: Tensor, w: Tensor) -> bool:
        """Whether dW is reduced in its GEMM: not for float64, nor where "auto" expects two steps to be faster."""
        if x.dtype == torch.float64 or (name == "cuda" and not availability("triton", w.device)):
            return False
        return self._backend != "auto" or (len(x) <= _EPILOGUE_ROWS and w.numel() >= _EPILOGUE_ENTRIES)

    def _in_two_steps(self, x: Tensor, g: Tensor, w: Tensor) -> Callable[[], GradientMoments]:
        """The library's GEMM and one fused pass, a block of rows of dW at a time."""
        step = max(1, _BLOCK_BYTES // max(1, w.shape[1] * x.element_size()))
        parts = [
            self.gradient_moments(g[:, i : i + step].t() @ x, w[i : i + step]) for i in range(0, max(len(w), 1), step)
        ]
        return lambda: functools.reduce(GradientMoments.merge, (part() for part in parts))

    def channel_products(self, y: Tensor, g: Tensor) -> Tensor:
        """S [N, K] = Σ_p y ⊙ g in float64, on the device, for y, g [N, P, K]."""
        y, g = readable(y, "y"), readable(g, "g")
        return (self._at_once(y.device) or rows_backend(self._pick(y.device))).channel_products(y, g)

    def squared_channel_products(self, y: Tensor, g: Tensor, channel_dim: int) -> Callable[[], float]:
        """Σ_nk S_nk² of ``channel_products``, for y, g of one shape, samples first and channels in ``channel_dim``."""
        y, g = readable(y, "y"), readable(g, "g")
        if at_once := self._at_once(y.device):
            return _known(at_once.squared_channel_products(y, g, channel_dim))
        y, g = by_channel(y, channel_dim), by_channel(g, channel_dim)
        products, step = (
            rows_backend(self._pick(y.device)).channel_products,
            max(1, _PRODUCT_ENTRIES // max(1, y.shape[2])),
        )
        parts = [products(y[i : i + step], g[i : i + step]).square().sum() for i in range(0, len(y), step)]
        return self.numbers(torch.stack(parts).sum()[None], float) if parts else _known(0.0)

    def numbers(self, values: Tensor, make: Callable[..., T]) -> Callable[[], T]:
        """What ``make`` makes of the float64 values [k] of a device."""
        if values.device.type == "cpu":
            return _known(make(*values.tolist()))
        out, (later,) = self._rows(values.device).take(1, len(values), make)
        out.copy_(values[None])
        return later

    def fetch(self) -> None:
        """Copies the rows of every device to the host, the only moment at which anything waits."""
        for rows in self._buffers.values():
            rows.fetch()

    def _pick(self, device: torch.device) -> str:
        name = self._chosen.get(device)
        if name is None:
            name = self._chosen[device] = pick_backend(self._backend, device)
        return name

    def _at_once(self, device: torch.device) -> NumbersBackend | None:
        """The backend that is about to run there, where its results are numbers at once; None of one of rows."""
        if device not in self._serving:
            name = self._pick(device)
            self.used.add(name)
            self._serving[device] = numbers_backend(name)
        return self._serving[device]

    def _rows(self, device: torch.device) -> _Rows:
        return self._buffers.setdefault(device, _Rows(device))


class _Rows:
    """Rows of float64 on one device, cut from a buffer that is large enough for most models."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[Tensor] = []
        self._used = _BUFFER
        self._host: list[list[float]] = []

    def take(self, count: int, width: int, make: Callable[..., T]) -> tuple[Tensor, list[Callable[[], T]]]:
        """A contiguous [count, width] to write to, and for each row what ``make`` makes of it after ``fetch``."""
        size = count * width
        if self._used + size > _BUFFER:
            self._buffers.append(torch.empty(max(size, _BUFFER), dtype=torch.float64, device=self._device))
            self._used = 0
        buffer, start = len(self._buffers) - 1, self._used
        self._used += size

        def later(first: int) -> Callable[[], T]:
            return lambda: make(*self._host[buffer][first : first + width])

        out = self._buffers[buffer][start : start + size].view(count, width)
        return out, [later(start + i * width) for i in range(count)]

    def fetch(self) -> None:
        self._host = [buffer.tolist() for buffer in self._buffers]


def _known(value: T) -> Callable[[], T]:
    return lambda: value
