"""bench.finetune: what each arm trains, that a run goes on where it stopped, and what the README shows of it."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from torch import nn

from bench import pictures, readme
from bench.finetune import forgetting
from bench.finetune import report as finetune_report
from bench.finetune import run as finetune
from bench.finetune.arms import ADAPTERS, NAMES, Arm, Orders, Trained, arms
from bench.packages.classifiers import SentenceEncoder

ONE_OF_EACH = (
    "head only", "full", "contribution@5", "joint@5", "ZEST@3", "ZEST@5", "ZEST probed@5", "random@5", "last@5",
    "LoRA r8", "LoRA+ZEST@3",
)  # fmt: skip
"""A run of every arm takes minutes."""
LAYERS = tuple(f"body.{2 * place}" for place in range(12))


class Classifier(nn.Module):
    """Twelve linear layers and a head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*(part for _ in LAYERS for part in (nn.Linear(6, 6), nn.Tanh())))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Classifier().eval()


def orders():
    best_first = {"ZEST": LAYERS, "contribution": LAYERS[::-1], "RGN": LAYERS[::2] + LAYERS[1::2], "Spectrum": LAYERS}
    best_first |= {
        "ZEST probed": LAYERS[2:] + LAYERS[:2],
        "largest": LAYERS[1:] + LAYERS[:1],
        "middle": LAYERS[4:] + LAYERS[:4],
        "joint": LAYERS[3:] + LAYERS[:3],
    }
    return Orders(best_first, LAYERS)


def trained_names(model, arm):
    return {name for name in Trained(model, "head", arm).parameters if not name.startswith("head.")}


def test_arms_train_what_they_are_called_after(model):
    found = {name: arms(name, orders(), model, seed=0) for name in NAMES}
    assert found["head only"] == [Arm("head only", ())] and found["full"] == [Arm("full", None)]
    assert found["ZEST@3"][0].layers == LAYERS[:3] and found["contribution@3"][0].layers == LAYERS[:-4:-1]
    assert found["last@5"][0].layers == LAYERS[-5:]
    assert found["ZEST probed@5"][0].layers == LAYERS[2:7]
    assert found["largest@5"][0].layers == LAYERS[1:6] and found["middle@5"][0].layers == LAYERS[4:9]
    first, second = found["random@5"]
    assert first.layers != second.layers and len({*first.layers}) == 5
    assert arms("random@5", orders(), model, seed=1)[0].layers != first.layers
    assert found["joint@5"][0].layers == LAYERS[3:8]
    assert trained_names(model, found["head only"][0]) == set()
    assert trained_names(model, found["ZEST@3"][0]) == {f"{n}.{p}" for n in LAYERS[:3] for p in ("weight", "bias")}
    assert len(trained_names(model, found["full"][0])) == 24
    adapters = trained_names(model, found["LoRA+ZEST@3"][0])
    assert len(adapters) == 6 and all("lora_" in name and name.split(".lora_")[0] in LAYERS[:3] for name in adapters)


def test_relatives_of_lora_begin_where_the_model_is_and_have_as_many_parameters(model):
    inputs = torch.randn(3, 6)
    wide = nn.Sequential(nn.Linear(6, 64), nn.Linear(64, 64))
    model.body, numbers = nn.Sequential(wide, nn.Linear(64, 6)), {}
    for adapter in ADAPTERS:
        (arm,) = arms(f"{adapter} r8", Orders({}, ("body.0.1",)), model, seed=0)
        trained = Trained(model, "head", arm)
        assert arm.adapter == adapter and torch.allclose(trained.model(inputs), model(inputs))
        trained.model(inputs).sum().backward()
        assert all(parameter.grad is not None for parameter in trained.parameters.values())
        numbers[adapter] = sum(p.numel() for name, p in trained.parameters.items() if not name.startswith("head."))
    assert numbers == {"LoRA": 1024, "rsLoRA": 1024, "DoRA": 1088, "SHiRA": 1024, "MiSS": 1024}


def test_an_arm_that_peft_has_not_for_these_layers_is_left_out():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(8, 2))
    assert arms("SHiRA r8", Orders({}, ("0",)), net, seed=0) == [] and arms("DoRA r8", Orders({}, ("0",)), net, seed=0)


