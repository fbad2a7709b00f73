"""Every task from the shell: what its data are taken for, training, the saved folder, and scores that stay the same."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import (
    MARKED_TURNS,
    TEXTS,
    TURNS,
    byte_tokenizer,
    save_bert,
    save_chat,
    save_digits,
    save_rows,
    save_t5,
)
from command_results import document, done, refused
from scipy import stats
from sklearn.metrics import f1_score
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from zest_fast import MasterWeights, SelectiveBackward
from zest_fast.cli import app
from zest_fast.cli.jobs.job import open_job
from zest_fast.cli.jobs.scores import entities, evaluate
from zest_fast.cli.jobs.training import scheduler_for, train
from zest_fast.finetuning.delta_files import read_delta
from zest_fast.finetuning.run_state import checksum, read_run
from zest_fast.integrations.pretrained import find_task, load_model

pytestmark = pytest.mark.usefixtures("one_thread")

CHATS = [[{"role": "user", "content": f"say {text}"}, {"role": "assistant", "content": text}] for text in TEXTS]
TAGS = [["O" if word in ("a", "the", "was", "and") else "B-x" for word in text.lower().split()] for text in TEXTS]
DATA = {
    "chat": [{"messages": messages} for messages in CHATS],
    "prompts": [{"prompt": f"{text}:", "completion": f" {text}"} for text in TEXTS],
    "pairs": [{"sentence1": text, "sentence2": text[:9], "label": "ab"[place % 2]} for place, text in enumerate(TEXTS)],
    "numbers": [{"text": text, "label": place / 4} for place, text in enumerate(TEXTS)],
    "sets": [{"text": text, "labels": [["x"], ["x", "y"], []][place % 3]} for place, text in enumerate(TEXTS)],
    "flags": [{"text": text, "x": place % 2, "y": 1 - place % 2} for place, text in enumerate(TEXTS)],
    "tags": [{"tokens": text.split(), "tags": tags} for text, tags in zip(TEXTS, TAGS, strict=True)],
    "sequences": [{"source": text, "target": text[-8:]} for text in TEXTS],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    save_bert(folder / "bert", num_labels=2, hidden_dropout_prob=0.1)
    save_bert(folder / "tagger", transformers.BertForTokenClassification, num_labels=3)
    save_chat(folder / "chat")
    save_chat(folder / "untold", template=None)
    save_t5(folder / "t5")
    for name, rows in DATA.items():
        save_rows(folder / f"{name}.jsonl", rows * 4)
    (folder / "template.jinja").write_text(MARKED_TURNS)
    return folder


@pytest.fixture
def home(files, tmp_path, monkeypatch):
    for entry in files.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.fixture
def run(home):
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


BERT_LAYER = "bert.encoder.layer.1.output.dense"


@pytest.mark.parametrize(
    ("model", "data", "more", "task", "taken", "figures"),
    [
        ("chat", "chat", (), "causal-lm", "chat messages of column 'messages', loss on the assistant's", {"accuracy"}),
        ("untold", "chat", ("--chat-template", "template.jinja"), "causal-lm", "chat messages", {"accuracy"}),
        ("chat", "prompts", (), "causal-lm", "prompts and completions of columns 'prompt', 'completion'", {"accuracy"}),
        ("bert", "pairs", (), "text-classification", "pairs of texts of columns 'sentence1' and", {"accuracy"}),
        ("bert", "numbers", (), "regression", "numbers of column 'label'", {"mse", "pearson", "spearman"}),
        ("bert", "sets", (), "multi-label", "labels, several a row, of column 'labels'", {"f1_micro", "f1_macro"}),
        ("bert", "flags", ("--label-column", "x,y"), "multi-label", "of columns 'x' and 'y'", {"f1_micro", "f1_macro"}),
        ("tagger", "tags", (), "token-classification", "words and tags", {"accuracy", "token_f1", "entity_f1"}),
        ("t5", "sequences", (), "seq2seq-lm", "sources and targets", {"accuracy"}),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalpha() else "",
)
def test_a_task_trained_saved_and_scored_again(run, model, data, more, task, taken, figures):
    words = (
        "finetune",
        model,
        f"{data}.jsonl",
        "--top",
        1,
        "--steps",
        3,
        "--lr",
        0.01,
        *more,
        "--save-model",
        "served",
    )
    result = run(*words, "--json")
    found = document(result)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("data: ")]
    assert taken in line
    assert set(found["after"]) == {"loss", "predictions", *figures} and found["verified"], found["problem"]
    assert found["training_loss"][-1] != found["training_loss"][0]
    said = read_delta("delta.safetensors").data
    assert said["task"] == task
    with_delta = document(run("evaluate", model, f"{data}.jsonl", "--delta", "delta.safetensors", "--json"))
    held = document(run("evaluate", model, f"{data}.jsonl", "--delta", "delta.safetensors", "--held-out", "--json"))
    assert {key: held[key] for key in found["after"]} == found["after"]
    columns = ("--label-column", "x,y") if data == "flags" else ()
    served = document(run("evaluate", "served", f"{data}.jsonl", *columns, "--json"))
    for key in found["after"]:
        assert served[key] == pytest.approx(with_delta[key], rel=1e-5, nan_ok=True), key
    assert find_task("served") == task
    if model == "untold":
        assert (
            transformers.AutoTokenizer.from_pretrained("served").chat_template == MARKED_TURNS == said["chat_template"]
        )
    done(run("merge", model, "delta.safetensors", "merged"))
    if model == "untold":
        assert transformers.AutoTokenizer.from_pretrained("merged").chat_template == MARKED_TURNS
    assert document(run("diff", "served", "merged", "--json"))["same"]
    assert find_task("merged") == task


def test_the_share_held_out_is_not_drawn_from_samples_that_are_cut_otherwise(run):
    """Other samples would be left, and the seed draw some of those that were trained on."""
    done(run("finetune", "chat", "chat.jsonl", "--layers", "model.layers.1.mlp.down_proj", "--steps", 1))
    held = ("evaluate", "chat", "chat.jsonl", "--delta", "delta.safetensors", "--held-out", "--json")
    refused(run(*held, "--max-length", 38), "--max-length may leave others: leave it out")
    refused(run(*held, "--chat-template", "template.jinja"), "--chat-template may leave others")
    assert document(run(*held, "--batch-size", 2))["predictions"]


def test_the_lean_loss_and_the_profile_learn_the_same_tokens(run, home):
    """Loss and gradients of masked labels, over chunks with a frozen head, against autograd on the plain model."""
    found = document(run("profile", "chat", "chat.jsonl", "--batch-size", 24, "--metrics", "snip", "--json"))
    job = open_job("chat", "chat.jsonl", task=None, seed=0, device="cpu", batch_size=24)
    (batch,) = job.loaders.train
    name = "model.layers.1.mlp.down_proj"
    weight = job.model.get_submodule(name).weight
    output = job.model(**batch)
    output.loss.backward()
    logits, targets = output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    assert 0 < (targets != -100).sum() < batch["attention_mask"].sum() / 2
    assert output.loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-6)
    assert found["loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    row = next(row for row in found["layers"] if row["name"] == name)
    assert row["metrics"]["snip"] == pytest.approx((weight * weight.grad).abs().sum().item(), rel=1e-4)
    plain = weight.grad.clone()
    weight.grad = None
    tuned = SelectiveBackward(job.model, [name], head=None)
    loss = job.model(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(output.loss.item(), rel=1e-5)
    assert torch.allclose(weight.grad, plain, rtol=1e-4, atol=1e-8)
    tuned.remove()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("bert", "chat.jsonl"), ["'messages'", "text or a pair", "--text-column"]),
        (("chat", "tags.jsonl"), ["'tokens', 'tags'", "messages or conversations"]),
        (("untold", "chat.jsonl"), ["'untold' has no chat template", "--chat-template"]),
        (("bert", "numbers.jsonl", "--task", "text-classification"), ["is a fraction", "regression"]),
        (("bert", "pairs.jsonl", "--task", "regression"), ["line 1: column 'label' is 'a'", "finite numbers"]),
        (("bert", "pairs.jsonl", "--task", "multi-label"), ["line 1", "a list of names"]),
        (("bert", "tags.jsonl", "--label-column", "tags"), ["'tokens', 'tags'"]),
        (("chat", "chat.jsonl", "--max-length", 8), ["24 of 24 samples have nothing left", "--max-length"]),
        (("chat", "chat.jsonl", "--split", "test"), ["--split", "leave it out"]),
        (("chat", "chat.jsonl", "--chat-template", "gone.jinja"), ["chat template 'gone.jinja' does not exist"]),
        (("chat", "chat.jsonl", "--dtype", "int8"), ["--dtype 'int8' is unknown"]),
        (("chat", "chat.jsonl", "--task", "seq2seq-lm", "--text-column", "messages"), ["a column of sources"]),
    ],
)
@pytest.mark.parametrize("command", ["profile", "finetune"])
def test_what_does_not_fit_is_one_line(run, command, words, parts):
    refused(run(command, *words), *parts)


def test_a_model_without_a_head_for_words_is_asked_about(run, home):
    """Texts alone would be for a language model, whose head such a checkpoint lacks: it would be drawn at random."""
    transformers.LlamaModel(transformers.LlamaConfig.from_pretrained("chat")).save_pretrained("body")
    byte_tokenizer(TURNS).save_pretrained("body")
    refused(run("profile", "body", "chat.jsonl"), "does not say its task", "causal-lm")
    result = done(run("profile", "body", "chat.jsonl", "--task", "causal-lm", "--metrics", "snip"))
    assert "drawn at random" in result.stderr


def test_a_sweep_is_for_classes(run):
    refused(run("sweep", "bert", "numbers.jsonl", "--steps", 1), "a sweep scores classes", "regression")


def test_options_without_effect_are_said(run):
    result = done(run("profile", "bert", "pairs.jsonl", "--chat-template", "template.jinja", "--metrics", "snip"))
    assert "--chat-template has no effect: these are no conversations" in result.stderr


# --- Scores ---------------------------------------------------------------------------------------------------------


def test_entities_are_those_of_conll():
    tags = ["B-x", "I-x", "O", "I-y", "I-y", "B-y", "I-x", "O", "B-x"]
    assert list(entities(tags)) == [("x", 0, 2), ("y", 3, 5), ("y", 5, 6), ("x", 6, 7), ("x", 8, 9)]


class Replay(torch.nn.Module):
    """Gives the logits that are in the batch."""

    def forward(self, logits, labels):
        return {"logits": logits, "loss": logits.sum() * 0 + 1}


def replayed(logits, labels, size=2, **task):
    rows = [{"logits": one, "labels": other} for one, other in zip(logits, labels, strict=True)]
    return evaluate(Replay(), DataLoader(rows, batch_size=size), torch.device("cpu"), **task).figures


def test_figures_are_those_of_scipy_and_scikit_learn():
    torch.manual_seed(3)
    predicted, wanted = torch.randn(9, 1), torch.randn(9)
    found = replayed(predicted, wanted, task="regression")
    flat = predicted[:, 0].numpy()
    assert found["pearson"] == pytest.approx(stats.pearsonr(flat, wanted.numpy())[0], abs=1e-6)
    assert found["spearman"] == pytest.approx(stats.spearmanr(flat, wanted.numpy())[0], abs=1e-6)
    assert found["mse"] == pytest.approx(((predicted[:, 0] - wanted) ** 2).mean().item(), rel=1e-6)
    assert math.isnan(replayed(predicted[:1], wanted[:1], task="regression")["pearson"])
    logits, labels = torch.randn(9, 4), (torch.rand(9, 4) > 0.6).float()
    labels[:, 3], logits[:, 3] = 0.0, -1.0  # a label that is nowhere
    found = replayed(logits, labels, task="multi-label")
    for average in ("micro", "macro"):
        expected = f1_score(labels.numpy(), (logits > 0).numpy(), average=average, zero_division=0)
        assert found[f"f1_{average}"] == pytest.approx(expected)


@pytest.mark.parametrize("data", [torch.zeros(2, 3), torch.zeros(0, 3)], ids=["scored", "nothing to score"])
def test_scores_leave_each_module_in_its_mode(data):
    """A body that its owner keeps in eval mode stays there."""
    model = Replay().train()
    model.body, model.head = torch.nn.Dropout().eval(), torch.nn.Dropout()
    rows = [{"logits": one, "labels": torch.tensor(0)} for one in data]
    loader = DataLoader(rows or [{"logits": torch.zeros(3), "labels": torch.tensor(-100)}])
    with contextlib.nullcontext() if rows else pytest.raises(ValueError, match="nothing to predict"):
        evaluate(model, loader, torch.device("cpu"))
    with pytest.raises(ValueError, match="no 'labels'"):
        evaluate(model, [{"logits": data}], torch.device("cpu"))
    assert model.training and model.head.training and not model.body.training


def test_tags_are_scored_by_token_and_by_entity():
    names = ("B-x", "I-x", "O")
    wanted = torch.tensor([[-100, 0, 1, 2, 0], [2, 2, 0, -100, 1]])
    predicted = torch.tensor([[2, 0, 1, 2, 2], [0, 2, 0, 2, 2]])
    found = replayed(
        torch.nn.functional.one_hot(predicted, 3).float(), wanted, task="token-classification", class_names=names
    )
    # tokens with a tag: B I . B | . . B I, found: B I . . | B . B .; entities: 2 + 1, found 1 + 2, alike 1
    assert found == {"accuracy": 5 / 8, "token_f1": 2 * 3 / (4 + 5), "entity_f1": 2 * 1 / (3 + 3)}
    found = replayed(
        torch.nn.functional.one_hot(predicted, 3).float(),
        wanted,
        task="token-classification",
        class_names=("a", "b", "c"),
    )
    assert found == {"accuracy": 5 / 8}


# --- Steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["chat", "bert"])
def test_accumulated_batches_are_one_batch(run, model):
    """Also where their numbers of tokens differ: the mean is over tokens, not over batches."""
    data = {"chat": "chat.jsonl", "bert": "pairs.jsonl"}[model]
    layer = {"chat": "model.layers.1.mlp.down_proj", "bert": BERT_LAYER}[model]
    if model == "bert":
        save_bert(Path("calm"), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = "calm"
    words = ("finetune", model, data, "--layers", layer, "--steps", 3, "--lr", 0.01, "--validation-share", 0, "--json")
    whole = document(run(*words, "--batch-size", 8, "--out", "a.safetensors"))
    parts = document(run(*words, "--batch-size", 2, "--accumulate", 4, "--out", "b.safetensors"))
    assert parts["training_loss"] == pytest.approx(whole["training_loss"], rel=1e-5)
    first, second = (read_delta(f"{name}.safetensors").parameters for name in "ab")
    assert all(torch.allclose(first[name], second[name], atol=2e-4) for name in first)
    assert read_delta("b.safetensors").recipe["accumulate"] == 4
    last = document(run("finetune", model, data, "--layers", layer, "--batch-size", 5, "--accumulate", 2, "--json"))
    assert last["steps"] == math.ceil(math.ceil(22 / 5) / 2)  # 22 samples train


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x)


def test_a_batch_without_a_label_takes_no_part_in_a_step():
    torch.manual_seed(0)
    inputs, targets = torch.randn(6, 3), torch.tensor([0, 1, -100, -100, 1, 0])
    losses = []
    for skip in (False, True):
        torch.manual_seed(1)
        model = Plain()
        rows = list(zip(inputs, targets, strict=True))
        rows = [row for row in rows if row[1] >= 0] if skip else rows
        options = {"epochs": 1, "steps": 1, "lr": 0.1, "device": torch.device("cpu"), "losses": []}
        options["accumulate"] = 2 if skip else 3
        found = train(
            model, torch.optim.SGD(model.parameters(), 0.1), DataLoader(rows, 2), report=lambda *_: None, **options
        )
        losses.append((found.losses, model.head.weight.tolist()))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.25])
@pytest.mark.parametrize("masters", [False, True])
def test_the_rates_are_those_of_transformers(schedule, warmup, masters):
    steps, rates = 8, []
    for ours in (True, False):
        weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16 if masters else torch.float32))
        optimizer = MasterWeights([weight], lr=0.5) if masters else torch.optim.AdamW([weight], lr=0.5)
        if ours:
            scheduler = scheduler_for(optimizer, schedule, warmup, steps)
        else:
            name = "constant_with_warmup" if schedule == "constant" else schedule
            scheduler = transformers.get_scheduler(
                name, optimizer, num_warmup_steps=math.ceil(warmup * steps), num_training_steps=steps
            )
        seen = []
        for _ in range(steps):
            seen.append(optimizer.param_groups[0]["lr"])
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        rates.append(seen)
        assert (scheduler is None) == (schedule == "constant" and not warmup and ours)
    assert rates[0] == pytest.approx(rates[1])


def test_a_run_with_a_schedule_goes_on_to_the_bit(run, home):
    words = (
        "finetune",
        "chat",
        "chat.jsonl",
        "--layers",
        "model.layers.1.mlp.down_proj",
        "--lr",
        0.01,
        "--batch-size",
        2,
    )
    more = ("--accumulate", 2, "--schedule", "cosine", "--warmup", 0.3, "--steps", 7)
    whole = document(run(*words, *more, "--save-every", 4, "--out", "d.safetensors", "--json"))
    saved = read_run("d.run.pt").progress
    assert len(saved["losses"]) == 4 and saved["options"]["schedule"] == "cosine"
    again = document(run(*words[:3], "--resume", "d.run.pt", "--out", "e.safetensors", "--json"))
    assert again["training_loss"] == whole["training_loss"]
    first, second = (read_delta(f"{name}.safetensors").parameters for name in "de")
    assert all(torch.equal(first[name], second[name]) for name in first)
    resume = ("--resume", "d.run.pt", "--out", "e.safetensors")
    refused(run(*words[:3], *resume, "--schedule", "linear"), "--schedule linear (it was started with cosine)")
    refused(run(*words[:3], *resume, "--text-column", "messages"), "--text-column messages (it was started with None)")
    refused(run(*words[:3], *resume, "--chat-template", "template.jinja"), "--chat-template", "started with None")
    refused(run("finetune", "chat", "prompts.jsonl", *resume), "does not hold what the run was started with")


def test_a_run_that_was_saved_before_these_options_goes_on(run, home):
    words = ("finetune", "chat", "chat.jsonl", "--layers", "model.layers.1.mlp.down_proj", "--lr", 0.01, "--steps", 3)
    whole = document(run(*words, "--save-every", 2, "--out", "d.safetensors", "--json"))
    content = torch.load("d.run.pt", weights_only=True)
    del content["checksum"]
    for name in ("chat_template", "split", "config", "dtype", "schedule", "warmup", "accumulate"):
        del content["progress"]["options"][name]
    content["progress"]["options"]["text_column"] = "messages"  # a name, always, then
    torch.save({**content, "checksum": checksum(content)}, "d.run.pt")
    again = document(run(*words[:3], "--resume", "d.run.pt", "--out", "e.safetensors", "--json"))
    assert again["training_loss"] == whole["training_loss"]


def test_the_dtype_of_the_weights(run, home):
    words = ("finetune", "chat", "chat.jsonl", "--top", 1, "--steps", 2, "--lr", 0.01, "--json")
    for dtype in ("bfloat16", "float16"):
        result = run(*words, "--dtype", dtype, "--out", f"{dtype}.safetensors")
        assert document(result)["verified"] and "float32 masters" in result.stderr
        assert ("gradients below 6e-8 are lost" in result.stderr) == (dtype == "float16")
        delta = read_delta(f"{dtype}.safetensors")
        assert delta.dtypes == (dtype,) and delta.recipe["masters"] == "float32"
    done(run("evaluate", "chat", "chat.jsonl", "--delta", "bfloat16.safetensors"))
    both = ("--delta", "bfloat16.safetensors", "--dtype", "float32")
    refused(run("evaluate", "chat", "chat.jsonl", *both), "leave one out")
    for data in ("numbers", "sets"):
        found = document(
            run("finetune", "bert", f"{data}.jsonl", "--top", 1, "--steps", 1, "--dtype", "bfloat16", "--json")
        )
        assert math.isfinite(found["after"]["loss"])
    stream = ("--stream", "--layers", "model.layers.1.mlp.down_proj", "--dtype", "bfloat16")
    refused(run("finetune", "chat", "chat.jsonl", *stream), "--dtype", "--stream")


# --- Where data and models come from --------------------------------------------------------------------------------


def test_parts_of_images_train_and_score(run, home):
    save_digits(home / "parts" / "train", classes=2)
    save_digits(home / "parts" / "val", classes=2, each=2)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=2)
    transformers.ResNetForImageClassification(config).save_pretrained("resnet")
    words = ("finetune", "resnet", "parts", "--image-size", 32, "--top", 1, "--steps", 1, "--json")
    result = run(*words, "--validation-share", 0.5)
    assert document(result)["after"]["predictions"] == 4  # the whole part
    assert "--validation-share has no effect: val scores" in result.stderr and "; val scores" in result.stderr
    held = document(run("evaluate", "resnet", "parts", "--delta", "delta.safetensors", "--held-out", "--json"))
    assert held["predictions"] == 4
    save_digits(home / "parts" / "val" / "odd", classes=1, each=1)
    refused(run(*words), "holds no image")
    shutil.rmtree(home / "parts" / "val" / "odd")
    save_digits(home / "parts" / "cats", classes=1, each=1)
    refused(run(*words), "train with classes in it and cats beside it")


def test_a_set_of_datasets_is_read_with_the_names_of_its_classes(run, home):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    rows = {"text": TEXTS, "label": [1, 0, 1, 0, 1, 1]}
    parts = {name: datasets.Dataset.from_dict(rows, features=features) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk("films")
    words = ("finetune", "bert", "films", "--top", 1, "--steps", 1, "--json")
    result = run(*words, "--save-model", "served")
    assert document(result)["after"]["predictions"] == 6 and "; test scores" in result.stderr
    assert transformers.AutoConfig.from_pretrained("served").id2label == {0: "neg", 1: "pos"}
    alone = document(run("evaluate", "served", "films", "--split", "train", "--json"))
    assert alone["predictions"] == 6
    parts["train"].save_to_disk("single")
    assert document(run("evaluate", "served", "single", "--json"))["loss"] == alone["loss"]
    tags = datasets.Features(
        {
            "tokens": datasets.Sequence(datasets.Value("string")),
            "ner_tags": datasets.Sequence(datasets.ClassLabel(names=["O", "B-x"])),
        }
    )
    words = {"tokens": [text.split() for text in TEXTS], "ner_tags": [[0] * len(text.split()) for text in TEXTS]}
    words["ner_tags"][0][1] = 1
    datasets.Dataset.from_dict(words, features=tags).save_to_disk("tagged")
    found = document(run("finetune", "tagger", "tagged", "--top", 1, "--steps", 1, "--validation-share", 0.5, "--json"))
    assert "entity_f1" in found["after"]
    (next((home / "single").glob("*.arrow"))).write_bytes(b"torn")
    refused(run("profile", "bert", "single"), "single", "cannot be read as a set of datasets")


def test_a_set_on_the_hub_is_asked_for_by_its_name(run, home, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(source, config):
        asked.append((source, config))
        if source == "nobody/nothing":
            raise datasets.exceptions.DatasetNotFoundError("it doesn't exist on the Hub")
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS, "label": list("ababab")})})

    monkeypatch.setattr(datasets, "load_dataset", load)
    done(run("profile", "bert", "owner/films", "--config", "small", "--metrics", "snip"))
    assert asked == [("owner/films", "small")]
    done(run("finetune", "bert", "owner/films", "--top", 1, "--steps", 1, "--validation-share", 0.5))
    words = ("evaluate", "bert", "owner/films", "--delta", "delta.safetensors", "--held-out")
    assert document(run(*words, "--json"))["predictions"] == 3
    refused(run(*words, "--split", "train"), "was not trained on what owner/films holds now")
    refused(
        run("profile", "bert", "nobody/nothing"),
        "'nobody/nothing' is no file or folder here",
        "doesn't exist on the Hub",
    )


def test_without_the_library_a_set_of_the_hub_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(run("profile", "bert", "owner/films"), "no file or folder here", "pip install 'zest_fast[datasets]'")


CODE = """
from transformers import LlamaForCausalLM
class MineForCausalLM(LlamaForCausalLM):
    pass
