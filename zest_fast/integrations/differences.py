"""Which tensors of two sets differ, and by how much: deltas, safetensors files, folders of them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zest_fast.finetuning.delta_files import FORMAT, reason
from zest_fast.foundation.documents import parse_json, whole_file
from zest_fast.foundation.replacing import check_regular

_AT_ONCE = 1 << 22  # entries compared at a time, in float64


@dataclass(frozen=True)
class Difference:
    """Of one tensor that both hold: moved of count entries have other bits.

    largest: the largest distance; relative: the norm of the difference by the norm of the first (inf for one of zeros).
    Both are NaN or infinite where an entry that moved is not finite in one of the two.
    """

    name: str
    count: int
    moved: int
    largest: float
    relative: float


@dataclass(frozen=True)
class Differences:
    """changed, equal: of what both hold. only_first, only_second: names that the other lacks. unlike: of one name, and
    of other shapes or dtypes: name -> what is there.

    partial: whether one of the two is a delta, which holds only what was trained, so that what it lacks is unchanged.
    """

    changed: tuple[Difference, ...]
    equal: tuple[str, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    unlike: dict[str, str]
    partial: bool

    @property
    def same(self) -> bool:
        """Whether the two hold the same bits in all that they can be compared in."""
        missing = () if self.partial else (*self.only_first, *self.only_second)
        return not (self.changed or self.unlike or missing)


class TensorFiles(AbstractContextManager["TensorFiles"]):
    """The tensors of a .safetensors file or of all such files of a folder, read when they are asked for.

    is_delta: whether it is a file that SelectiveBackward.save wrote.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        """Raises ValueError that names the file which is missing, torn or no safetensors file."""
        self.is_delta = False
        self._stack = ExitStack()
        self._homes: dict[str, Any] = {}
        try:
            for path in _files(Path(source)):
                self._open(path)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, path: Path) -> None:
        try:
            check_regular(path)
            file = self._stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{str(path)!r} is torn or no safetensors file ({reason(error)})") from error
        self.is_delta |= (file.metadata() or {}).get("format") == FORMAT
        for name in file.keys():  # noqa: SIM118 (no mapping)
            if name in self._homes:
                raise ValueError(f"{str(path.parent)!r} has {name!r} in two files: {path.name} is one")
            self._homes[name] = file

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._homes))

    def __getitem__(self, name: str) -> Tensor:
        return self._homes[name].get_tensor(name)

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def _files(source: Path) -> list[Path]:
    if not source.is_dir():
        if not source.exists():
            raise ValueError(f"{str(source)!r} does not exist; name a folder or a .safetensors file")
        return [source]
    index = source / "model.safetensors.index.json"
    if index.exists():
        homes = parse_json(whole_file(index))
        homes = homes.get("weight_map") if isinstance(homes, dict) else None
        if not isinstance(homes, dict) or not all(isinstance(name, str) for name in homes.values()):
            raise ValueError(f"{str(index)!r} has no weight_map from the names of tensors to files")
        if outside := [name for name in homes.values() if Path(name).name != name]:
            raise ValueError(f"{str(index)!r} names {outside[0]!r}, which is outside of the folder")
        return [source / name for name in sorted(set(homes.values()))]
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{str(source)!r} holds no .safetensors file: name a folder of weights, a delta or such a file"
        )
    return [source / "model.safetensors"] if source / "model.safetensors" in files else files


def differences(
    first: TensorFiles, second: TensorFiles, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> Differences:
    """Compare tensor by tensor, two in memory at a time, entries by their bits. progress(done, total) is told."""
    both = sorted(set(first.names) & set(second.names))
    changed, equal, unlike = [], [], {}
    for done, name in enumerate(both, start=1):
        one, other = first[name], second[name]
        if one.shape != other.shape or one.dtype != other.dtype:
            unlike[name] = f"{_shape(one)} and {_shape(other)}"
        elif (found := _difference(name, one, other)).moved:
            changed.append(found)
        else:
            equal.append(name)
        progress(done, len(both))
    return Differences(
        tuple(changed),
        tuple(equal),
        tuple(name for name in first.names if name not in both),
        tuple(name for name in second.names if name not in both),
        unlike,
        first.is_delta or second.is_delta,
    )


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _difference(name: str, one: Tensor, other: Tensor) -> Difference:
    moved, largest, squares, norm = 0, 0.0, 0.0, 0.0
    for a, b in _pieces(one, other):
        apart = _bits(a).ne(_bits(b)).any(1)
        moved += int(apart.sum())
        x, y = _wide(a), _wide(b)
        distance = torch.where(apart, (x - y).abs(), 0.0)
        largest = _larger(largest, float(distance.max()))
        squares += float(distance.square().sum())
        norm += float(x[x.isfinite()].abs().square().sum())
    relative = math.sqrt(squares / norm) if norm else (math.inf if squares else 0.0)
    return Difference(name, one.numel(), moved, largest, relative)


def _pieces(one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    a, b = one.reshape(-1), other.reshape(-1)
    for start in range(0, a.numel(), _AT_ONCE):
        yield a[start : start + _AT_ONCE], b[start : start + _AT_ONCE]


def _bits(flat: Tensor) -> Tensor:
    """[entries, bytes]"""
    return flat.contiguous().view(torch.uint8).view(flat.numel(), -1)


def _wide(flat: Tensor) -> Tensor:
    return flat.to(torch.complex128 if flat.is_complex() else torch.float64)


def _larger(one: float, other: float) -> float:
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)
