"""The GPU benchmark runs, as far as a CPU can tell: every section at toy sizes, and what it does without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.gpu import profiles as gpu_profiles
from bench.gpu.kernels import _figures
from bench.gpu.site import Site

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
DRY = Site(torch.device("cpu"), dry=True, rounds=3)


def run_bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env=NO_GPU, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """The JSON of a dry run, once for all tests that look at it."""
    out = tmp_path_factory.mktemp("results")
    done = run_bench("--dry-run", "--rounds", "1", "--out", str(out))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("dry run") == 4  # each table, and the last line
    yield json.loads((out / "gpu.json").read_text())


def rows(document: dict, section: str) -> list[dict]:
    return [row for row in document["results"] if row["section"] == section]


@needs_triton
def test_a_dry_run_says_so_everywhere(document: dict) -> None:
    assert document["settings"]["dry_run"] is True and "dry run" in document["settings"]["device"]
    assert all(row["dry_run"] is True for row in document["results"])
    assert set(document["settings"]["seconds"]) == {"correctness", "kernels", "profiles"}


@needs_triton
def test_every_kernel_is_held_against_the_reference(document: dict) -> None:
    found = rows(document, "correctness")
    kernels = {"moments", "gradient_moments", "linear_gradient_moments", "channel_products"}
    for dtype in ("float32", "float16"):
        assert {row["kernel"] for row in found if row["dtype"] == dtype} == kernels
    assert {row["backend"] for row in found} == {"triton"}
    for row in found:
        assert row["match"] is True and 0 <= row["error"] <= row["tolerance"] == 2e-5


@needs_triton
def test_kernels_have_intervals_rates_and_the_reason_of_what_is_missing(document: dict) -> None:
    linear, moments = rows(document, "kernels")
    assert {"zest_fast", "cublas", "cublas_pass", "cublas_naive"} <= set(linear["seconds"])
    assert {"zest_fast", "naive", "read", "copy"} <= set(moments["seconds"])
    if importlib.util.find_spec("quack") is None:
        assert linear["failed"] == {"quack": "not installed"}
    assert linear["flop"] == 2 * 33 * 24 * 40 and linear["bytes"] == 2 * (33 * 24 + 33 * 40 + 24 * 40)
    for row in (linear, moments):
        for name, seconds in row["seconds"].items():
            assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"] and seconds["n"] == 1
            assert row["rates"][name]["share_of_peak_bandwidth"] is None  # this device is in no table
        assert row["ratio"][row["baseline"]]["median"] == 1.0
    assert moments["share_of_copy_bandwidth"] == pytest.approx(0.5 / moments["ratio"]["zest_fast"]["median"])


@needs_triton
def test_whole_profiles_have_time_memory_under_each_cap_and_where_they_wait(document: dict) -> None:
    found = rows(document, "profiles")
    assert [row["model"] for row in found] == ["llama", "resnet50"]
    for row in found:
        assert row["backend"] == "triton" and row["failed"] == {}
        assert set(row["seconds"]) == {"plain", "profile", "drop_gradients", "hook_and_drop"}
        assert set(row["peak_bytes"]) == {"24 GB", "40 GB", "80 GB"}
        assert all(peak > 0 for found in row["peak_bytes"].values() for peak in found.values())
        assert any(place.startswith("zest_fast/profiling/loss.py") for place in row["waits"]["places"])


@pytest.mark.parametrize(("arguments", "status"), [((), 1), (("--allow-none",), 0)])
def test_without_a_gpu_nothing_is_measured(arguments: tuple[str, ...], status: int) -> None:
    done = run_bench(*arguments)
    assert (done.returncode, done.stdout) == (status, "no CUDA device: not measured\n")


def test_a_dry_run_does_not_overwrite_results() -> None:
    done = run_bench("--dry-run")
    assert done.returncode == 2 and "--out is needed" in done.stderr


def test_a_candidate_that_raises_is_recorded_and_the_others_are_measured() -> None:
    times, failed = DRY.times({"works": lambda number: number, "fails": lambda number: [][number]})
    assert {name: len(values) for name, values in times.items()} == {"works": 3}
    assert failed == {"fails": "IndexError: list index out of range"}


def test_a_figure_beyond_the_physical_limit_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Site, "times", lambda self, candidates: ({"a": [1e-6], "b": [1.0]}, {}))
    monkeypatch.setattr(Site, "peaks", lambda self, dtype: (1.0, 1.0))
    row = _figures(DRY, {}, {}, 10**9, 10**12, "float32", "b")
    assert row["rates"]["b"]["share_of_peak_flops"] == 1.0
    assert [warning.split(":")[0] for warning in row["warnings"]] == ["a", "a"]


def test_a_run_out_of_memory_is_a_result() -> None:
    def too_large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    found = gpu_profiles._peaks(
        DRY, 24, {"profile": too_large, "plain": lambda: torch.ones(1000)}, torch.nn.Linear(1, 1)
    )
    assert found["profile"] == "out of memory" and found["plain"] >= 4000
