"""The head trained alone by a sweep's recipe: the trials of its layers, without a layer."""

from dataclasses import replace

import pandas
import pytest
import torch
from sweeping_models import RECIPE, Residual, make
from torch import nn

from bench import data, head_alone
from zest_fast.sweeping.sweep import sweep
from zest_fast.sweeping.tables import consolidate, load_records, sweeps_of
from zest_fast.sweeping.trials import _batches_of, draw

STEPS = replace(RECIPE, steps=12, head_lr=0.05)


@pytest.fixture
def records(tmp_path, monkeypatch, one_thread):
    """The model, its splits, the file of a finished sweep; bench.data knows both."""
    model, splits = make(Residual)
    model.eval()
    monkeypatch.setattr(head_alone, "load_pair", lambda *_: (model, splits))
    monkeypatch.setitem(data.MODELS, "toy", data.Model("toy", "toy", "image", lambda _: model, lambda x: x))
    sweep(model, splits, recipe=STEPS, out=tmp_path / "r.jsonl", model_name="toy", layers=["stem"], progress=False)
    return model, splits, consolidate([tmp_path / "r.jsonl"], tmp_path / "records.parquet")


def plainly(model, splits, seed, start):
    """Loss after the head trained alone: a loop of its own over the whole model."""
    model.head.weight.data, model.head.bias.data = (part.clone() for part in start)
    inputs, targets = splits["train"]
    optimizer = torch.optim.Adam(model.head.parameters(), lr=STEPS.head_lr)
    rows = draw(len(targets), STEPS.train_samples, seed)
    for step, batch in enumerate(_batches_of(rows, STEPS.steps, STEPS.batch_size, seed)):
        optimizer.param_groups[0]["lr"] = STEPS.head_lr * (1 - step / STEPS.steps)
        optimizer.zero_grad()
        with torch.enable_grad():
            nn.functional.cross_entropy(model(inputs[batch]), targets[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(splits["score"][0]), splits["score"][1]))


def test_the_head_alone_is_trained_as_beside_a_layer(records) -> None:
    model, splits, path = records
    before, weights = load_records(path), {n: p.clone() for n, p in model.named_parameters() if "head" not in n}
    head_alone.add(path)
    (described,) = sweeps_of(path)
    pandas.testing.assert_frame_equal(load_records(path), before)
    starts = before.groupby("seed").head_loss.first()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in weights.items())
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for seed in STEPS.seeds:
        start = head_alone.refitted_head(model, model.head, splits["head"], STEPS, described["head_strength"], seed)
        found = described[head_alone.KEY][str(seed)]
        assert found["loss"] == pytest.approx(plainly(model, splits, seed, start), rel=1e-5)
        assert abs(found["loss"] - starts[seed]) > 1e-3  # it did train
        assert 0 <= found["accuracy"] <= 1


def test_what_is_there_is_not_measured_again_and_other_data_are_refused(records, monkeypatch) -> None:
    model, splits, path = records
    other = {**splits, "train": (splits["train"][0] + 1, splits["train"][1])}
    monkeypatch.setattr(head_alone, "load_pair", lambda *_: (model, other))
    with pytest.raises(ValueError, match="the samples of 'train' are not those of the records"):
        head_alone.add(path)
    assert head_alone.KEY not in sweeps_of(path)[0]
    monkeypatch.setattr(head_alone, "load_pair", lambda *_: (model, splits))
    head_alone.add(path)
    monkeypatch.setattr(head_alone, "load_pair", None)  # nothing is loaded
    head_alone.add(path)


def test_another_head_than_that_of_the_records_is_refused(records) -> None:
    _, _, path = records
    (described,) = sweeps_of(path)
    with pytest.raises(ValueError, match="the head of seed 0 has a loss of"):
        head_alone.head_alone({**described, "head_strength": 10.0}, head_alone._starts(path, described))
