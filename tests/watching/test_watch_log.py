"""What is made of a log: columns, tables, drift, the picture."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kendalltau
from watched_runs import LAYERS, METRICS, make_step

from zest_fast import WatchLog, load_watch, sink_for
from zest_fast.watching.logs.drift import latest_drift
from zest_fast.watching.logs.watch_log import LogFollower


def logged(path: Path, *steps) -> WatchLog:
    sink = sink_for(path)
    for step in steps:
        sink(step)
    sink.close()
    return load_watch(path)


def scored(step: int, scores: list[float], **more):
    """A step whose snip is `scores`; the head's is the last."""
    return make_step(step, metrics=["snip"], values=np.array(scores)[:, None], layers=LAYERS[-len(scores) :], **more)


def test_columns_and_tables(tmp_path: Path) -> None:
    made = [make_step(0), make_step(10, layers=LAYERS[2:]), make_step(20, overflow=True)]
    log = logged(tmp_path / "run.jsonl", *made)
    assert log.layers == list(LAYERS) and log.metrics == list(METRICS)
    column = log.column("grad_norm")
    assert column.shape == (3, 5)
    np.testing.assert_array_equal(column[0], made[0].profile.column("grad_norm"))
    np.testing.assert_array_equal(column[1], [np.nan, np.nan, *made[1].profile.column("grad_norm")])
    frame = log.to_pandas()
    assert list(frame.columns) == [*METRICS, "loss", "seconds", "overflow"] and frame.index.names == ["step", "layer"]
    assert len(frame) == 5 + 3 + 5
    for step in made:
        rows = frame.loc[step.step]
        assert list(rows.index) == step.profile.names
        np.testing.assert_array_equal(rows[list(METRICS)], step.profile.values)
        assert set(rows.loss) == {step.profile.loss} and set(rows.overflow) == {step.overflow}
    with pytest.raises(KeyError, match="no metric 'grad_nrm'; nearest: 'grad_norm'"):
        log.column("grad_nrm")


def test_metrics_that_come_and_go(tmp_path: Path) -> None:
    log = logged(tmp_path / "run.jsonl", make_step(0, metrics=["snip"]), make_step(10, metrics=["rgn", "snip"]))
    assert log.metrics == ["snip", "rgn"]
    assert np.isnan(log.column("rgn")[0]).all() and not np.isnan(log.column("rgn")[1]).any()
    assert log.to_pandas().loc[10, "rgn"].tolist() == log.steps[1].profile.column("rgn").tolist()


def test_steps_are_a_sequence(tmp_path: Path) -> None:
    log = logged(tmp_path / "run.jsonl", *(make_step(step) for step in range(0, 120, 10)))
    assert [step.step for step in log.steps[-2:]] == [100, 110] and log.steps[-1].step == 110
    assert (
        len(list(log.steps)) == 12 and "… and 2 more" in repr(log.steps) and repr(log).endswith("5 layers x 3 metrics")
    )
    with pytest.raises(IndexError):
        log.steps[12]


def test_names_of_a_file_move_no_cursor(tmp_path: Path) -> None:
    log = logged(tmp_path / "\x1b[2Jrun.jsonl", make_step(0, layers=["\x1b[2J", "head"]))
    assert not any("\x1b" in text for text in (repr(log), repr(log.steps), str(log.drift("snip"))))


def test_drift_is_kendalls_tau_and_what_stays_of_the_best(tmp_path: Path) -> None:
    scores = [[4.0, 3.0, 2.0, 1.0, 99.0], [4.0, 3.0, 1.0, 2.0, 0.0], [1.0, 2.0, 3.0, 4.0, 50.0]]
    log = logged(tmp_path / "run.jsonl", *(scored(10 * place, row) for place, row in enumerate(scores)))
    drift = log.drift("snip", top=2)
    assert drift.by == "snip" and drift.top == 2 and drift.steps.tolist() == [0, 10, 20]
    assert drift.tau_to_first.tolist() == pytest.approx([1.0, 4 / 6, -1.0])  # without the head
    assert drift.tau_to_previous.tolist() == pytest.approx([1.0, 4 / 6, -4 / 6])
    assert drift.overlap_with_first.tolist() == [1.0, 1.0, 0.0]
    assert drift.overlap_with_previous.tolist() == [1.0, 1.0, 0.0]
    expected = [kendalltau(scores[0][:4], row[:4]).statistic for row in scores]
    assert drift.tau_to_first.tolist() == pytest.approx(expected)
    assert list(drift.to_pandas().loc[20]) == pytest.approx([-1.0, -4 / 6, 0.0, 0.0])
    assert str(drift) == (
        "ranking by snip at step 20: tau -1.00 to step 0, -0.67 to the one before; 0 of its top 2 are still there"
    )


