"""CUDA C++ backend: hands addresses and the current stream to the compiled kernels (csrc/cuda).

Rows of statistics stay on the device: nothing here waits for the GPU. An accelerator on top of Triton, for where the
package was built with nvcc; ``availability`` says why not.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch  # before the extension: whichever comes first decides which OpenMP runtime both use
from torch import Tensor

from zest_fast import _native
from zest_fast.kernels.availability import AVAILABLE, Availability
from zest_fast.kernels.layout import DTYPE_NUMBER, GRADIENT_MOMENTS, MOMENTS


def availability(device: torch.device | None = None) -> Availability:
    """Whether these kernels can run on ``device`` (None = the current one), and why not.

    Needs no GPU, driver or CUDA build of PyTorch to answer.
    """
    if not _native.has_cuda:
        return Availability("zest_fast was built without nvcc (install it from source with nvcc on PATH)")
    if torch.version.cuda is None:
        return Availability(f"PyTorch {torch.__version__} was built without CUDA")
    if not torch.cuda.is_available():
        return Availability("PyTorch finds no usable CUDA device")
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    return _usable(index)


@functools.cache
def _usable(index: int) -> Availability:
    """What CUDA itself says against this device, once for each."""
    with torch.cuda.device(index):
        problem = _native.cuda_status(index)
    if not problem:
        return AVAILABLE
    driver, build = _version(_native.cuda_driver_version()), _version(_native.cuda_build_version())
    major, minor = torch.cuda.get_device_capability(index)
    return Availability(
        f"{problem} on {torch.cuda.get_device_name(index)} (sm_{major}{minor}): the driver knows CUDA up to {driver}, "
        f"the kernels were built with CUDA {build}"
    )


def moments_into(tensors: Sequence[Tensor], out: Tensor) -> None:
    """Moments of every tensor (any shape, strides and dtype) in one launch, queued on the current stream.

    Args:
        tensors: float32, float64, bfloat16 or float16, all on the device of ``out``.
        out: float64 [len(tensors), 6], contiguous; rows as in csrc/moments.h: count, mean, m2, abs_mean, abs_m2,
            nonfinite (the rest of a row is meaningless where that is not 0, see ``Moments.checked``).

    Raises:
        ValueError: a tensor on another device, or an ``out`` that does not fit.
        RuntimeError: what CUDA says about the launch.
    """
    _require_rows(out, (len(tensors), MOMENTS))
    for i, x in enumerate(tensors):
        _require_device(x, f"tensors[{i}]", out)
    if not tensors:
        return
    with torch.cuda.device(out.device):
        flat = [dense(x.detach()) for x in tensors]
        rows, chunks = pointer_table(flat, _native.cuda_chunk_size)
        # One row travels as an argument of the kernel; more come from pinned memory, which torch keeps until then.
        table = torch.tensor(rows, pin_memory=True).to(out.device, non_blocking=True) if len(rows) > 1 else None
        workspace = out.new_empty(chunks * MOMENTS)
        _native.cuda_moments(
            rows[0],
            0 if table is None else table.data_ptr(),
            len(rows),
            chunks,
            workspace.data_ptr(),
            out.data_ptr(),
            *_device_and_stream(),
        )


def gradient_moments_into(dw: Tensor, w: Tensor, out: Tensor) -> None:
    """Moments of the gradient ``dw`` and the weight ``w`` (same shape, any strides and dtypes) and of their product.

    Args:
        dw, w: on the device of ``out``.
        out: float64 [11], contiguous: the 6 of ``dw``, then weight_mean, weight_m2, weight_nonfinite, product_sum and
            product_abs_sum.

    Raises as ``moments_into`` does, and ValueError where the shapes differ.
    """
    _require_rows(out, (GRADIENT_MOMENTS,))
    if dw.shape != w.shape:
        raise ValueError(f"dw has shape {tuple(dw.shape)}, w {tuple(w.shape)}; they must be equal")
    _require_device(dw, "dw", out)
    _require_device(w, "w", out)
    with torch.cuda.device(out.device):
        dw, w = dense_in_one_order(dw.detach(), w.detach())
        chunks = -(-w.numel() // _native.cuda_chunk_size)
        workspace = out.new_empty(chunks * GRADIENT_MOMENTS)
        _native.cuda_gradient_moments(
            dw.data_ptr(),
            DTYPE_NUMBER[dw.dtype],
            w.data_ptr(),
            DTYPE_NUMBER[w.dtype],
            w.numel(),
            workspace.data_ptr(),
            out.data_ptr(),
            *_device_and_stream(),
        )


def channel_products(y: Tensor, g: Tensor) -> Tensor:
    """S [N, K] = Σ_p y ⊙ g in float64 for y, g [N, P, K] of any strides, queued on the current stream.

    Raises:
        ValueError: shapes or devices differ.
        RuntimeError: what CUDA says about the launch.
    """
    if y.shape != g.shape:
        raise ValueError(f"y has shape {tuple(y.shape)}, g {tuple(g.shape)}; they must be equal")
    _require_device(g, "g", y, "y")
    dtype = torch.promote_types(y.dtype, g.dtype)
    y, g = y.detach().to(dtype), g.detach().to(dtype)
    samples, positions, channels = y.shape
    chunks = -(-positions // _native.cuda_positions_per_chunk)
    with torch.cuda.device(y.device):
        out = y.new_empty(samples, channels, dtype=torch.float64)
        workspace = out.new_empty(out.numel() * chunks if chunks > 1 else 0)
        _native.cuda_channel_products(
            y.data_ptr(),
            y.stride(),
            g.data_ptr(),
            g.stride(),
            DTYPE_NUMBER[dtype],
            y.shape,
            workspace.data_ptr(),
            out.data_ptr(),
            *_device_and_stream(),
        )
    return out


def pointer_table(tensors: Sequence[Tensor], chunk_size: int) -> tuple[list[tuple[int, int, int, int]], int]:
    """A row of ``Entry`` (csrc/cuda/kernels.h) for each tensor: address, numel, first chunk, dtype; and all chunks."""
    rows, chunks = [], 0
    for x in tensors:
        rows.append((x.data_ptr(), x.numel(), chunks, DTYPE_NUMBER[x.dtype]))
        chunks += -(-x.numel() // chunk_size)
    return rows, chunks


def dense(x: Tensor) -> Tensor:
    """``x``, copied only where its entries do not fill one run of memory (in any dimension order)."""
    return x if x.numel() == 0 or _is_dense(x) else x.contiguous()


def dense_in_one_order(dw: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Both dense, with entry i of one beside entry i of the other in memory; w is copied only if it must."""
    w = dense(w)
    if _order(dw) == _order(w):
        return dw, w
    return torch.empty_like(w, dtype=dw.dtype, memory_format=torch.preserve_format).copy_(dw), w


def _is_dense(x: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(_order(x)):
        if stride != expected:
            return False
        expected *= size
    return True


def _order(x: Tensor) -> list[tuple[int, int]]:
    """Stride and size of the dimensions that have a stride to speak of."""
    return [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1]


def _device_and_stream() -> tuple[int, int]:
    """The current ones, as the extension takes them."""
    return torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream


def _require_rows(out: Tensor, shape: tuple[int, ...]) -> None:
    if out.shape != shape or out.dtype != torch.float64 or not out.is_contiguous():
        raise ValueError(f"out has shape {tuple(out.shape)}, {out.dtype}; contiguous float64 {shape} is needed")


def _require_device(x: Tensor, name: str, other: Tensor, other_name: str = "out") -> None:
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}, {other_name} on {other.device}")


def _version(number: int) -> str:
    """13000 -> "13.0", as CUDA counts."""
    return f"{number // 1000}.{number % 1000 // 10}"
