"""Parquet by way of a journal: the same steps, whole or in the journal, never lost."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pytest
from pyarrow import parquet
from watched_runs import LAYERS, METRICS, assert_same_step, make_step

from zest_fast import load_watch, sink_for
from zest_fast.watching.logs import parquet_log
from zest_fast.watching.logs.parquet_log import ParquetLog


def write(path: Path, steps) -> None:
    sink = sink_for(path)
    for step in steps:
        sink(step)
    sink.close()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_steps_come_back_to_the_bit(tmp_path: Path) -> None:
    values = np.resize([math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1, 1e308], (len(LAYERS), len(METRICS)))
    made = [
        make_step(0, full=True),
        make_step(10, values=values, loss=math.nan, notes=("layer 'x' explodes",), full=True),
        make_step(10, overflow=True, seconds=1.5),
        make_step(20, layers=LAYERS[3:]),
        make_step(30, layers=()),
        *(make_step(step) for step in range(40, 200)),  # several groups of rows
    ]
    write(tmp_path / "run.parquet", made)
    assert names_in(tmp_path) == ["run.parquet"]
    log = load_watch(tmp_path / "run.parquet")
    for found, step in zip(log.steps, made, strict=True):
        assert_same_step(found, step)


def test_others_read_a_row_for_each_step_and_layer(tmp_path: Path) -> None:
    made = [make_step(0), make_step(10)]
    write(tmp_path / "run.parquet", made)
    frame = pandas.read_parquet(tmp_path / "run.parquet")
    assert list(frame.columns[:6]) == ["segment", "step", "seconds", "loss", "overflow", "layer"]
    assert list(frame.layer) == [*LAYERS, *LAYERS] and list(frame.step) == [0] * 5 + [10] * 5
    np.testing.assert_array_equal(frame[list(METRICS)], np.vstack([step.profile.values for step in made]))


def test_until_it_is_closed_the_steps_are_in_the_journal(tmp_path: Path) -> None:
    sink = sink_for(tmp_path / "run.parquet")
    sink(make_step(0))
    assert names_in(tmp_path) == ["run.parquet.jsonl"]
    assert len(load_watch(tmp_path / "run.parquet")) == len(load_watch(tmp_path / "run.parquet.jsonl")) == 1
    sink.close()
    assert names_in(tmp_path) == ["run.parquet"]
    sink.close()  # nothing more to do
    sink(make_step(10))
    assert names_in(tmp_path) == ["run.parquet", "run.parquet.jsonl"]
    assert [step.step for step in load_watch(tmp_path / "run.parquet").steps] == [0, 10]
    sink.close()
    assert [step.step for step in load_watch(tmp_path / "run.parquet").steps] == [0, 10]


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run.parquet"
    write(path, [make_step(step, loss=1.0) for step in (0, 10, 20)])
    write(path, [make_step(20, loss=2.0)])
    log = load_watch(path)
    assert [(step.step, step.profile.loss) for step in log.steps] == [(0, 1.0), (10, 1.0), (20, 2.0)]
    assert [len(segment.steps) for segment in log.segments] == [3, 1]
    write(path, [])
    assert [segment.segment for segment in load_watch(path).segments] == [one.segment for one in log.segments]


def test_a_run_without_a_step_leaves_no_file(tmp_path: Path) -> None:
    sink_for(tmp_path / "run.parquet").close()
    assert names_in(tmp_path) == []


def test_a_process_killed_within_close_leaves_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "run.parquet"
    sink = sink_for(path)
    sink(make_step(0))
    sink(make_step(10))
    shutil.copy(tmp_path / "run.parquet.jsonl", tmp_path / "copy")
    sink.close()
    shutil.copy(tmp_path / "copy", tmp_path / "run.parquet.jsonl")  # written, and not removed any more
    assert len(load_watch(path)) == 2 and len(load_watch(path).segments) == 1
    write(path, [make_step(20)])
    assert names_in(tmp_path) == ["copy", "run.parquet"]
    assert [step.step for step in load_watch(path).steps] == [0, 10, 20] and len(load_watch(path).segments) == 2


def test_a_full_disk_at_the_end_keeps_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.parquet"
    write(path, [make_step(0)])
    before = path.read_bytes()
    sink = sink_for(path)
    sink(make_step(10))

    def refuse(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(parquet.ParquetWriter, "write_table", refuse)
        with pytest.raises(OSError, match="No space left"):
            sink.close()
    assert path.read_bytes() == before and names_in(tmp_path) == ["run.parquet", "run.parquet.jsonl"]
    assert len(load_watch(path)) == 2
    sink.close()
    assert names_in(tmp_path) == ["run.parquet"] and len(load_watch(path)) == 2


def test_a_log_too_large_to_be_read_back_stays_in_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_log, "_MOST_VALUES", 100)
    path = tmp_path / "run.parquet"
    with pytest.warns(UserWarning, match="would hold 110 values"):
        write(path, [make_step(0), make_step(10)])
    assert names_in(tmp_path) == ["run.parquet.jsonl"] and len(load_watch(path)) == 2


def test_the_log_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "run.parquet"
    write(path, [make_step(0)])
    before = path.read_bytes()
    sink = ParquetLog(path)
    with pytest.raises(ValueError, match=r"is the log of another model .*head only there"):
        sink(make_step(10, layers=LAYERS[:4]))
    sink.close()
    assert path.read_bytes() == before and names_in(tmp_path) == ["run.parquet"]


def test_two_sinks_on_one_file(tmp_path: Path) -> None:
    sink = sink_for(tmp_path / "run.parquet")
    with pytest.raises(RuntimeError, match="is in use"):
        sink_for(tmp_path / "run.parquet")
    sink.close()


def test_a_foreign_torn_or_newer_file_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "run.parquet"
    write(path, [make_step(0)])
    whole = path.read_bytes()
    table = parquet.read_table(path)
    newer = table.replace_schema_metadata({b"zest_fast.watch": json.dumps({"version": 2}).encode()})
    for make, words in (
        (lambda: path.write_bytes(whole[:-1]), "is no whole Parquet file"),
        (lambda: path.write_bytes(b""), "is no whole Parquet file"),
        (lambda: parquet.write_table(pyarrow.table({"a": [1]}), path), "it holds some other table"),
        (lambda: parquet.write_table(newer, path), "version 2, this zest_fast reads up to 1"),
        (lambda: parquet.write_table(table.slice(1), path), "its first row begins no step"),
        (lambda: parquet.write_table(table.slice(0, 3), path), "its layers are not those of its segment"),
        (lambda: parquet.write_table(table.drop_columns(["rgn"]), path), "rgn"),
    ):
        make()
        before = path.read_bytes()
        for read in (load_watch, sink_for):
            with pytest.raises(ValueError, match=rf"run.parquet'.*{words}"):
                read(path)
        assert path.read_bytes() == before


def test_a_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run.parquet"):
        load_watch(tmp_path / "run.parquet")
    with pytest.raises(FileNotFoundError, match=r"there is no folder '.*nowhere'"):
        sink_for(tmp_path / "nowhere" / "run.parquet")


def test_a_metric_that_bears_the_name_of_a_column_is_named(tmp_path: Path) -> None:
    sink = sink_for(tmp_path / "run.parquet")
    sink(make_step(0, metrics=["snip", "loss"]))
    with pytest.raises(ValueError, match="a metric is named 'loss'"):
        sink.close()
    assert len(load_watch(tmp_path / "run.parquet")) == 1
