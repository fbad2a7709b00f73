"""Profiles of batches that say nothing: made as a sweep makes its own, checked against its records, and resumed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sweeping_models import RECIPE, Residual, make
from torch import nn

pytest.importorskip("sklearn", reason="contestants stand beside the controls: pip install scikit-learn")

from bench import data
from bench.layerbench import controls
from bench.layerbench.control_contestants import INPUTS, LABELS, control_profiles
from zest_fast.prefix.volatile_state import preserved
from zest_fast.profiling.profile import profile
from zest_fast.sweeping.sweep import sweep
from zest_fast.sweeping.tables import consolidate, load_records, sweeps_of
from zest_fast.sweeping.trials import draw, set_head


@pytest.fixture
def swept(tmp_path, monkeypatch, one_thread):
    """The model, its splits, the file of a finished sweep of two data sets; bench.data knows them."""
    model, splits = make(Residual)
    model.eval()
    monkeypatch.setattr(controls, "load_pair", lambda *_: (model, splits))
    monkeypatch.setitem(data.MODELS, "toy", data.Model("toy", "toy", "image", lambda _: model, lambda x: x))
    names = ("one", "two")
    for name in names:
        files = {"out": tmp_path / f"{name}.jsonl", "model_name": "toy", "dataset_name": name}
        sweep(model, splits, recipe=RECIPE, layers=["stem"], progress=False, **files)
    paths = [tmp_path / f"{name}.jsonl" for name in names]
    return model, splits, consolidate(paths, tmp_path / "records.parquet")


def test_control_profiles_are_those_of_a_sweep_with_another_batch(swept, tmp_path) -> None:
    model, splits, path = swept
    out = tmp_path / "controls.parquet"
    controls.add(path, out, ["toy/one"])
    found = control_profiles(out)
    states = ("fresh", "warm")
    assert set(found) == {(control, "toy", "one", state) for control in (LABELS, INPUTS) for state in states}
    records = load_records(path)
    columns = [name for name in records if name not in ("accuracy", "loss", "head_accuracy", "head_loss")]
    assert all(list(rows.columns) == columns for rows in found.values())
    inputs, targets = splits["train"]
    rows = draw(len(targets), RECIPE.train_samples, 0)[: RECIPE.profile_samples]
    shuffled = targets[rows][torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    assert shuffled.bincount().equal(targets[rows].bincount()) and not shuffled.equal(targets[rows])
    for state in states:
        (described,) = [entry for entry in sweeps_of(path) if entry["dataset"] == "one"]
        head = controls.refitted_head(model, model.head, splits["head"], RECIPE, described["head_strength"], 0)
        with preserved(model, 0):
            set_head(model.head, *head)
            if state == "fresh":
                with preserved(model, 0):
                    model.head.reset_parameters()
            table = profile(model, (inputs[rows], shuffled), metrics=["grad_norm", "snip"])
        row = found[LABELS, "toy", "one", state].loc["stem"]
        assert row.grad_norm == pytest.approx(table["stem"]["grad_norm"], rel=1e-5)
        true = records[(records.dataset == "one") & (records.seed == 0) & (records.head_state == state)].iloc[0]
        for control in (LABELS, INPUTS):
            row = found[control, "toy", "one", state].loc["stem"]
            assert row.weight_std == true.weight_std and row.grad_norm != true.grad_norm
    assert found[LABELS, "toy", "one", "warm"].act_std.iloc[0] == pytest.approx(true.act_std, rel=1e-5)
    assert found[INPUTS, "toy", "one", "warm"].act_std.iloc[0] != pytest.approx(true.act_std, rel=1e-5)
    (described,) = controls.described(out)
    assert set(described["checks"]) == {"head_loss", "grad_norm, fresh", "grad_norm, warm"}


def test_what_is_there_stays_and_what_lacks_is_added(swept, tmp_path, monkeypatch) -> None:
    _, _, path = swept
    out = tmp_path / "controls.parquet"
    controls.add(path, out, ["toy/one"])
    loaded = []
    load = controls.load_pair
    monkeypatch.setattr(controls, "load_pair", lambda *names: loaded.append(names) or load(*names))
    before = control_profiles(out)
    controls.add(path, out)
    assert loaded == [("toy", "two")] and len(control_profiles(out)) == 8
    for key, rows in before.items():
        assert control_profiles(out)[key].grad_norm.equals(rows.grad_norm)
    controls.add(path, out)
    assert len(loaded) == 1
    with pytest.raises(ValueError, match="no records of toy/three"):
        controls.add(path, out, ["toy/three"])


def test_other_data_another_head_and_other_gradients_are_refused(swept, tmp_path, monkeypatch) -> None:
    model, splits, path = swept
    records, (described, _) = load_records(path), sweeps_of(path)
    own = records[records.dataset == described["dataset"]]
    other = {**splits, "score": (splits["score"][0] + 1, splits["score"][1])}
    monkeypatch.setattr(controls, "load_pair", lambda *_: (model, other))
    with pytest.raises(ValueError, match="the samples of 'score' are not those of the records"):
        controls.control_profiles(described, own)
    monkeypatch.setattr(controls, "load_pair", lambda *_: (model, splits))
    with pytest.raises(ValueError, match="the head of seed 0 has a loss of"):
        controls.control_profiles({**described, "head_strength": 10.0}, own)
    with pytest.raises(ValueError, match="other gradients than in the records: 50"):
        controls.control_profiles(described, own.assign(grad_norm=2 * own.grad_norm))


def test_noise_has_the_mean_and_deviation_of_each_channel() -> None:
    spread, centre = torch.tensor([[1.0, 2.0, 3.0], [0.0, 5.0, -5.0]])[:, :, None, None]
    images = spread * torch.randn(400, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + centre
    noise = controls.noise_like(images, nn.Identity())
    assert noise.shape == images.shape
    torch.testing.assert_close(noise.mean((0, 2, 3)), images.mean((0, 2, 3)), atol=0.1, rtol=0)
    torch.testing.assert_close(noise.std((0, 2, 3)), images.std((0, 2, 3)), atol=0.05, rtol=0)

    both = torch.stack([(noise - centre).flatten(), (images - centre).flatten()])
    assert abs(torch.corrcoef(both)[0, 1]) < 0.02
    assert torch.equal(noise, controls.noise_like(images, nn.Identity()))


def test_random_tokens_keep_padding_and_what_marks_begin_and_end() -> None:
    begin, end, padding = 2, 3, 0
    lengths = (3, 5, 8)
    ids = torch.full((3, 8), padding)
    mask = torch.zeros(3, 8, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.arange(10, 10 + length)
        ids[row, 0], ids[row, length - 1] = begin, end
        mask[row, :length] = 1
    model = SimpleNamespace(modules=lambda: [nn.Embedding(50, 4), nn.Embedding(8, 4)])
    noise = controls.noise_like({"input_ids": ids, "attention_mask": mask}, model)
    found = noise["input_ids"]
    assert torch.equal(noise["attention_mask"], mask)
    for row, length in enumerate(lengths):
        assert found[row, 0] == begin and found[row, length - 1] == end and (found[row, length:] == padding).all()
        inside = found[row, 1 : length - 1]
        assert not set(inside.tolist()) & {begin, end, padding} and inside.max() < 50
    assert not torch.equal(found, ids)
    ids[:, 0], ids[0, 2] = torch.tensor([4, 5, 6]), 7  # nothing in common: all words are replaced
    free = controls.noise_like({"input_ids": ids, "attention_mask": mask}, model)["input_ids"]
    assert (free[mask.bool()] != ids[mask.bool()]).float().mean() > 0.8
