"""Folders of weights: what `save_pretrained` writes, and what `pack` makes of it. Nothing is read before it is used."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import nn

from zest_fast.finetuning.quantised_formats import FORMATS
from zest_fast.foundation.documents import Json, Keys, ListOf, MapOf, Number, Text, parse_json, shown, whole_file
from zest_fast.foundation.nearest import nearest
from zest_fast.streaming.mapped_files import DTYPES, MappedFile

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DOCUMENT = "zest_fast.json"
FORMAT, VERSION = "zest_fast.packed", 1
_MANY = 10_000_000

_PLACE = Keys(
    {
        "shape": ListOf(Number(0, 2**60, integer=True), least=2, most=2),
        "dtype": Text(among=tuple(DTYPES)),
        "file": Text(),
        "digest": Text(most=64),
    }
)
_SPECIFICATION = Keys(
    {
        "format": Text(among=(FORMAT,)),
        "version": Number(1, VERSION, integer=True),
        "frozen": Text(among=tuple(FORMATS)),
        "files": MapOf(Number(0, 2**60, integer=True), most=_MANY),
        "source": Keys({"folder": Text(), "files": MapOf(Number(0, 2**60, integer=True), most=_MANY)}),
        "layers": MapOf(_PLACE, most=_MANY),
    },
    {"zest_fast": Json()},
)


@dataclass(frozen=True)
class PackedLayer:
    """What a packed weight was: its shape, dtype, the file of the source that holds it and the digest there."""

    shape: tuple[int, int]
    dtype: torch.dtype
    file: str
    digest: str


@dataclass(frozen=True)
class PackedFolder:
    """What zest_fast.json says. files: of this folder, with their sizes; source: what was packed, and its files."""

    format: str
    files: dict[str, int]
    source: Path
    source_files: dict[str, int]
    layers: dict[str, PackedLayer]


class Checkpoint:
    """The tensors of the safetensors files of a folder, mapped, by name."""

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        """Raises ValueError that names the file which is missing, torn, or has a tensor that another one has too."""
        self.folder = folder
        self._homes: dict[str, MappedFile] = {}
        for name in files:
            file = _opened(folder, name)
            for tensor in file.entries:
                if tensor in self._homes:
                    raise ValueError(
                        f"{os.fspath(folder)!r} has {tensor!r} twice: in {name} and {self.file_of(tensor)}"
                    )
                self._homes[tensor] = file

    def __contains__(self, name: str) -> bool:
        return name in self._homes

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)

    def parameter(self, name: str) -> nn.Parameter:
        """Frozen, and with `.pages` where it is mapped. Raises ValueError for a name that is not there."""
        if name not in self._homes:
            raise ValueError(f"{os.fspath(self.folder)!r} has no tensor {name!r}; {nearest(name, self._homes)}")
        return self._homes[name].parameter(name)

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        entry = self._homes[name].entries[name]
        return entry.shape, entry.dtype

    def file_of(self, name: str) -> str:
        return self._homes[name].path.name

    def place_of(self, name: str) -> int:
        """Of its first byte in that file."""
        return self._homes[name].entries[name].start

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(file.path.name for file in self._homes.values()))


def plain_checkpoint(folder: Path) -> Checkpoint:
    """What `save_pretrained` wrote: model.safetensors, or shards and their index.

    Raises ValueError, naming the folder or file, where there is none, or where a shard is torn, missing or lacks what
    the index says it has.
    """
    check_folder(folder)
    index = folder / INDEX
    if not index.exists():
        if not (folder / WHOLE).exists():
            raise ValueError(
                f"{os.fspath(folder)!r} holds neither {WHOLE} nor {INDEX}; "
                f"save the model there with save_pretrained (there are: {_listing(folder)})"
            )
        return Checkpoint(folder, [WHOLE])
    homes = _index(index)
    checkpoint = Checkpoint(folder, dict.fromkeys(homes.values()))
    for tensor, name in homes.items():
        if tensor not in checkpoint or checkpoint.file_of(tensor) != name:
            raise ValueError(f"{os.fspath(folder / name)!r} has no {tensor!r}, although {INDEX} says so")
    return checkpoint


def packed_checkpoint(folder: Path, packed: PackedFolder) -> Checkpoint:
    """The files of a packed folder. Raises ValueError that names the one which is missing or not as it was written."""
    _check_sizes(folder, packed.files, "it was packed")
    return Checkpoint(folder, packed.files)


def source_checkpoint(folder: Path, packed: PackedFolder) -> Checkpoint:
    """The plain weights that a folder was packed from. Raises ValueError where they are gone or have changed."""
    try:
        _check_sizes(packed.source, packed.source_files, f"{os.fspath(folder)!r} was packed from it")
        return Checkpoint(packed.source, packed.source_files)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{os.fspath(folder)!r} holds packed weights, and layers that train are read from {str(packed.source)!r}, "
            f"which it was packed from: {error}; put that folder back, or pack again"
        ) from error


def read_packed(folder: Path) -> PackedFolder | None:
    """None for a plain folder. Raises ValueError, naming the document, where it is torn or foreign."""
    check_folder(folder)
    path = folder / DOCUMENT
    if not path.exists():
        return None
    try:
        found = parse_json(whole_file(path))
        if isinstance(found, dict) and type(found.get("version")) is int and found["version"] > VERSION:
            raise ValueError(f"version {found['version']}, and this zest_fast reads {VERSION}: upgrade it")
        _SPECIFICATION.check(found, "")
        for name in (*found["files"], *found["source"]["files"]):
            _check_inside(name)
        if unknown := {layer["file"] for layer in found["layers"].values()} - set(found["source"]["files"]):
            raise ValueError(f"layers: the file {min(unknown)!r} is none of the source")
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} is not what zest_fast.pack writes: {error}") from error
    layers = {
        name: PackedLayer(tuple(one["shape"]), DTYPES[one["dtype"]], one["file"], one["digest"])
        for name, one in found["layers"].items()
    }
    source = found["source"]
    return PackedFolder(found["frozen"], found["files"], Path(source["folder"]), source["files"], layers)


def check_folder(folder: Path) -> None:
    """Raises ValueError where it is no folder."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        beside = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise ValueError(f"folder {os.fspath(folder)!r} {what}; {nearest(folder.name, beside)}")


