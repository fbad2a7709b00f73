"""Records as a table, as one Parquet file, and the ones that ship with the library. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zest_fast.profiling.replacing import replacing
from zest_fast.sweeping.records import Record, read_records

if TYPE_CHECKING:
    import pandas

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


def load_records(path: str | os.PathLike[str] | None = None) -> pandas.DataFrame:
    """What layers turned out to be worth: a row for each model, data set, seed, layer and state of the profiled head.

    path: a Parquet file that `consolidate` wrote; None = the records that ship with the library.
    Raises ValueError, naming the file, where it cannot be read.
    """
    import pandas

    path = Path(path) if path is not None else SHIPPED
    sweeps_of(path)  # says what is wrong with a foreign file
    return pandas.read_parquet(path)


def sweeps_of(path: str | os.PathLike[str] | None = None) -> list[dict[str, Any]]:
    """What the file says of each sweep: model, dataset, recipe, versions, command, seconds, ..."""
    import pyarrow
    from pyarrow import parquet

    path = Path(path) if path is not None else SHIPPED
    if not path.exists():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    try:
        metadata = parquet.read_schema(path).metadata or {}
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{str(path)!r} is no Parquet file, or a damaged one: {error}") from error
    if _METADATA not in metadata:
        raise ValueError(f"{str(path)!r} holds no contribution records; name a file that `consolidate` wrote")
    return json.loads(metadata[_METADATA])


def consolidate(paths: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Write the records of finished sweeps into one Parquet file, beside those that it holds already.

    Unfinished sweeps, which lack the late layers, are left out; a pair of model and data set that is there already is
    replaced. Raises ValueError where a model was swept under two recipes, the metrics are of two versions, or two files
    hold the same pair.
    """
    import pandas
    import pyarrow
    from pyarrow import parquet

    sources: dict[tuple[str, str], str] = {}
    frames, sweeps = [], []
    for path in sorted(map(str, paths)):
        header, records = read_records(path)
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
    _check_one_recipe_a_model(sweeps)
    _check_one_meaning(sweeps)
    table = pyarrow.Table.from_pandas(pandas.concat(frames, ignore_index=True), preserve_index=False)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _METADATA: json.dumps(sweeps).encode()})
    with replacing(out) as temporary:
        parquet.write_table(table, temporary, compression="zstd")
    return Path(out)


def _pair(sweep: Mapping[str, Any]) -> tuple[str, str]:
    return sweep["model"], sweep["dataset"]


def _check_one_recipe_a_model(sweeps: list[dict[str, Any]]) -> None:
    first: dict[str, dict[str, Any]] = {}
    for sweep in sweeps:
        other = first.setdefault(sweep["model"], sweep)
        if other["recipe_hash"] != sweep["recipe_hash"]:
            raise ValueError(
                f"{sweep['model']} was swept under different recipes on {other['dataset']} and {sweep['dataset']}; "
                "their records are not mixed"
            )


def _check_one_meaning(sweeps: list[dict[str, Any]]) -> None:
    first = sweeps[0]
    for sweep in sweeps:
        if sweep["versions"]["definitions"] != first["versions"]["definitions"]:
            raise ValueError(
                f"the metrics of {sweep['model']} on {sweep['dataset']} are of definitions "
                f"{sweep['versions']['definitions']}, those of {first['model']} on {first['dataset']} of "
                f"{first['versions']['definitions']}; their records are not mixed"
            )


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
                head = heads[seed]
                leading = (
                    header["model"], header["dataset"], header["family"], seed, layer,
                    score["accuracy"], score["loss"], head["accuracy"], head["loss"], state,
                )  # fmt: skip
                rows.append(dict(zip(LEADING, leading, strict=True)) | row)
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