class Words(nn.Module):
    """As a decoder of transformers: each token's embedding, through a layer; what it says last is what it reads."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(9, 6)
        self.layer = nn.Linear(6, 6)

    def get_input_embeddings(self):
        return self.embeddings

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(last_hidden_state=self.layer(self.embeddings(input_ids)))


def test_forgetting_of_a_sentence_encoder_and_of_a_language_model():
    torch.manual_seed(0)
    before = nn.ModuleDict({"body": SentenceEncoder(Words())})
    after = copy.deepcopy(before)
    tokens = {"input_ids": torch.randint(9, (20, 5)), "attention_mask": torch.ones(20, 5, dtype=torch.long)}
    tokens["attention_mask"][::2, 3:] = 0
    assert forgetting.similarity(before, after, tokens) == pytest.approx(1)
    perplexity = forgetting.perplexity(before, after, tokens)
    hidden = before.body.encoder(**tokens).last_hidden_state.double()
    odds = (hidden @ before.body.encoder.embeddings.weight.T.double()).softmax(-1)
    said = [
        odds[row, place, tokens["input_ids"][row, place + 1]].log()
        for row in range(20)
        for place in range(4)
        if tokens["attention_mask"][row, place + 1]
    ]
    assert perplexity == pytest.approx(torch.stack(said).mean().neg().exp().item(), rel=1e-5)
    with torch.no_grad():
        after.body.encoder.layer.weight.normal_()
    assert forgetting.similarity(before, after, tokens) < 0.9
    assert forgetting.perplexity(before, after, tokens) != pytest.approx(perplexity, rel=1e-2)


def test_forgetting_is_scored_once_for_each_tested_run(small, tmp_path, monkeypatch, capsys):
    runs = {
        f"{arm} {seed}": {"arm": arm, "layers": layers, "seed": seed, "rate": 1e-2, "test_accuracy": 0.5}
        for arm, layers in (("ZEST@5", LAYERS[:5]), ("random@5 draw 1", LAYERS[5:10]), ("head only", []))
        for seed in (0, 1)
    }
    before = small.body[0].weight.clone()
    (tmp_path / "toy--digits.json").write_text(json.dumps({"pair": "toy/digits", "runs": runs, "arms": {}}))
    change = lambda old, new: (old.body[0].weight - new.body[0].weight).abs().sum().item()  # noqa: E731
    monkeypatch.setattr(finetune, "score_of", lambda *_: ("change", change))
    finetune.Pair("toy/digits", tmp_path).score_forgetting()
    found = json.loads((tmp_path / "toy--digits.json").read_text())["forgetting"]
    assert found["before"] == 0 and found["arms"].keys() == {"ZEST@5", "random@5 draw 1"}
    assert all(value > 0 for value in found["arms"]["ZEST@5"].values()) and torch.equal(small.body[0].weight, before)
    assert set(found["arms"]["random@5 draw 1"].values()) == {0.0}  # its layers begin above the first
    capsys.readouterr()
    finetune.Pair("toy/digits", tmp_path).score_forgetting()
    assert not capsys.readouterr().out
    table = finetune_report.forgetting_table({"results": [{"pair": "toy/digits", "forgetting": found}]})
    assert "| as it came | 0.000 |" in table and "| random@5 | 0.000 ± 0.000 |" in table


def test_an_arm_leaves_the_model_that_it_copies_alone(model):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trained = Trained(model, "head", Arm("LoRA r8", LAYERS, "LoRA"))
    with torch.no_grad():
        for parameter in trained.parameters.values():
            parameter.add_(1.0)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


class FirstLayersFirst:
    """Stands in for a fitted Ranker: the lower, the better."""

    def fit(self, records, *, sweeps=None):
        assert "digits" not in set(records.family), "it must not see the family that it is judged on"
        return self

    def predict(self, profile):
        return -torch.arange(float(len(profile))).double().numpy()

    def assess(self, profile, probe=None):
        assert probe is None or set(probe.names) == set(LAYERS)
        return SimpleNamespace(scores=self.predict(profile), intervals=np.full((len(profile), 2), np.nan))


@pytest.fixture
def small(monkeypatch, model):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(96, 6, generator=generator)
    targets = (inputs[:, 0] > 0).long()
    splits = dict.fromkeys(("head", "train", "score", "test"), (inputs, targets))
    rows = [
        {"model": "toy", "dataset": data, "family": family, "layer": layer, "loss": float(place)}
        for data, family in (("digits", "digits"), ("letters", "letters"))
        for place, layer in enumerate(LAYERS)
    ]
    monkeypatch.setattr(finetune, "load_pair", lambda *_: (model, splits))
    monkeypatch.setattr(finetune, "load_records", lambda: pandas.DataFrame(rows))
    monkeypatch.setattr(finetune, "sweeps_of", list)
    monkeypatch.setattr(finetune, "Ranker", FirstLayersFirst)
    monkeypatch.setattr(finetune, "load_spectra", lambda names: {"toy": {name: {"snr": 1.0} for name in LAYERS}})
    monkeypatch.setitem(finetune.DATASETS, "digits", type("D", (), {"family": "digits"}))
    for name, value in {
        "NAMES": ONE_OF_EACH,
        "SEEDS": (0, 1),
        "RATES": (1e-3, 1e-2),
        "SETTINGS": {"image": {"batch_size": 4, "steps": 8, "head_rate": 1e-3}},
        "PROFILED": 8,
        "CURVE_SAMPLES": 40,  # fewer than there are
        "ROUNDS": 1,
    }.items():
        monkeypatch.setattr(finetune, name, value)
    return model


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped_and_ends_in_a_table(small, tmp_path, monkeypatch):
    trained = []
    train = finetune.Pair._trained

    def stop_in_the_middle(self, arm, seed, rate, test):
        if len(trained) == 30:
            raise KeyboardInterrupt
        trained.append((arm.name, seed, rate, test))
        return train(self, arm, seed, rate, test)

    monkeypatch.setattr(finetune.Pair, "_trained", stop_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        finetune.Pair("toy/digits", tmp_path).run()
    assert "arms" not in json.loads((tmp_path / "toy--digits.json").read_text())
    monkeypatch.setattr(
        finetune.Pair,
        "_trained",
        lambda *a: trained.append((a[1].name, *a[2:])) or train(*a),  # type: ignore[func-returns-value]
    )
    finetune.Pair("toy/digits", tmp_path).run()
    assert len(trained) == len(set(trained))  # nothing twice
    before = json.loads((tmp_path / "toy--digits.json").read_text())
    finetune.Pair("toy/digits", tmp_path).measure_costs()
    after = json.loads((tmp_path / "toy--digits.json").read_text())
    assert before["runs"] == after["runs"]
    for name, arm in after["arms"].items():
        old = before["arms"][name]
        assert arm.keys() == old.keys() and arm["peak_bytes"] == old["peak_bytes"] and arm["seconds"] != old["seconds"]
    document = json.loads(finetune.collect(tmp_path, tmp_path / "out").read_text())
    (pair,) = document["results"]
    assert list(pair["arms"]) == list(ONE_OF_EACH)
    zest, draws = pair["arms"]["ZEST@5"], pair["arms"]["random@5"]
    assert len(zest["test_accuracy"]) == 2 and len(draws["test_accuracy"]) == 4 and zest["rate"] in (1e-3, 1e-2)
    sets = {run["arm"]: run["loss"] for run in after["runs"].values() if run["arm"].startswith("joint@5 set")}
    best = min(sets, key=sets.__getitem__)
    chosen = [tuple(run["layers"]) for run in after["runs"].values() if run["arm"] in (best, "joint@5")]
    assert len(sets) == 25 and len(chosen) > 2 and len(set(chosen)) == 1
    assert zest["trained"] == 5 * 42 + 14 and [point[0] for point in zest["curve"]] == [0, 1, 2, 4, 8]
    assert 0 < zest["peak_bytes"] <= zest["peak_bytes_full"] and zest["to_full"]["median"] > 0
    source = json.dumps(document).encode()
    finetune_report.draw(source, tmp_path / "finetune.svg")
    assert pictures.is_drawn(source, tmp_path / "finetune.svg")
    assert not pictures.is_drawn(source + b" ", tmp_path / "finetune.svg")
    text = readme.BLOCKS["finetune"][-1](document)
    lead = 100 * (sum(zest["test_accuracy"]) / 2 - sum(draws["test_accuracy"]) / 4)
    assert f"| random@5 | {lead:+.1f} | {lead:+.1f} |" in text
    assert "| ZEST@5 | " in text and f"{100 * sum(zest['test_accuracy']) / 2:.1f} ±" in text


def test_the_head_is_in_no_order(small, tmp_path):
    pair = finetune.Pair("toy/digits", tmp_path)
    pair.model, pair.splits = finetune.load_pair("toy", "digits")
    pair.settings, pair.head = finetune.SETTINGS["image"], "head"
    found = pair._orders(0)
    assert found.used == LAYERS and all(set(order) == set(LAYERS) for order in found.by.values())
    assert found.by["contribution"] == LAYERS
    assert set(found.by["middle"][:4]) == set(LAYERS[4:8]) and set(found.by["middle"][-2:]) == {LAYERS[0], LAYERS[-1]}
    assert found.by["largest"] == LAYERS  # all of one size: the first


def test_the_test_of_the_first_seed_is_that_of_a_run_of_its_own(small, tmp_path, monkeypatch):
    """The weights that found the rate are kept for it."""
    monkeypatch.setattr(finetune, "NAMES", ("full", "ZEST@3", "random@5", "LoRA r8"))
    monkeypatch.setattr(finetune.Pair, "_cost", lambda *_: {})  # timed, and slow
    for folder in ("kept", "anew"):
        pair = finetune.Pair("toy/digits", tmp_path / folder)
        (tmp_path / folder).mkdir()
        if folder == "anew":
            pair._write = lambda *, pair=pair, write=pair._write, **facts: pair._ends.clear() or write(**facts)
        pair.run()
    kept, anew = (
        json.loads((tmp_path / folder / "toy--digits.json").read_text())["runs"] for folder in ("kept", "anew")
    )
    assert kept == anew


def test_lora_on_a_convolution_whose_padding_the_model_computes():
    """As transformers' MobileNetV2 does: it reads the stride of what may be an adapter."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileNetV2Config(depth_multiplier=0.35, image_size=32, num_labels=3, tf_padding=True)
    net = transformers.MobileNetV2ForImageClassification(config).eval()
    convolution = "mobilenet_v2.layer.3.expand_1x1.convolution"
    trained = Trained(net, "classifier", Arm("LoRA+ZEST@3", (convolution,), "LoRA"))
    images = torch.randn(2, 3, 32, 32)
    logits = trained.model(images).logits
    assert torch.equal(logits, net(images).logits)  # adapters begin at zero
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in trained.parameters.values())


