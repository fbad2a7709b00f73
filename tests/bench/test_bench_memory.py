"""bench.llama7b and bench.memory_table in their smallest form, and the tables that the README shows of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.memory_report import llama7b_text, memory_text

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("transformers")


def run(name, *arguments):
    command = [sys.executable, "-m", f"bench.{name}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_llama7b_measures_each_case_once_and_goes_on(tmp_path):
    said = run("llama7b", "finetune", "--tiny", "--tokens", 16, "--frozen", "int8", "--out", tmp_path)
    path = tmp_path / "llama7b.json"
    profile, step = json.loads(path.read_text())["results"]  # a step needs layers, so there is a profile first
    assert (profile["kind"], step["kind"], step["frozen"]) == ("profile", "finetune", "int8")
    assert step["layers"] == profile["layers"] and len(set(step["layers"])) == 5
    assert step["cut"] in step["layers"] and len(step["losses"]) == 2
    assert step["weights_gib"] < profile["weights_gib"] and step["planned_gib"] < step["peak_gib"]
    assert all(row["seconds"][-1] > 0 and min(row["forward_dx_seconds"]) > 0 for row in (profile, step))
    assert "finetune 16 int8" in said
    before = path.read_bytes()
    run("llama7b", "profile", "--tiny", "--tokens", 16, "--out", tmp_path)
    assert path.read_bytes() == before
    table = llama7b_text(json.loads(before))
    assert "| profile, 16 tokens |" in table and "| ZEST@5 step, int8, 16 tokens |" in table


def test_memory_table_counts_what_it_plans(tmp_path):
    run("memory_table", "--quick", "--check", "--dtypes", "float32", "--out", tmp_path)
    document = json.loads((tmp_path / "memory_table.json").read_text())
    rows = {row["method"]: row for row in document["results"]}
    assert {"full", "full, in backward", "zest@5, plain", "zest@5, lean"} <= set(rows)
    for row in rows.values():
        assert row["peak_bytes"] == pytest.approx(row["counted_bytes"], rel=0.02)
        assert row["seconds"] > 0
    assert rows["full"]["time_to_full"] == 1 > rows["zest@5, lean"]["memory_to_full"]
    table = memory_text(document)
    assert "| resnet-50 2 x 64, float32 |" in table and f"{len(rows)} within 2 %." in table
    rows["full"]["counted_bytes"] *= 1.1
    assert f"{len(rows) - 1} within 2 %, the others (resnet-50 2 x 64) up to 10 % above" in memory_text(document)
    for row in document["results"]:
        del row["counted_bytes"], row["seconds"], row["time_to_full"]
    assert "counted" not in memory_text(document) and ", time" not in memory_text(document)
