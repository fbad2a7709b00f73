"""safetensors files as memory: tensors that the kernel reads when they are used, and whose pages can be given back.

A file is mapped whole, private and writable: a stray write lands in a copy of the page and not in the file. Nobody
changes what is mapped, so whatever autograd keeps of it stays as it was; a page that was dropped is read again.

A file must stay as it is while it is mapped: one that is cut short ends the process (SIGBUS), as with every mapping.
What goes to a device is read from the file and not from the mapping (`Pages.read`), where that is an error like others.
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
            self._contents = _Contents(path, os.dup(file.fileno()))

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
            pages = Pages(self._memory, self._contents, entry.start, entry.stop, parameter)
            parameter.pages = pages  # type: ignore[attr-defined]
        return parameter


class _Contents:
    """A file to be read beside its mapping, by the same descriptor: another file of its name is not read."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor
        weakref.finalize(self, os.close, descriptor).atexit = False

    def read(self, out: Tensor, start: int) -> None:
        """Fill `out` (bytes, on the host) with those from `start` on. Raises OSError, naming the file that ends."""
        rest = out.numpy().data
        while rest:
            count = os.preadv(self._descriptor, [rest], start)
            if count == 0:
                raise OSError(
                    f"weights file {os.fspath(self._path)!r} ends at byte {start:,} and was longer when it was opened; "
                    "put it back and open the model again"
                )
            rest, start = rest[count:], start + count


class Pages:
    """Those of one mapped parameter, or of some of its rows."""

    def __init__(self, memory: mmap.mmap, contents: _Contents, start: int, stop: int, parameter: nn.Parameter) -> None:
        """start, stop: bytes of the file."""
        self._memory, self._contents = memory, contents
        self._start, self._stop, self._first = start, stop, 0
        self._parameter, self._version = weakref.ref(parameter), parameter._version
        self._address = parameter.data_ptr()

    @property
    def size(self) -> int:
        return self._stop - self._start

    def rows(self, parameter: nn.Parameter, start: int, stop: int) -> Pages:
        """Those of rows `start` to `stop` of the parameter that these pages are of."""
        row = self.size // parameter.shape[0]
        first, last = self._start + start * row, self._start + stop * row
        found = Pages(self._memory, self._contents, first, last, parameter)
        found._first, found._version, found._address = start * row, self._version, self._address
        return found

    @property
    def stamp(self) -> tuple[int, ...]:
        """Changes when the parameter is written to or gets other memory: what was copied of it before is outdated."""
        parameter = self._parameter()
        return () if parameter is None else (parameter._version, parameter.data_ptr())

    def read(self, out: Tensor) -> None:
        """Copy their bytes to `out` (bytes, on the host): from the file, or from memory where others were put there.

        Raises OSError, naming the file, where it was cut short.
        """
        parameter = self._parameter()
        if parameter is None or self.stamp == (self._version, self._address):
            self._contents.read(out, self._start)
        else:
            written = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
            out.copy_(written[self._first : self._first + self.size])

    def read_rows(self, rows: list[int]) -> Tensor:
        """These rows of the parameter, in memory; few of many, so that nothing beside them is read."""
        parameter = self._parameter()
        assert parameter is not None
        if self.stamp != (self._version, self._address):
            return parameter.detach()[rows]
        out = torch.empty((len(rows), *parameter.shape[1:]), dtype=parameter.dtype)
        row = self.size // parameter.shape[0]
        for number, one in zip(rows, out.view(torch.uint8).view(len(rows), row), strict=True):
            self._contents.read(one, self._start + number * row)
        return out

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
