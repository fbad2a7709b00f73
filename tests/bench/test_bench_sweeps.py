"""What the sweeps of bench/ load and choose; none of them runs here."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sweeping_models import RECIPE, Residual, make
from torch import nn

from bench import data, readme, sweep_speed, sweeps
from bench.packages import installed


def emoji_package(folder, version="16.0.0"):
    """A package as npm installs it: two emoji, one of them with skin tones, and one skin tone."""
    package = folder / "node_modules" / "emoji-datasource-google"
    (package / "img/google/64").mkdir(parents=True)
    (package / "package.json").write_text(json.dumps({"version": version}))
    entries = [
        {"image": "hand.png", "category": "People & Body", "skin_variations": {"1F3FB": {"image": "light.png"}}},
        {"image": "cat.png", "category": "Animals & Nature"},
        {"image": "tone.png", "category": "Component"},
    ]
    (package / "emoji.json").write_text(json.dumps(entries))
    red = np.zeros((64, 64, 4), dtype=np.uint8)
    red[:32] = [255, 0, 0, 255]  # the lower half is transparent
    for name in ("hand.png", "cat.png"):
        Image.fromarray(red).save(package / "img/google/64" / name)


def test_emoji_lie_on_white_and_skin_tones_are_left_out(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(installed, "NPM", tmp_path)
    emoji_package(tmp_path)
    images = data.DATASETS["emoji"].load()
    assert images.pixels.shape == (2, 64, 64, 3) and images.pixels.dtype == torch.uint8
    assert images.targets.tolist() == [1, 0]  # categories in the order of the alphabet
    assert images.pixels[0, 0, 0].tolist() == [255, 0, 0] and images.pixels[0, 63, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(("version", "found"), [(None, "is not installed"), ("15.1.0", "15.1.0 is installed")])
def test_a_missing_or_other_package_of_npm_names_the_line_that_installs_it(tmp_path, monkeypatch, version, found):
    monkeypatch.setattr(installed, "NPM", tmp_path)
    if version:
        emoji_package(tmp_path, version)
    with pytest.raises(RuntimeError, match=rf"{found}; run: npm install --prefix .*emoji-datasource-google@16\.0\.0"):
        data.DATASETS["emoji"].load()


def test_an_expensive_model_is_scored_on_fewer_samples(monkeypatch) -> None:
    texts = data.Sentences([f"sentence {number}" for number in range(4500)], torch.arange(4500) % 6)
    monkeypatch.setitem(data.DATASETS, "trec", data.DataSet("trec", "trec", lambda: texts, data._TEXT))
    model = data.Model("toy", "toy", "text", lambda classes: nn.Linear(1, classes), _lengths)
    monkeypatch.setitem(data.MODELS, "toy", model)
    monkeypatch.setitem(data.MODELS, "dear", data.Model("dear", "toy", "text", model.load, _lengths, scored=7))
    (_, all_of_it), (_, some) = data.load_pair("toy", "trec"), data.load_pair("dear", "trec")
    assert len(all_of_it["score"][1]) == 1000 and torch.equal(some["score"][1], all_of_it["score"][1][:7])
    assert torch.equal(some["train"][1], all_of_it["train"][1])


def _lengths(texts):
    return torch.tensor([[float(len(text))] for text in texts])


def test_a_third_of_a_llama_takes_each_kind_and_each_depth_equally_often() -> None:
    kinds = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
    blocks = [
        nn.ModuleDict({part: nn.ModuleDict({kind: nn.Linear(1, 1) for kind in kinds[part]}) for part in kinds})
        for _ in range(30)
    ]
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(2, 1), "layers": nn.ModuleList(blocks)})
    model = nn.ModuleDict({"encoder": model, "head": nn.Linear(1, 2)})
    chosen = [name for name, module in model.named_modules() if sweeps.every_third(name, module)]
    assert len(chosen) == 70
    assert set(Counter(name.rpartition(".")[2] for name in chosen).values()) == {10}
    assert set(Counter(int(name.split(".")[2]) // 3 for name in chosen).values()) == {7}


def test_every_pair_exists_fits_together_and_has_a_recipe() -> None:
    pairs = [*sweeps.PAIRS, *sweeps.LATER_PAIRS]
    assert len(set(pairs)) == len(pairs)
    for pair in pairs:
        model, _ = data.find(*pair.split("/"))
        assert model.family in sweeps.RECIPES


def test_the_speed_of_a_sweep_is_measured_beside_the_naive_loop(tmp_path, monkeypatch) -> None:
    model, splits = make(Residual)
    monkeypatch.setattr(sweep_speed, "load_pair", lambda *_: (model, splits))
    recipe = replace(RECIPE, steps=4)
    sweep_speed.measure({"residual/toys": recipe}, tmp_path)
    document = json.loads((tmp_path / "sweep_speed.json").read_text())
    (result,) = document["results"]
    assert result["pair"] == "residual/toys" and result["layers"] == 7
    assert 0 <= result["largest_difference_of_a_score"] < 1e-4
    assert result["ratio"]["n"] == sweep_speed.ROUNDS and result["ratio"]["low"] > 0
    for name, parts in result["phases"].items():
        assert 0 < sum(parts.values()) <= sum(result["seconds"][name][end] for end in ("low", "high")) / 2
    assert result["phases"]["naive"]["checks"] == 0 < result["phases"]["reuse"]["checks"]
    table = readme.sweep_speed_table(document)
    assert "ratio without planning, caches and checks" in table
    assert f"| {result['ratio']['median']:.2f} (" in table and "residual/toys" in table
