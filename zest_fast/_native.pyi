"""What csrc/bindings.cpp exports: addresses, sizes, strides and dtype numbers in, numbers out; unchecked."""

from collections.abc import Sequence

has_openmp: bool
"""False: one thread, whatever ``threads`` says."""
has_cuda: bool
cuda_chunk_size: int
"""This and all else named cuda_ is there only where has_cuda is true."""
cuda_positions_per_chunk: int

def moments(
    x: int, dtype: int, sizes: Sequence[int], strides: Sequence[int], threads: int
) -> tuple[float, float, float, float, float, float]: ...
def gradient_moments(
    dw: int,
    dw_dtype: int,
    dw_strides: Sequence[int],
    w: int,
    w_dtype: int,
    w_strides: Sequence[int],
    sizes: Sequence[int],
    threads: int,
) -> tuple[float, float, float, float, float, float, float, float, float, float, float]: ...
def channel_products(
    y: int,
    y_dtype: int,
    y_strides: Sequence[int],
    g: int,
    g_dtype: int,
    g_strides: Sequence[int],
    sizes: Sequence[int],
    out: int,
    threads: int,
) -> float: ...
def squared_channel_products(
    y: int,
    y_dtype: int,
    y_strides: Sequence[int],
    g: int,
    g_dtype: int,
    g_strides: Sequence[int],
    sizes: Sequence[int],
    channel: int,
    threads: int,
) -> float | None: ...
def silu_gated_backward(
    addresses: Sequence[int], strides: Sequence[int], rows: int, columns: int, dtype: int, threads: int
) -> None: ...
def interval_bits(x: int, dtype: int, n: int, low: float, high: float, bits: int, threads: int) -> None: ...
def masked(g: int, bits: int, n: int, element_size: int, out: int, threads: int) -> None: ...
def cuda_status(device: int) -> str: ...
def cuda_build_version() -> int: ...
def cuda_driver_version() -> int: ...
def cuda_moments(
    first: Sequence[int], table: int, count: int, chunks: int, workspace: int, out: int, device: int, stream: int
) -> None: ...
def cuda_gradient_moments(
    dw: int, dw_dtype: int, w: int, w_dtype: int, numel: int, workspace: int, out: int, device: int, stream: int
) -> None: ...
def cuda_channel_products(
    y: int,
    y_strides: Sequence[int],
    g: int,
    g_strides: Sequence[int],
    dtype: int,
    sizes: Sequence[int],
    workspace: int,
    out: int,
    device: int,
    stream: int,
) -> None: ...
