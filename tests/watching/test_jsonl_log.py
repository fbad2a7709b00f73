"""The file of lines: exact, continued, mended, refused by name."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import resource
import signal
import stat
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pandas
import pytest
from watched_runs import LAYERS, METRICS, assert_same_step, make_step

from zest_fast import load_watch, rank, sink_for
from zest_fast.watching.logs.jsonl_log import JsonlLog
from zest_fast.watching.logs.lines import Layout, with_checksum
from zest_fast.watching.logs.reader import LogReader


def write(path: Path, steps) -> None:
    sink = sink_for(path)
    for step in steps:
        sink(step)
    sink.close()


def test_steps_come_back_to_the_bit(tmp_path: Path) -> None:
    odd = np.array([math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1, 1e308, 1 / 3, 2**53 + 1.0])
    values = np.resize(odd, (len(LAYERS), len(METRICS)))
    made = [
        make_step(0, full=True),
        make_step(10, values=values, loss=math.nan, notes=("layer 'x' explodes\n☃",), full=True),
        make_step(20, overflow=True, loss=math.inf),
    ]
    write(tmp_path / "run.jsonl", made)
    log = load_watch(tmp_path / "run.jsonl")
    assert len(log) == len(log.steps) == 3 and log.notes == ()
    for found, step in zip(log.steps, made, strict=True):
        assert_same_step(found, step)
    assert rank(log.steps[0].profile, "snip").names == rank(made[0].profile, "snip").names


def test_a_step_is_in_the_file_at_the_return(tmp_path: Path) -> None:
    sink = sink_for(tmp_path / "run.jsonl")
    for count, step in enumerate((0, 5, 9), start=1):
        sink(make_step(step))
        assert len(load_watch(tmp_path / "run.jsonl")) == count
    sink.close()


def test_others_read_the_lines_as_json(tmp_path: Path) -> None:
    write(tmp_path / "run.jsonl", [make_step(0), make_step(7)])
    header, *steps = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert header["names"] == list(LAYERS) and header["metrics"] == list(METRICS) and header["version"] == 1
    assert [step["step"] for step in steps] == [0, 7] and steps[1]["values"] == make_step(7).profile.values.tolist()
    assert len(pandas.read_json(tmp_path / "run.jsonl", lines=True)) == 3


def test_a_line_cut_off_at_any_byte_is_left_out_with_a_word_and_mended(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    write(whole, [make_step(step, layers=LAYERS[:2], metrics=METRICS[:1]) for step in (0, 10, 20)])
    contents = whole.read_bytes()
    last = contents.rindex(b"\n", 0, -1) + 1
    path = tmp_path / "run.jsonl"
    for end in range(last, len(contents)):
        path.write_bytes(contents[:end])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            log = load_watch(path)
        assert [step.step for step in log.steps] == [0, 10]
        assert len(caught) == len(log.notes) == (end > last)
        if end > last:
            assert f"torn ({end - last} bytes)" in str(caught[0].message) and "run.jsonl" in str(caught[0].message)
        write(path, [make_step(20, layers=LAYERS[:2], metrics=METRICS[:1])])
        assert [step.step for step in load_watch(path).steps] == [0, 10, 20]
        assert path.read_bytes().startswith(contents[:last] + b'{"record":"header"')


def test_a_header_cut_off_at_any_byte_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write(path, [make_step(0, layers=LAYERS[:1])])
    header = path.read_bytes().split(b"\n")[0]
    for end in range(len(header) + 1):
        path.write_bytes(header[:end])
        write(path, [make_step(3, layers=LAYERS[:1])])
        assert [step.step for step in load_watch(path).steps] == [3]


def test_a_last_line_whose_bytes_arrived_in_another_order_counts_as_torn(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write(path, [make_step(0), make_step(10)])
    contents = bytearray(path.read_bytes())
    contents[-200:-100] = bytes(100)
    path.write_bytes(contents)
    with pytest.warns(UserWarning, match="torn"):
        assert [step.step for step in load_watch(path).steps] == [0]
    write(path, [make_step(10)])
    assert [step.step for step in load_watch(path).steps] == [0, 10]


@pytest.mark.parametrize("line", [1, 2])
def test_damage_in_the_middle_is_named_and_never_read(tmp_path: Path, line: int) -> None:
    path = tmp_path / "run.jsonl"
    write(path, [make_step(0), make_step(10), make_step(20)])
    lines = path.read_bytes().splitlines(keepends=True)
    at = lines[line].index(b'"values":[[') + 12
    lines[line] = lines[line][:at] + (b"1" if lines[line][at : at + 1] != b"1" else b"2") + lines[line][at + 1 :]
    path.write_bytes(b"".join(lines))
    before = path.read_bytes()
    for read in (load_watch, sink_for):
        with pytest.raises(ValueError, match=rf"run.jsonl', line {line + 1}: the checksum"):
            read(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "contents",
    [b'{"text": "a row of somebody\'s data"}\n', b"no line break", b'{"record":"headex', b"\n", bytes(100)],
)
def test_a_file_of_somebody_else_is_refused_and_kept(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(contents)
    for read in (load_watch, sink_for):
        with pytest.raises(ValueError, match=r"data.jsonl' is no log of a watched run"):
            read(path)
    assert path.read_bytes() == contents


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write(path, [make_step(0)])
    header = json.loads(path.read_text().splitlines()[0])
    del header["crc"]
    text = json.dumps({**header, "version": 2, "unknown": 1}, separators=(",", ":"))
    path.write_bytes(with_checksum(text.encode()) + path.read_bytes().splitlines(keepends=True)[1])
    before = path.read_bytes()
    for read in (load_watch, sink_for):
        with pytest.raises(ValueError, match="has version 2, this zest_fast reads up to 1: upgrade"):
            read(path)
    assert path.read_bytes() == before


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write(path, [make_step(step, loss=1.0) for step in (0, 10, 20, 30)])
    write(path, [make_step(step, loss=2.0) for step in (21, 31)])  # from a checkpoint of step 15
    log = load_watch(path)
    assert [(step.step, step.profile.loss) for step in log.steps] == [
        (0, 1.0),
        (10, 1.0),
        (20, 1.0),
        (21, 2.0),
        (31, 2.0),
    ]
    assert len(log.segments) == 2 and [len(segment.steps) for segment in log.segments] == [4, 2]
    assert log.segments[0].run != log.segments[1].run
    assert len(log.notes) == 1 and "1 step from 21 on" in log.notes[0]


def test_steps_that_repeat_after_a_resume_are_those_of_the_later_start(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write(path, [make_step(step, loss=1.0) for step in (0, 10, 20, 30)])
    write(path, [make_step(20, loss=2.0)])
    log = load_watch(path)
    assert [(step.step, step.profile.loss) for step in log.steps] == [(0, 1.0), (10, 1.0), (20, 2.0)]  # 30 never came
    write(path, [make_step(0, loss=3.0)])  # another run from the beginning
    assert [step.profile.loss for step in load_watch(path).steps] == [3.0]


def test_a_step_that_overflowed_and_the_one_made_after_it_have_one_number(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write(path, [make_step(0), make_step(10, overflow=True, seconds=1.0), make_step(10, seconds=1.5)])
    log = load_watch(path)
    assert [(step.step, step.overflow) for step in log.steps] == [(0, False), (10, True), (10, False)]
    assert len(log.segments) == 1


def test_a_second_watch_with_the_same_sink_begins_a_segment(tmp_path: Path) -> None:
    sink = JsonlLog(tmp_path / "run.jsonl")
    for seconds in (1.0, 0.5):
        sink(make_step(0, seconds=seconds))
    sink.close()
    log = load_watch(tmp_path / "run.jsonl")
    assert [step.seconds for step in log.steps] == [0.5] and len(log.segments) == 2


def test_layers_that_change_while_a_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    made = [make_step(0), make_step(10, overflow=True), make_step(10, seconds=1.5, layers=LAYERS[2:]), make_step(20)]
    write(path, made)
    log = load_watch(path)
    for found, step in zip(log.steps, made, strict=True):  # the overflow at 10 is no step of an earlier start
        assert_same_step(found, step)
    assert [segment.continues for segment in log.segments] == [False, True, True] and log.notes == ()
    assert np.isnan(log.column("snip")[2]).tolist() == [True, True, False, False, False]
    write(path, [make_step(30, layers=LAYERS[2:])])  # resumed where fewer layers train
    assert len(load_watch(path)) == 5


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"layers": [*LAYERS[:4], "classifier"]}, "other layers: head only there, classifier only here"),
        ({"layers": [LAYERS[1], LAYERS[0], *LAYERS[2:]]}, "the same ones in another order"),
        ({"metrics": ["snip", "fisher", "rgn"]}, "other metrics: grad_norm only there, fisher only here"),
        ({"shape": [4, 3]}, r"layer 'blocks.0.q' has shape \[2, 3\] there and \[4, 3\] here"),
    ],
)
def test_the_log_of_another_model_is_refused_by_name(tmp_path: Path, other: dict, words: str) -> None:
    path = tmp_path / "run.jsonl"
    write(path, [make_step(0)])
    before = path.read_bytes()
    sink = JsonlLog(path)
    with pytest.raises(ValueError, match=r"run.jsonl' is the log of another model .*" + words):
        sink.check(Layout.of(make_step(10, **other).profile))
    for _ in range(2):  # and is not written at the second try
        with pytest.raises(ValueError, match=words):
            sink(make_step(10, **other))
    sink(make_step(10))
    sink.close()
    assert path.read_bytes().startswith(before) and len(load_watch(path)) == 2


def test_a_missing_folder_a_folder_and_a_device_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder '.*nowhere'; create it"):
        sink_for(tmp_path / "nowhere" / "run.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        sink_for(tmp_path / "folder.jsonl")
    (tmp_path / "full.jsonl").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"full.jsonl' is a device"):
        sink_for(tmp_path / "full.jsonl")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.touch(mode=0o444)
    with pytest.raises(PermissionError, match=r"run\.jsonl"):
        sink_for(path)


def test_a_file_that_may_not_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", os.fspath(path))

    monkeypatch.setattr("zest_fast.watching.logs.jsonl_log.os.open", refuse)
    with pytest.raises(PermissionError, match=r"run\.jsonl"):
        sink_for(tmp_path / "run.jsonl")


def test_a_full_disk_leaves_whole_lines_and_the_next_step_is_tried(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    sink = sink_for(path)
    sink(make_step(0))
    before = path.read_bytes()
    found = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, found[1]))  # the line fits in part
    try:
        for step in (10, 20):
            with pytest.raises(OSError, match=r"the steps before are safe in it.*run.jsonl"):
                sink(make_step(step))
            assert path.read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, found)
        signal.signal(signal.SIGXFSZ, ignored)
    sink(make_step(30))
    sink.close()
    assert [step.step for step in load_watch(path).steps] == [0, 30]


def test_a_full_disk_that_keeps_half_a_line_is_mended_at_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.jsonl"
    sink = sink_for(path)
    sink(make_step(0))

    def half(descriptor: int, data: bytes) -> None:
        os.write(descriptor, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    def refuse(*_) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr("zest_fast.watching.logs.jsonl_log.write_fully", half)
        patched.setattr("zest_fast.watching.logs.jsonl_log.os.ftruncate", refuse)
        with pytest.raises(OSError, match="No space left"):
            sink(make_step(10))
    sink(make_step(20))
    sink.close()
    assert [step.step for step in load_watch(path).steps] == [0, 20] and load_watch(path).notes == ()


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    sink = sink_for(path)
    sink(make_step(0))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="lone surrogates"):
        sink(make_step(10, notes=("\ud800",)))
    with pytest.raises(ValueError, match="lone surrogates"):
        sink(make_step(10, layers=[*LAYERS[:4], "\ud800"]))
    assert path.read_bytes() == before
    sink.close()


def _hold(path: Path, ready, done) -> None:
    sink = sink_for(path)
    sink(make_step(0))
    ready.set()
    done.wait(60)
    os._exit(0)


def test_two_processes_on_one_file(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(path, ready, done))
    other.start()
    try:
        assert ready.wait(60)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"run.jsonl' is in use by another watch"):
                sink_for(path)
        assert len(load_watch(path)) == 1  # who reads need not wait
    finally:
        done.set()
        other.join()
    write(path, [make_step(10)])
    assert len(load_watch(path)) == 2


def test_two_sinks_of_one_process_on_one_file(tmp_path: Path) -> None:
    sink = sink_for(tmp_path / "run.jsonl")
    with pytest.raises(RuntimeError, match="is in use"):
        sink_for(tmp_path / "run.jsonl")
    sink(make_step(0))  # the first one goes on
    sink.close()
    sink_for(tmp_path / "run.jsonl").close()


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked"):
        sink = sink_for(tmp_path / "run.jsonl")
    sink(make_step(0))
    sink.close()
    assert len(load_watch(tmp_path / "run.jsonl")) == 1


KILLED = """
import os, signal, sys
from watched_runs import make_step
from zest_fast import sink_for
import zest_fast.watching.logs.jsonl_log as home
sink = sink_for(sys.argv[1])
sink(make_step(0))
sink(make_step(10))
def killed(descriptor, data):
    os.write(descriptor, data[:50])
    os.kill(os.getpid(), signal.SIGKILL)
