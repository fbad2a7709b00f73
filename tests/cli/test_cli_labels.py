"""What `zest-fast` takes for classes, and when the head of a checkpoint is kept, replaced with a word, or refused."""

from __future__ import annotations

import json
import sys

import pandas
import pytest
import torch
import transformers
from checkpoints import TEXTS, save_bert, save_digits, save_jsonl, save_llama, save_resnet, save_tokenizer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from zest_fast.cli import app
from zest_fast.cli.jobs.training import loss_and_predictions
from zest_fast.integrations.pretrained import load_model

pytestmark = pytest.mark.usefixtures("one_thread")
EMOTIONS = {0: "joy", 1: "anger", 2: "fear", 3: "trust", 4: "grief", 5: "pride", 6: "shame"}


def named(names):
    return {"id2label": names, "label2id": {name: index for index, name in names.items()}}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    save_bert(folder / "two")
    save_bert(folder / "seven", num_labels=7)
    save_bert(folder / "emotions", **named(EMOTIONS))
    save_bert(folder / "loud", **named({0: "NEGATIVE", 1: "POSITIVE"}))
    save_bert(folder / "several", num_labels=4, problem_type="multi_label_classification")
    save_bert(folder / "number", num_labels=1, problem_type="regression")
    save_bert(folder / "reranker", num_labels=1)
    save_bert(folder / "masked", transformers.BertForMaskedLM)
    save_llama(folder / "llama")
    save_resnet(folder / "resnet", num_labels=7)
    save_digits(folder / "digits", classes=2)
    (folder / "zest_labels_user.py").write_text(
        "import torch\nfrom torch.utils.data import DataLoader, TensorDataset\n"
        "def one(): return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 1))\n"
        "def two(): return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))\n"
        "def zeros(): return DataLoader(TensorDataset(torch.randn(8, 4), torch.zeros(8).long()), batch_size=2)\n"
        "def soft(): return DataLoader(TensorDataset(torch.randn(8, 4), torch.rand(8, 2)), batch_size=2)\n"
    )
    return folder


@pytest.fixture
def run(home, tmp_path, monkeypatch):
    """Runs `zest-fast COMMAND MODEL` on a file of TEXTS with these labels."""
    monkeypatch.chdir(home)
    monkeypatch.delitem(sys.modules, "zest_labels_user", raising=False)

    def call(model, labels, *words, command="profile", ending="jsonl"):
        file = tmp_path / f"data.{ending}"
        if ending == "jsonl":
            save_jsonl(file, TEXTS * 4, labels * 4)
        else:
            frame = pandas.DataFrame({"text": TEXTS * 4, "label": labels * 4})
            frame.to_csv(file, index=False) if ending == "csv" else frame.to_parquet(file)
        return CliRunner().invoke(app, [command, model, str(file), *map(str, words)])

    return call


def refused(result, *parts):
    assert result.exit_code == 2 and result.stdout == "", result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and all(part in line for part in parts), line


def notes(result):
    assert result.exit_code == 0, result.stderr
    return [line for line in result.stderr.splitlines() if line.startswith("note: ")]


def loss_of(result):
    return json.loads(result.stdout)["loss"]


QUICK = ("--metrics", "snip", "--batch-size", 24, "--json")
SOME = [0, 1, 0, 1, 1, 0]
WORDS = ["pos", "neg", "pos", "neg", "pos", "pos"]


