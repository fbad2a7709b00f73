"""From data to something served, and an interrupted run that goes on: finetune, merge, apply, diff, evaluate."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections import namedtuple

import pytest
import torch
import transformers
from checkpoints import TEXTS, save_bert, save_digits, save_jsonl, save_llama, save_resnet
from command_results import document, done, refused
from safetensors.torch import load_file
from typer.testing import CliRunner

from zest_fast.cli import app
from zest_fast.cli.jobs import finetuning
from zest_fast.finetuning.delta_files import read_delta
from zest_fast.finetuning.run_state import read_run

pytestmark = pytest.mark.usefixtures("one_thread")
LABELS = ["pos", "neg", "pos", "neg", "pos", "pos"]

USER_MODULE = """
import torch
from torch.utils.data import DataLoader, Dataset

class Noisy(Dataset):
    '''Augments with a random number of torch's and one of Python's.'''
    def __len__(self):
        return 20

    def __getitem__(self, index):
        import random
        return torch.full((4,), index / 20) + torch.randn(4) * 0.1 + random.random() * 0.1, index % 2

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = torch.nn.Linear(4, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 2)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x):
        return self.head(self.drop(self.b(self.a(x).relu()).relu()))

def net():
    torch.manual_seed(1)
    return Net()

def noisy():
    return DataLoader(Noisy(), batch_size=4, shuffle=True)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_bert(folder / "bert", num_labels=2, hidden_dropout_prob=0.1)
    save_llama(folder / "llama")
    save_resnet(folder / "resnet", num_labels=3)
    save_digits(folder / "digits")
    save_jsonl(folder / "films.jsonl", TEXTS * 4, LABELS * 4)
    save_jsonl(folder / "texts.jsonl", TEXTS * 4)
    return folder


@pytest.fixture
def home(models, tmp_path, monkeypatch):
    for entry in models.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "zest_loop_user.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("zest_loop_user", None)


@pytest.fixture
def run(home):
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


BERT = ("finetune", "bert", "films.jsonl")
LAYER = ("--layers", "bert.encoder.layer.1.output.dense")


# --- A folder that is served ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "data", "more", "kind"),
    [
        ("bert", "films.jsonl", (), "AutoModelForSequenceClassification"),
        ("resnet", "digits", ("--batch-size", 4), "AutoModelForImageClassification"),
        ("llama", "texts.jsonl", ("--task", "causal-lm"), "AutoModelForCausalLM"),
        ("llama", "texts.jsonl", ("--task", "causal-lm", "--frozen", "int8"), "AutoModelForCausalLM"),
    ],
)
def test_the_saved_folder_is_the_delta_in_its_base(run, home, model, data, more, kind):
    words = ("finetune", model, data, "--top", 1, "--steps", 2, *more)
    found = document(run(*words, "--out", "d.safetensors", "--save-model", "served", "--json"))
    assert found["model"] == "served" and found["model_not_saved"] is None
    done(run("merge", model, "d.safetensors", "merged"))
    assert document(run("diff", "served", "merged", "--json"))["same"]
    delta = read_delta("d.safetensors")
    state = getattr(transformers, kind).from_pretrained("served").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in delta.parameters.items())
    if model == "resnet":
        assert transformers.AutoImageProcessor.from_pretrained("served").size
    else:
        assert transformers.AutoTokenizer.from_pretrained("served")("the film")["input_ids"]


