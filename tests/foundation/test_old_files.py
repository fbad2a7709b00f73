"""Files of formats that were written before load to the numbers that went in: tests/data is never written anew.

A format that changes gets files of a new number beside these. Deltas and runs are read in
tests/finetuning/test_delta_mutations.py, the first Ranker in tests/ranking/test_trees.py.
"""

from __future__ import annotations

import gzip
import math
import shutil
from pathlib import Path

import numpy as np
import pandas
import pytest

from zest_fast import LayerProfile, Ranker, Ranking, load_records, load_watch, rank, sink_for
from zest_fast.sweeping.records import RecordFile, read_records
from zest_fast.sweeping.tables import consolidate, sweeps_of

DATA = Path(__file__).parents[1] / "data"
PROFILES = ("profile_v1.json", "profile_v1.parquet")


@pytest.mark.parametrize("name", PROFILES)
def test_profile(name: str) -> None:
    profile = LayerProfile.load(DATA / name)
    assert profile.names == ["conv", "lin", "head"] and len(profile.metrics) == 15
    assert profile["lin"]["snip"] == 0.0881520065404402 and profile["head"]["grad_norm"] == 0.09015217930871344
    assert math.isnan(profile["conv"]["fisher"])
    assert profile.loss == 0.7169085741043091 and profile.backend == "cpu"
    assert profile.uncovered == {
        "embed.weight": "an embedding; name it in layers= to profile it",
        "lone.weight": "no gradient reached it: its module was not called",
    }
    assert profile.info["conv"]["shape"] == [3, 4, 1] and profile.info["head"]["head"] is True
    assert profile.info["conv"]["note"].startswith("act and fisher undefined: Conv1d 'conv' was not called")


def test_both_files_of_a_profile_hold_the_same() -> None:
    json, parquet = (LayerProfile.load(DATA / name) for name in PROFILES)
    np.testing.assert_array_equal(json.values, parquet.values)
    assert json.metrics == parquet.metrics and json.info == parquet.info


def test_profile_of_several_batches() -> None:
    json, parquet = (LayerProfile.load(DATA / name) for name in ("profile_v2.json", "profile_v2.parquet"))
    for found in (json, parquet):
        assert found.names == ["stem", "left", "right", "head"] and found.metrics == ["grad_norm", "snip"]
        assert found["left"]["snip"] == 0.09401651517974352 and found.spread is not None and found.spread.batches == 3
        assert found.spread.counts.tolist() == [[3, 3], [2, 2], [1, 1], [3, 3]]
        assert math.isnan(found.spread.deviations[2, 0]) and found.spread.deviations[1, 1] == 0.005591764691143234
        assert found.info["right"]["note"] == "reached in 1 of 3 batches, of which the means are"
    assert json.info == parquet.info and json.loss == parquet.loss


def test_ranking_of_a_ranker() -> None:
    ranking = Ranking.load(DATA / "ranking_v1.json")
    assert (
        ranking.names == ["stem", "right", "left", "head"]
        and ranking.heads == ("head",)
        and ranking.by == "Ranker"
        and ranking.is_new
    )
    assert ranking.scores[0] == 0.5711539899687424 and math.isnan(ranking.scores[-1])
    assert ranking.intervals[0].tolist() == [0.22391426351576538, 0.8773540753314752]
    assert ranking.note.startswith("has not seen this architecture, held-out tau 0.38")
    assert ranking.explain().loc["left", "base_metrics"] == -0.07065787970157239


def test_ranker(tmp_path: Path) -> None:
    path = tmp_path / "ranker.json"
    path.write_bytes(gzip.decompress((DATA / "ranker_v2.json.gz").read_bytes()))
    ranking = rank(LayerProfile.load(DATA / PROFILES[0]), by=Ranker.load(path))
    assert ranking.names == ["conv", "lin", "head"]
    np.testing.assert_allclose(ranking.scores, [0.5365457109400458, 0.46345428905995417, math.nan], rtol=1e-12)


def test_record_file_is_read_and_continued(tmp_path: Path) -> None:
    header, records = read_records(DATA / "records_v1.jsonl")
    assert header["model"] == "tiny" and header["recipe"]["seeds"] == [0] and header["layers"] == ["stem", "inner"]
    assert [record["record"] for record in records] == ["strength", "head", "profile", "profile", "layer", "layer"]
    path = Path(shutil.copy(DATA / "records_v1.jsonl", tmp_path / "records.jsonl"))
    with RecordFile(path, {key: value for key, value in header.items() if key not in ("record", "format")}) as file:
        assert file.get("layer", 0, "inner")["accuracy"] == 0.6190476190476191
        assert len(file.records) == 6
    assert path.read_bytes() == (DATA / "records_v1.jsonl").read_bytes()


def test_table_of_records(tmp_path: Path) -> None:
    frame = load_records(DATA / "records_v1.parquet")
    rows = frame.set_index(["layer", "head_state"])
    assert list(frame.layer) == ["stem", "stem", "inner", "inner"] and set(frame.seed) == {0}
    assert rows.loc[("inner", "warm"), "accuracy"] == 0.6190476190476191
    assert rows.loc[("stem", "fresh"), "snip"] == pytest.approx(0.357048, abs=1e-6)
    (about,) = sweeps_of(DATA / "records_v1.parquet")
    assert about["dataset"] == "toys" and about["versions"]["definitions"] == 1 and about["head_strength"] == 0.01
    again = load_records(consolidate([DATA / "records_v1.jsonl"], tmp_path / "again.parquet"))
    pandas.testing.assert_frame_equal(again, frame, rtol=0, atol=0)


def test_a_table_of_before_takes_new_sweeps(tmp_path: Path) -> None:
    path = Path(shutil.copy(DATA / "records_v1.parquet", tmp_path / "records.parquet"))
    consolidate([DATA / "records_v1.jsonl"], path)  # the same pair: replaced, not doubled
    pandas.testing.assert_frame_equal(load_records(path), load_records(DATA / "records_v1.parquet"), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["watch_v1.jsonl", "watch_v1.parquet"])
def test_log_of_a_watched_run_is_read_and_continued(tmp_path: Path, name: str) -> None:
    path = Path(shutil.copy(DATA / name, tmp_path / name))
    sink_for(path).close()
    assert path.read_bytes() == (DATA / name).read_bytes()
    log = load_watch(path)
    assert [step.step for step in log.steps] == [0, 10, 20] and len(log.segments) == 2 and len(log.notes) == 1
    assert log.layers == ["blocks.0.q", "blocks.0.mlp", "blocks.1.q", "blocks.1.mlp", "head"]
    last = log.steps[2]
    assert last.profile["blocks.0.q"]["snip"] == 0.6979076750492467 and last.profile.loss == 1 / 21
    assert last.notes == ("layer 'head' is dead",) and last.totals["noise_scale"] == math.inf and last.seconds == 2.0
    assert last.profile.info["head"]["shape"] == [2, 3] and last.profile.uncovered == {"embed.weight": "an embedding"}
    assert math.isnan(last.parts[1].loss) and last.parts[1].names == ["blocks.0.q", "blocks.0.mlp"]
    assert last.histograms["blocks.0.q"]["weight"][0].tolist() == [1, 0, 5]
    (overflow,) = [step for step in log.segments[0].steps if step.overflow]
    assert overflow.values[0].tolist()[2] == math.inf and math.isnan(overflow.values[0][1])
    sink = sink_for(path)
    sink(last)
    sink.close()
    np.testing.assert_array_equal(load_watch(path).steps[2].profile.values, last.profile.values)
