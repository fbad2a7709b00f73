"""bench.probes: probes become a column of the records, and only where they are of the same layers."""

from __future__ import annotations

import shutil

import pytest

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
