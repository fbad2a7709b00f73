"""One bit for each element of a tensor: what masks of activations and dropout weigh in lean saving.

Eight booleans are eight bytes of 0 or 1, hence one int64; a multiplication moves them into its top byte. Packing and
unpacking go block by block, so that what is unpacked stays in the cache and a whole mask never exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_GATHER = 0x0102040810204080  # times the word: bit i of the top byte = byte i
_REPEAT = 0x0101010101010101  # times the byte: the byte eight times over
_SELECT = 0x8040201008040201 - 2**64  # bit i of byte i, as a signed word
_CPU_BLOCK, _GPU_BLOCK = 2**18, 2**26  # elements, multiples of 8: in the cache; few launches


def pack(mask: Tensor, out: Tensor) -> None:
    """Write the booleans of `mask` [n] into the bytes of `out` [ceil(n / 8)]."""
    whole = mask.numel() // 8 * 8
    out[: whole // 8] = (mask[:whole].view(torch.int64) * _GATHER) >> 56
    if whole < mask.numel():
        rest = mask.new_zeros(8)
        rest[: mask.numel() - whole] = mask[whole:]
        pack(rest, out[-1:])


def unpack(bits: Tensor, count: int) -> Tensor:
    """The first `count` elements as uint8: zero where the bit is 0, some other number where it is 1."""
    return ((bits.to(torch.int64) * _REPEAT) & _SELECT).view(torch.uint8)[:count]


def blocks(count: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Slices of `count` elements, and of the bytes that hold their bits."""
    size = _CPU_BLOCK if device.type == "cpu" else _GPU_BLOCK
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield slice(start, stop), slice(start // 8, (stop + 7) // 8)


def empty_bits(count: int, device: torch.device) -> Tensor:
    return torch.empty((count + 7) // 8, dtype=torch.uint8, device=device)


def memory_order(x: Tensor) -> list[int]:
    """The permutation of dimensions, outermost first, in which x lies in memory (of channels-last tensors too)."""
    return sorted(range(x.dim()), key=x.stride().__getitem__, reverse=True)


def flat(x: Tensor, order: list[int]) -> Tensor:
    """x in that order as one dimension; a view where x lies in memory so."""
    return x.permute(order).reshape(-1)


def empty_in_order(x: Tensor, order: list[int]) -> Tensor:
    """An empty tensor of x's shape that lies in memory in that order, so that `flat` of it is a view."""
    inverse = sorted(range(x.dim()), key=order.__getitem__)
    return x.new_empty([x.shape[dim] for dim in order]).permute(inverse)
