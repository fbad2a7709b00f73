"""`zest-fast bench`: each subcommand on a tiny case, kernels of the user's, what is refused, and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_results import done, refused
from typer.testing import CliRunner
from without_module import refuse_import

from zest_fast.benchmarking import torch_reductions
from zest_fast.benchmarking.results import Result
from zest_fast.cli import app

pytestmark = pytest.mark.usefixtures("one_thread")

USER_MODULE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 3))

def batches():
    from torch.utils.data import DataLoader, TensorDataset
    return DataLoader(TensorDataset(torch.randn(8, 3, 2, 2), torch.arange(8) % 3), batch_size=4)

def moments(x):
    found = {"mean": x.mean(), "std": x.std(correction=0), "abs_mean": x.abs().mean()}
    return {**found, "abs_std": x.abs().std(correction=0)}

def wrong(x):
    return {**moments(x), "std": 1.0}

def raising(x):
    raise KeyError("no such layer")

def mutating(x):
    x.mul_(2)
    return moments(x)

NUMBER = 3
"""
QUICK = ("--size", "16KiB", "--dtype", "float32", "--rounds", 6, "--no-compile")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    (folder / "zest_bench_user.py").write_text(USER_MODULE)
    return folder


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return lambda *words: CliRunner().invoke(app, ["bench", *(str(word) for word in words)])


def test_kernels_are_measured_saved_drawn_and_compared(run, tmp_path):
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "a.json", tmp_path / "a.svg"
    said = done(run("kernels", *QUICK, "--json", file, "--plot", picture)).stdout
    assert "read bandwidth of this run" in said and "Match" in said and picture.stat().st_size > 1000
    found = Result.load(file)
    kernels = {case.settings["kernel"] for case in found.cases}
    assert kernels == {
        "moments",
        "gradient_moments",
        "linear_gradient_moments",
        "channel_products (tokens)",
        "channel_products (pixels)",
    }
    assert found.machine["cores"] >= 1 and found.versions["torch"] and found.wrong == []
    assert all(one.match for case in found.cases for one in case.measured if one.role != "floor")
    again = done(run("compare", file, file, "--margin", "0.5"))
    assert "moments 4096 float32, 1 thread" in again.stdout


def test_markdown_is_all_that_is_printed(run):
    said = done(run("kernels", "moments", *QUICK, "--markdown", "--warm")).stdout
    assert said.startswith("### zest-fast bench kernels\n\n") and "| zest_fast | yes |" in said


def test_kernels_of_the_user_are_right_or_named_with_exit_code_1(run):
    own = ["zest_bench_user:moments", *(f"moments=zest_bench_user:{name}" for name in ("wrong", "raising", "mutating"))]
    good = run("kernels", *QUICK, "--kernel", own[0])
    assert good.exit_code == 0 and "zest_bench_user:moments" in good.stdout
    assert "gradient_moments" not in good.stdout  # only what it computes
    bad = run("kernels", *QUICK, *(word for text in own for word in ("--kernel", text)))
    assert bad.exit_code == 1
    for said in (
        "zest_bench_user:wrong: not timed: wrong: std is off by",
        "zest_bench_user:raising: not timed: raises KeyError: 'no such layer'",
        "zest_bench_user:mutating: not timed: changes its input (argument 1)",
    ):
        assert said in bad.stdout


def test_torch_compile_is_a_peer_where_it_works_and_says_why_where_it_does_not(run, monkeypatch):
    def no_compiler():
        def call(x):
            raise RuntimeError("no C++ compiler was found\nand more")

        return call

    monkeypatch.setattr(torch_reductions, "compiled_moments", no_compiler)
    found = run("kernels", "moments", *QUICK[:-1])
    assert found.exit_code == 0  # ours is right
    assert "torch_compiled: not timed: raises RuntimeError: no C++ compiler was found" in found.stdout


@pytest.mark.parametrize("command", ["profile", "step", "plan"])
def test_a_model_of_the_user_is_measured(command, run, tmp_path):
    file = tmp_path / "a.json"
    layers = () if command == "profile" else ("--layers", "3")
    words = (command, "zest_bench_user:net", "zest_bench_user:batches", *layers, "--rounds", 6, "--json", file)
    done(run(*words))
    (case,) = Result.load(file).cases
    assert case.name == "zest_bench_user:net, 1 thread" and case.settings.get("layers") in (3, ["3"])
    assert Result.load(file).command == command and all(one.why == "" for one in case.measured)


