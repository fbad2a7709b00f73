"""Files of records: JSONL, CSV and Parquet, read into columns, with errors that name the file and the line."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zest_fast.foundation.documents import check_regular, parse_json, shown, text_of, whole_file
from zest_fast.foundation.nearest import nearest
from zest_fast.foundation.parquet_files import MOST_VALUES, read_parquet

_MOST_BYTES, _MOST_COLUMNS = 2**30, 10_000


@dataclass(frozen=True)
class Table:
    path: Path
    columns: dict[str, list[Any]]  #: name -> one value per row
    places: Sequence[str]  #: where each row stands in the file, for errors: "line 7"
    validation: Table | None = None  #: the part that scores; None = to be split off

    def column(self, name: str) -> list[Any]:
        """The values of a column; ValueError where there is no such column or a row has no value for it."""
        if name not in self.columns:
            raise ValueError(f"{self.path} has no column {name!r}; {nearest(name, self.columns)}")
        for place, value in zip(self.places, self.columns[name], strict=True):
            if value is None or value == "" or value != value:
                raise ValueError(f"{self.path}, {place}: column {name!r} is empty")
        return self.columns[name]


def read_table(path: Path) -> Table:
    """Reads a .jsonl, .ndjson, .csv, .tsv or .parquet file.

    ValueError for other endings, torn files, devices and pipes, and for what is too large to be held as a table.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: the ending {path.suffix!r} is unknown; {nearest(path.suffix, _READERS)}")
    check_regular(path)
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
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
        rows.append(row)
        places.append(f"line {number}")
    names = dict.fromkeys(name for row in rows for name in row)
    check_size(path, len(names), len(rows))
    return Table(path, {name: [row.get(name) for row in rows] for name in names}, places)


def _read_csv(path: Path) -> Table:
    reader = csv.reader(
        io.StringIO(_text(path), newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True
    )
    rows, places, start = [], [], 1
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ValueError(f"{path}, line 1: two columns have the same name: {_columns(header)}")
        check_size(path, len(header), 0)
        start = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):
                raise ValueError(
                    f"{path}, line {start}: {len(row)} fields where the header has {len(header)}: {_columns(header)}"
                )
            if row:
                rows.append(row)
                places.append(f"line {start}")
            start = reader.line_num + 1  # a quoted field may hold line breaks
    except csv.Error as error:
        raise ValueError(f"{path}, line {start}: torn row ({error})") from error
    check_size(path, len(header), len(rows))
    return Table(
        path, {name: list(values) for name, values in zip(header, zip(*rows, strict=True), strict=False)}, places
    )


def _read_parquet(path: Path) -> Table:
    table = read_parquet(path)
    try:
        columns = table.to_pydict()
    except (ValueError, ArithmeticError, LookupError) as error:  # text that is no UTF-8, times before the year 1
        raise ValueError(f"{path} holds values that Python cannot ({shown(str(error), 200)})") from error
    return Table(path, columns, [f"row {number}" for number in range(1, table.num_rows + 1)])


def check_size(path: Path, columns: int, rows: int) -> None:
    """Raises ValueError for more than is held as a table."""
    if columns > _MOST_COLUMNS or columns * rows > MOST_VALUES:
        raise ValueError(
            f"{path} has {rows:,} rows of {columns:,} columns; at most {_MOST_COLUMNS:,} columns and {MOST_VALUES:,} "
            "values are read: split it, or keep the columns that are needed"
        )


def _columns(header: Sequence[str]) -> str:
    return shown(", ".join(header), 500)


def _text(path: Path) -> str:
    try:
        return text_of(whole_file(path, _MOST_BYTES), "utf-8-sig")  # spreadsheets put a byte order mark in front
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from error


_READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
ENDINGS = tuple(_READERS)
