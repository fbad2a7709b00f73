"""The benchmarks run from the checkout, and their harness measures what it says. No test here looks at a speed."""

import json
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import zest_fast
from bench import readme
from bench.profile import cases, libraries, memory, peers, where
from zest_fast.benchmarking import timing
from zest_fast.kernels import cpu
from zest_fast.planning.counted_memory import held_bytes, peak_bytes
from zest_fast.planning.ledger import Ledger
from zest_fast.planning.step import hold
from zest_fast.profiling import taps

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20


pytestmark = pytest.mark.usefixtures("one_thread")


def documented_commands() -> set[str]:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "bench" / "README.md", ROOT / "noxfile.py"]
    pages += [ROOT / ".ci" / "run", *(ROOT / "bench").rglob("*.py"), *(ROOT / "bench" / "results").glob("*.json")]
    return {name for page in pages for name in re.findall(r"python3? -m bench\.(\w+)", page.read_text())} - {"NAME"}


@pytest.mark.parametrize("name", sorted(documented_commands()))
def test_every_command_that_somebody_is_told_of_is_there(name):
    place = ROOT / "bench" / name
    source = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
    assert 'if __name__ == "__main__":' in source.read_text()


def run_bench(name: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", f"bench.{name}", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def kernels_json(tmp_path_factory) -> Path:
    """bench.kernels in its smallest form, once for all tests that look at its JSON."""
    out = tmp_path_factory.mktemp("results")
    done = run_bench("kernels", "--quick", "--rounds", "5", "--threads", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out / "kernels.json"


def test_kernels_benchmark_covers_every_public_kernel_and_says_where_it_ran(kernels_json):
    document = json.loads(kernels_json.read_text())
    assert {result["kernel"].split()[0] for result in document["results"]} == {
        "moments",
        "gradient_moments",
        "channel_products",
        "linear_gradient_moments",
    }
    assert {result["dtype"] for result in document["results"]} == {"float32", "bfloat16"}
    for result in document["results"]:
        spread = result["seconds"]["zest_fast"]
        assert 0 < spread["low"] <= spread["median"] <= spread["high"] and spread["n"] == 5
        assert {"torch_separate", "torch_lean"} <= set(result["speedup"])
        assert result["gb_per_s"] == pytest.approx(result["bytes"] / spread["median"] / 1e9)
        assert ("time_to_bare_mm" in result) != ("share_of_read_bandwidth" in result)
    assert document["machine"]["cores"] >= 1 and document["versions"]["torch"] == torch.__version__
    assert document["command"].startswith("python -m bench.kernels --quick")


@pytest.mark.slow
def test_profile_benchmark_measures_every_candidate(tmp_path):
    done = run_bench(
        "profile", "--quick", "--rounds", "2", "--threads", "1", "--models", "bert", "--out", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "profile.json").read_text())["results"]
    assert {"plain", "profile", "hook_and_drop", "after_backward", "zero_cost_nas"} <= set(result["seconds"])
    assert set(result["seconds"]) | set(result["failed"]) >= set(libraries.LIBRARIES)
    assert set(result["peak_bytes"]) == {"stored", "checkpointed"}


def test_rounds_are_interleaved_and_slow_candidates_stop_early():
    calls = []
    candidates = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = timing.interleave(candidates, 6, limits={"c": 2}, warmup=1)
    assert calls[:2] == ["a", "b"]  # the warm-up, not timed
    rounds = [calls[2:5], calls[5:8]] + [calls[i : i + 2] for i in range(8, 16, 2)]
    assert [sorted(order) for order in rounds] == [["a", "b", "c"]] * 2 + [["a", "b"]] * 4
    assert all(rounds[i] == rounds[i + 1][::-1] for i in (0, 2, 4))  # of two candidates each is first equally often
    assert {name: len(values) for name, values in times.items()} == {"a": 6, "b": 6, "c": 2}


def test_a_ratio_is_taken_inside_rounds_so_that_drift_cancels():
    drift = [1.0, 5.0, 2.0, 9.0, 3.0, 4.0]
    times = {"plain": drift, "profile": [1.1 * t for t in drift]}
    spread = timing.ratio(times, "profile", "plain")
    assert (spread.median, spread.low, spread.high) == pytest.approx((1.1, 1.1, 1.1))


@pytest.mark.parametrize(
    ("n", "low", "high", "coverage"),
    [(1, 0, 0, 0.0), (5, 0, 4, 0.9375), (6, 0, 5, 0.96875), (9, 1, 7, 1 - 20 / 512), (15, 3, 11, 1 - 2 * 576 / 2**15)],
)
def test_interval_of_the_median_is_that_of_the_binomial(n, low, high, coverage):
    spread = timing.median([float(i) for i in reversed(range(n))])
    assert (spread.low, spread.high, spread.n) == (low, high, n)
    assert spread.coverage == pytest.approx(coverage)


def test_median_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one round"):
        timing.median([])


@pytest.mark.parametrize("case", cases.TINY, ids=str)
def test_the_books_of_a_plan_hold_of_a_real_run_what_the_allocator_counts(case):
    model, batch = case.build()
    peers.drop_gradients(model, batch)
    ledger = Ledger()
    hold(ledger, model, batch, {})
    ledger.start()
    with ledger:
        held = held_bytes([*model.parameters(), *model.buffers(), *batch.values()])
        peers.drop_gradients(model, batch)
    peak = ledger.books().peak()
    rounding = 512 * len(peak.alive)  # the ledger's unit is that of a GPU's allocator
    counted = peak_bytes(lambda: peers.drop_gradients(model, batch))
    assert 0 < peak.size - rounding - held <= counted <= 2 * (peak.size - held) + MIB


def _scale(metric: str, row: dict[str, float], numel: int) -> float:
    """What an error is relative to: a mean's deviation, the mean |W⊙dW| for plain (both may be zero by symmetry)."""
    if metric == "plain":
        return row["snip"] / numel
    return row[metric.replace("_mean", "_std")]


@pytest.mark.parametrize("case", cases.TINY, ids=str)
def test_peers_and_profile_agree_in_float64(case):
    model, batch = case.build()
    model, batch = model.double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    written_out = peers.reductions_after_backward(model, batch)
    profile = zest_fast.profile(model, batch)
    assert set(profile.names) == set(written_out)
    for table in (peers.hook_reductions(model, batch), peers.zero_cost_nas(model, batch), profile):
        for layer, row in written_out.items():
            for metric in profile.metrics if table is profile else table[layer]:
                scale = _scale(metric, row, model.get_submodule(layer).weight.numel())
                assert table[layer][metric] == pytest.approx(row[metric], rel=0, abs=1e-6 * scale), (layer, metric)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("case", cases.TINY, ids=str)
def test_libraries_agree_on_the_norms_of_samples(case):
    pytest.importorskip("backpack")
    pytest.importorskip("opacus")
    model, batch = case.build()
    backpack, opacus = libraries.backpack_norms(model)(batch), libraries.opacus_norms(model)(batch)
    for layer in peers.profiled_layers(model):
        torch.testing.assert_close(backpack[layer], opacus[layer], rtol=1e-3, atol=0)


def test_outputs_nobody_keeps_are_those_that_autograd_does_not_save():
    first, second = torch.nn.Linear(4, 16), torch.nn.Linear(16, 8)

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)) + 1  # the second layer saves the output of the first, nobody the second's

    assert memory.outputs_nobody_keeps(Small(), {"x": torch.randn(3, 4)}) == 3 * 8 * 4