"""


def test_code_of_a_model_is_run_only_when_it_is_trusted(run, home, monkeypatch):
    shutil.copytree(home / "chat", "mine")
    config = json.loads((home / "mine" / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.MineForCausalLM"},
    }
    (home / "mine" / "config.json").write_text(json.dumps(config))
    (home / "mine" / "code.py").write_text(
        "from transformers import LlamaConfig\n" + CODE + "class Config(LlamaConfig):\n    model_type = 'mine'\n"
        "MineForCausalLM.config_class = Config\n"
    )
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(home / "modules"))
    words = ("finetune", "mine", "chat.jsonl", "--top", 1, "--steps", 1)
    refused(
        run(*words), "asks to run code of its own", "code.MineForCausalLM", "--trust-remote-code imports and runs it"
    )
    assert not (home / "modules").exists()
    done(run(*words, "--trust-remote-code"))
    evaluate_words = ("evaluate", "mine", "chat.jsonl", "--delta", "delta.safetensors")
    refused(run(*evaluate_words), "asks to run code of its own")  # a delta trusts nobody
    scored = document(run(*evaluate_words, "--trust-remote-code", "--json"))
    refused(run("merge", "mine", "delta.safetensors", "merged"), "asks to run code of its own")
    done(run("merge", "mine", "delta.safetensors", "merged", "--trust-remote-code"))
    again = document(run("evaluate", "merged", "chat.jsonl", "--trust-remote-code", "--json"))
    assert again["loss"] == pytest.approx(scored["loss"], rel=1e-6)


def test_a_trained_head_of_another_task_is_replaced_with_a_word(home):
    loaded = load_model("bert", task="regression")
    assert loaded.fresh == ("classifier.bias", "classifier.weight") and "it is for classes" in loaded.notes[0]
    assert loaded.model.config.num_labels == 1 and loaded.model.config.problem_type == "regression"
    save_bert(home / "number", num_labels=1, problem_type="regression")
    assert load_model("number", task="regression").fresh == () and find_task("number") == "regression"
    save_bert(home / "several", num_labels=2, problem_type="multi_label_classification",
              id2label={0: "x", 1: "y"}, label2id={"x": 0, "y": 1})  # fmt: skip
    kept = load_model("several", task="multi-label", class_names=["y", "x"])
    assert kept.fresh == () and kept.class_names == ("x", "y") and find_task("several") == "multi-label"
    assert find_task("t5") == "seq2seq-lm" and find_task("tagger") == "token-classification"


def test_the_templates_of_these_tests_write_the_same():
    first, second = byte_tokenizer(TURNS), byte_tokenizer(MARKED_TURNS)
    assert first.apply_chat_template(CHATS[0], tokenize=False) == second.apply_chat_template(CHATS[0], tokenize=False)