@pytest.mark.parametrize("epochs", [1, 4])
def test_a_cached_arm_comes_out_the_same_and_is_not_trained_twice(epochs, small, tmp_path, monkeypatch, capsys):
    layers = list(LAYERS[6:11])
    runs = {
        str(seed): {"arm": "ZEST@5", "layers": layers, "seed": seed, "rate": 1e-2, "test_accuracy": 0.5}
        for seed in (0, 1)
    }
    (tmp_path / "toy--digits.json").write_text(json.dumps({"runs": runs, "arms": {"full": {"rate": 1e-3}}}))
    monkeypatch.setitem(finetune.SETTINGS, "image", {"batch_size": 24, "steps": 8, "head_rate": 1e-3})  # two rounds
    finetune.Pair("toy/digits", tmp_path).run_cached(epochs)
    name, counts = {
        1: ("cached", "96 computed, 96 read"),
        4: ("cached, 4 epochs", "48 computed, 144 read"),
    }[epochs]
    found = json.loads((tmp_path / "toy--digits.json").read_text())[name]
    assert found.keys() == {"0", "1"} and "with the cache" in capsys.readouterr().out
    for run in found.values():
        assert run["cached"]["test_accuracy"] == run["plain"]["test_accuracy"]
        assert run["cached"]["test_loss"] == pytest.approx(run["plain"]["test_loss"], rel=1e-5)
        assert counts in run["cache"] and run["full"]["seconds"] > 0
    finetune.Pair("toy/digits", tmp_path).run_cached(epochs)
    assert json.loads((tmp_path / "toy--digits.json").read_text())[name] == found
    assert not capsys.readouterr().out


def test_epochs_of_a_cached_run_are_parts_of_its_steps(small, tmp_path):
    runs = {"0": {"arm": "ZEST@5", "layers": list(LAYERS[6:11]), "seed": 0, "rate": 1e-2, "test_accuracy": 0.5}}
    (tmp_path / "toy--digits.json").write_text(json.dumps({"runs": runs, "arms": {"full": {"rate": 1e-3}}}))
    with pytest.raises(ValueError, match="--epochs 3: toy/digits takes 8 steps; give a divisor of that"):
        finetune.Pair("toy/digits", tmp_path).run_cached(3)
