"""Sets of the library `datasets`, imported when named: a folder that save_to_disk wrote, or owner/name on the hub.

Columns of class numbers become their names, since the model's head is called by them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from zest_fast.foundation.text_table import first_line
from zest_fast.integrations.data.tables import ENDINGS, Table, check_size

_ID = re.compile(r"[\w.-]+/[\w.-]+")
_OPAQUE = ("Image", "Audio", "Video", "Pdf")  # features whose values are no plain data


def is_saved(path: Path) -> bool:
    """Whether save_to_disk wrote this folder, a set or several parts."""
    return (path / "dataset_dict.json").is_file() or ((path / "state.json").is_file() and _has_arrow(path))


def _has_arrow(path: Path) -> bool:
    return next(path.glob("*.arrow"), None) is not None


def is_hub_id(source: str) -> bool:
    """Whether a `source` that does not exist here reads as owner/name, and not as a file in a folder that does."""
    owner = Path(source).parent
    return _ID.fullmatch(source) is not None and not owner.is_dir() and Path(source).suffix.lower() not in ENDINGS


def open_saved(path: Path) -> dict[str, Callable[[], Table]]:
    """Its parts by name, each read when it is called for; a single set is called train."""
    library = _datasets(f"{path} was saved by the library datasets")
    try:
        found = library.load_from_disk(str(path))
    except Exception as error:  # of a torn folder it raises what pyarrow and json meet
        raise ValueError(f"{path} cannot be read as a set of datasets ({first_line(error)[:300]})") from error
    return _parts(path, found)


def open_hub(source: str, config: str | None) -> dict[str, Callable[[], Table]]:
    """The same of a set on the hub, of which code is never run."""
    return _parts(Path(source), _loaded(source, config))


def digest_of_hub(source: str, config: str | None) -> str:
    """Of what the rows of all its parts hold."""
    state = hashlib.blake2b(digest_size=16)
    for name, part in sorted(_named(_loaded(source, config)).items()):
        state.update(f"{name}|{part.features}|".encode())
        for rows in part.iter(batch_size=1000):
            state.update(repr(rows).encode(errors="surrogateescape"))
    return state.hexdigest()


def _loaded(source: str, config: str | None) -> Any:
    library = _datasets(f"data {source!r} is no file or folder here, and a set on the hub")
    try:
        return library.load_dataset(source, config)
    except Exception as error:  # no network, no such set, a configuration to be chosen, a script that is not run
        raise ValueError(
            f"data {source!r} is no file or folder here, and the hub did not give it ({first_line(error)[:300]})"
        ) from error


def _named(found: Any) -> Mapping[str, Any]:
    return found if isinstance(found, Mapping) else {"train": found}


def _parts(path: Path, found: Any) -> dict[str, Callable[[], Table]]:
    return {name: partial(_table, path / name, part) for name, part in _named(found).items()}


def _table(path: Path, part: Any) -> Table:
    for name, feature in part.features.items():
        if type(feature).__name__ in _OPAQUE:
            raise ValueError(
                f"{path}: column {name!r} holds a {type(feature).__name__}, which is not read from a set of datasets; "
                "save images as files, a sub-folder for each class"
            )
    check_size(path, len(part.features), len(part))
    if not len(part):
        raise ValueError(f"{path} has no rows")
    columns = {name: _by_name(feature, part[:][name]) for name, feature in part.features.items()}
    return Table(path, columns, [f"row {number}" for number in range(1, len(part) + 1)])


def _by_name(feature: Any, values: list[Any]) -> list[Any]:
    """Numbers of classes as their names, also in lists; -1, for labels that are not given, as nothing."""
    inner = getattr(feature, "feature", None)
    if inner is not None and hasattr(inner, "int2str"):
        return [value if value is None else [_name(inner, entry) for entry in value] for value in values]
    return [_name(feature, value) for value in values] if hasattr(feature, "int2str") else list(values)


def _name(feature: Any, value: Any) -> Any:
    return None if value is None or value < 0 else feature.int2str(value)


def _datasets(why: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{why}: pip install 'zest_fast[datasets]'") from error
    return datasets
