"""`profile(model, batches=...)`: means over batches, how these differ, and both on disk."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from profiles import make_profile
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import zest_fast
from zest_fast import LayerProfile
from zest_fast.profiling.averaging import mean_profile
from zest_fast.profiling.layer_profile import Spread

pytestmark = pytest.mark.usefixtures("one_thread")


class Routed(nn.Module):
    """A batch whose first input is positive goes through one expert, any other through the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        expert = self.left if x[0, 0] > 0 else self.right
        return self.head(expert(self.stem(x).tanh()))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 3))


def batches(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 4, generator=draw), torch.randint(3, (8,), generator=draw)) for _ in range(count)]


def test_values_are_means_of_single_profiles_and_the_model_is_as_it_was():
    model, data = network(), batches()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    singles = [zest_fast.profile(model, batch) for batch in data]
    found = zest_fast.profile(model, batches=data)
    stacked = np.stack([one.values for one in singles])
    np.testing.assert_allclose(found.values, stacked.mean(axis=0), rtol=1e-14)
    assert found.spread is not None and found.spread.batches == 3
    np.testing.assert_allclose(found.spread.deviations, stacked.std(axis=0, ddof=1), rtol=1e-12)
    assert (found.spread.counts == 3).all() and (found.spread.deviations[:, found.metrics.index("snip")] > 0).all()
    assert found.loss == pytest.approx(np.mean([one.loss for one in singles]))
    assert found.info == singles[0].info and found.uncovered == singles[0].uncovered
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert repr(found).startswith("LayerProfile: 2 layers x 15 metrics, means of 3 batches, loss ")


def test_a_loader_is_read_to_its_end_and_one_batch_is_itself():
    model, (inputs, targets) = network().eval(), batches(1)[0]
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=4)
    assert zest_fast.profile(model, batches=loader).spread.batches == 2
    alone, one = zest_fast.profile(model, (inputs, targets)), zest_fast.profile(model, batches=[(inputs, targets)])
    np.testing.assert_array_equal(one.values, alone.values)
    assert alone.spread is None and np.isnan(one.spread.deviations).all() and (one.spread.counts == 1).all()


def test_a_layer_that_some_batches_do_not_reach_has_the_mean_of_the_others():
    torch.manual_seed(0)
    model, data = Routed(), batches(4)
    for sign, (inputs, _) in zip((1, -1, 1, 1), data, strict=True):
        inputs[0, 0] = sign
    found = zest_fast.profile(model, batches=data, metrics=["snip"])
    assert found.names == ["stem", "left", "right", "head"] and not found.uncovered
    counts = dict(zip(found.names, found.spread.counts[:, 0].tolist(), strict=True))
    assert counts == {"stem": 4, "left": 3, "right": 1, "head": 4}
    singles = [zest_fast.profile(model, batch, metrics=["snip"]) for batch in data]
    assert found["right"]["snip"] == singles[1]["right"]["snip"]
    assert found["left"]["snip"] == pytest.approx(np.mean([singles[i]["left"]["snip"] for i in (0, 2, 3)]))
    assert found.info["left"]["note"] == "reached in 3 of 4 batches, of which the means are"
    assert [found.info[name]["depth"] for name in found] == [0, 1, 2, 3]


def test_cells_that_are_undefined_or_infinite_in_some_batches():
    info = {name: {"depth": row, "uses": 1, "nonfinite": row, "note": ""} for row, name in enumerate("ab")}
    first, second = (make_profile({"a": low, "b": high}, info=info) for low, high in ((1.0, np.nan), (3.0, np.inf)))
    found = mean_profile([first, second])
    assert found["a"]["snip"] == 2.0 and found.spread.deviations[0, 0] == pytest.approx(2**0.5)
    assert found["b"]["snip"] == np.inf and found.spread.counts[1, 0] == 1
    assert np.isnan(found.spread.deviations[1, 0]) and found.info["b"]["nonfinite"] == 2


def test_ranking_works_from_means():
    model, data = network(), batches()
    assert set(zest_fast.rank(zest_fast.profile(model, batches=data)).names) == {"0", "4"}


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_round_trip_is_exact(tmp_path, suffix):
    found = zest_fast.profile(network(), batches=batches())
    path = found.save(tmp_path / f"profile.{suffix}")
    again = LayerProfile.load(path)
    np.testing.assert_array_equal(again.values, found.values)
    np.testing.assert_array_equal(again.spread.deviations, found.spread.deviations)
    np.testing.assert_array_equal(again.spread.counts, found.spread.counts)
    assert again.spread.batches == 3 and again.spread.counts.dtype == np.int64


def test_files_that_contradict_themselves(tmp_path):
    path = zest_fast.profile(network(), batches=batches()).save(tmp_path / "profile.json")
    document = json.loads(path.read_text())
    assert document["version"] == 2

    def refused(message, **changes):
        path.write_text(json.dumps({**document, **changes}))
        with pytest.raises(ValueError, match=rf"profile\.json.*{message}"):
            LayerProfile.load(path)

    refused("batches: with format version 1", version=1)
    refused("counts: expected 0 to 2", batches=2)
    layers = [{key: value for key, value in layer.items() if key != "counts"} for layer in document["layers"]]
    refused(r"layers\[0\]\.counts: expected one of each", layers=layers)
    path.write_text(json.dumps({key: value for key, value in document.items() if key != "batches"}))
    with pytest.raises(ValueError, match="batches: with format version 2"):
        LayerProfile.load(path)


def test_the_spread_in_a_data_frame():
    found = zest_fast.profile(network(), batches=batches(), metrics=["snip", "plain"])
    frame = found.to_pandas(spread=True)
    assert list(frame)[:4] == ["plain", "plain_deviation", "plain_batches", "snip"]
    assert frame["snip_batches"].tolist() == [3, 3]
    with pytest.raises(ValueError, match="of one batch"):
        zest_fast.profile(network(), batches(1)[0]).to_pandas(spread=True)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], ValueError, "batches yields no batch"),
        ({"input_ids": torch.ones(2, 2)}, TypeError, "batches is a dict, one batch"),
        (torch.ones(2, 4), TypeError, "batches is a Tensor, one batch or part of it"),
        (3, TypeError, "batches is a int; a list of batches"),
        (batches(1)[0], TypeError, "batch is a Tensor; a mapping"),
    ],
)
def test_what_is_no_list_of_batches(given, error, message):
    with pytest.raises(error, match=message):
        zest_fast.profile(network(), batches=given)


def test_errors_name_the_batch_and_two_ways_are_refused():
    data = [*batches(2), (torch.ones(8, 5), torch.zeros(8, dtype=torch.long))]
    with pytest.raises(RuntimeError) as raised:
        zest_fast.profile(network(), batches=data)
    if hasattr(raised.value, "__notes__"):  # from Python 3.11 on
        assert raised.value.__notes__ == ["in batch 2 of batches= (the first is 0)"]
    with pytest.raises(ValueError, match="batches was given together with batch"):
        zest_fast.profile(network(), data[0], batches=data)
    with pytest.raises(ValueError, match=r"spread\.deviations has shape \[1, 2\]"):
        make_profile({"a": 1.0, "b": 2.0}, spread=Spread(2, np.ones((1, 2)), np.ones((2, 2), dtype=np.int64)))