LISTS = [[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize("command", ["profile", "finetune", "sweep"])
def test_several_labels_at_once_are_no_class(run, command) -> None:
    words = ("--task", "text-classification")
    for ending in ("jsonl", "parquet"):
        refused(
            run("two", LISTS, *words, command=command, ending=ending),
            "[0, 1, 1]",
            "holds several values",
            "multi-label",
        )
    refused(
        run("two", LISTS, command=command, ending="csv"), "[0, 1, 1]", "holds several values", "JSONL"
    )  # a text there


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_lists_are_several_labels_and_said_to_be(run, ending) -> None:
    result = run("two", LISTS, *QUICK, ending=ending)
    (note,) = notes(result)
    assert "the head of two (2 outputs) is replaced by a new one for 3 classes (0, 1, 2)" in note
    assert "labels, several a row, of column 'label' (multi-label)" in result.stderr
    result = run("several", [[*row, 0] for row in LISTS], *QUICK, ending=ending)
    assert not notes(result)  # the head of four labels is kept


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_fractions_are_numbers_to_predict_and_no_classes(run, home, ending) -> None:
    wanted = [0.5, 1.0, 3.25, 2.0, 1.0, 0.0]
    refused(run("two", wanted, "--task", "text-classification", ending=ending), "0.5 is a fraction", "regression")
    result = run("number", wanted, *QUICK, ending=ending)
    assert not notes(result) and "numbers of column 'label' (regression)" in result.stderr
    model = transformers.AutoModelForSequenceClassification.from_pretrained(home / "number").eval()
    batch = transformers.AutoTokenizer.from_pretrained(home / "number")(TEXTS * 4, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits[:, 0]
    assert loss_of(result) == pytest.approx(((logits - torch.tensor(wanted * 4)) ** 2).mean().item(), rel=1e-5)
    assert "is replaced by a new one of one output" in notes(run("two", wanted, *QUICK, ending=ending))[0]


def test_other_things_are_no_classes(run) -> None:
    refused(run("two", [{"a": 1}] * 6), "{'a': 1} holds several values")
    refused(run("two", list(pandas.to_datetime(["2020-01-01"] * 6)), ending="parquet"), "is a datetime")
    refused(run("two", [b"a", b"b"] * 3, ending="parquet"), "is a bytes")
    refused(run("two", SOME, "--label-column", "text"), "both 'text'")


def test_numbers_are_the_same_class_however_they_are_written(run) -> None:
    found = {
        loss_of(run("two", labels, *QUICK, ending=ending))
        for labels, ending in ((SOME, "jsonl"), (SOME, "csv"), ([1.0 * n for n in SOME], "csv"), (SOME, "parquet"))
    }
    assert len(found) == 1
    assert not notes(run("two", [1.0 * n for n in SOME], *QUICK, ending="csv"))
    assert notes(run("two", ["[x]", "[y]"] * 3, *QUICK, ending="csv"))  # names in brackets are names


def cross_entropy(folder, classes):
    """Of the checkpoint as transformers loads it, on TEXTS * 4."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS * 4, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    return torch.nn.functional.cross_entropy(logits, torch.tensor(classes * 4)).item()


def test_a_head_with_more_outputs_than_classes_is_kept(run, home) -> None:
    """By number, by name, and by a name in another case: the loss is that of the trained head."""
    result = run("seven", SOME, *QUICK)
    assert loss_of(result) == pytest.approx(cross_entropy(home / "seven", SOME), rel=1e-5)
    assert notes(result) == ["note: the head of seven is kept: the data has 2 of its 7 classes"]
    fear = [2 if n else 1 for n in SOME]
    result = run("emotions", [EMOTIONS[n] for n in fear], *QUICK)
    assert loss_of(result) == pytest.approx(cross_entropy(home / "emotions", fear), rel=1e-5)
    assert len(notes(result)) == 1 and "2 of its 7 classes" in notes(result)[0]
    result = run("loud", ["Positive" if n else "negative" for n in SOME], *QUICK)
    assert loss_of(result) == pytest.approx(cross_entropy(home / "loud", SOME), rel=1e-5)
    assert "'Positive' as its output 1, 'POSITIVE'" in notes(result)[0]
    assert not notes(run("loud", ["POSITIVE" if n else "NEGATIVE" for n in SOME], *QUICK))


def test_numbers_for_a_head_with_names_are_its_outputs_and_said_to_be(run, home) -> None:
    result = run("emotions", SOME, *QUICK)
    assert loss_of(result) == pytest.approx(cross_entropy(home / "emotions", SOME), rel=1e-5)
    assert "'1' as its output 1, 'anger'" in notes(result)[0]


def test_a_head_of_images_is_kept_as_well(home, monkeypatch) -> None:
    monkeypatch.chdir(home)
    result = CliRunner().invoke(app, ["profile", "resnet", "digits", "--metrics", "snip", "--json"])
    assert notes(result) == ["note: the head of resnet is kept: the data has 2 of its 7 classes"]
    loaded = load_model("resnet", class_names=["0", "1"])
    assert loaded.fresh == () and loaded.class_names == tuple("0123456")


def test_a_head_that_does_not_fit_is_replaced_and_what_and_why_is_said(run, home) -> None:
    (note,) = notes(run("seven", WORDS, *QUICK))
    assert "the head of seven (7 outputs) is replaced by a new one for 2 classes (neg, pos)" in note
    assert "no names" in note and "0 to 6" in note
    (note,) = notes(run("emotions", WORDS, *QUICK))
    assert "(7 outputs: joy, anger" in note and "it knows no 'neg', 'pos'" in note
    (note,) = notes(run("two", [1, 2, 3, 1, 2, 3], *QUICK))
    assert "(2 outputs) is replaced by a new one for 3 classes (1, 2, 3)" in note
    (note,) = notes(run("masked", SOME, *QUICK, "--task", "text-classification"))
    assert "masked does not hold" in note and "classifier.weight" in note


def test_a_head_of_the_same_size_but_other_names_is_really_drawn_anew(run, home) -> None:
    """Its weights belong to other classes: in the order of the alphabet they would have started from the wrong ones."""
    trained = load_file(home / "two" / "model.safetensors")["classifier.weight"]
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        loaded = load_model(str(home / "two"), class_names=["neg", "pos"])
        drawn.append(loaded.model.classifier.weight.detach().clone())
    assert loaded.fresh == ("classifier.bias", "classifier.weight") and loaded.class_names == ("neg", "pos")
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], trained) and drawn[0].std() < 1
    expected = transformers.AutoModel.from_pretrained(home / "two").state_dict()
    for name, tensor in loaded.model.bert.state_dict().items():
        assert torch.equal(tensor, expected[name]), name  # and nothing but the head
    result = run("two", WORDS, *QUICK)
    assert "is replaced by a new one for 2 classes (neg, pos)" in notes(result)[0]


def test_a_head_for_several_labels_is_refused_and_one_for_regression_replaced_with_a_word(run) -> None:
    for labels in (SOME, WORDS):
        refused(run("several", labels), "the head of several (4 outputs)", "multi_label_classification", "as lists")
    for model, labels, words in (
        ("number", WORDS, ()),
        ("reranker", WORDS, ()),
        ("number", SOME, ("--task", "text-classification")),
        ("reranker", SOME, ("--task", "text-classification")),
    ):
        (note,) = notes(run(model, labels, *QUICK, *words))
        assert f"the head of {model} (1 output) is replaced" in note and "it is for regression" in note


def test_whole_numbers_are_what_the_model_predicts_or_have_to_be_said_to_be(run) -> None:
    assert "(regression)" in run("number", SOME, *QUICK).stderr
    refused(run("reranker", SOME), "one output", "--task text-classification or --task regression")
    assert not notes(run("reranker", SOME, *QUICK, "--task", "regression"))


def test_names_of_outputs_that_collide_with_those_of_the_data(tmp_path) -> None:
    """label2id may hold other names than id2label; a class keeps its own output."""
    folder = save_bert(tmp_path / "bert", num_labels=3)
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": "b", "1": "a", "2": "c"}, "label2id": {"x": 2, "b": 1, "z": 0}}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_model(str(folder), class_names=["b", "x"])
    assert loaded.fresh == () and loaded.class_names[1:] == ("b", "x") and loaded.class_names[0] != "b"


def test_weights_that_fit_no_name_or_another_size_are_no_model(tmp_path) -> None:
    folder = save_bert(tmp_path / "bert")
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file({f"wrapped.{name}": tensor for name, tensor in weights.items()}, file, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"its weights have no name that BertForSequenceClassification knows, .*wrapped"
    ):
        load_model(str(folder))
    save_file(weights, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    for names in (None, ["0", "1"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match=r"bert\.encoder|size") as caught:
            load_model(str(folder), class_names=names)
        assert "\n" not in str(caught.value)


def test_an_encoder_is_no_causal_lm(run) -> None:
    refused(run("masked", WORDS, "--task", "causal-lm"), "is an encoder", "is_decoder")


def test_texts_that_are_none(run, home, tmp_path) -> None:
    save_jsonl(tmp_path / "lists.jsonl", [["a", "film"]] * 6, SOME)
    save_jsonl(tmp_path / "blank.jsonl", ["a film", " \t "] * 3, SOME)
    for file, part in (("lists", "line 1: column 'text' holds a list"), ("blank", "line 2: column 'text' is empty")):
        refused(CliRunner().invoke(app, ["profile", "two", str(tmp_path / f"{file}.jsonl")]), part)


def test_targets_that_finetune_cannot_score_are_refused(home, monkeypatch, tmp_path) -> None:
    """A batch of as many samples as outputs would have compared [n] with [n, n]; one output has a loss of zero."""
    monkeypatch.chdir(home)
    words = ("--layers", "0", "--head", "none", "--steps", "1", "--out", str(tmp_path / "d.safetensors"))
    for model, data, part in (("two", "soft", "torch.float32 [2, 2]"), ("one", "zeros", "a single output")):
        result = CliRunner().invoke(app, ["finetune", f"zest_labels_user:{model}", f"zest_labels_user:{data}", *words])
        last = result.stderr.splitlines()[-1]  # after what it was about to train
        assert result.exit_code == 2 and result.stdout == "" and last.startswith("error: ") and part in last
    assert not (tmp_path / "d.safetensors").exists()


@pytest.mark.parametrize("kind", ["BertForTokenClassification", "BertForMaskedLM", "T5ForConditionalGeneration"])
def test_accuracy_compares_what_the_loss_compares(kind) -> None:
    """Only a causal language model predicts the token after; the mean loss over the targets tells."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 11,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    if kind.startswith("T5"):
        config = transformers.T5Config(
            vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    else:
        config = transformers.BertConfig(**sizes, num_labels=5)
    model = getattr(transformers, kind)(config).eval()
    ids = torch.randint(1, 11, (3, 6))
    batch = {"input_ids": ids, "labels": ids % 5}
    loss, logits, targets = loss_and_predictions(model, batch)
    assert torch.nn.functional.cross_entropy(logits, targets).item() == pytest.approx(loss.item(), rel=1e-5)


def test_accuracy_of_a_causal_model_looks_ahead() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(1, 11, (3, 6))
    loss, logits, targets = loss_and_predictions(model, {"input_ids": ids, "labels": ids})
    assert torch.nn.functional.cross_entropy(logits, targets).item() == pytest.approx(loss.item(), rel=1e-5)
    assert targets.tolist() == ids[:, 1:].flatten().tolist()


def test_the_tokenizer_of_these_tests_knows_its_words(tmp_path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.unk_token_id not in {token for ids in tokenizer(TEXTS)["input_ids"] for token in ids}


def test_labels_and_texts_that_are_most_likely_a_mistake_are_pointed_out(run, tmp_path) -> None:
    mixed = ["pos", "neg", "pos ", "Neg", "pos", "pos"]
    found = " ".join(notes(run("two", mixed, *QUICK)))
    assert "'Neg' and 'neg', 'pos' and 'pos '" in found and "classes of their own" in found
    save_jsonl(tmp_path / "ids.jsonl", TEXTS * 4, [f"id-{number}" for number in range(24)])
    result = CliRunner().invoke(app, ["profile", "two", str(tmp_path / "ids.jsonl"), *map(str, QUICK)])
    assert "24 of the 24 classes have a single row" in " ".join(notes(result))
    save_jsonl(tmp_path / "cyrillic.jsonl", ["\u0434\u043e\u043c", "\u0436\u0443\u043a"] * 12, SOME * 4)
    result = CliRunner().invoke(app, ["profile", "two", str(tmp_path / "cyrillic.jsonl"), *map(str, QUICK)])
    assert notes(result) == ["note: 100% of the tokens are unknown to the tokenizer: is it for this language?"]
