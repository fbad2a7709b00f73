"""The sink that leaves a Parquet file, and what reads it. pyarrow is imported by the functions. No torch.

Parquet has its index at the end, so that a file that is still written to cannot be read, and one whose writer was
killed holds nothing. Steps therefore go to a journal of lines beside it, at once, and the Parquet file is written
whole, or not at all, when the sink is closed.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zest_fast.foundation.documents import Keys, Number, parse_json
from zest_fast.foundation.parquet_files import read_parquet
from zest_fast.foundation.replacing import replacing
from zest_fast.profiling.profile_files import NewerVersionError
from zest_fast.watching.logs.jsonl_log import JsonlLog
from zest_fast.watching.logs.lines import (
    FORMAT,
    VERSION,
    Document,
    Layout,
    LoggedStep,
    Segment,
    header_line,
    header_of,
    logged_step,
)
from zest_fast.watching.logs.reader import LogReader
from zest_fast.watching.watched_step import WatchedStep

if TYPE_CHECKING:
    import pyarrow

_METADATA = FORMAT.encode()
_STEP_COLUMNS = ("segment", "step", "seconds", "loss", "overflow", "layer")
_DOCUMENTS = ("header", "document")
"""Of the first row of a segment and of a step: what has no column of its own, as JSON."""
_MOST_VALUES = 10**8
_AT_ONCE = 64  # steps of a group of rows


class ParquetLog:
    """Appends each step that it is called with to `path`, a Parquet file, by way of a journal beside it.

    Until `close` the steps are in the journal, `path` + ".jsonl", which is what `JsonlLog` writes: a killed process
    loses nothing, but leaves `path` without the steps of its run. `load_watch(path)` reads both; the next sink of the
    same path goes on in the journal, and its `close` brings all of it to Parquet. `close` reads the whole log and
    writes it anew; where that fails (a full disk), the journal stays, and nothing is lost.

    Raises as JsonlLog.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        before = read_parquet_log(self.path) if self.path.exists() else []
        self._journal = JsonlLog(journal_of(self.path), known=[segment.layout for segment in before])

    def check(self, layout: Layout) -> None:
        """Raises ValueError where this is the log of another model, as the first step would."""
        self._journal.check(layout)

    def __call__(self, step: WatchedStep) -> None:
        self._journal(step)

    def close(self) -> None:
        """Write the Parquet file, and remove the journal. A step that comes later begins a new one."""
        journal = journal_of(self.path)
        if journal.exists():
            before, after = _both(self.path, None)
            if size := _too_large(before + after):
                warnings.warn(
                    f"{str(self.path)!r} would hold {size:,} values, and at most {_MOST_VALUES:,} could be read back: "
                    f"what was logged stays in {str(journal)!r}, and load_watch({str(self.path)!r}) reads both",
                    stacklevel=2,
                )
            else:
                if after:
                    _write(self.path, before + after)
                journal.unlink()
        self._journal.close()  # only now: its lock is that of both files


def journal_of(path: Path) -> Path:
    return path.with_name(path.name + ".jsonl")


def segments_of_parquet(path: Path, journal: LogReader | None = None) -> list[Segment]:
    """Those of the file and of its journal, one of which has to be there. Raises as read_parquet and LogReader.

    journal: that has been polled; None reads it here.
    """
    before, after = _both(path, journal)
    return before + after


def _both(path: Path, journal: LogReader | None) -> tuple[list[Segment], list[Segment]]:
    there = read_parquet_log(path) if path.exists() or not journal_of(path).exists() else []
    if journal is None and journal_of(path).exists():
        journal = LogReader(journal_of(path))
        journal.poll()
    known = {segment.segment for segment in there}  # a process that was killed within `close` leaves both
    new = [one for one in (journal.segments if journal else []) if one.segment not in known and one.steps]
    return there, new


def read_parquet_log(path: Path) -> list[Segment]:
    """Raises FileNotFoundError, and ValueError that names the file for all else that is wrong with it."""
    table = read_parquet(path, most_values=_MOST_VALUES)
    try:
        return _segments(table)
    except NewerVersionError as error:
        raise NewerVersionError(f"{str(path)!r}: {error}") from error
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{str(path)!r} is no log of a watched run that can be read: {error}") from error


def _too_large(segments: Sequence[Segment]) -> int:
    """How many values a file of these would hold, where it could not be read back; else 0."""
    columns = len(_STEP_COLUMNS) + len(_DOCUMENTS) + len(_metrics(segments))
    size = columns * sum(max(1, len(segment.layout.names)) * len(segment.steps) for segment in segments)
    return size if size > _MOST_VALUES else 0


def _metrics(segments: Sequence[Segment]) -> list[str]:
    return list(dict.fromkeys(metric for segment in segments for metric in segment.layout.metrics))


