"""What a user writes, and which part of a step a sink gets."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from watched_runs import LAYERS, METRICS, make_step

from zest_fast import load_watch, sink_for
from zest_fast.watching.logs.jsonl_log import JsonlLog
from zest_fast.watching.logs.lines import Layout
from zest_fast.watching.logs.parquet_log import ParquetLog


def got(step=None, **selection):
    """What a function gets of a step under a selection."""
    found = []
    sink_for(found.append, **selection)(step or make_step(3, full=True))
    return found[0]


def test_paths_names_and_functions(tmp_path: Path) -> None:
    for what, kind in ((tmp_path / "a.jsonl", JsonlLog), (str(tmp_path / "b.PARQUET"), ParquetLog)):
        sink = sink_for(what)
        assert type(sink) is kind
        sink.close()
    assert sink_for(print) is print


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("run.json", r"'run.json' is no sink; nearest: '.jsonl'"),
        ("run", "'run' is no sink; there are: "),
        ("wandbb", "nearest: 'wandb'"),
        ("tensorboard:", "nearest: 'tensorboard:FOLDER'"),
        ("", "'' is no sink"),
    ],
)
def test_what_is_no_sink_is_named(what: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sink_for(what)


def test_what_is_neither_a_path_nor_a_function_is_refused() -> None:
    for what in (None, 3, ["run.jsonl"]):
        with pytest.raises(TypeError, match="a sink is a path, a name or a function"):
            sink_for(what)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (r"blocks\.\d+\.q", ["blocks.0.q", "blocks.1.q"]),
        (re.compile("head|blocks.0.*"), ["blocks.0.q", "blocks.0.mlp", "head"]),
        (["head", "blocks.1.q"], ["blocks.1.q", "head"]),
        (lambda name, info: info["depth"] > 2, ["blocks.1.mlp", "head"]),
        (None, list(LAYERS)),
    ],
)
def test_layers_of_a_sink(layers, expected) -> None:
    whole, part = make_step(3, full=True), got(layers=layers)
    assert part.profile.names == expected and part.profile.metrics == list(METRICS)
    for name in expected:
        assert dict(part.profile[name]) == dict(whole.profile[name])
        assert part.profile.info[name] == whole.profile.info[name]
    assert part.parts[1].names == [name for name in LAYERS[:2] if name in expected]
    assert list(part.histograms) == [name for name in LAYERS[:1] if name in expected]
    assert part.totals == whole.totals and part.profile.loss == whole.profile.loss


def test_a_layer_is_found_by_its_module_as_well() -> None:
    step = make_step(0, layers=["rnn.weight", "head"])
    assert got(step, layers=["rnn"]).profile.names == got(step, layers="rnn").profile.names == ["rnn.weight"]


def test_metrics_of_a_sink_keep_their_order_and_values() -> None:
    whole, part = make_step(3, full=True), got(metrics=["rgn", "snip"])
    assert part.profile.metrics == ["snip", "rgn"] == part.parts[0].metrics
    np.testing.assert_array_equal(part.profile.values, whole.profile.values[:, [0, 2]])


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ({"layers": ["head", "blocks.0.k"]}, "no watched layer is named 'blocks.0.k'; nearest: 'blocks.0.q'"),
        ({"layers": "blocks"}, "layers= chooses none"),
        ({"layers": lambda name, info: False}, "layers= chooses none"),
        ({"metrics": ["snip", "grad_nrm"]}, "'grad_nrm' is not watched; nearest: 'grad_norm'"),
    ],
)
def test_a_selection_that_finds_nothing_is_named_at_the_first_step(selection, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        got(**selection)


@pytest.mark.parametrize(
    ("selection", "error", "words"),
    [
        ({"layers": "("}, ValueError, "no regular expression"),
        ({"layers": []}, ValueError, "layers is empty"),
        ({"layers": 3}, TypeError, "layers is a int"),
        ({"metrics": []}, ValueError, "metrics is empty"),
        ({"metrics": "snip"}, TypeError, r"pass a list, \['snip'\]"),
    ],
)
def test_a_selection_that_is_none_is_refused_at_once(selection, error, words: str) -> None:
    with pytest.raises(error, match=words):
        sink_for(print, **selection)


def test_a_layer_that_was_there_and_is_frozen_now_is_left_out() -> None:
    found = []
    sink = sink_for(found.append, layers=["head", "blocks.0.q"])
    sink(make_step(0))
    sink(make_step(10, layers=["head"]))
    assert [step.profile.names for step in found] == [["blocks.0.q", "head"], ["head"]]
    sink(make_step(20, layers=["blocks.1.q"]))
    assert found[2].profile.names == []


def test_a_part_in_a_file_and_its_log_on_resume(tmp_path: Path) -> None:
    for step in (0, 10):
        sink = sink_for(tmp_path / "run.jsonl", layers=".*q", metrics=["rgn"])
        sink.check(Layout.of(make_step(step).profile))
        sink(make_step(step))
        sink.close()
    log = load_watch(tmp_path / "run.jsonl")
    assert log.layers == ["blocks.0.q", "blocks.1.q"] and log.metrics == ["rgn"] and len(log) == 2
    sink = sink_for(tmp_path / "run.jsonl", metrics=["rgn"])
    with pytest.raises(ValueError, match="another model or another watch"):
        sink.check(Layout.of(make_step(20).profile))
    with pytest.raises(ValueError, match="another model or another watch"):
        sink(make_step(20))
    sink.close()


def test_a_part_for_a_function_has_nothing_to_check_or_close() -> None:
    sink = sink_for(print, metrics=["rgn"])
    sink.check(Layout.of(make_step(0).profile))
    sink.close()