def test_the_folder_names_its_classes_and_scores_as_the_delta_does(run, home):
    found = document(run(*BERT, *LAYER, "--steps", 3, "--lr", 0.01, "--save-model", "served", "--json"))
    config = transformers.AutoConfig.from_pretrained("served")
    assert config.id2label == {0: "neg", 1: "pos"} and config.label2id == {"neg": 0, "pos": 1}
    words = ("evaluate", "bert", "films.jsonl", "--delta", "delta.safetensors", "--json")
    with_delta, alone = document(run(*words)), document(run("evaluate", "served", "films.jsonl", "--json"))
    assert with_delta["class_names"] == alone["class_names"] == ["neg", "pos"]
    assert with_delta["predictions"] == 24 and with_delta["accuracy"] == alone["accuracy"]
    assert with_delta["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    held = document(run(*words, "--held-out"))
    assert {key: held[key] for key in found["after"]} == found["after"]
    assert "was trained on these data, on 90% of them" in run(*words).stderr


def test_a_delta_says_how_it_came_about(run, home):
    words = (*BERT, "--top", 2, "--steps", 1, "--max-length", 9, "--batch-size", 4, "--seed", 5)
    found = document(run(*words, "--out", "d.safetensors", "--json"))
    delta = read_delta("d.safetensors")
    assert delta.class_names == ("neg", "pos")
    assert delta.ranking["note"] == found["note"] and "tau" in found["note"]
    assert delta.ranking["names"][: len(found["layers"])] and delta.recipe["lr"] == 1e-4
    assert delta.recipe["model"] == "bert" and delta.recipe["steps"] == 1
    said = {key: delta.data[key] for key in ("task", "text_column", "max_length", "batch_size", "seed")}
    assert said == {
        "task": "text-classification",
        "text_column": "text",
        "max_length": 9,
        "batch_size": 4,
        "seed": 5,
    }
    scored = document(run("evaluate", "bert", "films.jsonl", "--delta", "d.safetensors", "--json"))
    longer = document(run("evaluate", "bert", "films.jsonl", "--delta", "d.safetensors", "--max-length", 3, "--json"))
    assert scored["loss"] != longer["loss"]  # what is written counts


def test_labels_in_columns_of_other_names_are_found_again(run, home):
    rows = [{"review": text, "stars": label} for text, label in zip(TEXTS * 4, [1, 3, 1, 3, 1, 1] * 4, strict=True)]
    (home / "stars.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ("--text-column", "review", "--label-column", "stars")
    done(run("finetune", "bert", "stars.jsonl", *columns, *LAYER, "--steps", 1, "--save-model", "served"))
    assert transformers.AutoConfig.from_pretrained("served").id2label == {0: "1", 1: "3"}
    assert read_delta("delta.safetensors").data["new_head"] is True
    found = document(run("evaluate", "bert", "stars.jsonl", "--delta", "delta.safetensors", "--json"))
    again = document(run("evaluate", "served", "stars.jsonl", *columns, "--json"))
    assert found["loss"] == pytest.approx(again["loss"], rel=1e-5)
    refused(run("evaluate", "bert", "films.jsonl", "--delta", "delta.safetensors"), "no column")
    (home / "five.jsonl").write_text('{"review": "a joy", "stars": 5}\n')
    refused(run("evaluate", "bert", "five.jsonl", "--delta", "delta.safetensors"), "'5' is none of the model's classes")


def test_a_random_head_is_not_scored(run, home):
    result = run("evaluate", "bert", "films.jsonl")
    refused(result, "does not hold a head for these classes", "--delta")
    refused(run("evaluate", "bert", "films.jsonl", "--held-out"), "pass --delta")
    done(run(*BERT, *LAYER, "--steps", 1, "--validation-share", 0))
    words = ("evaluate", "bert", "films.jsonl", "--delta", "delta.safetensors", "--held-out")
    refused(run(*words), "held nothing out")
    refused(run(*words, "--seed", 3), "--seed names another")
    (home / "films.jsonl").unlink()
    save_jsonl(home / "films.jsonl", TEXTS, LABELS)
    refused(run(*words), "was not trained on what films.jsonl holds now")


def test_apply_changes_a_folder_in_place(run, home):
    done(run(*BERT, *LAYER, "--head", "classifier", "--steps", 1, "--out", "d.safetensors"))
    shutil.copytree("bert", "mine")
    refused(run("apply", "mine", "d.safetensors"), "cannot be changed in place", "merge it")  # a new head
    words = ("finetune", "llama", "texts.jsonl", "--task", "causal-lm", "--top", 1, "--steps", 1)
    done(run(*words, "--out", "l.safetensors"))
    shutil.copytree("llama", "patched")
    assert "would change: model.safetensors" in done(run("apply", "patched", "l.safetensors", "--check")).stdout
    assert document(run("diff", "llama", "patched", "--json"))["same"]
    assert "changed: model.safetensors" in done(run("apply", "patched", "l.safetensors")).stdout
    found = document(run("diff", "llama", "patched", "--json"))
    assert {one["name"] for one in found["changed"]} == set(read_delta("l.safetensors").parameters)
    shown = done(run("diff", "llama", "l.safetensors")).stdout
    assert "1 of 1 tensors differ" in shown and "a delta holds what was trained alone" in " ".join(shown.split())
    refused(run("diff", "llama", "d.safetensors"), "share no name")


def test_outputs_that_cannot_be_are_refused_before_anything_is_loaded(run, home):
    done(run(*BERT, *LAYER, "--steps", 1, "--out", "d.safetensors"))
    (home / "there").mkdir()
    (home / "zest_loop_user.py").write_text("raise RuntimeError('loaded before the output was checked')")
    model, data = "zest_loop_user:net", "zest_loop_user:noisy"
    for option in ("--save-model",):
        refused(run("finetune", model, data, option, "there"), f"{option} there is there already")
        refused(run("finetune", model, data, option, "gone/x"), "does not exist")
        refused(run("finetune", model, data, option, "/proc/x"), f"{option} /proc/x cannot be written")
    refused(run("merge", "bert", "d.safetensors", "there"), "OUT there is there already")
    refused(run("merge", "bert", "d.safetensors", "/proc/x"), "OUT /proc/x cannot be written")
    refused(run("merge", "bert", "d.safetensors", "x.safetensors"), "name a new folder")
    refused(run("merge", "bert", "gone", "x"), "delta 'gone' does not exist")
    refused(run("merge", "bert", "films.jsonl", "x"), "is no delta that can be read")
    assert not (home / "x").exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--by", "snipp"), ["--by 'snipp'", "'snip'"]),
        (("--prefer", "cheap"), ["--prefer 'cheap'", "'cheap-cut'"]),
        (("--checkpoint", "all"), ["--checkpoint 'all'", "above-cut"]),
        (("--frozen", "int3"), ["--frozen 'int3'", "int8"]),
        (("--max-memory", "much"), ["--max-memory 'much'", "16GiB"]),
        (("--cache", "c", "--cache-limit", "much"), ["--cache-limit 'much'"]),
        (("--task", "chat"), ["--task 'chat'"]),
        (("--lr", "inf"), ["--lr inf"]),
        (("--device", "gpu"), ["--device 'gpu'"]),
        (("--layers", "a", "--prefer", "cheap-cut"), ["--prefer chooses among ranked layers"]),
        (("--resume", "gone.pt"), ["run 'gone.pt' does not exist"]),
        (("--resume", "films.jsonl"), ["is no run that can be resumed"]),
    ],
)
def test_every_option_is_checked_before_anything_is_loaded(run, home, words, parts):
    (home / "zest_loop_user.py").write_text("raise RuntimeError('loaded before the options were checked')")
    refused(run("finetune", "zest_loop_user:net", "zest_loop_user:noisy", *words), *parts)