def test_where_a_profile_spends_is_told_in_parts_that_add_up():
    model, batch = cases.TINY[0].build()
    run = partial(zest_fast.profile, model, batch)
    run()
    before = cpu.moments, cpu.torch.mm, taps.ModuleHook.__call__
    bytes_read = []
    for _ in range(2):
        with where.Timers() as timers:
            start = time.thread_time()
            timers.run(run)
            total = time.thread_time() - start
        assert set(timers.seconds) == {*where.PARTS, "pass", "mm"}
        assert all(seconds > 0 for seconds in timers.seconds.values())
        assert sum(timers.seconds.values()) <= total
        bytes_read.append(timers.bytes_read)
    assert bytes_read[0] == bytes_read[1] > 4 * sum(m.weight.numel() for m in peers.profiled_layers(model).values())
    assert (cpu.moments, cpu.torch.mm, taps.ModuleHook.__call__) == before


MARKERS = "".join(f"<!-- bench:{name}:begin -->\n<!-- bench:{name}:end -->\nprose\n" for name in readme.BLOCKS)


def test_readme_is_filled_once_and_drift_is_found(kernels_json, tmp_path):
    page = tmp_path / "README.md"
    page.write_text(MARKERS)
    arguments = ("--readme", str(page), "--results", str(kernels_json.parent))
    assert run_bench("readme", *arguments, "--check").returncode == 1
    assert page.read_text() == MARKERS  # --check writes nothing
    assert run_bench("readme", *arguments).returncode == 0
    filled = page.read_text()
    assert "linear_gradient_moments" in filled and "Not measured yet: `python -m bench.profile`" in filled
    assert filled.count("prose") == len(readme.BLOCKS)
    assert readme.render(filled, kernels_json.parent) == filled
    assert run_bench("readme", *arguments, "--check").returncode == 0
    page.write_text(filled.replace("float32", "float64"))
    assert run_bench("readme", *arguments, "--check").returncode == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- bench:speed:begin --><!-- bench:speed:end -->", "no such block"),
        ("<!-- bench:demo:begin -->", "is missing"),
    ],
)
def test_readme_markers_that_do_not_fit_are_errors(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        readme.render(text, tmp_path)


def test_demo_block_takes_arms_with_and_without_costs():
    cost = {"trainable_parameters": 12345, "seconds_per_step": 0.5, "relative_seconds": 0.25, "peak_bytes": 3 * MIB}
    arms = [{"name": "as it comes", "test_accuracy": 0.5}]
    arms.append({"name": "top 5", "test_accuracy": 0.875, "standard_error": 0.01, **cost})
    table = readme.demo_table({"arms": arms, "finding": "top 5 is best."})
    assert "| as it comes | 50.0 |  |  |  |  |" in table
    assert "| top 5 | 87.5 ± 1.0 | 12,345 | 0.500 | 0.25 | 3 |" in table
    assert table.endswith("top 5 is best.")
