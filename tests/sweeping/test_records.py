"""Record files survive what happens to files, and say so where they do not."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pandas
import pytest

from zest_fast.sweeping import records as records_module
from zest_fast.sweeping.records import RecordFile, read_records
from zest_fast.sweeping.tables import LEADING, consolidate, load_records, sweeps_of

HEADER = {
    "model": "tiny", "dataset": "toys", "family": "toys", "recipe": {"seeds": [0, 1]}, "recipe_hash": "aa",
    "layers": ["a", "b"], "versions": {"definitions": 1}, "environment": {"command": "one"},
}  # fmt: skip


def score(layer, seed=0, loss=0.5):
    return {"record": "layer", "seed": seed, "layer": layer, "accuracy": 0.75, "loss": loss, "seconds": 1.5}


def fill(path, header=HEADER, seeds=(0, 1), layers=("a", "b")):
    with RecordFile(path, header) as file:
        for seed in seeds:
            file.append({"record": "head", "seed": seed, "accuracy": 0.5, "loss": 0.7, "weight": "", "bias": ""})
            for state in ("warm", "fresh"):
                rows = {
                    layer: {"snip": 1.5 + seed, "numel": 6, "kind": "linear", "shape": [2, 3], "shared_with": []}
                    for layer in layers
                }
                profile = {"record": "profile", "seed": seed, "head_state": state, "backend": "cpu", "layers": rows}
                file.append(profile)
            for layer in layers:
                file.append(score(layer, seed))
    return path


def test_records_come_back_exact_to_the_bit(tmp_path) -> None:
    with RecordFile(tmp_path / "r.jsonl", HEADER) as file:
        file.append(score("a", loss=0.1 + 0.2))
        file.append(score("ä", loss=float("inf")))
    with RecordFile(tmp_path / "r.jsonl", HEADER) as file:
        assert file.get("layer", 0, "a")["loss"] == 0.1 + 0.2
        assert file.get("layer", 0, "ä")["loss"] == float("inf")
        assert ("layer", 1, "a") not in file and ("layer", 0, "a") in file


@pytest.mark.parametrize("kept", [1, 8, 9, 10, 40, -1])
def test_a_line_torn_off_at_the_end_is_dropped(tmp_path, kept) -> None:
    path = tmp_path / "r.jsonl"
    with RecordFile(path, HEADER) as file:
        file.append(score("a"))
        whole = path.read_bytes()
        file.append(score("b"))
    last = path.read_bytes()[len(whole) :]
    path.write_bytes(whole + last[:kept])
    assert len(read_records(path)[1]) == 1
    with RecordFile(path, HEADER) as file:
        assert path.read_bytes() == whole
        file.append(score("b"))
    assert path.read_bytes() == whole + last


def test_a_torn_header_is_written_again(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    RecordFile(path, HEADER).close()
    whole = path.read_bytes()
    for kept in (0, 3, 9, 50):
        path.write_bytes(whole[:kept])
        RecordFile(path, HEADER).close()
        assert path.read_bytes() == whole


def test_a_last_line_of_which_the_end_is_right_and_the_middle_is_not_is_dropped(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    with RecordFile(path, HEADER) as file:
        file.append(score("a"))
    before = path.read_bytes()
    path.write_bytes(before + b"00000000 " + b"\0" * 20 + b"\n")
    with RecordFile(path, HEADER) as file:
        assert len(file.records) == 1
    assert path.read_bytes() == before


def test_a_changed_digit_in_the_middle_is_an_error_that_names_the_line(tmp_path) -> None:
    path = fill(tmp_path / "r.jsonl")
    damaged = path.read_bytes().replace(b"0.75", b"0.76", 1)
    path.write_bytes(damaged)
    for read in (read_records, lambda path: RecordFile(path, HEADER)):
        with pytest.raises(ValueError, match=r"r.jsonl', line 5: the checksum"):
            read(path)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("content", [b"my notes", b"my notes\n", b"a,b\n1,2\n", b"{}\n{}\n"])
def test_a_file_of_somebody_else_is_refused_and_kept(tmp_path, content) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"notes.txt'"):
        RecordFile(path, HEADER)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": {"seeds": [0, 2]}}, r"another recipe.seeds: \[0, 1\] there, \[0, 2\] now"),
        ({"versions": {"definitions": 2}}, "another versions.definitions: 1 there, 2 now"),
        ({"dataset": "cars"}, "another dataset: 'toys' there, 'cars' now"),
    ],
)
def test_records_of_another_recipe_or_version_are_refused(tmp_path, change, message) -> None:
    path = fill(tmp_path / "r.jsonl")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        RecordFile(path, {**HEADER, **change})
    assert path.read_bytes() == before
    RecordFile(path, {**HEADER, "environment": {"command": "another"}}).close()


@pytest.mark.parametrize("written", [0, 20])
def test_a_full_disk_loses_nothing_and_the_sweep_can_go_on(tmp_path, monkeypatch, written) -> None:
    path = tmp_path / "r.jsonl"
    with RecordFile(path, HEADER) as file:
        file.append(score("a"))
        before = path.read_bytes()
        write = os.write

        def full(descriptor, data):
            write(descriptor, data[:written])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(records_module.os, "write", full)
        with pytest.raises(RuntimeError, match=r"No space left on device.*make room"):
            file.append(score("b"))
        monkeypatch.undo()
        assert path.read_bytes() == before and ("layer", 0, "b") not in file
        file.append(score("b"))
    assert len(read_records(path)[1]) == 2


def test_a_write_that_takes_less_than_it_was_given_is_finished(tmp_path, monkeypatch) -> None:
    write = os.write
    monkeypatch.setattr(records_module.os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    with RecordFile(tmp_path / "r.jsonl", HEADER) as file:
        file.append(score("a"))
    assert read_records(tmp_path / "r.jsonl")[1] == [score("a")]


def test_two_sweeps_do_not_write_into_one_file(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    program = f"from zest_fast.sweeping.records import RecordFile; RecordFile({str(path)!r}, {HEADER!r})"
    with RecordFile(path, HEADER):
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "is in use by another sweep" in found.stderr
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_consolidated_records_are_read_with_their_recipes(tmp_path) -> None:
    one = fill(tmp_path / "one.jsonl")
    other = fill(tmp_path / "other.jsonl", {**HEADER, "dataset": "cars", "recipe": {"seeds": [0]}}, seeds=(0,))
    table = consolidate([one, other], tmp_path / "records.parquet")
    frame = load_records(table)
    assert tuple(frame.columns[:10]) == LEADING
    assert list(frame.columns[10:]) == ["snip", "numel", "kind", "shape", "shared_with"]
    assert frame.groupby("dataset").size().to_dict() == {"cars": 4, "toys": 8}
    assert frame[frame.seed == 1].snip.eq(2.5).all() and frame.head_loss.eq(0.7).all()
    assert [(sweep["dataset"], sweep["recipe"], sweep["seconds"]) for sweep in sweeps_of(table)] == [
        ("toys", HEADER["recipe"], 6.0),
        ("cars", {"seeds": [0]}, 3.0),
    ]


def test_an_unfinished_sweep_is_left_out(tmp_path) -> None:
    finished = fill(tmp_path / "finished.jsonl")
    short = fill(tmp_path / "short.jsonl", {**HEADER, "dataset": "cars"}, seeds=(0,))
    frame = load_records(consolidate([finished, short], tmp_path / "records.parquet"))
    assert set(frame.dataset) == {"toys"}
    with pytest.raises(ValueError, match="no finished sweep"):
        consolidate([short], tmp_path / "none.parquet")
    assert not (tmp_path / "none.parquet").exists()


def test_a_layer_that_the_loss_does_not_reach_leaves_nothing_unfinished(tmp_path) -> None:
    path = fill(tmp_path / "r.jsonl", layers=("a",))
    assert set(load_records(consolidate([path], tmp_path / "records.parquet")).layer) == {"a"}


def test_consolidating_again_adds_to_what_is_there_and_replaces_what_was_swept_anew(tmp_path) -> None:
    table = consolidate([fill(tmp_path / "one.jsonl")], tmp_path / "records.parquet")
    consolidate([fill(tmp_path / "two.jsonl", {**HEADER, "dataset": "cars"})], table)
    assert load_records(table).groupby("dataset").size().to_dict() == {"cars": 8, "toys": 8}
    with RecordFile(tmp_path / "two.jsonl", {**HEADER, "dataset": "cars"}) as file:
        file.append(score("a", loss=0.25))
    consolidate([tmp_path / "two.jsonl"], table)
    frame = load_records(table)
    assert frame.groupby("dataset").size().to_dict() == {"cars": 8, "toys": 8}
    assert (frame.loss == 0.25).sum() == 2
    before = table.read_bytes()
    with pytest.raises(ValueError, match="different recipes"):
        consolidate([fill(tmp_path / "x.jsonl", {**HEADER, "dataset": "x", "recipe_hash": "bb"})], table)
    assert table.read_bytes() == before


def test_one_model_under_two_recipes_and_a_pair_twice_are_refused(tmp_path) -> None:
    one = fill(tmp_path / "one.jsonl")
    other = fill(tmp_path / "two.jsonl", {**HEADER, "dataset": "cars", "recipe_hash": "bb"})
    with pytest.raises(ValueError, match=r"tiny was swept under different recipes on toys \(aa\) and cars \(bb\)"):
        consolidate([one, other], tmp_path / "records.parquet")
    again = fill(tmp_path / "again.jsonl")
    with pytest.raises(ValueError, match="both hold records of tiny on toys"):
        consolidate([one, again], tmp_path / "records.parquet")


def test_metrics_of_two_definitions_are_refused(tmp_path) -> None:
    one = fill(tmp_path / "one.jsonl")
    later = {**HEADER, "model": "other", "versions": {"definitions": 2}}
    with pytest.raises(ValueError, match=r"different definitions: 1 \(tiny/toys\), 2 \(other/"):
        consolidate([one, fill(tmp_path / "two.jsonl", later)], tmp_path / "records.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1 and so on", None])
def test_a_foreign_or_torn_table_is_refused_by_name(tmp_path, content) -> None:
    path = tmp_path / "records.parquet"
    if content is None:
        pandas.DataFrame({"model": ["tiny"]}).to_parquet(path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"records.parquet'"):
        load_records(path)


def test_the_shipped_records_are_whole() -> None:
    frame = load_records()
    assert tuple(frame.columns[:10]) == LEADING
    assert set(frame.head_state) == {"warm", "fresh"} and not frame["head"].any()
    assert frame[["loss", "accuracy", "head_loss", "head_accuracy"]].notna().all(axis=None)
    assert not frame.duplicated(["model", "dataset", "seed", "layer", "head_state"]).any()
    described = {(sweep["model"], sweep["dataset"]) for sweep in sweeps_of()}
    assert described == set(frame[["model", "dataset"]].itertuples(index=False, name=None))
    for sweep in sweeps_of():
        assert sweep["recipe_hash"] and sweep["recipe"]["layer_lr_factor"] and sweep["environment"]["command"]
        json.dumps(sweep, allow_nan=False)