home.write_fully = killed
sink(make_step(20))
"""


@pytest.mark.parametrize("name", ["run.jsonl", "run.parquet"])
def test_a_process_that_is_killed_while_it_writes(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    folders = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "support")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])}
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path)], env=environment, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    with pytest.warns(UserWarning, match=r"torn \(50 bytes\)"):
        assert [step.step for step in load_watch(path).steps] == [0, 10]
    write(path, [make_step(20)])
    assert [step.step for step in load_watch(path).steps] == [0, 10, 20]


@pytest.mark.parametrize("how", ["removed", "moved", "emptied", "replaced by nothing"])
def test_a_file_that_somebody_takes_away_is_begun_anew(tmp_path: Path, how: str) -> None:
    path = tmp_path / "run.jsonl"
    sink = sink_for(path)
    sink(make_step(0))
    sink(make_step(10))
    if how == "removed":
        path.unlink()
    elif how == "moved":
        path.rename(tmp_path / "run.jsonl.1")
    elif how == "emptied":
        os.truncate(path, 0)
    else:
        (tmp_path / "new").touch()
        (tmp_path / "new").replace(path)
    sink(make_step(20))
    sink.close()
    assert [step.step for step in load_watch(path).steps] == [20]
    if how == "moved":
        assert [step.step for step in load_watch(tmp_path / "run.jsonl.1").steps] == [0, 10]


def test_a_sink_that_was_closed_opens_again(tmp_path: Path) -> None:
    sink = sink_for(tmp_path / "run.jsonl")
    sink(make_step(0))
    sink.close()
    sink.close()
    sink(make_step(10))
    sink.close()
    assert len(load_watch(tmp_path / "run.jsonl")) == 2


def test_the_file_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        sink_for(tmp_path / "run.jsonl").close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "run.jsonl").stat().st_mode) == 0o640


def test_an_empty_log(tmp_path: Path) -> None:
    sink_for(tmp_path / "run.jsonl").close()
    log = load_watch(tmp_path / "run.jsonl")
    assert len(log) == 0 and log.layers == log.metrics == [] and log.to_pandas().empty


def test_a_reader_reads_what_is_new_and_anew_what_was_replaced(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    sink = sink_for(path)
    sink(make_step(0))
    reader = LogReader(path)
    assert reader.poll() and not reader.poll()
    first = reader.segments[0].steps[0]
    sink(make_step(10))
    assert reader.poll() and [step.step for step in reader.segments[0].steps] == [0, 10]
    assert reader.segments[0].steps[0] is first  # not read again
    whole = path.read_bytes()
    with open(path, "ab") as file:
        file.write(whole.splitlines(keepends=True)[-1][:40])
    assert not reader.poll() and reader.torn == 40
    os.truncate(path, len(whole))
    assert not reader.poll() and reader.torn == 0
    sink.close()
    os.truncate(path, 0)  # another log in the same file, longer than the first
    write(path, [make_step(step, loss=9.0) for step in (1, 2, 3, 4, 5)])
    assert reader.poll() and [step.step for step in reader.segments[0].steps] == [1, 2, 3, 4, 5]
    path.unlink()
    with pytest.raises(FileNotFoundError):
        reader.poll()


def test_the_checksum_is_crc_32_of_what_stands_before_it(tmp_path: Path) -> None:
    write(tmp_path / "run.jsonl", [make_step(0)])
    for line in (tmp_path / "run.jsonl").read_bytes().splitlines():
        text, crc = line[:-18], line[-10:-2]
        assert line[-18:-10] == b',"crc":"' and int(crc, 16) == zlib.crc32(text)
