"""The two formats of a quantised matrix: packed once, unpacked for as long as something multiplies by it.

int8: the nearest of 255 multiples of 1/127 of the row's largest magnitude; one byte a weight and a float32 scale a row.
nf4: QLoRA's 16 quantiles of a normal distribution times the largest magnitude of each 64 weights, by bitsandbytes; half
a byte a weight and a float32 scale a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 64  #: weights that share a scale in nf4
_AT_ONCE = 1 << 17  # weights: temporaries of half a MiB, whatever the size of the matrix


class Format(NamedTuple):
    """pack: matrix -> packed, scale. unpack: packed, scale, shape, dtype -> matrix. check: raises ImportError."""

    pack: Callable[[Tensor], tuple[Tensor, Tensor]]
    unpack: Callable[[Tensor, Tensor, torch.Size, torch.dtype], Tensor]
    check: Callable[[], object]


def _pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    packed = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    rows = _rows_at_once(weight.shape)
    for w, p, s in zip(weight.split(rows), packed.split(rows), scale.split(rows), strict=True):
        s.copy_(w.abs().amax(dim=1))
        s /= 127
        p.copy_((w.float() / s.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)).round_())
    return packed, scale


def _unpack_int8(packed: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    weight = torch.empty(shape, dtype=dtype, device=packed.device)
    rows = _rows_at_once(shape)  # else the product in float32 exists whole on a CPU
    for w, p, s in zip(weight.split(rows), packed.split(rows), scale.split(rows), strict=True):
        torch.mul(p, s.unsqueeze(1), out=w)
    return weight


def _rows_at_once(shape: torch.Size) -> int:
    return max(1, _AT_ONCE // max(1, shape[1]))


def _pack_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    quantise = _bitsandbytes().functional.quantize_4bit
    parts = [quantise(part, blocksize=BLOCK, quant_type="nf4") for part in weight.reshape(-1).split(_AT_ONCE)]
    return torch.cat([packed for packed, _ in parts]), torch.cat([state.absmax for _, state in parts])


def _unpack_nf4(packed: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    functional = _bitsandbytes().functional
    # As one row of an even length: bitsandbytes 0.50 for CPUs takes the wrong scales where a block goes over two rows,
    # and calls the compiler for odd rows.
    row = torch.Size((1, 2 * packed.numel()))
    state = functional.QuantState(scale, shape=row, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
    weight: Tensor = functional.dequantize_4bit(packed, state)
    return weight.reshape(-1)[: math.prod(shape)].view(shape)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError("frozen='nf4' needs bitsandbytes: pip install 'zest_fast[quant]'") from error
    return bitsandbytes


FORMATS = {
    "int8": Format(_pack_int8, _unpack_int8, lambda: None),
    "nf4": Format(_pack_nf4, _unpack_nf4, _bitsandbytes),
}
