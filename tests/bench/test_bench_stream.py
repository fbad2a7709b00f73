"""bench.stream in its smallest form."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    command = [sys.executable, "-m", "bench.stream", "shape", "--tiny", "--tokens", "16", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_each_case_is_measured_once_and_its_gradients_are_checked(tmp_path):
    where = ("--folder", tmp_path / "weights", "--out", tmp_path)
    run("--frozen", "none", "--checkpoint", *where)
    said = run("--frozen", "int8", "--check", *where)
    path = tmp_path / "stream.json"
    plain, packed = json.loads(path.read_text())["results"]
    assert (plain["frozen"], packed["frozen"], plain["checkpoint"]) == (None, "int8", "above-cut")
    assert packed["files_gib"] < plain["files_gib"]
    for row in (plain, packed):
        assert len(set(row["layers"])) == 5 and row["cut"] in row["layers"]
        assert len(row["losses"]) == len(row["seconds"]) == len(row["read_gib"]) == 2
        assert 0 < row["largest_of_files_gib"] < row["peak_gib"]
    assert packed["check"]["equal_to_resident"]
    assert packed["check"]["largest_relative_error"] < 10 * 2**-8  # some ten roundings of bfloat16 on the way
    assert "tiny int8 16 tokens" in said
    before = path.read_bytes()
    run("--frozen", "int8", *where)
    assert path.read_bytes() == before
    assert sorted(folder.name for folder in (tmp_path / "weights").iterdir()) == [
        "tiny-bfloat16-from-2",
        "tiny-int8-from-2",
    ]
