"""`watch(log=...)` with what a name stands for: opened when the watch begins, closed when it ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import zest_fast


def make(width: int = 6) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for x in torch.randn(steps, 5, 4, generator=torch.Generator().manual_seed(1)):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_what_a_function_gets_is_what_is_read_back(ending, tmp_path) -> None:
    model, optimizer = make()
    path, got = tmp_path / f"run.{ending}", []
    options = {"metrics": "all", "updates": True, "noise": True, "histograms": True, "parts": True}
    with zest_fast.watch(model, 2, log=[str(path), got.append], **options):
        train(model, optimizer, 5)
    log = zest_fast.load_watch(path)
    assert [step.step for step in log.steps] == [step.step for step in got] == [0, 2, 4]
    for ours, theirs in zip(log.steps, got, strict=True):
        for one, other in zip((ours.profile, *ours.parts), (theirs.profile, *theirs.parts), strict=True):
            np.testing.assert_array_equal(one.values, other.values)
            assert (one.names, one.metrics, one.info) == (other.names, other.metrics, other.info)
        assert ours.notes == theirs.notes and str(ours.totals) == str(dict(theirs.totals))
        assert ours.histograms.keys() == theirs.histograms.keys()


def test_a_run_goes_on_in_its_log(tmp_path) -> None:
    path = tmp_path / "run.jsonl"
    model, optimizer = make()
    with zest_fast.watch(model, 2, log=path):
        train(model, optimizer, 4)
    with zest_fast.watch(model, 2, log=path, first_step=4):
        train(model, optimizer, 3)
    log = zest_fast.load_watch(path)
    assert [step.step for step in log.steps] == [0, 2, 4, 6] and len(log.segments) == 2


def test_the_log_of_another_model_is_refused_before_training(tmp_path) -> None:
    path = tmp_path / "run.jsonl"
    model, optimizer = make()
    with zest_fast.watch(model, 1, log=path):
        train(model, optimizer, 1)
    before = path.read_bytes()
    other, _ = make(width=7)
    for options, reason in (({}, "'0' has shape"), ({"updates": True}, "update_ratio only here")):
        watched = zest_fast.watch(other if not options else model, 1, log=path, **options)
        with pytest.raises(ValueError, match=reason), watched:
            pytest.fail("the training began")
    assert path.read_bytes() == before
    with zest_fast.watch(model, 1, log=path):  # neither the file is locked nor the model watched any more
        train(model, optimizer, 1)


def test_a_log_that_is_in_use_is_refused(tmp_path) -> None:
    (model, _), (other, _) = make(), make()
    with zest_fast.watch(model, log=tmp_path / "run.jsonl"):
        second = zest_fast.watch(other, log=tmp_path / "run.jsonl")
        with pytest.raises(RuntimeError, match="in use by another watch"), second:
            pytest.fail("the training began")


def test_a_file_is_closed_whatever_ends_the_training(tmp_path) -> None:
    path = tmp_path / "run.parquet"
    model, optimizer = make()
    with pytest.raises(KeyboardInterrupt), zest_fast.watch(model, 1, log=path):
        train(model, optimizer, 2)
        raise KeyboardInterrupt
    assert path.exists() and not path.with_name("run.parquet.jsonl").exists()
    assert [step.step for step in zest_fast.load_watch(path).steps] == [0, 1]


def test_what_is_no_sink_is_refused_by_name(tmp_path) -> None:
    model, _ = make()
    with pytest.raises(TypeError, match="3 is no sink"):
        zest_fast.watch(model, log=[3])
    with pytest.raises(ValueError, match=r"'run\.txt' is no sink"), zest_fast.watch(model, log="run.txt"):
        pytest.fail("the training began")


def test_the_last_step_is_in_the_file_when_its_round_ends_with_the_watch(tmp_path) -> None:
    """That its optimizer has stepped for the last time is known at the end only, where it holds a part of the
    weights."""
    model, _ = make()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with zest_fast.watch(model, 1, log=tmp_path / "run.jsonl"):
        for x in torch.randn(2, 5, 4):
            model(x).square().mean().backward()
            first.step()
            model.zero_grad()
    assert [step.step for step in zest_fast.load_watch(tmp_path / "run.jsonl").steps] == [0, 1]
