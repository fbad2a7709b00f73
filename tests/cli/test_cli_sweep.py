"""`zest-fast sweep` on models of a few hundred weights."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import TEXTS, save_bert, save_jsonl
from typer.testing import CliRunner

import zest_fast
from zest_fast.cli import app
from zest_fast.cli.sweep import _slurm_options
from zest_fast.sweeping.records import read_records

USER_MODULE = """
import torch
from torch.utils.data import DataLoader, TensorDataset

def net():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 6), torch.nn.Linear(6, 2))

def batches():
    torch.manual_seed(2)
    targets = torch.arange(40) % 2
    return DataLoader(TensorDataset(torch.randn(40, 4) + targets[:, None], targets), batch_size=16)

def ragged():
    return DataLoader([(torch.zeros(1 + i % 2), 0) for i in range(4)], batch_size=1)
"""
QUICK = ("--steps", 2, "--batch-size", 4, "--seeds", 2)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs `zest-fast sweep` with the given words inside a folder with models and data."""
    (tmp_path / "zest_sweep_user.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "zest_sweep_user", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda *words: CliRunner().invoke(app, ["sweep", *map(str, words)])
    torch.set_num_threads(threads)


USERS = ("zest_sweep_user:net", "zest_sweep_user:batches")


def test_a_model_and_data_of_the_user(run, tmp_path) -> None:
    result = run(*USERS, *QUICK, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert {row["layer"] for row in found["best"]} == {"0", "2"} and found["layers"] == 2
    gains = [row["gain"] for row in found["best"]]
    assert gains == sorted(gains, reverse=True) and all(row["deviation"] >= 0 for row in found["best"])
    header, records = read_records(tmp_path / "sweep.jsonl")
    assert header["recipe"]["steps"] == 2 and header["recipe"]["seeds"] == [0, 1]
    assert (header["model"], header["dataset"]) == USERS
    scores = {r["layer"]: [] for r in records if r["record"] == "layer"}
    heads = {r["seed"]: r["loss"] for r in records if r["record"] == "head"}
    for r in records:
        if r["record"] == "layer":
            scores[r["layer"]].append(heads[r["seed"]] - r["loss"])
    best = found["best"][0]
    assert best["gain"] == pytest.approx(sum(scores[best["layer"]]) / 2)


def test_texts_and_a_model_folder_with_two_workers_and_again(run, tmp_path) -> None:
    save_bert(tmp_path / "bert", num_labels=2)
    save_jsonl(tmp_path / "films.jsonl", TEXTS * 6, ["pos", "neg", "pos", "neg", "pos", "pos"] * 6)
    words = ("bert", "films.jsonl", *QUICK, "--seeds", 1, "--layers", r".*attention\.self\.(query|value)", "--top", 3)
    result = run(*words, "--workers", 2, "--out", "records.jsonl")
    assert result.exit_code == 0, result.stderr
    assert "4 layers; the head alone: loss" in result.stdout and "records.jsonl" in result.stdout
    assert result.stdout.count("bert.encoder.layer") == 3
    before = (tmp_path / "records.jsonl").read_bytes()
    assert before.count(b'"record":"layer"') == 4
    again = run(*words, "--out", "records.jsonl")
    assert again.stdout == result.stdout and (tmp_path / "records.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*USERS, "--head-share", 0.7), "leave -4 of 40 samples to train on"),
        (("zest_sweep_user:net", "zest_sweep_user:ragged"), "pad all samples alike"),
        ((*USERS, "--workers", 0), "workers is 0"),
        ((*USERS, "--workers", 2, "--slurm", "timeout_min=60"), "slurm is for --workers 'slurm:N'"),
        ((*USERS, "--workers", "slurm:2", "--slurm", "timeout_min"), "expected key=value"),
        ((*USERS, "--workers", "slurm:2", "--slurm", "qos=a", "--slurm", "qos=b"), "qos is given twice"),
        ((*USERS, "--out", "records.csv"), "'.csv'"),
        ((*USERS, "--layers", "nothing"), "nothing"),
        ((*USERS, "--head-lr", 0), "head_lr"),
    ],
)
def test_wrong_input_is_one_line(run, words, message) -> None:
    result = run(*words)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert message in result.stderr


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed")
def test_jobs_of_the_local_executor(run, tmp_path, monkeypatch) -> None:
    """They find the user's module, which is in the current folder, and zest_fast where it is installed."""
    monkeypatch.setenv("PYTHONPATH", str(Path(zest_fast.__file__).parents[1]))  # here it may not be installed
    assert run(*USERS, *QUICK, "--out", "alone.jsonl").exit_code == 0
    (tmp_path / "1").mkdir()
    options = ("--slurm", "folder=1", "--slurm", "cluster=local", "--slurm", "timeout_min=5")
    result = run(*USERS, *QUICK, "--workers", "slurm:1", *options, "--out", "jobs.jsonl", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["layers"] == 2
    alone, jobs = (scores(tmp_path / name) for name in ("alone.jsonl", "jobs.jsonl"))
    assert alone == jobs and len(jobs) == 4 and not list((tmp_path / "1").iterdir())


def scores(path):
    layers = [record for record in read_records(path)[1] if record["record"] == "layer"]
    return {(record["layer"], record["seed"]): (record["loss"], record["accuracy"]) for record in layers}


@pytest.mark.parametrize(
    ("text", "value"),
    [("60", 60), ("1.5", 1.5), ("true", True), ("0123", "0123"), ("1e3", "1e3"), ("+4", "+4"), ("cpu,gpu", "cpu,gpu")],
)
def test_values_of_slurm_options_stay_as_they_were_typed(text, value) -> None:
    found = _slurm_options([f"comment={text}", "folder=2026"])
    assert found == {"comment": value, "folder": "2026"} and type(found["comment"]) is type(value)


def test_another_recipe_does_not_go_into_the_same_file(run) -> None:
    assert run(*USERS, *QUICK).exit_code == 0
    result = run(*USERS, *QUICK, "--steps", 3)
    assert result.exit_code == 2 and "recipe.steps" in result.stderr and "not mixed" in result.stderr
