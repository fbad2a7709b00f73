"""Records as a table, as one Parquet file, and the ones that ship with the library. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zest_fast.foundation.documents import Json, Keys, ListOf, MapOf, Number, Text, parse_json, text_of
from zest_fast.foundation.parquet_files import parquet_schema, read_parquet
from zest_fast.foundation.replacing import replacing
from zest_fast.ranking.features import METRICS as _METRICS
from zest_fast.ranking.probed import PROBED
from zest_fast.sweeping.records import VERSIONS, Record, read_records

if TYPE_CHECKING:
    import pandas
    import pyarrow

SHIPPED = Path(__file__).parent / "data" / "records.parquet"
LEADING = (
    "model",
    "dataset",
    "family",
    "seed",
    "layer",
    "accuracy",
    "loss",
    "head_accuracy",
    "head_loss",
    "head_state",
)
_METADATA = b"zest_fast.records"

_IDENTITY = ("model", "dataset", "family", "seed", "layer", "head_state")
_COLUMNS = {
    **dict.fromkeys(("model", "dataset", "family", "layer", "head_state", "kind"), "strings"),
    **dict.fromkeys(("accuracy", "loss", "head_accuracy", "head_loss"), "numbers"),
    **dict.fromkeys((*_METRICS, PROBED), "numbers or nothing"),
    **dict.fromkeys(("seed", "numel", "depth"), "integers"),
    "shape": "lists of integers",
    "head": "flags",
}
_BOUNDS = {
    **dict.fromkeys(("accuracy", "head_accuracy"), (0, 1)),
    **dict.fromkeys(("numel", "depth"), (0, 2**53)),
    "seed": (-(2**63), 2**63 - 1),
}
_SWEEP = {"model": Text(), "dataset": Text(), "recipe_hash": Text()}
_SWEEPS = ListOf(
    Keys(_SWEEP, {"family": Text(), "versions": VERSIONS, "recipe": MapOf(Json()), "environment": Json()}, True),
    most=100_000,
)
_HEADER = Keys(
    {
        **_SWEEP,
        "family": Text(),
        "layers": ListOf(Text()),
        "recipe": Keys({"seeds": ListOf(Number(integer=True))}, others=True),
    },
    others=True,
)


def load_records(path: str | os.PathLike[str] | None = None) -> pandas.DataFrame:
    """What layers turned out to be worth: a row for each model, data set, seed, layer and state of the profiled head.

    Args:
        path: a Parquet file that `consolidate` wrote; None = the records that ship with the library.

    Returns:
        A DataFrame, as `sweep` returns it, of several sweeps.

    Raises:
        ValueError: a file that cannot be read; it is named.
        FileNotFoundError: there is none.

    Examples:
        >>> import zest_fast
        >>> records = zest_fast.load_records()
        >>> {"model", "dataset", "seed", "layer", "loss", "snip"} <= set(records.columns)
        True
    """
    path = Path(path) if path is not None else SHIPPED
    sweeps_of(path)  # says what is wrong with a foreign file
    table = read_parquet(path)
    try:
        _check_columns(table)
        return table.to_pandas(ignore_metadata=True)  # a range of rows; what pandas wrote beside it is not needed
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{str(path)!r} holds no records that can be read: {error}; consolidate again") from error


def sweeps_of(path: str | os.PathLike[str] | None = None) -> list[dict[str, Any]]:
    """What the file says of each sweep: model, dataset, recipe, versions, command, seconds, ...

    Args:
        path: as for `load_records`.

    Returns:
        A mapping for each sweep.

    Raises:
        ValueError: a file that holds no records.
        FileNotFoundError: there is none.

    Examples:
        >>> import zest_fast
        >>> len(zest_fast.sweeps_of()) == len(zest_fast.load_records()[["model", "dataset"]].drop_duplicates())
        True
    """
    path = Path(path) if path is not None else SHIPPED
    if not path.exists():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    metadata = parquet_schema(path).metadata or {}
    if _METADATA not in metadata:
        raise ValueError(f"{str(path)!r} holds no contribution records; name a file that `consolidate` wrote")
    try:
        sweeps = parse_json(text_of(metadata[_METADATA]))
        _SWEEPS.check(sweeps, "sweeps")
    except ValueError as error:
        raise ValueError(f"{str(path)!r} does not say which sweeps it holds: {error}; consolidate again") from error
    return sweeps


def _check_columns(table: pyarrow.Table) -> None:
    """Raises ValueError for a column that lacks, has another type, or holds what it cannot."""
    from pyarrow import compute, types

    is_kind = {
        "strings": lambda kind: types.is_string(kind) or types.is_large_string(kind),
        "numbers": lambda kind: types.is_floating(kind) or types.is_integer(kind),
        "numbers or nothing": lambda kind: types.is_floating(kind) or types.is_integer(kind) or types.is_null(kind),
        "integers": types.is_integer,
        "flags": types.is_boolean,
        "lists of integers": lambda kind: (
            (types.is_list(kind) or types.is_large_list(kind)) and types.is_integer(kind.value_type)
        ),
    }
    for name in LEADING:
        if name not in table.schema.names:
            raise ValueError(f"column {name!r}: it is not there")
    for name in table.schema.names:
        if table.schema.names.count(name) > 1:
            raise ValueError(f"column {name!r} occurs more than once")
        expected = _COLUMNS.get(name)
        column = table.column(name)
        if expected is None:
            continue
        if not is_kind[expected](column.type):
            raise ValueError(f"column {name!r}: expected {expected}, found {column.type}")
        if column.null_count and name in (*_IDENTITY, "head", "kind", "depth", "numel", "shape"):
            raise ValueError(f"column {name!r}: {column.null_count} entries are missing")
        if name in _BOUNDS and len(table):
            low, high = _BOUNDS[name]
            found = compute.min_max(column).as_py()
            if found["min"] is not None and not (low <= found["min"] and found["max"] <= high):
                raise ValueError(
                    f"column {name!r}: expected {low:g} to {high:g}, found {found['min']:g} to {found['max']:g}"
                )


def consolidate(paths: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Write the records of finished sweeps into one Parquet file, beside those that it holds already.

    Unfinished sweeps, which lack the late layers, are left out; a pair of model and data set that is there already is
    replaced.

    Args:
        paths: record files of `sweep`.
        out: the file to write or to add to; it is replaced at once or kept.

    Returns:
        The path of `out`.

    Raises:
        ValueError: no sweep is finished, a model was swept under two recipes, the metrics are of two versions, or two
            files hold the same pair.

    Examples:
        >>> import torch, zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> splits = {name: (torch.randn(24, 4), torch.arange(24) % 3) for name in ("head", "train", "score")}
        >>> recipe = zest_fast.Recipe(steps=2, batch_size=4, seeds=(0,), profile_samples=8)
        >>> _ = zest_fast.sweep(model, splits, recipe=recipe, out="sweep.jsonl", progress=False)
        >>> records = zest_fast.consolidate(["sweep.jsonl"], "records.parquet")
        >>> zest_fast.load_records(records)["layer"].unique().tolist()
        ['0']
    """
    import pandas
    import pyarrow
    from pyarrow import parquet

    from zest_fast.ranking.learning.contributions import check_sweeps  # with pandas

    sources: dict[tuple[str, str], str] = {}
    frames, sweeps = [], []
    for path in sorted(map(str, paths)):
        header, records = read_records(path)
        try:
            _HEADER.check(header, "")
        except ValueError as error:
            raise ValueError(f"{path!r} does not say what was swept: {error}; sweep again") from error
        if not _finished(header, records):
            continue
        pair = _pair(header)
        if pair in sources:
            raise ValueError(f"{path!r} and {sources[pair]!r} both hold records of {pair[0]} on {pair[1]}")
        sources[pair] = path
        frames.append(records_to_frame(header, records))
        sweeps.append(_summary(header, records))
    if not frames:
        raise ValueError("there is no finished sweep to consolidate")
    if Path(out).exists():
        kept = [sweep for sweep in sweeps_of(out) if _pair(sweep) not in sources]
        frame = load_records(out)
        frames = [*(frame[(frame.model == m) & (frame.dataset == d)] for m, d in map(_pair, kept)), *frames]
        sweeps = [*kept, *sweeps]
    check_sweeps(sweeps)
    try:
        table = pyarrow.Table.from_pandas(pandas.concat(frames, ignore_index=True), preserve_index=False)
    except (pyarrow.ArrowException, OverflowError) as error:
        raise ValueError(f"the records hold a column of several types ({error}); sweep again") from error
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _METADATA: json.dumps(sweeps).encode()})
    with replacing(out) as temporary:
        parquet.write_table(table, temporary, compression="zstd")
    return Path(out)


