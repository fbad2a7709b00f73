"""LayerProfile on disk: JSON for people and other languages, Parquet for data frames. No pickle.

Both hold the same header (format, version, loss, backend, uncovered, info); JSON carries the values by layer, Parquet
in float64 columns with the header as schema metadata. JSON has no NaN and no infinity: there they are the strings
"NaN", "Infinity" and "-Infinity", which `float` reads back. Version 2 is of means over several batches: how many these
were, and for each value its standard deviation and count. A profile of one batch stays version 1.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from zest_fast.foundation.documents import (
    MOST_BYTES,
    Flag,
    Keys,
    ListOf,
    MapOf,
    Null,
    Number,
    OneOf,
    Specification,
    Text,
    check_regular,
    parse_json,
    shown,
    text_of,
    whole_file,
)
from zest_fast.foundation.parquet_files import read_parquet
from zest_fast.foundation.replacing import replacing
from zest_fast.profiling.layer_profile import LayerProfile, Spread

FORMAT = "zest_fast.LayerProfile"
VERSION = 2
_OF_ONE_BATCH = 1
METADATA_KEY = b"zest_fast"

_MOST_LAYERS, _MOST_METRICS, _LARGEST = 1_000_000, 1_000, 2**53
VALUE = OneOf((Text(among=("NaN", "Infinity", "-Infinity")), Number(finite=False)))
"""A float as `strict_number` writes it."""
INFO = Keys(
    {},
    {
        "numel": Null(Number(0, _LARGEST)),
        "kind": Null(Text()),
        "depth": Number(-_LARGEST, _LARGEST),
        "uses": Null(Number(0, _LARGEST)),
        "nonfinite": Null(Number(0, _LARGEST)),
        "shape": Null(ListOf(Number(0, _LARGEST), most=64)),
        "head": Null(Flag()),
    },
    others=True,
)
"""What a row's `info` may hold."""
_HEADER: dict[str, Specification] = {
    "format": Text(),
    "version": Number(1, VERSION, integer=True),
    "loss": VALUE,
    "backend": Text(),
    "uncovered": MapOf(Text(), most=_MOST_LAYERS),
    "metrics": ListOf(Text(), most=_MOST_METRICS, unique=True),
}
_COUNT = Number(0, _LARGEST, integer=True)
_LAYER = Keys(
    {"name": Text(), "values": MapOf(VALUE, most=_MOST_METRICS), "info": INFO},
    {"deviations": MapOf(VALUE, most=_MOST_METRICS), "counts": MapOf(_COUNT, most=_MOST_METRICS)},
)
_BATCHES: dict[str, Specification] = {"batches": Number(1, _LARGEST, integer=True)}
_JSON = Keys({**_HEADER, "layers": ListOf(_LAYER, most=_MOST_LAYERS)}, _BATCHES, others=True)
_PARQUET = Keys({**_HEADER, "info": MapOf(INFO, most=_MOST_LAYERS)}, _BATCHES, others=True)
_DEVIATION, _COUNTS = "{}_deviation", "{}_batches"  # columns of Parquet, as of `to_pandas(spread=True)`


def save_profile(profile: LayerProfile, path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    write = {".json": _write_json, ".parquet": _write_parquet}[_suffix(path)]
    with replacing(path) as temporary:
        write(profile, temporary)
    return path


def load_profile(path: str | os.PathLike[str]) -> LayerProfile:
    path = Path(path)
    read = {".json": _read_json, ".parquet": _read_parquet}[_suffix(path)]
    check_regular(path, MOST_BYTES)
    try:
        return read(path)
    except NewerVersionError:
        raise
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} is no profile that can be read ({error}): torn, or written by something else; profile "
            "again, or name a file that LayerProfile.save wrote"
        ) from error


class NewerVersionError(ValueError):
    """The file was written by a later zest_fast."""


def refuse_newer(path: Path, version: int, known: int) -> None:
    if version > known:
        raise NewerVersionError(
            f"{str(path)!r} has format version {version}, this zest_fast reads up to {known}: upgrade zest_fast"
        )


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in (".json", ".parquet"):
        raise ValueError(f"{str(path)!r} ends in {path.suffix!r}; a profile is a .json or a .parquet file")
    return suffix


def _header(profile: LayerProfile) -> dict[str, Any]:
    spread = profile.spread
    return {
        "format": FORMAT,
        **({"version": _OF_ONE_BATCH} if spread is None else {"version": VERSION, "batches": spread.batches}),
        "loss": strict_number(profile.loss),
        "backend": profile.backend,
        "uncovered": profile.uncovered,
        "metrics": profile.metrics,
    }


def _check(header: Any, path: Path, specification: Specification) -> None:
    Keys({"format": Text(), "version": Number(1, 10**6, integer=True)}, others=True).check(header, "")
    if header["format"] != FORMAT:
        raise ValueError(f"its format is {shown(header['format'])}, not {FORMAT!r}")
    refuse_newer(path, header["version"], VERSION)
    specification.check(header, "")
    if (header["version"] == _OF_ONE_BATCH) == ("batches" in header):
        raise ValueError(f"batches: with format version {header['version']} they do not go together")


def _write_json(profile: LayerProfile, path: Path) -> None:
    layers = [
        {
            "name": name,
            "values": {metric: strict_number(value) for metric, value in profile[name].items()},
            "info": profile.info[name],
            **_spread_of(profile, row),
        }
        for row, name in enumerate(profile)
    ]
    path.write_text(_dumps({**_header(profile), "layers": layers}, indent=1) + "\n", encoding="utf-8")