def test_a_disk_without_room_is_found_out_before_training(run, home, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(
        "zest_fast.cli.jobs.finetuning.shutil.disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000)
    )
    monkeypatch.setattr("zest_fast.cli.jobs.finetuning.train", lambda *a, **b: pytest.fail("trained"))
    refused(run(*BERT, *LAYER, "--steps", 1), "--out delta.safetensors will take about 1 MiB", "make room")
    monkeypatch.setattr("zest_fast.cli.jobs.finetuning.shutil.disk_usage", lambda path: usage(10**9, 0, 10_000))
    refused(run(*BERT, *LAYER, "--steps", 1, "--save-model", "m"), "--save-model m will take")
    refused(run(*BERT, *LAYER, "--steps", 1, "--save-every", 1), "--out")


def test_a_model_of_no_folder_is_refused_before_training(run, home):
    words = ("finetune", "zest_loop_user:net", "zest_loop_user:noisy", "--layers", "b", "--steps", 1)
    refused(run(*words, "--save-model", "m"), "is a Net without save_pretrained")
    done(run(*words))
    assert "merged in memory" in done(run("merge", "zest_loop_user:net", "delta.safetensors", "m.safetensors")).stdout
    delta, merged = read_delta("delta.safetensors"), load_file("m.safetensors")
    assert len(merged) == 6 and all(torch.equal(merged[name], tensor) for name, tensor in delta.parameters.items())


def test_dry_run_stops_after_the_plan(run, home):
    before = {entry.name for entry in home.iterdir()}
    words = (*BERT, "--top", 2, "--dry-run", "--save-model", "served")
    found = document(run(*words, "--json"))
    assert {entry.name for entry in home.iterdir()} == before | {"__pycache__"} & {e.name for e in home.iterdir()}
    assert len(found["layers"]) == 2 and found["plan"]["peak_bytes"] > 0 and found["note"]
    trained = document(run(*BERT, "--top", 2, "--steps", 1, "--json"))
    assert trained["layers"] == found["layers"] and trained["trainable"] == found["trainable"]
    assert trained["plan"] == found["plan"] and trained["trainable_parameters"] == found["plan"]["trainable_parameters"]
    shown = run(*words)
    assert "nothing was trained" in shown.stdout
    for part in ("training bert.", "ranking: ", "plan: a step takes"):
        assert part in shown.stderr
    named = run("finetune", "zest_loop_user:net", "zest_loop_user:noisy", "--layers", "b", "--dry-run")
    assert "plan: a step takes" in done(named).stderr
    refused(run(*BERT, "--layers", "bert.nothing", "--dry-run"), "no layer 'bert.nothing'")


# --- Runs that go on ------------------------------------------------------------------------------------------------


def interrupt_after(monkeypatch, steps):
    """SIGINT after the step with this number, as Ctrl-C sends it."""
    old = finetuning.train

    def train(*arguments, report, **options):
        def reported(step, loss, place):
            report(step, loss, place)
            if step == steps:
                os.kill(os.getpid(), signal.SIGINT)

        return old(*arguments, report=reported, **options)

    monkeypatch.setattr(finetuning, "train", train)
    return lambda: monkeypatch.setattr(finetuning, "train", old)


CASES = {
    "a table, dropout, the second epoch": ((*BERT, *LAYER, "--epochs", 3, "--batch-size", 4, "--lr", 0.01), 8),
    "the end of an epoch": ((*BERT, *LAYER, "--epochs", 3, "--batch-size", 4, "--lr", 0.01), 6),
    "steps and a ranking": ((*BERT, "--top", 2, "--steps", 9, "--batch-size", 4), 5),
    "images": (("finetune", "resnet", "digits", "--top", 1, "--epochs", 2, "--batch-size", 4), 4),
    "a loader of the user's": (
        ("finetune", "zest_loop_user:net", "zest_loop_user:noisy", "--layers", "b", "--epochs", 3),
        7,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_goes_on_to_the_bit(run, home, monkeypatch, case):
    """Dropout, shuffling and the moments of Adam are as if nothing had happened."""
    words, steps = CASES[case]
    random.seed(11)
    whole = document(run(*words, "--out", "whole.safetensors", "--json"))
    random.seed(11)
    undo = interrupt_after(monkeypatch, steps)
    result = run(*words, "--out", "part.safetensors")
    undo()
    assert result.exit_code == 130 and result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert f"--resume part.run.pt goes on after step {steps}" in last and "part.interrupted.safetensors" in last
    random.seed(12)  # another process, as it were
    again = document(run(*words[:3], "--resume", "part.run.pt", "--out", "part.safetensors", "--json"))
    ours, theirs = load_file("part.safetensors"), load_file("whole.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert again["training_loss"] == whole["training_loss"] and again["steps"] == whole["steps"]
    assert again["before"] == whole["before"] and again["after"] == whole["after"]
    one, other = (read_delta(f"{name}.safetensors") for name in ("part", "whole"))
    assert one.recipe == other.recipe and one.data == other.data and one.ranking == other.ranking


def test_saving_every_few_steps_changes_nothing_and_can_be_gone_on_from(run, home, monkeypatch):
    words = (*BERT, *LAYER, "--steps", 7, "--batch-size", 4)
    done(run(*words, "--out", "whole.safetensors"))
    done(run(*words, "--out", "d.safetensors", "--save-every", 3))
    assert load_file("d.safetensors").keys() == load_file("whole.safetensors").keys()
    assert read_run("d.run.pt").progress["losses"][5] and len(read_run("d.run.pt").progress["losses"]) == 6
    (home / "d.safetensors").unlink()
    done(run(*BERT, "--resume", "d.run.pt", "--out", "d.safetensors"))
    for name, tensor in load_file("whole.safetensors").items():
        assert torch.equal(load_file("d.safetensors")[name], tensor), name


def test_a_run_that_cannot_be_saved_is_no_end_of_the_training(run, home, monkeypatch):
    def full(self, *arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zest_fast.finetuning.selective_backward.SelectiveBackward.save_run", full)
    result = done(run(*BERT, *LAYER, "--steps", 3, "--save-every", 1))
    assert "delta.run.pt could not be written (No space left" in result.stderr
    assert read_delta("delta.safetensors").recipe["steps"] == 3


@pytest.fixture
def interrupted(run, home):
    done(run(*BERT, *LAYER, "--steps", 4, "--batch-size", 4, "--save-every", 2, "--out", "d.safetensors"))
    return "d.run.pt"


def test_other_options_and_data_are_named(run, home, interrupted):
    again = (*BERT, "--resume", interrupted)
    refused(run(*again, "--lr", 0.5), "--lr 0.5 (it was started with 0.0001)")
    refused(run(*again, "--batch-size", 3, "--seed", 1), "--batch-size 3", "--seed 1 (it was started with 0)")
    refused(run(*again, *LAYER), "--layers is about choosing layers")
    refused(run(*again, "--cache", "c"), "--cache (it was started without)")
    refused(run(*again, "--no-masters"), "--masters False (it was started with True)")
    refused(run("finetune", "llama", "films.jsonl", "--resume", interrupted), "bert.encoder.layer.1.output.dense")
    weights = save_bert(home / "other", num_labels=2, hidden_dropout_prob=0.1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(weights)
    torch.nn.init.ones_(model.bert.pooler.dense.bias)
    model.save_pretrained(weights)
    result = run("finetune", "other", "films.jsonl", "--resume", interrupted)
    assert result.exit_code == 2 and "frozen parameters or buffers of this model differ" in result.stderr
    done(run(*again, "--lr", 0.0001, "--out", "again.safetensors"))  # as it was
    (home / "films.jsonl").unlink()
    save_jsonl(home / "films.jsonl", TEXTS * 4, LABELS[::-1] * 4)
    refused(run(*again), "films.jsonl does not hold what the run was started with")


def test_a_run_of_another_loop_is_refused(run, home, tmp_path):
    from zest_fast import SelectiveBackward

    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    with SelectiveBackward(model, ["0"]) as tuned:
        optimizer = torch.optim.AdamW(tuned.parameters())
        for progress in (
            None,
            {"step": 1},
            {"kind": "zest-fast finetune"},
            {"kind": "zest-fast finetune", "layers": 3},
        ):
            tuned.save_run("mine.pt", optimizer, progress=progress)
            refused(run(*BERT, "--resume", "mine.pt"), "--resume mine.pt")


# --- Float32 masters ------------------------------------------------------------------------------------------------


@pytest.fixture
def low(home):
    """A folder whose weights are bfloat16."""
    transformers.LlamaForCausalLM.from_pretrained("llama").bfloat16().save_pretrained("low")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(home / "llama" / name, home / "low" / name)
    return ("finetune", "low", "texts.jsonl", "--task", "causal-lm", "--layers", "model.layers.1.mlp.up_proj")


def test_a_model_in_bfloat16_trains_with_masters(run, home, low, monkeypatch):
    words = (*low, "--steps", 6, "--batch-size", 4, "--lr", 2e-5)
    with_masters = run(*words, "--out", "d.safetensors", "--save-every", 3, "--json")
    assert "keeps float32 masters" in with_masters.stderr and "cannot move" not in with_masters.stderr
    plain = run(*words, "--no-masters", "--out", "p.safetensors", "--json")
    assert "cannot move at a learning rate of 2e-05" in plain.stderr and "keeps float32" not in plain.stderr
    assert document(with_masters)["plan"]["breakdown"]["optimizer"] > document(plain)["plan"]["breakdown"]["optimizer"]
    ours, theirs = read_delta("d.safetensors"), read_delta("p.safetensors")
    assert ours.dtypes == ("bfloat16",) and ours.recipe["masters"] == "float32" and theirs.recipe["masters"] is None
    before = load_file("low/model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    moved = [
        float((d.parameters["model.layers.1.mlp.up_proj.weight"] != before).float().mean()) for d in (ours, theirs)
    ]
    assert moved[0] > moved[1]
    done(run(*low[:3], "--resume", "d.run.pt", "--out", "e.safetensors"))
    again = load_file("e.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.parameters.items())


def test_a_float32_model_has_no_masters(run, home):
    result = run(*BERT, *LAYER, "--steps", 1, "--json")
    assert "masters" not in result.stderr and document(result)
    assert read_delta("delta.safetensors").recipe["masters"] is None


def test_a_folder_that_cannot_be_written_leaves_the_delta_and_says_how_to_go_on(run, home, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("Some tensors share memory")

    monkeypatch.setattr("zest_fast.cli.jobs.finetuning.save_model_folder", broken)
    result = run(*BERT, *LAYER, "--steps", 1, "--save-model", "served", "--json")
    assert result.exit_code == 2 and json.loads(result.stdout)["model_not_saved"]
    last = result.stderr.splitlines()[-1]
    assert "served could not be written (Some tensors share memory)" in last and "zest-fast merge" in last
    monkeypatch.undo()
    monkeypatch.chdir(home)
    done(run("merge", "bert", "delta.safetensors", "served"))


def test_data_that_are_gone_are_named(run, home, interrupted):
    refused(
        run("finetune", "bert", "film.jsonl", "--resume", interrupted), "'film.jsonl' does not exist", "films.jsonl"
    )
    done(run(*BERT, *LAYER, "--steps", 1))
    refused(run("evaluate", "bert", "film.jsonl", "--delta", "delta.safetensors"), "'film.jsonl' does not exist")
