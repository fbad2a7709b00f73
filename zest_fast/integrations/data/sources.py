"""The user's data from a string: a table, a folder of images, parts of either, a set of `datasets`, or a function.

Reading comes before the model is loaded, since a fresh head needs the class names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from zest_fast.foundation.documents import check_regular
from zest_fast.foundation.nearest import some
from zest_fast.integrations.data.dataset_folders import digest_of_hub, is_hub_id, is_saved, open_hub, open_saved
from zest_fast.integrations.data.images import ImageFolder, open_images
from zest_fast.integrations.data.tables import ENDINGS, Table, read_table
from zest_fast.integrations.references import is_reference, load_function, nearest_path

TRAIN = "train"
VALIDATION = ("validation", "valid", "val", "dev", "test")  # the first that is there scores
_PARTS = (TRAIN, *VALIDATION)
Source = TypeVar("Source", Table, ImageFolder)


@dataclass(frozen=True)
class Loaders:
    """Batches: mappings with "labels" for transformers models, pairs (inputs, targets) otherwise."""

    train: DataLoader[Any]
    validation: DataLoader[Any] | None  #: None: none was asked for, or the user's function returned none
    notes: tuple[str, ...] = ()  #: what is strange in the data and the user should know, a sentence each
    taken: str = ""  #: what the data were taken for, in a line; "" of a function's


def open_data(source: str, *, split: str | None = None, config: str | None = None) -> Table | ImageFolder | Loaders:
    """Reads what `source` names; ValueError or TypeError in one line with the nearest valid value.

    source: a .jsonl, .ndjson, .csv, .tsv or .parquet file; a folder with one sub-folder of images for each class; a
        folder of such parts, train and validation (val, test): tables or folders of images; a folder that `datasets`
        saved (save_to_disk), or owner/name on the hub; or `module:function`, whose function returns a DataLoader or a
        pair of them (training, validation).
    split, config: of a set of `datasets`: the part that trains, or that and the one that scores, "train,test"; and the
        configuration on the hub.
    """
    if is_reference(source):
        _check_unused(source, split, config)
        return _user_loaders(source, load_function(source)())
    path = Path(source)
    if is_saved(path):
        _check_unused(source, None, config)
        return _with_parts(source, open_saved(path), split)
    if not path.exists():
        if not is_hub_id(source):
            raise ValueError(f"data {source!r} does not exist; {nearest_path(path)}")
        return _with_parts(source, open_hub(source, config), split)
    if not path.is_dir():
        _check_unused(source, split, config)
        return read_table(path)
    _check_unused(source, None, config)
    parts = _parts(path)
    if not parts:
        _check_unused(source, split, None)
        return open_images(path)
    return _with_parts(source, {name: _reader(part) for name, part in parts.items()}, split)


def digest_of_data(source: str, *, split: str | None = None, config: str | None = None) -> str | None:
    """Of what a table holds, or of the names and sizes of images; None for `module:function`, of which nobody knows.

    Raises ValueError as open_data does where there is no such file.
    """
    if is_reference(source):
        return None
    path = Path(source)
    state = hashlib.blake2b(digest_size=16)
    state.update(f"{split}|{config}".encode() if split or config else b"")
    if not path.exists():
        if not is_hub_id(source):
            raise ValueError(f"data {source!r} does not exist; {nearest_path(path)}")
        state.update(digest_of_hub(source, config).encode())
    elif is_saved(path):
        _add_files(state, path, (file for file in path.rglob("*") if file.is_file()))
    elif not path.is_dir():
        _add_content(state, path)
    elif parts := _parts(path):
        for name, part in sorted(parts.items()):
            state.update(f"{name}|".encode())
            _add_images(state, open_images(part)) if part.is_dir() else _add_content(state, part)
    else:
        _add_images(state, open_images(path))
    return state.hexdigest()


def _check_unused(source: str, split: str | None, config: str | None) -> None:
    for name, value in (("split", split), ("config", config)):
        if value is not None:
            what = (
                "parts: a set of datasets, or a folder of train and validation"
                if name == "split"
                else "a set on the hub"
            )
            raise ValueError(f"{name}={value} is about {what}, and {source} is none; leave it out")


def _parts(path: Path) -> dict[str, Path]:
    """Files or folders of a folder that are its parts, by name; none where it is a folder of classes.

    Raises ValueError where parts and classes lie beside each other.
    """
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    tables = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in ENDINGS]
    folders = [entry for entry in entries if entry.is_dir()]
    within = [entry for entry in folders if entry.name in _PARTS and _has_folders(entry)]
    if within and len(within) < len(folders):
        others = some(entry.name for entry in folders if entry not in within)
        raise ValueError(
            f"data folder {path} has {within[0].name} with classes in it and {others} beside it; move them"
        )
    if within and tables:
        raise ValueError(f"data folder {path} has parts of images and tables ({tables[0].name}); name one of them")
    found: dict[str, Path] = {}
    for entry in within or (tables if not folders else []):
        if entry.stem not in _PARTS:
            raise ValueError(
                f"data folder {path} holds {entry.name}, and tables of a folder are its parts: {', '.join(_PARTS)}; "
                "name a single table instead"
            )
        if entry.stem in found:
            raise ValueError(f"data folder {path} holds {found[entry.stem].name} and {entry.name}; which is it?")
        found[entry.stem] = entry
    return found


def _has_folders(path: Path) -> bool:
    return any(entry.is_dir() and not entry.name.startswith(".") for entry in path.iterdir())


def _reader(part: Path) -> Callable[[], Table | ImageFolder]:
    return lambda: open_images(part) if part.is_dir() else read_table(part)


def _with_parts(source: str, parts: dict[str, Callable[[], Any]], split: str | None) -> Any:
    """The part that trains, with the one that scores in it."""
    names = [name.strip() for name in split.split(",")] if split is not None else _usual(source, list(parts))
    if len(names) > 2 or len(set(names)) < len(names):
        raise ValueError(f"split={split} names {some(names)}; one that trains and at most one that scores are needed")
    for name in names:
        if name not in parts:
            raise ValueError(f"{source} has no part {name!r}; there are: {some(parts, 8)}")
    train = parts[names[0]]()
    return train if len(names) == 1 else replace(train, validation=parts[names[1]]())


def _usual(source: str, names: list[str]) -> list[str]:
    if len(names) == 1:
        return names
    if TRAIN not in names:
        raise ValueError(f"{source} has the parts {some(names, 8)} and none is called {TRAIN}: say which with split=")
    return [TRAIN, *[name for name in VALIDATION if name in names][:1]]


def _add_images(state: Any, folder: ImageFolder) -> None:
    for file, label in zip(folder.files, folder.labels, strict=True):
        state.update(f"{label}/{file.name}|{file.stat().st_size}\n".encode(errors="surrogateescape"))


def _add_files(state: Any, root: Path, files: Iterable[Path]) -> None:
    for file in sorted(files):
        state.update(f"{file.relative_to(root)}|".encode(errors="surrogateescape"))
        _add_content(state, file)


def _add_content(state: Any, path: Path) -> None:
    check_regular(path)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            state.update(block)


def _user_loaders(source: str, made: Any) -> Loaders:
    if isinstance(made, DataLoader):
        return Loaders(made, None)
    if isinstance(made, tuple) and len(made) == 2 and all(isinstance(loader, DataLoader) for loader in made):
        return Loaders(*made)
    raise TypeError(
        f"{source!r} returned {type(made).__name__}; it has to return a DataLoader or a pair of DataLoaders"
    )