def _spread_of(profile: LayerProfile, row: int) -> dict[str, Any]:
    """What a layer of JSON holds beside the values."""
    if profile.spread is None:
        return {}
    deviations, counts = profile.spread.deviations[row].tolist(), profile.spread.counts[row].tolist()
    return {
        "deviations": dict(zip(profile.metrics, map(strict_number, deviations), strict=True)),
        "counts": dict(zip(profile.metrics, counts, strict=True)),
    }


def _read_json(path: Path) -> LayerProfile:
    document = parse_json(text_of(whole_file(path)))
    _check(document, path, _JSON)
    metrics, layers = document["metrics"], document["layers"]
    tables = ("values", "deviations", "counts") if "batches" in document else ("values",)
    for place, layer in enumerate(layers):
        for table in tables:
            if odd := sorted(set(layer.get(table, {})) ^ set(metrics)):
                where = f"layers[{place}].{table}"
                raise ValueError(f"{where}: expected one of each metric and no other; differing: {odd[:3]}")
    names = [layer["name"] for layer in layers]

    def table_of(table: str) -> np.ndarray:
        rows = [[float(layer[table][metric]) for metric in metrics] for layer in layers]
        return np.array(rows, dtype=np.float64).reshape(len(names), len(metrics))

    values, *spread = (table_of(table) for table in tables)
    return _profile(document, names, values, {layer["name"]: layer["info"] for layer in layers}, spread)


def _write_parquet(profile: LayerProfile, path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    header = _dumps({**_header(profile), "info": profile.info})
    columns = [pyarrow.array(profile.names, pyarrow.string()), *(pyarrow.array(column) for column in profile.values.T)]
    fields = [("layer", pyarrow.string()), *((metric, pyarrow.float64()) for metric in profile.metrics)]
    if profile.spread is not None:
        columns += map(pyarrow.array, profile.spread.deviations.T)
        columns += map(pyarrow.array, profile.spread.counts.T)
        fields += [(_DEVIATION.format(metric), pyarrow.float64()) for metric in profile.metrics]
        fields += [(_COUNTS.format(metric), pyarrow.int64()) for metric in profile.metrics]
    table = pyarrow.Table.from_arrays(columns, schema=pyarrow.schema(fields, metadata={METADATA_KEY: header.encode()}))
    pyarrow.parquet.write_table(table, path)


def _read_parquet(path: Path) -> LayerProfile:
    from pyarrow import types

    table = read_parquet(path)
    metadata = table.schema.metadata or {}
    if METADATA_KEY not in metadata:
        raise ValueError("it holds a table, but no profile")
    header = parse_json(text_of(metadata[METADATA_KEY]))
    _check(header, path, _PARQUET)
    metrics = header["metrics"]
    groups = [metrics]
    if "batches" in header:
        groups += [[form.format(metric) for metric in metrics] for form in (_DEVIATION, _COUNTS)]
    counts = set(groups[-1]) if len(groups) > 1 else set()
    for name in ("layer", *(name for group in groups for name in group)):
        if table.schema.names.count(name) != 1:
            raise ValueError(f"expected one column {name!r}, found {table.schema.names.count(name)}")
        kind = table.schema.field(name).type
        expected, fits = "floats", types.is_floating(kind)
        if name == "layer":
            expected, fits = "strings", types.is_string(kind) or types.is_large_string(kind)
        elif name in counts:
            expected, fits = "integers", types.is_integer(kind)
        if not fits:
            raise ValueError(f"column {name!r}: expected {expected}, found {kind}")
        if table.column(name).null_count:
            raise ValueError(f"column {name!r}: {table.column(name).null_count} entries are missing")
    values, *spread = (
        np.column_stack([table.column(name).to_numpy() for name in group]) if group else np.empty((table.num_rows, 0))
        for group in groups
    )
    return _profile(header, table.column("layer").to_pylist(), values, header["info"], spread)


def _profile(
    header: dict[str, Any], names: list[str], values: np.ndarray, info: dict[str, Any], spread: list[np.ndarray]
) -> LayerProfile:
    """spread: deviations and counts, where the file has them."""
    found = None
    if spread:
        deviations, counts = spread
        found = Spread(header["batches"], deviations, counts.astype(np.int64))
        if ((counts < 0) | (counts > header["batches"])).any():
            raise ValueError(f"counts: expected 0 to {header['batches']}, the number of batches")
    return LayerProfile(
        names,
        header["metrics"],
        values,
        info=info,
        loss=float(header["loss"]),
        backend=header["backend"],
        uncovered=header["uncovered"],
        spread=found,
    )


def strict_number(value: float) -> float | str:
    """As strict JSON holds it; `float` reads it back."""
    if math.isfinite(value):
        return value  # json writes the shortest digits that read back to the same float64
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _dumps(document: dict[str, Any], indent: int | None = None) -> str:
    try:
        return json.dumps(document, allow_nan=False, indent=indent, default=plain_value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"info and uncovered must hold what strict JSON can: {error}") from error


def plain_value(value: Any) -> Any:
    """NumPy scalars and arrays in `info` as plain numbers and lists."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} {value!r} is neither a number, a string, a list nor a dictionary")
