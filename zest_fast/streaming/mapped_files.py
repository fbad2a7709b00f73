"""safetensors files as memory: tensors that the kernel reads when they are used, and whose pages can be given back.

A file is mapped whole, private and writable: a stray write lands in a copy of the page and not in the file. Nobody
changes what is mapped, so whatever autograd keeps of it stays as it was; a page that was dropped is read again.

A file must stay as it is while it is mapped: one that is cut short ends the process (SIGBUS), as with every mapping.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.foundation.documents import check_regular, parse_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  #: how safetensors calls the types that are read here
_MOST_HEADER = 100_000_000  # bytes, as safetensors itself allows
_AHEAD = 1 << 17  # bytes: Linux reads no more than its read-ahead window (128 KiB as it ships) for one request
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # else a file larger than the memory could not be mapped


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: start and stop are bytes of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class MappedFile:
    """A safetensors file. Raises ValueError, naming it, where it is torn, OSError where it cannot be read.

    entries: by the names of the tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_regular(path)
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            try:
                self.entries = _entries(file.read(8), file.read, size)
            except ValueError as error:
                raise ValueError(
                    f"weights file {os.fspath(path)!r} is torn or no safetensors file ({error}); copy or download it "
                    "again"
                ) from error
            flags, access = mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            self._memory = mmap.mmap(file.fileno(), size, flags=flags, prot=access)

    def tensor(self, name: str) -> Tensor:
        """In the mapping itself; in memory where the file holds it at an address that its dtype cannot have."""
        entry = self.entries[name]
        count = math.prod(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if entry.start % entry.dtype.itemsize:
            copied = bytearray(self._memory[entry.start : entry.stop])
            return torch.frombuffer(copied, dtype=entry.dtype).view(entry.shape)
        # The tensor keeps the mapping, and not the other way round: closing it would pull the memory from under it.
        whole = torch.frombuffer(self._memory, dtype=entry.dtype, count=count, offset=entry.start)
        return whole.view(entry.shape)

    def parameter(self, name: str) -> nn.Parameter:
        """The same, frozen, with `.pages` where it is in the mapping."""
        entry, parameter = self.entries[name], nn.Parameter(self.tensor(name), requires_grad=False)
        if entry.start < entry.stop and entry.start % entry.dtype.itemsize == 0:
            pages = Pages(self._memory, entry.start, entry.stop, parameter)
            parameter.pages = pages  # type: ignore[attr-defined]
        return parameter


class Pages:
    """Those of one mapped parameter."""

    def __init__(self, memory: mmap.mmap, start: int, stop: int, parameter: nn.Parameter) -> None:
        self._memory = memory
        self._start, self._stop = start, stop
        self._parameter, self._version = weakref.ref(parameter), parameter._version

    def will_need(self) -> None:
        """Let the kernel read them into its cache, without waiting for it."""
        for start in range(self._start // mmap.PAGESIZE * mmap.PAGESIZE, self._stop, _AHEAD):
            self._memory.madvise(mmap.MADV_WILLNEED, start, min(_AHEAD, self._stop - start))

    def drop(self) -> None:
        """Out of resident memory, but for the two that neighbours share. Nothing is lost.

        A parameter that trains or was written to is left alone: what was written is in these pages and nowhere else.
        """
        parameter = self._parameter()
        if parameter is None or parameter.requires_grad or parameter._version != self._version:
            return
        start, stop = -(-self._start // mmap.PAGESIZE) * mmap.PAGESIZE, self._stop // mmap.PAGESIZE * mmap.PAGESIZE
        if start < stop:
            self._memory.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise copies_refused()

    def used_by_rows(self) -> None:
        """No read-ahead beyond a row that is looked up."""
        start = self._start // mmap.PAGESIZE * mmap.PAGESIZE
        self._memory.madvise(mmap.MADV_RANDOM, start, self._stop - start)


def copies_refused() -> TypeError:
    return TypeError(
        "a model whose weights are read from disk as they are used cannot be copied or pickled: call "
        "zest_fast.open_streamed again, and load the delta that SelectiveBackward.save wrote"
    )


def pages_of(parameter: Tensor | None) -> Pages | None:
    """None for a parameter that is in memory, or that is not there."""
    return getattr(parameter, "pages", None)


def check_platform() -> None:
    """Raises NotImplementedError where the kernel has no madvise."""
    if not sys.platform.startswith("linux"):
        raise NotImplementedError(
            f"weights are read from disk as they are used on Linux only, and this is {sys.platform}"
        )


def _entries(length: bytes, read: Callable[[int], bytes], size: int) -> dict[str, Entry]:
    """The header, checked against the size of the file: tensors one after the other, and nothing else."""
    count = int.from_bytes(length, "little")
    if len(length) < 8 or not 2 <= count <= min(_MOST_HEADER, size - 8):
        raise ValueError(f"{size:,} bytes cannot hold its header")
    header = parse_json(read(count))
    if not isinstance(header, Mapping):
        raise ValueError("its header holds no names")
    entries = {name: _entry(name, value, 8 + count) for name, value in header.items() if name != "__metadata__"}
    end = 8 + count
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise ValueError(f"{name!r} begins at byte {entry.start:,}, and {end:,} is expected")
        end = entry.stop
    if end != size:
        raise ValueError(f"it has {size:,} bytes, and its header says {end:,}")
    return entries


def _entry(name: str, value: Any, base: int) -> Entry:
    try:
        dtype, shape, (start, stop) = DTYPES[value["dtype"]], value["shape"], value["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the entry of {name!r} is {json.dumps(value):.80}") from error
    if not isinstance(shape, list) or not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(f"the entry of {name!r} is {json.dumps(value):.80}")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r} has {stop - start:,} bytes for {shape} of {value['dtype']}")
    return Entry(dtype, tuple(shape), base + start, base + stop)