def test_a_built_in_model_is_measured(run):
    pytest.importorskip("transformers")
    said = done(run("step", "--size", "tiny", "--only", "llama", "--rounds", 6)).stdout
    assert "llama 2x8, 1 thread" in said and "SelectiveBackward" in said and "x FLOPs" in said


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("kernels", "moment"), ("KERNEL 'moment' is unknown", "'moments'")),
        (("kernels", "--dtype", "int8"), ("--dtype 'int8' is unknown",)),
        (("kernels", "--size", "3XB"), ("--size='3XB' is no size",)),
        (("kernels", "--size", "1KiB"), ("from 4KiB to 16GiB",)),
        (("kernels", "--threads", "1,none"), ("--threads 'none' is no number of threads",)),
        (("kernels", "--kernel", "moments"), ("is no module:function",)),
        (
            ("kernels", "--kernel", "zest_bench_user:wrong"),
            ("'wrong' is none of the kernels", "moments=zest_b"),
        ),
        (("kernels", "--kernel", "zest_bench_none:moments"), ("no module named 'zest_bench_none'",)),
        (("kernels", "--kernel", "moments=zest_bench_user:moment"), ("has no function 'moment'", "'moments'")),
        (("kernels", "--kernel", "moments=zest_bench_user:NUMBER"), ("is a int", "it has to be a function")),
        (("kernels", "channel_products", "--kernel", "zest_bench_user:moments"), ("computes moments, which is not",)),
        (("kernels", "--json", "a.txt"), ("--json a.txt: the ending '.txt' is unknown",)),
        (("profile", "zest_bench_user:net"), ("needs data, too",)),
        (("profile", "--batch-size", "3"), ("--batch-size is of a model of yours",)),
        (("step", "zest_bench_user:net", "zest_bench_user:batches", "--only", "bert"), ("--only is of the built-in",)),
        (("profile", "--size", "huge"), ("--size 'huge' is unknown",)),
        (("profile", "--only", "burt"), ("--only 'burt' is unknown", "'bert'")),
        (("profile", "--layers", "a"), ("a profile measures every layer",)),
        (("step", "--layers", "a"), ("--layers names the layers of one model",)),
        (("compare", "none.json", "none.json"), ("result 'none.json' does not exist",)),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(words, parts, run):
    refused(run(*words), *parts)


def test_built_in_models_say_what_they_need(run, monkeypatch):
    refuse_import(monkeypatch, "transformers")
    refused(run("profile", "--size", "tiny"), "the built-in models need transformers", "zest_fast[transformers]")


def test_compare_ends_with_1_where_it_got_slower_and_with_2_where_it_cannot_say(run, tmp_path):
    file, slower, other = (tmp_path / name for name in ("a.json", "b.json", "c.json"))
    document = json.loads((Path(__file__).parents[1] / "data" / "bench_v1.json").read_text())
    file.write_text(json.dumps(document))
    ours = document["cases"][0]["measured"][0]
    ours["seconds"] |= {name: 3 * ours["seconds"][name] for name in ("median", "low", "high")}
    document["machine"]["cpu"] = "another"
    slower.write_text(json.dumps(document))
    worse = run("compare", file, slower)
    assert worse.exit_code == 1 and "slower" in worse.stdout and "ANOTHER MACHINE: cpu: A, now another" in worse.stdout
    better = run("compare", slower, file)
    assert better.exit_code == 0 and "faster" in better.stdout
    document["cases"][0]["name"] = "moments 4096 float32, 2 threads"
    other.write_text(json.dumps(document))
    refused(run("compare", file, other), "the cases do not match")
    other.write_text("{}")
    refused(run("compare", file, other), "is no result of `zest-fast bench`", "format: it is not there")


def test_nothing_of_the_current_folder_is_imported_unless_it_is_named(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise SystemExit('imported')\n")
    (tmp_path / "transformers.py").write_text("raise SystemExit('imported')\n")
    words = ("kernels", "moments", *map(str, QUICK))
    command = [sys.executable, "-c", "import sys; sys.path.remove(''); from zest_fast.cli import app; app()", "bench"]
    result = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "zest_fast" in result.stdout and "imported" not in result.stdout + result.stderr
