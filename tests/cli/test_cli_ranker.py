"""`zest-fast train-ranker`, and `zest-fast rank` with what it wrote."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from synthetic_records import make_records, one_profile, profile_of, write_sweep
from typer.testing import CliRunner

from zest_fast.cli import app
from zest_fast.ranking import shipped
from zest_fast.ranking.ranker import Ranker
from zest_fast.sweeping import tables

DATASETS = ("digits", "cats")


@pytest.fixture(scope="module")
def records():
    return make_records(("tower", "castle"), DATASETS, blocks=3, seeds=1, states=("fresh",))


@pytest.fixture(scope="module")
def home(records, tmp_path_factory):
    """Records of the castle that "ship", sweeps of the tower, a profile and a Ranker of all."""
    folder = tmp_path_factory.mktemp("home")
    for (model, dataset), rows in records.groupby(["model", "dataset"]):
        write_sweep(rows, folder / f"{model}-{dataset}.jsonl")
    tables.consolidate([folder / f"castle-{dataset}.jsonl" for dataset in DATASETS], folder / "shipped.parquet")
    profile_of(one_profile(records, "tower", "cats")).save(folder / "profile.json")
    Ranker().fit(records).save(folder / "fitted.json")
    return folder


@pytest.fixture
def run(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr(tables, "SHIPPED", home / "shipped.parquet")
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def document(result):
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(result, *parts):
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and all(part in line for part in parts), line


def test_own_sweeps_join_the_shipped_records(run, home):
    result = document(run("train-ranker", "tower-digits.jsonl", "tower-cats.jsonl", "--out", "own.json", "--json"))
    assert result["metadata"]["pairs"] == ["castle/cats", "castle/digits", "tower/cats", "tower/digits"]
    assert result["metadata"]["recipes"] == {"castle": "aa", "tower": "aa"} and result["metadata"]["definitions"] == 1
    rows = result["cross_validation"]
    assert [(row["model"], row["dataset"]) for row in rows] == [
        (model, dataset) for model in ("castle", "tower") for dataset in ("cats", "digits")
    ]
    assert all(-1 <= row[name] <= 1 for row in rows for name in ("ranker", "layer_prior", "best_metric"))
    assert Ranker.load(home / "own.json").knows(tables.load_records("shipped.parquet").query("dataset == 'cats'"))


def test_the_report_for_people_has_a_line_for_each_pair_and_the_mean(run):
    result = run("train-ranker", "tower-digits.jsonl", "tower-cats.jsonl", "--no-shipped", "--out", "own.json")
    assert result.exit_code == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()]
    assert [line[:2] for line in lines if line[0] == "tower"] == [["tower", "cats"], ["tower", "digits"]]
    assert lines[1][:5] == ["model", "data", "set", "ranker", "layer"]
    assert next(line for line in lines if line[0] == "mean")[1].lstrip("-").startswith("0.")
    assert lines[-1][:4] == ["Ranker", "of", "2", "pairs"] and lines[-1][-1] == "own.json"


def test_shipped_records_can_be_left_out_and_a_pair_of_the_same_name_is_replaced(run, records, home):
    result = document(run("train-ranker", "shipped.parquet", "--no-shipped", "--folds", 0, "--json"))
    assert result["metadata"]["pairs"] == ["castle/cats", "castle/digits"] and result["cross_validation"] is None
    for records_words in (("shipped.parquet",), ()):
        assert document(run("train-ranker", *records_words, "--folds", 0, "--json"))["metadata"] == result["metadata"]
    own = records[(records.model == "castle") & (records.dataset == "cats")]
    write_sweep(own.assign(loss=own.loss[::-1].to_numpy()), home / "anew.jsonl")
    replaced = document(run("train-ranker", "anew.jsonl", "--folds", 0, "--json"))["metadata"]
    assert replaced["pairs"] == result["metadata"]["pairs"] and replaced["records"] != result["metadata"]["records"]


def test_records_that_do_not_fit_together_leave_no_ranker(run, records, home):
    castle = records[(records.model == "castle") & (records.dataset == "cats")].assign(dataset="dogs")
    write_sweep(castle, home / "recipe.jsonl", recipe="bb")
    write_sweep(castle.assign(model="keep"), home / "definitions.jsonl", definitions=2)
    words = ("--out", "none.json", "--folds", 0)
    refused(run("train-ranker", "recipe.jsonl", *words), "castle was swept under different recipes", "(bb)")
    refused(run("train-ranker", "definitions.jsonl", *words), "different definitions: 1 (castle/", "2 (keep/dogs)")
    twice = ("tower-cats.jsonl", "tower-cats.jsonl")
    refused(run("train-ranker", *twice, *words), "both hold records of tower on cats")
    assert not (home / "none.json").exists()


def test_files_that_cannot_be_used_are_named(run, home):
    refused(run("train-ranker", "tower-cat.jsonl"), "'tower-cat.jsonl' do not exist", "tower-cats.jsonl")
    (home / "torn.jsonl").write_text("something else\n")
    refused(run("train-ranker", "torn.jsonl"), "torn.jsonl'", "no record file")
    refused(run("train-ranker", "tower-cats.jsonl", "--out", "ranker.pkl"), "'.pkl'")
    refused(run("train-ranker", "--no-shipped"), "leaves nothing to learn from")
    refused(run("train-ranker", "tower-cats.jsonl", "--no-shipped"), "two families of data sets")


def test_rank_by_a_ranker_of_ones_own(run):
    found = document(run("rank", "profile.json", "--ranker", "fitted.json", "--top", 2, "--json"))
    assert found["by"] == "Ranker" and found["names"][:2] == found["top"] and found["names"][-1] == "head"
    low, high = found["intervals"][0]
    assert low <= found["scores"][0] <= high and found["note"].startswith("knows tower (100% of the layers)")
    table = run("rank", "profile.json", "--ranker", "fitted.json", "--top", 2).stdout
    assert found["top"][0] in table and "80% interval" in table and found["note"][:31] in table


def test_rank_without_words_takes_the_shipped_ranker(run, home, monkeypatch):
    monkeypatch.setattr(shipped, "SHIPPED", home / "no-such-ranker.json")
    refused(run("rank", "profile.json"), "no Ranker ships with this version yet", "snip")
    monkeypatch.setattr(shipped, "SHIPPED", home / "fitted.json")
    assert document(run("rank", "profile.json", "--json"))["by"] == "Ranker"


def test_rank_refuses_two_orders_and_files_that_are_no_ranker(run):
    refused(run("rank", "profile.json", "--by", "snip", "--ranker", "fitted.json"), "exclude each other")
    refused(run("rank", "profile.json", "--ranker", "fited.json"), "'fited.json' does not exist", "fitted.json")
    refused(run("rank", "profile.json", "--ranker", "profile.json"), "profile.json' is no Ranker")


def test_neither_command_needs_torch(home):
    code = (
        "import sys; from zest_fast.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    train = ["train-ranker", home / "tower-cats.jsonl", "--no-shipped", "--folds", "0", "--out", home / "light.json"]
    rank = ["rank", home / "profile.json", "--ranker", home / "fitted.json"]
    for words in (train, rank):
        found = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