def _pair(sweep: Mapping[str, Any]) -> tuple[str, str]:
    return sweep["model"], sweep["dataset"]


def records_to_frame(header: Mapping[str, Any], records: Iterable[Record]) -> pandas.DataFrame:
    """The columns of `load_records()`, for every layer that was scored and profiled."""
    import pandas

    heads = {r["seed"]: r for r in records if r["record"] == "head"}
    profiles = {(r["seed"], r["head_state"]): r["layers"] for r in records if r["record"] == "profile"}
    scores = {(r["seed"], r["layer"]): r for r in records if r["record"] == "layer"}
    rows = []
    for seed in header["recipe"]["seeds"]:
        for layer in header["layers"]:
            for state in ("warm", "fresh"):
                score, row = scores.get((seed, layer)), profiles.get((seed, state), {}).get(layer)
                if score is None or row is None:
                    continue
                if seed not in heads:
                    raise ValueError(f"layer {layer!r} was scored under seed {seed}, of which no head is recorded")
                head = heads[seed]
                leading = (
                    header["model"], header["dataset"], header["family"], seed, layer,
                    score["accuracy"], score["loss"], head["accuracy"], head["loss"], state,
                )  # fmt: skip
                rows.append(
                    dict(zip(LEADING, leading, strict=True)) | {k: v for k, v in row.items() if k not in LEADING}
                )
    return pandas.DataFrame(rows, columns=None if rows else list(LEADING))


def _finished(header: Mapping[str, Any], records: list[Record]) -> bool:
    seeds = header["recipe"]["seeds"]
    reached = {layer for r in records if r["record"] == "profile" for layer in r["layers"]}
    done = {(r["seed"], r["layer"]) for r in records if r["record"] == "layer"}
    return bool(reached) and all((seed, layer) in done for seed in seeds for layer in reached)


def _summary(header: Mapping[str, Any], records: list[Record]) -> dict[str, Any]:
    strength = next((r["value"] for r in records if r["record"] == "strength"), None)
    backends = sorted({r["backend"] for r in records if r["record"] == "profile"})
    seconds = sum(r.get("seconds", 0.0) for r in records)
    kept = {name: value for name, value in header.items() if name not in ("record", "layers")}
    return {**kept, "head_strength": strength, "backends": backends, "seconds": round(seconds, 1)}