def _write(path: Path, segments: Sequence[Segment]) -> None:
    import pyarrow
    from pyarrow import parquet

    metrics = _metrics(segments)
    for metric in metrics:
        if metric in (*_STEP_COLUMNS, *_DOCUMENTS):
            raise ValueError(f"{str(path)!r}: a metric is named {metric!r}, as another column is; log to .jsonl")
    kinds = (pyarrow.int64(), pyarrow.int64(), pyarrow.float64(), pyarrow.float64(), pyarrow.bool_(), pyarrow.string())
    fields = [
        *zip(_STEP_COLUMNS, kinds, strict=True),
        *((metric, pyarrow.float64()) for metric in metrics),
        *((name, pyarrow.string()) for name in _DOCUMENTS),
    ]
    schema = pyarrow.schema(fields, metadata={_METADATA: json.dumps({"version": VERSION}).encode()})
    with replacing(path) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for tables in _groups(segments, schema, metrics):
            writer.write_table(pyarrow.concat_tables(tables))


def _groups(segments: Sequence[Segment], schema: Any, metrics: Sequence[str]) -> Iterator[list[pyarrow.Table]]:
    for number, segment in enumerate(segments):
        for start in range(0, len(segment.steps), _AT_ONCE):
            steps = segment.steps[start : start + _AT_ONCE]
            yield [
                _rows(step, number, segment if start + place == 0 else None, schema, metrics)
                for place, step in enumerate(steps)
            ]


def _rows(step: LoggedStep, number: int, begun: Segment | None, schema: Any, metrics: Sequence[str]) -> pyarrow.Table:
    """A row for each layer; without layers one, so that the step is there."""
    import pyarrow

    names: list[str | None] = [*step.layout.names] or [None]
    rest = [None] * (len(names) - 1)
    of_the_step = [number, step.step, step.seconds, step.loss, step.overflow]
    columns: list[Any] = [[value] * len(names) for value in of_the_step]
    columns.append(names)
    for metric in metrics:
        if metric in step.layout.metrics and step.layout.names:
            columns.append(step.values[:, step.layout.metrics.index(metric)])
        else:
            columns.append([None] * len(names))
    header = None
    if begun is not None:
        line = header_line(
            begun.layout, run=begun.run, segment=begun.segment, began=begun.began, continues=begun.continues
        )
        header = line.decode()
    columns += [[header, *rest], [json.dumps(step.document, allow_nan=False), *rest]]
    arrays = [pyarrow.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
    return pyarrow.Table.from_arrays(arrays, schema=schema)


def _segments(table: pyarrow.Table) -> list[Segment]:
    metadata = table.schema.metadata or {}
    if _METADATA not in metadata:
        raise ValueError("it holds some other table")
    version = parse_json(metadata[_METADATA])
    Keys({"version": Number(1, 10**6, integer=True)}, others=True).check(version, "")
    if version["version"] > VERSION:
        raise NewerVersionError(
            f"its format has version {version['version']}, this zest_fast reads up to {VERSION}: upgrade zest_fast"
        )
    headers, documents, layers = (_strings(table, name) for name in (*_DOCUMENTS, "layer"))
    begins = [row for row, document in enumerate(documents) if document is not None]
    if table.num_rows and begins[:1] != [0]:
        raise ValueError("its first row begins no step")
    columns: dict[str, np.ndarray] = {}
    segments: list[Segment] = []
    for row, end in zip(begins, [*begins[1:], table.num_rows], strict=True):
        header, document = headers[row], documents[row]
        if header is not None:
            segments.append(header_of(header.encode()))
        layout = segments[-1].layout if segments else None
        if layout is None or layers[row:end] != (layout.names if layout.names else [None]):
            raise ValueError(f"row {row}: its layers are not those of its segment")
        values = np.empty((len(layout.names), len(layout.metrics)))
        for place, metric in enumerate(layout.metrics):
            if metric not in columns:
                columns[metric] = _floats(table, metric)
            values[:, place] = columns[metric][row : row + len(layout.names)]
        segments[-1].steps.append(logged_step(_document(document), layout, values))
    return segments


def _document(text: str | None) -> Document:
    document = parse_json(text or "")
    if not isinstance(document, dict):
        raise ValueError("the document of a step is none")
    return document


def _strings(table: pyarrow.Table, name: str) -> list[str | None]:
    from pyarrow import types

    kind = table.schema.field(name).type
    if not (types.is_string(kind) or types.is_large_string(kind)):
        raise ValueError(f"column {name!r}: expected strings, found {kind}")
    return list(table.column(name).to_pylist())


def _floats(table: pyarrow.Table, metric: str) -> np.ndarray:
    from pyarrow import types

    if not types.is_float64(table.schema.field(metric).type):
        raise ValueError(f"column {metric!r}: expected float64, found {table.schema.field(metric).type}")
    return np.asarray(table.column(metric).to_numpy())
