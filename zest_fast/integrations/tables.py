"""Files of records: JSONL, CSV and Parquet, read into columns, with errors that name the file and the line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zest_fast.profiling.nearest import nearest


@dataclass(frozen=True)
class Table:
    path: Path
    columns: dict[str, list[Any]]  #: name -> one value per row
    places: Sequence[str]  #: where each row stands in the file, for errors: "line 7"

    def column(self, name: str) -> list[Any]:
        """The values of a column; ValueError where there is no such column or a row has no value for it."""
        if name not in self.columns:
            raise ValueError(f"{self.path} has no column {name!r}; {nearest(name, self.columns)}")
        for place, value in zip(self.places, self.columns[name], strict=True):
            if value is None or value == "" or value != value:
                raise ValueError(f"{self.path}, {place}: column {name!r} is empty")
        return self.columns[name]


def read_table(path: Path) -> Table:
    """Reads a .jsonl, .ndjson, .csv, .tsv or .parquet file; ValueError for other endings and for torn files."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: the ending {path.suffix!r} is unknown; {nearest(path.suffix, _READERS)}")
    table = reader(path)
    if not table.places:
        raise ValueError(f"{path} has no rows")
    return table


def _read_jsonl(path: Path) -> Table:
    rows, places = [], []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: torn JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
        rows.append(row)
        places.append(f"line {number}")
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(path, {name: [row.get(name) for row in rows] for name in names}, places)


def _read_csv(path: Path) -> Table:
    reader = csv.reader(
        io.StringIO(_text(path), newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True
    )
    rows, places, start = [], [], 1
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ValueError(f"{path}, line 1: two columns have the same name: {header}")
        start = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):
                raise ValueError(
                    f"{path}, line {start}: {len(row)} fields where the header has {len(header)}: {header}"
                )
            if row:
                rows.append(row)
                places.append(f"line {start}")
            start = reader.line_num + 1  # a quoted field may hold line breaks
    except csv.Error as error:
        raise ValueError(f"{path}, line {start}: torn row ({error})") from error
    return Table(
        path, {name: list(values) for name, values in zip(header, zip(*rows, strict=True), strict=False)}, places
    )


def _read_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_table(path).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no whole Parquet file ({error})") from error
    rows = len(next(iter(columns.values()), ()))
    return Table(path, columns, [f"row {number}" for number in range(1, rows + 1)])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets put a byte order mark in front
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from error


_READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
