"""bench.paper end to end on tiny stand-ins in the schema of the hub, and its likelihoods against an unbatched loop."""

from __future__ import annotations

import json
import random
import re
import sys

import pytest
import torch
from checkpoints import WORDS, save_bert, save_llama, save_tokenizer
from PIL import Image
from profiles import make_profile
from small_models import llama
from transformers import AutoTokenizer, ResNetConfig, ResNetForImageClassification

from bench.method_comparison import compare
from bench.paper.__main__ import main
from bench.paper.adapters import Choices
from bench.paper.arms import arm_layers
from bench.paper.likelihood import accuracy, encode, log_likelihoods, training_batch
from bench.paper.sources import load
from bench.paper.tasks import DATASETS, Item
from zest_fast.integrations.pretrained import load_model
from zest_fast.ranking.ranking import rank


def sentence(draw, shortest=2, longest=9):
    return " ".join(draw.choice(WORDS[:-1]) for _ in range(draw.randint(shortest, longest)))


def write_rows(folder, rows, split):
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# What the hub's rows become

CHOICES = {"text": ["one", "two", "three"], "label": ["A", "B", "C"]}
ROWS = {
    "arc-e": ({"question": "How many?", "choices": CHOICES, "answerKey": "B"},
              Item("Question: How many?\nAnswer:", ("one", "two", "three"), 1)),
    "arc-c": ({"question": "Which?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
              Item("Question: Which?\nAnswer:", ("x", "y"), 1)),
    "openbookqa": ({"question_stem": "The sun is", "choices": CHOICES, "answerKey": "C"},
                   Item("The sun is", ("one", "two", "three"), 2)),
    "hellaswag": ({"activity_label": "Cooking", "ctx_a": "A man [step] stirs.", "ctx_b": "he then", "label": "1",
                   "endings": ["sits [title] down.", "eats."]},
                  Item("Cooking: A man stirs. He then", ("sits. down.", "eats."), 1)),
    "piqa": ({"goal": "Open a tin", "sol1": "use a key", "sol2": "use a cloth", "label": 0},
             Item("Question: Open a tin\nAnswer:", ("use a key", "use a cloth"), 0)),
    "sciq": ({"question": "What falls?", "support": "Rain falls.", "correct_answer": "rain", "distractor1": "sun",
              "distractor2": "wind", "distractor3": "fog"},
             Item("Rain falls.\nQuestion: What falls?\nAnswer:", ("sun", "wind", "fog", "rain"), 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_multiple_choice(tmp_path, name):
    row, item = ROWS[name]
    for split in ("train", DATASETS[name].evaluated):
        write_rows(tmp_path, [row], split)
    assert load(name, tmp_path) == ([item], [item])


def test_the_recipes_are_those_of_the_paper():
    rates = {name: (data.recipe.lr, data.recipe.weight_decay, data.recipe.epochs) for name, data in DATASETS.items()}
    assert {rates[name] for name in ROWS} == {(2e-5, 1e-2, 3)}
    assert {rates[name] for name in ("sst2", "mrpc", "mnli")} == {(5e-5, 1e-2, 3)}
    assert rates["cifar100"] == (3e-4, 5e-4, 30) and rates["cub"] == (6e-4, 5e-4, 30)


# Likelihoods


def test_likelihoods_are_those_of_an_unbatched_loop(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer, model, draw = AutoTokenizer.from_pretrained(tmp_path), llama().eval(), random.Random(0)
    items = [Item(sentence(draw), tuple(sentence(draw, 1, 6) for _ in range(4)), draw.randrange(4)) for _ in range(50)]
    texts = [encode(tokenizer, item.context, choice, 64) for item in items for choice in item.choices]
    found = log_likelihoods(model, texts, batch_size=7, pad=0)
    expected = []
    for item in items:
        for choice in item.choices:
            before = tokenizer(item.context, add_special_tokens=False)["input_ids"]
            ids = before + tokenizer(choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            expected.append(sum(float(logits[place - 1, ids[place]]) for place in range(len(before), len(ids))))
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)
    best = [max(range(4), key=lambda choice: expected[4 * row + choice]) for row in range(50)]
    right = sum(choice == item.answer for choice, item in zip(best, items, strict=True))
    assert accuracy(items, found)["accuracy"] == right / 50


def test_the_training_loss_is_that_of_the_answer_alone(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), llama().eval()
    item = Item("the film was", ("good", "bad"), 1)
    batch = Choices(tokenizer, 64).batch([item])
    assert batch["labels"].tolist() == [[-100, -100, -100, WORDS.index("bad") + 4]]
    one = log_likelihoods(model, [encode(tokenizer, item.context, "bad", 64)], 1, 0)
    assert model(**batch).loss.item() == pytest.approx(-one.item(), abs=1e-5)


def test_what_is_too_long_loses_its_beginning(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    whole = encode(tokenizer, "the film was a joy", "and a bore", 64)
    cut = encode(tokenizer, "the film was a joy", "and a bore", 5)
    assert cut.ids == whole.ids[-5:] and cut.start == 2
    assert training_batch([cut], 0)["labels"][0, cut.start :].tolist() == whole.ids[-3:]


def test_norm_divides_by_the_bytes_of_a_choice():
    items = [Item("c", ("a", "bbbb"), 1)]
    assert accuracy(items, torch.tensor([-1.0, -2.0], dtype=torch.float64)) == {"accuracy": 0.0, "accuracy_norm": 1.0}


# End to end


def run(monkeypatch, out, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench.paper", "--by", "snip", "--out", str(out), *map(str, arguments)])
    main()
    document = json.loads((out / "paper.json").read_text())
    return document["settings"], {result["arm"]: result for result in document["results"]}


def test_llama_on_piqa(tmp_path, monkeypatch):
    draw = random.Random(0)
    for split, count in (("train", 32), ("validation", 16)):
        rows = []
        for _ in range(count):
            label = draw.randrange(2)
            solutions = ["good joy", "bad bore"] if label == 0 else ["bad bore", "good joy"]
            rows.append({"goal": sentence(draw, 2, 5), "sol1": solutions[0], "sol2": solutions[1], "label": label})
        write_rows(tmp_path / "piqa", rows, split)
    folder = save_llama(tmp_path / "llama")
    save_tokenizer(folder)
    settings, found = run(
        monkeypatch, tmp_path, "--model", folder, "--dataset", "piqa", "--data", tmp_path / "piqa",
        "--lr", 1e-2, "--arms", "zest@3", "lora+zest@3", "random@3",
    )  # fmt: skip
    assert settings["recipe"] == {"lr": 1e-2, "weight_decay": 1e-2, "epochs": 3, "batch_size": 16}
    assert list(found) == ["zero-shot", "zest@3", "lora+zest@3", "random@3"]
    assert found["zest@3"]["accuracy"] == 1.0  # the answer is always the same
    assert found["zest@3"]["layers"] == found["lora+zest@3"]["layers"] != found["random@3"]["layers"]
    assert 0 < found["lora+zest@3"]["trained_parameters"] < 8 * 2 * 3 * 32 + 1


def test_bert_on_mrpc(tmp_path, monkeypatch):
    draw = random.Random(0)
    for split, count in (("train", 32), ("validation", 16)):
        rows = []
        for _ in range(count):
            label = draw.randrange(2)
            rows.append({"sentence1": "good joy" if label else "bad bore", "sentence2": sentence(draw), "label": label})
        write_rows(tmp_path / "mrpc", rows, split)
    folder = save_bert(tmp_path / "bert", num_labels=2)
    _, found = run(
        monkeypatch, tmp_path, "--model", folder, "--dataset", "mrpc", "--data", tmp_path / "mrpc",
        "--lr", 1e-2, "--epochs", 5, "--arms", "zest@3", "full", "lora", "--seeds", 0,
    )  # fmt: skip
    assert found["zest@3"]["accuracy"] > 0.9 and len(found["zest@3"]["layers"]) == 3
    assert found["zest@3"]["trained_parameters"] < found["full"]["trained_parameters"]


def test_resnet_on_cifar(tmp_path, monkeypatch):
    folder = tmp_path / "cifar"
    for split in ("train", "test"):
        rows = []
        for place in range(8):
            name = f"{split}{place}.png"
            folder.mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (250, 0, 0) if place % 2 else (0, 0, 250)).save(folder / name)
            rows.append({"img": name, "fine_label": place % 2})
        write_rows(folder, rows, split)
    torch.manual_seed(0)
    config = ResNetConfig(depths=[1, 1], hidden_sizes=[8, 16], embedding_size=8, num_labels=2, layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    _, found = run(
        monkeypatch, tmp_path, "--model", tmp_path / "resnet", "--dataset", "cifar100", "--data", folder,
        "--image-size", 16, "--epochs", 6, "--lr", 1e-2, "--batch-size", 4, "--arms", "zest@3",
    )  # fmt: skip
    assert found["zest@3"]["accuracy"] == 1.0 and "classifier.1" not in found["zest@3"]["layers"]


def test_every_arm_begins_with_the_same_weights(tmp_path, monkeypatch):
    write_rows(tmp_path / "sst2", [{"sentence": "good", "label": 1}, {"sentence": "bad", "label": 0}], "train")
    write_rows(tmp_path / "sst2", [{"sentence": "good", "label": 1}, {"sentence": "bad", "label": 0}], "validation")
    models = []

    def keep(*arguments, **options):
        models.append(load_model(*arguments, **options))
        return models[-1]

    monkeypatch.setattr("bench.paper.__main__.load_model", keep)
    folder = save_bert(tmp_path / "bert", num_labels=2)
    common = ("--model", folder, "--dataset", "sst2", "--data", tmp_path / "sst2", "--lr", 1e-2)
    run(monkeypatch, tmp_path, *common, "--arms", "full", "lora+zest@2", "zest@2")
    untouched = load_model(str(folder)).model.state_dict()
    left = models[0].model.state_dict()
    assert left.keys() == untouched.keys()
    assert all(torch.equal(left[name], tensor) for name, tensor in untouched.items())


# PEFT's method_comparison

RUNNER = """
import json
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

class Config:
    max_seq_length, query_template = 16, "{query}"

def get_train_config(path):
    return Config()

def get_tokenizer(*, model_id, max_seq_length):
    return AutoTokenizer.from_pretrained(model_id)

def get_train_valid_test_datasets(*, tokenizer, query_template, print_fn):
    rows = dict(tokenizer(["the film was good", "a bore", "a joy and dull"]))
    return Rows(rows | {"response": ["", "", ""]}), None, None

class Rows(dict):
    def __getitem__(self, rows):
        return {name: values[rows] for name, values in self.items()}

def get_model(**settings):
    return AutoModelForCausalLM.from_pretrained(settings["model_id"])

def get_file_size(model, **_):
    return 99999999

def main(*, path_experiment, experiment_name, clean):
    settings = json.load(open(path_experiment + "/training_params.json"))["optimizer_kwargs"]
    model_id = json.load(open("default_training_params.json"))["model_id"]
    model = get_model(model_id=model_id, peft_config=None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    ids = torch.tensor([[4, 5, 6]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)]
    trained, every = model.get_nb_trainable_parameters()
    log = {"experiment": experiment_name, "moved": moved, "trained": trained, "every": every,
           "file_size": get_file_size(model, peft_config=None, clean=clean, print_fn=print)}
    json.dump(log, open("log.json", "w"))
"""


def test_method_comparison_trains_the_chosen_layers_in_the_runner_of_peft(tmp_path, monkeypatch):
    folder = save_llama(tmp_path / "llama")
    (tmp_path / "run.py").write_text(RUNNER)
    (tmp_path / "default_training_params.json").write_text(json.dumps({"model_id": str(folder)}))
    monkeypatch.delitem(sys.modules, "run", raising=False)
    name = compare(tmp_path, 2, "snip", {"lr": 1e-2, "weight_decay": 0.1})
    monkeypatch.delitem(sys.modules, "run")
    log = json.loads((tmp_path / "log.json").read_text())
    assert log["experiment"] == name == "zest/llama-top2"
    assert len(log["moved"]) == 2  # weight decay leaves what is frozen alone
    assert log["trained"] < log["every"]
    assert 4 * log["trained"] < log["file_size"] < 4 * log["trained"] + 2000  # the delta, not the model
    with pytest.raises(ValueError, match=r"holds no run\.py"):
        compare(tmp_path / "llama", 2, "snip", {})


# Bad input


def test_bad_input_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="data set 'arc' is unknown; nearest: 'arc-"):
        load("arc")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=re.escape("pip install datasets; or pass --data FOLDER with train.jsonl")):
        load("piqa")
    with pytest.raises(ValueError, match=r"holds neither train\.jsonl nor train\.parquet"):
        load("piqa", tmp_path)
    write_rows(tmp_path, [{"goal": "a", "sol1": "b", "label": 0}], "train")
    with pytest.raises(ValueError, match=r"piqa, train, row 1: not a row of ybisk/piqa \(KeyError: 'sol2'\)"):
        load("piqa", tmp_path)
    ranking = rank(make_profile({"a": 1.0, "b": 2.0}), by="snip")
    with pytest.raises(ValueError, match="arm 'zest' is unknown"):
        arm_layers(ranking, "zest", 0)
