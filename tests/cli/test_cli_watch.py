"""`zest-fast watch`: a log in the terminal, in a pipe, as JSON, and while it grows."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner
from watched_runs import LAYERS, make_step

from zest_fast import sink_for
from zest_fast.cli import app
from zest_fast.cli.run_picture import change, sparkline


def run(*words):
    return CliRunner().invoke(app, ["watch", *map(str, words)])


def refused(result, *parts: str) -> None:
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and all(part in line for part in parts), line


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "run.jsonl"
    sink = sink_for(path)
    sink(make_step(0, full=True))
    sink(make_step(100, overflow=True, notes=("old note",)))
    sink(
        make_step(200, notes=("layer 'head' is dead: its gradient has been 0 for the last 3 logged steps",), full=True)
    )
    sink.close()
    return path


def test_a_log_as_text(log: Path) -> None:
    result = run(log)
    assert result.exit_code == 0, result.stderr
    text = result.stdout
    assert "\x1b" not in text and f"{log}: step 200, loss 0.004975 (first 1), 20 s, 3 steps logged" in text
    for layer in LAYERS:
        last = make_step(200).profile[layer]["grad_norm"]
        assert re.search(rf"{re.escape(layer)} .*{re.escape(f'{last:.4g}')}", text)
    assert "layer 'head' is dead" in text and "old note" not in text
    assert "1 of 3 logged steps overflowed, the last one at step 100" in text
    assert "all layers: grad_norm 200.1, noise_scale inf" in text and "ranking by grad_norm at step 200: tau" in text


def test_the_largest_layers_of_those_that_match(log: Path) -> None:
    values = {layer: make_step(200).profile[layer]["snip"] for layer in LAYERS if layer.endswith("q")}
    best = max(values, key=values.__getitem__)
    result = run(log, "--metric", "snip", "--layers", r"blocks\.\d\.q", "--top", 1, "--once")
    shown = [layer for layer in LAYERS if re.search(rf"^ +{re.escape(layer)} ", result.stdout, re.MULTILINE)]
    assert shown == [best] and "1 more with smaller values" in result.stdout


def test_a_log_as_json(log: Path) -> None:
    result = run(log, "--json", "--metric", "rgn", "--layers", "head|blocks.0.q")
    found = json.loads(result.stdout)
    assert found["steps"] == [0, 100, 200] and found["overflow"] == [False, True, False] and found["metric"] == "rgn"
    values = {row["name"]: row["values"] for row in found["layers"]}
    for layer in ("head", "blocks.0.q"):
        assert values[layer] == [make_step(0).profile[layer]["rgn"], None, make_step(200).profile[layer]["rgn"]]
    assert len(values) == 2 and found["drift"]["by"] == "rgn" and -1 <= found["drift"]["tau_to_first"] <= 1
    assert found["notes"][0].startswith("layer 'head' is dead") and found["totals"]["grad_norm"] == 200.1


def test_a_parquet_log_and_its_journal(tmp_path: Path) -> None:
    sink = sink_for(tmp_path / "run.parquet")
    sink(make_step(0))
    for _ in range(2):
        assert "step 0, loss 1, 0 s, 1 step logged" in run(tmp_path / "run.parquet").stdout
        sink.close()


def test_a_log_without_steps(tmp_path: Path) -> None:
    sink_for(tmp_path / "run.jsonl").close()
    assert "no step of a layer yet" in run(tmp_path / "run.jsonl").stdout
    assert json.loads(run(tmp_path / "run.jsonl", "--json").stdout)["steps"] == []


def test_a_torn_line_is_said(log: Path) -> None:
    os.truncate(log, log.stat().st_size - 5)
    result = run(log)
    assert result.exit_code == 0 and "the last line is torn" in result.stdout and ": step 100," in result.stdout


def test_without_grad_norm_another_metric_is_drawn(tmp_path: Path) -> None:
    sink = sink_for(tmp_path / "run.jsonl")
    sink(make_step(0, metrics=["weight_std"]))
    sink.close()
    assert "weight_std" in run(tmp_path / "run.jsonl").stdout
    refused(run(tmp_path / "run.jsonl", "--metric", "grad_norm"), "--metric 'grad_norm'", "weight_std")


def test_what_is_refused(log: Path) -> None:
    refused(run(log.with_name("rum.jsonl")), "rum.jsonl' does not exist", "nearest: 'run.jsonl'")
    refused(run(log.parent), "is a folder")
    refused(run(log, "--metric", "rgm"), "--metric 'rgm'", "nearest: 'rgn'")
    refused(run(log, "--layers", "("), "--layers '('")
    refused(run(log, "--layers", "nothing"), "--layers 'nothing' matches no layer")
    refused(run(log, "--json", "--follow"), "--json", "--follow")
    log.write_text('{"text": "data"}\n')
    refused(run(log), "is no log of a watched run")
    refused(run(log, "--follow"), "is no log of a watched run")


def test_names_move_no_cursor(tmp_path: Path) -> None:
    sink = sink_for(tmp_path / "run.jsonl")
    sink(make_step(0, layers=["\x1b[2J[bold]", "head"], notes=("\x1b[2J",)))
    sink.close()
    result = run(tmp_path / "run.jsonl")
    assert "\x1b" not in result.stdout and "[bold]" in result.stdout


def command(*words) -> list[str]:
    return [sys.executable, "-m", "zest_fast", "watch", *map(str, words)]


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    return {**inherited, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]), "TERM": "xterm"}


def test_into_a_pipe_that_cannot_show_blocks(log: Path) -> None:
    ascii_only = {**environment(), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    found = subprocess.run(command(log), env=ascii_only, capture_output=True)
    assert found.returncode == 0, found.stderr
    assert b"blocks.0.q" in found.stdout and found.stdout.isascii()


class Lines:
    """What a process prints, as it comes."""

    def __init__(self, descriptor: int) -> None:
        self.text = ""
        self._descriptor = descriptor
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                found = os.read(self._descriptor, 2**16) if select.select([self._descriptor], [], [], 60)[0] else b""
            except OSError:  # the other end of a terminal is closed
                return
            if not found:
                return
            self.text += found.decode("utf-8", "replace")

    def wait_for(self, words: str) -> None:
        ends = time.monotonic() + 60
        while words not in self.text:
            assert time.monotonic() < ends, self.text
            time.sleep(0.02)


def test_a_pipe_is_followed_from_before_the_file_is_there_until_ctrl_c(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    process = subprocess.Popen(
        command(path, "--follow", "--interval", 0.05), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    out, errors = Lines(process.stdout.fileno()), Lines(process.stderr.fileno())
    try:
        errors.wait_for("waiting for")
        sink = sink_for(path)
        sink(make_step(0))
        out.wait_for("1 step logged")
        sink(make_step(100, overflow=True, notes=("a note",)))
        out.wait_for("step 100: loss 0.009901, grad_norm undefined, overflow\n  a note\n")
        low, high = (pick(make_step(200).profile.column("grad_norm")) for pick in (np.min, np.max))
        path.rename(tmp_path / "old.jsonl")  # rotated: the sink begins the file anew
        sink(make_step(200))
        out.wait_for(f"step 200: loss 0.004975, grad_norm {low:.4g} (")
        out.wait_for(f" to {high:.4g} (")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        errors.wait_for("interrupted")
        sink.close()
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in errors.text


def test_a_terminal_is_drawn_anew_as_the_file_grows(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    sink = sink_for(path)
    names = [f"blocks.{place}.a_rather_long_name_of_a_layer.projection" for place in range(40)]
    sink(make_step(0, layers=names))
    ours, theirs = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 70, 0, 0))
    process = subprocess.Popen(
        command(path, "--interval", 0.05), env=environment(), stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True
    )
    os.close(theirs)
    screen = Lines(ours)
    try:
        screen.wait_for("1 step logged")
        sink(make_step(100, layers=names))
        screen.wait_for("2 steps logged")
        path.unlink()
        screen.wait_for("waiting for")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    sink.close()
    drawn = screen.text.split("2 steps logged")[1].split("\x1b[2K")[0]
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in drawn.split("\r\n")]
    assert len(lines) <= 19 and max(map(len, lines)) <= 70
    assert 5 < sum("blocks." in line for line in lines) < 15 and "are still there" in " ".join(lines)  # nothing cut off


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([1, 1, 1], 8, "▅▅▅"),
        ([0, 0], 8, "▁▁"),
        ([0, math.nan, 7, math.inf], 8, "▁ █!"),
        ([math.nan, math.nan], 8, "  "),
        ([1, 1, 1, 1, 9, 1, 1, 1], 2, "▁█"),  # an outlier of one step stays visible
        ([5, 5, 5, 5, -9, 5, 5, 5], 2, "█▁"),
        ([-1e308, 1e308], 8, "▁█"),
        ([], 8, ""),
    ],
)
def test_a_line_of_blocks(values: list[float], width: int, line: str) -> None:
    assert sparkline(np.array(values, dtype=np.float64), width) == line


@pytest.mark.parametrize(
    ("now", "then", "words"),
    [
        (1.5, 1.0, "+50.0 %"),
        (0.5, 1.0, "-50.0 %"),
        (-0.5, -1.0, "+50.0 %"),
        (30.0, 1.0, "x 30"),
        (1.0, 1.0, "0 %"),
        (1.0, 0.0, "from 0"),
        (math.nan, 1.0, ""),
        (1.0, math.inf, ""),
    ],
)
def test_a_change_in_words(now: float, then: float, words: str) -> None:
    assert change(now, then) == words