def test_steps_without_a_ranking_are_compared_with_nothing(tmp_path: Path) -> None:
    log = logged(
        tmp_path / "run.jsonl",
        scored(0, [math.inf] * 4, overflow=True),
        scored(10, [3.0, 2.0, 1.0, 9.0]),
        scored(20, [math.nan] * 3 + [1.0]),
        scored(30, [7.0] * 4),
        scored(40, [1.0, 5.0, 9.0, 0.0], overflow=True),
        scored(50, [2.0, 3.0, 1.0, 9.0]),
        scored(60, [2.0, math.nan, math.inf, 9.0]),
    )
    drift = log.drift("snip", top=2)
    nan = math.nan
    np.testing.assert_allclose(drift.tau_to_first, [nan, 1, nan, nan, nan, 1 / 3, -1])
    np.testing.assert_allclose(drift.tau_to_previous, [nan, 1, nan, nan, nan, 1 / 3, -1])
    np.testing.assert_array_equal(drift.overlap_with_first, [nan, 1, nan, nan, nan, 1, 0.5])
    latest = latest_drift(log.steps, "snip", 2)
    assert latest.steps.tolist() == [10, 50, 60] and str(latest) == str(drift)


def test_drift_over_layers_that_both_have(tmp_path: Path) -> None:
    log = logged(tmp_path / "run.jsonl", scored(0, [4.0, 3.0, 2.0, 1.0, 9.0]), scored(10, [1.0, 2.0, 9.0]))
    drift = log.drift("snip")
    assert drift.tau_to_first[1] == -1.0 and drift.top == 4 and drift.overlap_with_first[1] == 0.5


@pytest.mark.parametrize("count", [0, 1])
def test_drift_of_no_two_steps(tmp_path: Path, count: int) -> None:
    log = logged(tmp_path / "run.jsonl", *(scored(10 * step, [1.0, 2.0, 3.0]) for step in range(count)))
    assert "fewer than two steps" in str(latest_drift(log.steps, "snip", 5))
    if count:
        assert "fewer than two steps" in str(log.drift("snip")) and len(log.drift("snip").steps) == 1


def test_drift_refuses_what_it_cannot_rank_by(tmp_path: Path) -> None:
    log = logged(tmp_path / "run.jsonl", make_step(0), make_step(10))
    with pytest.raises(ValueError, match="by='snap' is no metric of this log; nearest: 'snip'"):
        log.drift("snap")
    with pytest.raises(ValueError, match="top must be at least 1"):
        log.drift("snip", top=0)
    with pytest.raises(ValueError, match="the profile lacks"):  # what the Ranker that ships learned from
        log.drift()


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    steps = [make_step(0), make_step(10, overflow=True), make_step(10, seconds=2.0, layers=LAYERS[1:]), make_step(20)]
    log = logged(tmp_path / "run.jsonl", *steps)
    for name in ("run.png", "run.svg"):
        assert log.plot(tmp_path / name, "rgn") == tmp_path / name and (tmp_path / name).stat().st_size > 1000
    drawn = (tmp_path / "run.svg").read_text()
    assert all(f"<!-- {layer} -->" in drawn for layer in LAYERS) and "<!-- rgn -->" in drawn
    with pytest.raises(ValueError, match="no such metric; nearest: 'grad_norm'"):
        log.plot(tmp_path / "a.png", "grad_nrm")
    with pytest.raises(ValueError, match="no suffix"):
        log.plot(tmp_path / "a")
    with pytest.raises(ValueError, match="nothing to plot"):
        logged(tmp_path / "empty.jsonl").plot(tmp_path / "a.png")


def test_the_picture_of_a_deep_model_stays_of_a_size(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    layers = [f"blocks.{place}" for place in range(400)]
    log = logged(tmp_path / "run.jsonl", make_step(0, layers=layers), make_step(10, layers=layers))
    log.plot(tmp_path / "run.svg")
    drawn = (tmp_path / "run.svg").read_text()
    assert "<!-- blocks.0 -->" in drawn and "<!-- blocks.1 -->" not in drawn


@pytest.mark.parametrize("name", ["run.jsonl", "run.parquet"])
def test_a_log_is_followed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    follower = LogFollower(path)
    with pytest.raises(FileNotFoundError):
        follower.poll()
    sink = sink_for(path)
    empty = follower.poll()
    assert empty is not None and len(empty) == 0
    sink(make_step(0))
    log = follower.poll()
    assert log is not None and [step.step for step in log.steps] == [0] and follower.poll() is None
    sink(make_step(10))
    sink.close()
    log = follower.poll()
    assert log is not None and [step.step for step in log.steps] == [0, 10]
    logged(path, make_step(10, loss=7.0))
    log = follower.poll()
    assert log is not None and [step.profile.loss for step in log.steps] == [1.0, 7.0] and len(log.notes) == 1
