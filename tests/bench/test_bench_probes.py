"""bench.probes: probes become a column of the records, and only where they are of the same layers."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pandas
import pytest
import torch
from torch import nn

import zest_fast
from bench import probe_blind, probe_controls, probes
from bench.probe_share import share_text
from bench.probes import add
from zest_fast import load_records, sweeps_of
from zest_fast.sweeping.tables import SHIPPED


@pytest.fixture
def copy(tmp_path):
    return shutil.copy(SHIPPED, tmp_path / "records.parquet")


def test_scores_are_written_beside_what_was_swept(copy):
    before = load_records(copy)
    layers = sorted(set(before.layer[(before.model == "splade-tiny") & (before.dataset == "trec")]))
    lines = [
        {"pair": "splade-tiny/trec", "layers": {name: [place + seed, 0.0, 0.0] for place, name in enumerate(layers)}}
        for seed in (0, 1)
    ]
    add(copy, [*lines, {"pair": "nobody/knows", "layers": {"this": [1.0, 0.0, 0.0]}}])
    after = load_records(copy)
    assert sweeps_of(copy) == sweeps_of() and len(after) == len(before)
    probed = after[after.probe_score.notna()]
    assert set(probed.model + "/" + probed.dataset) == {"splade-tiny/trec"}
    means = probed.groupby("layer").probe_score.agg(["min", "max"])
    assert (means["min"] == means["max"]).all() and means["min"].tolist() == [n + 0.5 for n in range(len(layers))]
    assert before.drop(columns="probe_score").equals(after.drop(columns="probe_score"))


def test_probes_of_other_layers_are_refused(copy):
    contents = load_records(copy)
    with pytest.raises(ValueError, match="splade-tiny/trec: the probe is of other layers than the records"):
        add(copy, [{"pair": "splade-tiny/trec", "layers": {"elsewhere": [1.0, 0.0, 0.0]}}])
    assert load_records(copy).equals(contents)


@pytest.fixture
def toy(monkeypatch):
    """A pair of two layers and a head that no package is needed for; what its probes were given."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    inputs = torch.randn(96, 4)
    samples = (inputs, inputs[:, :3].argmax(1))
    records = pandas.DataFrame(
        [
            {"model": "toy", "dataset": "digits", "layer": layer, "loss": loss, "numel": numel}
            for layer, loss, numel in (("0", 0.5, 32), ("2", 0.4, 64))
            for _ in range(2)
        ]
    )
    monkeypatch.setattr(probes, "load_pair", lambda *_: (model, dict.fromkeys(("train", "score", "head"), samples)))
    monkeypatch.setattr(probes, "load_records", lambda: records)
    monkeypatch.setattr(probes, "MODELS", {"toy": SimpleNamespace(family="toy")})
    given = []
    monkeypatch.setattr(probes, "probe", lambda *of, **options: given.append(of[1]) or zest_fast.probe(*of, **options))
    return given


def test_a_control_has_the_same_samples_with_labels_in_another_order(toy):
    own, control = (
        probes.measure("toy/digits", seed=0, budget=1.0, samples=96, shuffled=shuffled) for shuffled in (False, True)
    )
    ((inputs, labels),), ((same, shuffled),) = toy
    assert torch.equal(inputs, same) and not torch.equal(labels, shuffled)
    assert torch.equal(labels.sort().values, shuffled.sort().values)
    assert list(own["layers"]) == list(control["layers"]) == ["0", "2"]
    assert own["by_rate"].keys() == control["by_rate"].keys() and own["rate"] in map(float, own["by_rate"])


def test_controls_stand_beside_the_probe_and_the_number_of_parameters(monkeypatch):
    rows = [{"model": "toy", "dataset": "digits", "layer": f"{n}", "loss": 1.0 - n, "numel": n * n} for n in range(3)]
    monkeypatch.setattr(probe_controls, "load_records", lambda: pandas.DataFrame(rows))
    best, worst = ({f"{n}": [sign * n, 0.0, 0.0] for n in range(3)} for sign in (1.0, -1.0))
    found = probe_controls.taus("toy/digits", best, worst)
    assert found == {"probe": 1.0, "shuffled": -1.0, "numel": 1.0}
    text = probe_controls.controls_text({"results": [{"pair": "toy/digits", **found}, {"pair": "b", **found}]})
    assert "| toy/digits | 1.00 | -1.00 | 1.00 |" in text and "| mean | 1.00 | -1.00 | 1.00 |" in text


def test_a_share_of_time_is_of_the_whole_sweep():
    row = {"pair": "toy/digits", "layers": 2, "share": {"median": 0.05}}
    row["seconds"] = {"probe": {"median": 3.0}, "sweep": {"median": 5.0}}  # of a twelfth of it
    text = share_text({"settings": {"share_of_a_seed": 4}, "results": [row]})
    assert "| toy/digits | 2 | 3.0 | 60 | 5.0% |" in text


def test_what_is_blind_is_judged_without_its_outcomes():
    """The ranking that knows the gains is perfect, whoever gives it; pairs that ship are refused."""
    records = load_records()
    rows = records[(records.model == "splade-tiny") & (records.dataset == "trec")]
    gains = -rows[rows.head_state == "fresh"].groupby("layer").loss.mean()
    line = {"layers": {name: [gain, gain, 0.1] for name, gain in gains.items()}, "rate": 1.0, "start": 1.0}

    class Blind:
        def predict(self, profile, probe=None):
            assert not {"loss", "accuracy", "head_loss"} & set(profile.columns)
            return -profile.numel.to_numpy() if probe is None else probe.of(tuple(profile.layer))

    found = probe_blind.judged(rows, line, Blind())
    assert found["tau"]["probe"] == found["tau"]["probed"] == 1.0 and found["top_5"]["probe"] == 1.0
    assert found["tau"]["ranker"] == pytest.approx(-found["tau"]["numel"]) and found["layers"] == len(gains)
    assert "| x | the probe alone | 1.00 | 1.00 |" in probe_blind.blind_text({"results": [{"pair": "x", **found}]})
