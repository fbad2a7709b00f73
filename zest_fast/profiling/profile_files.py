"""LayerProfile on disk: JSON for people and other languages, Parquet for data frames. No pickle.

Both hold the same header (format, version, loss, backend, uncovered, info); JSON carries the values by layer, Parquet
in float64 columns with the header as schema metadata. JSON has no NaN and no infinity: there they are the strings
"NaN", "Infinity" and "-Infinity", which `float` reads back.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from zest_fast.profiling.layer_profile import LayerProfile
from zest_fast.profiling.replacing import replacing

FORMAT = "zest_fast.LayerProfile"
VERSION = 1
METADATA_KEY = b"zest_fast"


def save_profile(profile: LayerProfile, path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    write = {".json": _write_json, ".parquet": _write_parquet}[_suffix(path)]
    with replacing(path) as temporary:
        write(profile, temporary)
    return path


def load_profile(path: str | os.PathLike[str]) -> LayerProfile:
    path = Path(path)
    read = {".json": _read_json, ".parquet": _read_parquet}[_suffix(path)]
    try:
        return read(path)
    except NewerVersionError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} is no profile that can be read ({type(error).__name__}: {error}): torn, or written by "
            "something else; profile again, or name a file that LayerProfile.save wrote"
        ) from error


class NewerVersionError(ValueError):
    """The file was written by a later zest_fast."""


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in (".json", ".parquet"):
        raise ValueError(f"{str(path)!r} ends in {path.suffix!r}; a profile is a .json or a .parquet file")
    return suffix


def _header(profile: LayerProfile) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "loss": _strict(profile.loss),
        "backend": profile.backend,
        "uncovered": profile.uncovered,
        "metrics": profile.metrics,
    }


def _check(header: Any, path: Path) -> None:
    if header["format"] != FORMAT:
        raise ValueError(f"its format is {header['format']!r}, not {FORMAT!r}")
    if header["version"] > VERSION:
        raise NewerVersionError(
            f"{str(path)!r} has format version {header['version']}, this zest_fast reads up to {VERSION}: "
            "upgrade zest_fast"
        )


def _write_json(profile: LayerProfile, path: Path) -> None:
    layers = [
        {
            "name": name,
            "values": {metric: _strict(value) for metric, value in profile[name].items()},
            "info": profile.info[name],
        }
        for name in profile
    ]
    path.write_text(_dumps({**_header(profile), "layers": layers}, indent=1) + "\n", encoding="utf-8")


def _read_json(path: Path) -> LayerProfile:
    document = json.loads(path.read_text(encoding="utf-8"))
    _check(document, path)
    names = [layer["name"] for layer in document["layers"]]
    rows = [[float(layer["values"][metric]) for metric in document["metrics"]] for layer in document["layers"]]
    values = np.array(rows, dtype=np.float64).reshape(len(names), len(document["metrics"]))
    return _profile(document, names, values, {layer["name"]: layer["info"] for layer in document["layers"]})


def _write_parquet(profile: LayerProfile, path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    header = _dumps({**_header(profile), "info": profile.info})
    columns = [pyarrow.array(profile.names, pyarrow.string()), *(pyarrow.array(column) for column in profile.values.T)]
    fields = [("layer", pyarrow.string()), *((metric, pyarrow.float64()) for metric in profile.metrics)]
    table = pyarrow.Table.from_arrays(columns, schema=pyarrow.schema(fields, metadata={METADATA_KEY: header.encode()}))
    pyarrow.parquet.write_table(table, path)


def _read_parquet(path: Path) -> LayerProfile:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, OSError) as error:  # pyarrow calls a torn data page an OSError
        raise ValueError(str(error)) from error
    header = json.loads((table.schema.metadata or {})[METADATA_KEY])
    _check(header, path)
    metrics = header["metrics"]
    columns = [table.column(metric).to_numpy() for metric in metrics]
    values = np.column_stack(columns) if columns else np.empty((table.num_rows, 0))
    return _profile(header, table.column("layer").to_pylist(), values, header["info"])


def _profile(header: dict[str, Any], names: list[str], values: np.ndarray, info: dict[str, Any]) -> LayerProfile:
    return LayerProfile(
        names,
        header["metrics"],
        values,
        info=info,
        loss=float(header["loss"]),
        backend=header["backend"],
        uncovered=header["uncovered"],
    )


def _strict(value: float) -> float | str:
    if math.isfinite(value):
        return value  # json writes the shortest digits that read back to the same float64
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _dumps(document: dict[str, Any], indent: int | None = None) -> str:
    try:
        return json.dumps(document, allow_nan=False, indent=indent, default=_plain)
    except (TypeError, ValueError) as error:
        raise ValueError(f"info and uncovered must hold what strict JSON can: {error}") from error


def _plain(value: Any) -> Any:
    """NumPy scalars and arrays in `info` as plain numbers and lists."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} {value!r} is neither a number, a string, a list nor a dictionary")
