"""A safetensors file written tensor by tensor, none of which need exist whole: the header goes in last."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from zest_fast.streaming.mapped_files import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}  #: of the types in safetensors
_AT_ONCE = 1 << 24  # bytes
_ENTRY = 200  # bytes of the header beside the name of a tensor, at most: dtype, shape, two numbers
_PAGE = 4096


class ShardWriter:
    """Writes `path`, which must not exist. A `with` block that ends well leaves a whole file.

    names: of all that will be written, in any order; the header has room for these.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        room = sum(len(json.dumps(name)) + _ENTRY for name in names)
        self._header = -(-(8 + room) // _PAGE) * _PAGE - 8  # so that tensors begin on a page
        self._entries: dict[str, dict[str, object]] = {}
        self._end = 0
        self._file = open(path, "xb")  # noqa: SIM115 (closed at the end of the `with` block)
        try:
            self._file.seek(8 + self._header)
        except BaseException:
            self._file.close()
            raise

    def write(self, name: str, dtype: torch.dtype, shape: Iterable[int], parts: Iterable[Tensor]) -> None:
        """parts: tensors of `dtype` whose entries, one after the other, are those of the tensor."""
        start, sizes = self._end, list(shape)
        for part in parts:
            contents = part.contiguous().view(-1).view(torch.uint8).numpy().data if part.numel() else memoryview(b"")
            for place in range(0, len(contents), _AT_ONCE):
                self._file.write(contents[place : place + _AT_ONCE])
            self._end += len(contents)
        if self._end - start != math.prod(sizes) * dtype.itemsize:
            raise ValueError(f"{name!r}: {self._end - start:,} bytes were given for {sizes} of {dtype}")
        self._entries[name] = {"dtype": NAMES[dtype], "shape": sizes, "data_offsets": [start, self._end]}

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                header = json.dumps(self._entries, separators=(",", ":")).encode().ljust(self._header)
                if len(header) > self._header:
                    raise ValueError(f"more tensors were written than were announced: {len(self._entries)}")
                self._file.seek(0)
                self._file.write(self._header.to_bytes(8, "little") + header)
