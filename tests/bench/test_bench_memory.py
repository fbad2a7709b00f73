"""bench.llama7b and bench.memory_table in their smallest form, and the tables that the README shows of them."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.landing_report import DTYPE, ROWS, SHAPE, landing_text
from bench.llama7b.report import llama7b_text
from bench.memory_table import run as memory_table
from bench.memory_table.report import memory_text

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("transformers")


def run(name, *arguments):
    command = [sys.executable, "-m", f"bench.{name}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
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


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="what oneDNN holds for MobileNetV2 is known of CPUs with AVX-512 alone; see docs/limits.md",
)
@pytest.mark.slow
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


def test_methods_that_the_memory_table_lacks_are_added_and_nothing_else_changes(tmp_path, monkeypatch):
    planned = []

    def methods(shape, dtype):
        for peak, name in enumerate(("full", "zest@5, plain", "new", "zest@5, lean"), 1):
            facts = {"flops": 8, "breakdown": {}, "fits": (8,), "peak_tensor": "x"}
            make = SimpleNamespace(peak_bytes=peak * 2**30, **facts)
            yield name, lambda name=name, make=make: planned.append(name) or make

    monkeypatch.setattr(memory_table, "_methods", methods)
    (tiny,) = memory_table.TINY
    old = [row for row in memory_table.rows(tiny, "float32") if row["method"] != "new"]
    assert planned == ["full", "zest@5, plain", "new", "zest@5, lean"] and old[1]["memory_to_full"] == 2
    path = tmp_path / "memory_table.json"
    path.write_text(json.dumps({"command": "as before", "date": "2000-01-01", "results": old}))
    planned.clear()
    memory_table.add_missing(path)
    assert planned == ["new"]
    document = json.loads(path.read_text())
    assert document["command"] == "as before" and document["results"][:3] == old
    new = document["results"][3]
    assert (new["method"], new["memory_to_full"]) == ("new", 3) and new["date"] > document["date"]
    before = path.read_bytes()
    memory_table.add_missing(path)
    assert planned == ["new"] and path.read_bytes() == before


def test_the_landing_table_has_every_arm_beside_its_plan():
    def arm(accuracies, memory):
        ends = {"test_accuracy": accuracies, "trained": 10, "to_full": {"median": 0.5}}
        return {**ends, "peak_bytes": memory, "peak_bytes_full": 100}

    pairs = [
        {"pair": f"{model}/data", "arms": {name: arm([low, low + 0.1], 25) for name in ROWS}}
        for model, low in (("a", 0.5), ("b", 0.7))
    ]
    for pair, accuracy in zip(pairs, (0.65, 0.83), strict=True):
        pair["arms"]["ZEST@5"] = arm([accuracy], 20)
    del pairs[0]["arms"]["middle@5"], pairs[0]["arms"]["largest@5"], pairs[1]["arms"]["largest@5"]
    methods = [method for _, *names in ROWS.values() for method in names if method]
    rows = [
        {"model": SHAPE, "dtype": DTYPE, "method": name, "peak_bytes": place * 2**30, "flops": 2 + place}
        for place, name in enumerate(methods)
    ]
    text = landing_text({"results": pairs}, {"results": [*rows, {**rows[0], "dtype": "float32", "peak_bytes": 0}]})
    assert "| **five layers by ZEST** | 74.0 |  | 0.50 | 0.20 | 0.00 | 1.00 |" in text
    assert "| all layers | 65.0 | +9.0 ± 1.0 | 0.50 | 0.25 | 2.00 |  |" in text
    assert "| five layers at random | 65.0 | +9.0 ± 1.0 | 0.50 | 0.25 |  |  |" in text
    assert "| five layers in the middle | (1 pairs) | +8.0 | 0.50 | 0.25 |  |  |" in text and "largest" not in text
    assert "2 pairs of model and data set with 2 models" in text and "for 2.0 times the FLOPs" in text
