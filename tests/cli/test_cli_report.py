"""`zest-fast report`: one page of what a run has left; what it says of files that are missing, damaged or foreign."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from axe import look_at, missing
from checkpoints import TEXTS, save_bert, save_jsonl
from html_checks import Parsed
from profiles import make_profile
from torch import nn
from typer.testing import CliRunner

import zest_fast
from zest_fast.cli import app
from zest_fast.cli.jobs import scores
from zest_fast.cli.jobs.record import FIGURES, thinned
from zest_fast.finetuning.delta_files import read_delta

pytestmark = pytest.mark.usefixtures("one_thread")

SECTIONS = ["In short", "Ranking", "Profile", "Memory", "Training", "Watched run", "Files"]
EVIL = 'a<script>alert("1")</script>&b'


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with all that the commands and a watch leave: profile, delta, run, plan, log, and files of others."""
    folder = tmp_path_factory.mktemp("made")
    save_bert(folder / "bert", num_labels=2)
    save_jsonl(folder / "films.jsonl", TEXTS * 4, ["pos", "neg"] * 12)
    run = folder / "run"
    run.mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    here = Path.cwd()
    os.chdir(folder)
    try:
        lines = [
            ("profile", "bert", "films.jsonl", "--label-column", "label", "--batches", 2, "--batch-size", 8),
            ("finetune", "bert", "films.jsonl", "--top", 3, "--epochs", 2, "--batch-size", 4, "--json"),
        ]
        done = [
            command(*lines[0], "--out", "run/profile.json"),
            command(*lines[1], "--out", "run/delta.safetensors", "--save-every", 3),
        ]
        assert all(result.exit_code == 0 for result in done), [result.output for result in done]
    finally:
        os.chdir(here)
        torch.set_num_threads(threads)
    (folder / "finetuning.json").write_text(done[1].stdout)
    (run / "config.json").write_text('{"model_type": "bert"}')
    (run / "films.jsonl").write_text('{"text": "a film"}\n')
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with zest_fast.watch(model, every=1, log=run / "watch.jsonl"):
        for _ in range(3):
            nn.functional.cross_entropy(model(torch.ones(4, 4)), torch.zeros(4, dtype=torch.long)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return folder


@pytest.fixture
def without_matplotlib(monkeypatch):
    """Also for tests that are not about figures: drawing is what a page waits for."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name))


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.copy(made / "finetuning.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def page(*words) -> Parsed:
    result = command("report", *words, "-o", "page.html")
    assert result.exit_code == 0, result.output
    found = Parsed(Path("page.html").read_text(encoding="utf-8"))
    assert not found.errors
    return found


def refused(*words) -> str:
    """The message; the page that was there is as it was."""
    Path("page.html").write_text("before")
    result = command("report", *words, "-o", "page.html")
    assert result.exit_code == 2 and Path("page.html").read_text() == "before", result.output
    (line,) = result.stderr.splitlines()
    return line


def test_a_folder_becomes_one_page_that_needs_nothing_else(folder):
    found = page("run")
    text = Path("page.html").read_text(encoding="utf-8")
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">') and '<meta name="viewport"' in text
    assert (
        not re.search(r"https?://(?!www\.w3\.org/)", text)
        and "@import" not in text
        and "url(" not in text.replace("url(#", "")
    )
    assert [line for line in SECTIONS if line in found.text] == SECTIONS
    assert len(found.all("h1")) == 1 and len(found.all("h2")) == len(SECTIONS) and len(found.all("title")) == 1
    assert {one["href"] for one in found.all("a")} == {f"#{one['id']}" for one in found.all("section")}
    # scores, heat map, parts of the memory, loss, and two of the watched run; each is a table, too
    assert len(found.all("svg")) == 6 and len(found.all("details")) >= 5 and "No figure" not in found.text
    assert "prefers-color-scheme: dark" in text
    scrolling = [one for one in found.all("div") if one.get("class") == "scroll"]
    assert all(one["tabindex"] == "0" and one["role"] == "region" and one["aria-label"] for one in scrolling)
    assert not any(one in found.text for one in ("config.json", "films.jsonl"))
    assert page("run") and Path("page.html").read_text(encoding="utf-8") == text  # the same files, the same page


def test_what_the_page_says_is_what_the_files_say(folder, without_matplotlib):
    found = page("run")
    delta, profile = read_delta("run/delta.safetensors"), zest_fast.LayerProfile.load("run/profile.json")
    ranking = delta.ranking
    assert ranking["note"] in found.text and all(f"{name} (trains)" in found.text for name in delta.layers)
    low, high = ranking["intervals"][0]
    assert f"{ranking['scores'][0]:.4g}" in found.text and f"{low:.4g}" in found.text and f"{high:.4g}" in found.text
    part, added = ranking["reasons"][ranking["names"][0]][0]
    assert f"{added:+.3f}" in found.text and (part.startswith("base_") or part.replace("_", " ") in found.text)
    assert f"means of 2 batches, loss {profile.loss:.4g}" in found.text
    record = delta.recipe["record"]
    assert f"{record['plan']['breakdown']['weights']:,}" in found.text
    assert record["curve"]["steps"] == list(range(1, 13)) and f"{record['curve']['losses'][-1]:.4g}" in found.text
    assert "before" in found.text and f"{record['before']['loss']:.4g}" in found.text
    assert "3 steps logged, 0 to 2, 2 layers." in found.text
    assert "classes neg, pos" in found.text and "12 steps" in found.text


def test_single_files_and_what_finetune_printed(folder):
    found = page("run/delta.safetensors", "finetuning.json")
    report = json.loads(Path("finetuning.json").read_text())
    assert f"after {report['after']['loss']:.4g}" in found.text
    assert f"{report['trainable_parameters']:,} of {report['parameters']:,}" in found.text
    for line in ("No profile: zest-fast profile MODEL DATA --out", "No log of a watched run: zest_fast.watch("):
        assert line in found.text
    assert "No figure" not in found.text and len(found.all("svg")) == 3


@pytest.mark.parametrize(
    ("file", "shown", "absent"),
    [
        ("run/profile.json", "run/profile.json, ranked for this page", "No learning curve"),
        ("run/watch.jsonl", "3 steps logged", "No ranking"),
        ("run/delta.run.pt", "layers that train", "No profile"),
    ],
)
def test_each_file_alone(folder, without_matplotlib, file, shown, absent):
    found = page(file)
    assert shown in found.text and absent in found.text


def test_a_ranking_and_a_plan(made, folder, without_matplotlib):
    profile = zest_fast.LayerProfile.load("run/profile.json")
    zest_fast.rank(profile, by="snip").save("ranking.json")
    result = command("plan", made / "bert", "--layers", 2, "--sequence-length", 8, "--json")
    Path("plan.json").write_text(result.stdout)
    found = page("ranking.json", "plan.json")
    assert (
        "By snip" in found.text
        and "Reasons" not in found.text
        and f"zest_fast report: {json.loads(result.stdout)['model']}" in found.text
    )
    assert f"{json.loads(result.stdout)['breakdown']['weights']:,}" in found.text


def test_the_newest_of_a_folder_counts_and_the_others_are_named(folder, without_matplotlib):
    shutil.copy("run/profile.json", "run/older.json")
    os.utime("run/older.json", (1, 1))
    assert "run/older.json is a second profile" in page("run").text
    assert "a second profile" in refused("run/profile.json", "run/older.json")


def test_damaged_files_are_named(folder, without_matplotlib):
    whole = Path("run/profile.json").read_bytes()
    Path("run/profile.json").write_bytes(whole[:-40])
    found = page("run")
    assert "'run/profile.json' is no profile that can be read" in found.text and "No profile" in found.text
    assert "run/profile.json" in command("report", "run", "-o", "page.html").stderr
    assert "'run/profile.json' is no profile that can be read" in refused("run/profile.json")
    delta = bytearray(Path("run/delta.safetensors").read_bytes())
    delta[-1] ^= 1
    Path("run/delta.safetensors").write_bytes(delta)
    assert "checksum" in refused("run/delta.safetensors") and "checksum" in page("run").text
    log = Path("run/watch.jsonl").read_bytes()
    Path("run/watch.jsonl").write_bytes(log.replace(b'"loss":', b'"lost":', 1))
    Path("run/delta.run.pt").write_bytes(b"PK torn")
    assert "there is nothing to report" in refused("run") and "line 2" in refused("run")
    for name in ("profile.json", "delta.safetensors", "watch.jsonl", "delta.run.pt"):
        assert name in refused("run")


def test_documents_of_another_form_are_refused(folder):
    report = json.loads(Path("finetuning.json").read_text())
    Path("finetuning.json").write_text(json.dumps({**report, "training_loss": "high"}))
    assert "training_loss: expected a list" in refused("finetuning.json")


def test_what_a_user_wrote_into_a_delta_is_passed_over_with_a_word(folder):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with zest_fast.SelectiveBackward(model, ["0"], head=["1"]) as tuned:
        nn.functional.cross_entropy(model(torch.ones(2, 4)), torch.tensor([0, 1])).backward()
        tuned.save("mine.safetensors", ranking=["0", "1"], recipe={"record": {"plan": 3}, "model": EVIL})
    found = page("mine.safetensors")
    assert "its ranking has another form" in found.text and "its record of its training has another form" in found.text
    assert EVIL in found.text and not found.all("script")


def test_files_of_different_models_and_trainings_are_pointed_out(folder, without_matplotlib):
    make_profile({"a": 1.0, "b": 2.0}).save("other.json")
    report = json.loads(Path("finetuning.json").read_text())
    Path("finetuning.json").write_text(json.dumps({**report, "layers": report["layers"][1:]}))
    result = command("report", "other.json", "run/delta.safetensors", "finetuning.json", "-o", "page.html")
    text = Parsed(Path("page.html").read_text()).text
    for line in ("other.json has no layer 'bert.", "finetuning.json is of a training of other layers"):
        assert line in text and line in result.stderr
    assert "which trains" not in page("run").text


def test_names_of_layers_are_text(folder):
    make_profile({EVIL: 1.0, "b": np.nan}).save("evil.json")
    found = page("evil.json")
    assert EVIL in found.text and not found.all("script") and "cannot be ranked" in found.text


def test_without_matplotlib_the_tables_are_there(folder, without_matplotlib):
    found = page("run")
    assert not found.all("svg") and "pip install 'zest_fast[plot]'" in found.text and len(found.all("table")) >= 7


def test_what_can_be_no_page_or_source(folder):
    Path("mine.txt").write_text("x")
    assert "'nowhere' does not exist" in refused("nowhere")
    assert "'mine.txt' is none of what a report shows" in refused("mine.txt")
    assert "'run/config.json' is none of what" in refused("run/config.json")
    Path("empty").mkdir()
    assert "there is nothing to report" in refused("empty")
    result = command("report", "run", "-o", "page.pdf")
    assert result.exit_code == 2 and "'.html'" in result.stderr


def test_a_curve_is_thinned_by_means():
    assert thinned([3.0, 1.0]) == {"steps": [1, 2], "losses": [3.0, 1.0]}
    assert thinned([1.0, 3.0, 5.0, 7.0], most=2) == {"steps": [2, 4], "losses": [2.0, 6.0]}
    assert thinned([]) == {"steps": [], "losses": []}
    long = thinned(list(map(float, range(1234))))
    assert len(long["steps"]) == 500 and long["steps"][-1] == 1234


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_axe_has_nothing_to_say(folder, width, dark):
    page("run", "finetuning.json")
    text = Path("page.html").read_text(encoding="utf-8")
    Path("open.html").write_text(text.replace("<details>", "<details open>"), encoding="utf-8")
    for name in ("page.html", "open.html"):
        found = look_at(Path(name), folder, width=width, dark=dark)
        assert found["violations"] == [] and found["passes"] > 30
        assert found["dark"] is dark and found["width"] == width and found["needs"] <= width


def test_a_training_that_is_scored_by_other_figures_has_its_scores_too(made, folder, without_matplotlib):
    (folder / "bert").symlink_to(made / "bert")
    save_jsonl(folder / "numbers.jsonl", TEXTS * 2, [place / 4 for place in range(2 * len(TEXTS))])
    words = ("--layers", "bert.encoder.layer.1.output.dense", "--validation-share", 0.5, "--task", "regression")
    done = command("finetune", "bert", "numbers.jsonl", *words, "--out", "other.safetensors", "--json")
    assert done.exit_code == 0, done.output
    Path("other.json").write_text(done.stdout)
    for file in ("other.safetensors", "other.json"):
        found = page(file)
        text = Path("page.html").read_text(encoding="utf-8")
        assert not found.errors and "another form" not in text
        for name in ("mse", "pearson", "spearman", "predictions"):
            assert f">{name}</th>" in text
        assert f"{json.loads(done.stdout)['before']['mse']:.4g}" in text


def test_every_task_is_scored_by_figures_that_a_page_knows():
    tallies = (scores._Classes(), scores._Numbers(), scores._Sets(), scores._Tags(("O", "B-x", "I-x")))
    logits, tags = torch.zeros(2, 3), torch.tensor([0, 1])
    for tally, outputs, targets in zip(
        tallies, (logits, logits[:, 0], logits, logits), (tags, torch.ones(2), torch.ones(2, 3), tags), strict=True
    ):
        tally.add(outputs, targets, targets.view(1, -1))
        assert set(tally.figures()) <= set(FIGURES)