def _opened(folder: Path, name: str) -> MappedFile:
    try:
        return MappedFile(folder / name)
    except FileNotFoundError as error:
        raise ValueError(f"weights file {os.fspath(folder / name)!r} is missing") from error


def _check_sizes(folder: Path, files: dict[str, int], since: str) -> None:
    for name, size in files.items():
        path = folder / name
        if not path.exists():
            raise ValueError(f"weights file {os.fspath(path)!r} is missing")
        if path.stat().st_size != size:
            raise ValueError(
                f"weights file {os.fspath(path)!r} has {path.stat().st_size:,} bytes, and had {size:,} when {since}"
            )


def _index(path: Path) -> dict[str, str]:
    """The file of each tensor."""
    try:
        found = parse_json(whole_file(path))
        homes = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(homes, dict) or not homes or not all(isinstance(name, str) for name in homes.values()):
            raise ValueError(f"weight_map: expected files by the names of tensors, found {shown(homes)}")
        for name in set(homes.values()):
            _check_inside(name)
    except ValueError as error:
        raise ValueError(f"weights index {os.fspath(path)!r}: {error}") from error
    return homes


def _check_inside(name: str) -> None:
    """By its words alone: a link in the folder may lead anywhere, since caches of the hub are made of links."""
    if not name or "\0" in name or any(len(path.parts) != 1 or ".." in path.parts for path in _paths(name)):
        raise ValueError(f"the file {name!r} would lie outside of the folder")


def _paths(name: str) -> tuple[PurePosixPath, PureWindowsPath]:
    return PurePosixPath(name), PureWindowsPath(name)


def _listing(folder: Path) -> str:
    names: list[Any] = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:5]) or "nothing"
