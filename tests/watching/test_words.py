"""Dead and exploding layers in words, and the thresholds that they hang on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import zest_fast
from zest_fast.watching.words import DEAD_AFTER, EXPLODES_AT, MEDIAN_FROM, History


def said(history, **norms):
    return history.notes(norms, dict.fromkeys(norms, 0))


def test_dead_after_that_many_zeros_in_a_row():
    history = History()
    for _ in range(DEAD_AFTER - 1):
        assert not said(history, a=0.0, b=1.0)
    assert said(history, a=0.0, b=1.0) == [
        f"layer 'a' is dead: its gradient has been 0 for the last {DEAD_AFTER} logged steps"
    ]
    assert not said(history, a=1e-30, b=1.0)
    assert not said(history, a=0.0, b=1.0)


def test_exploding_beyond_that_many_medians():
    history = History()
    for i in range(MEDIAN_FROM):
        assert not said(history, a=EXPLODES_AT ** (i % 2 * 3))  # too few to have a median
    history = History()
    for _ in range(MEDIAN_FROM):
        assert not said(history, a=2.0)
    assert not said(history, a=2.0 * EXPLODES_AT)
    (note,) = said(history, a=4.0 * EXPLODES_AT)
    assert note == f"layer 'a' explodes: its gradient norm is {2 * EXPLODES_AT:.0f} times the median of its last 6"


def test_not_finite_is_said_and_is_no_part_of_the_history():
    history = History()
    for _ in range(MEDIAN_FROM):
        history.notes({"a": math.nan}, {"a": 3})
    (note,) = history.notes({"a": math.nan}, {"a": 3})
    assert note == "layer 'a': 3 entries of its weight, gradient or output are not finite"
    assert not said(history, a=1e9)


def test_many_layers_are_named_in_short():
    history, names = History(), [f"layer{i}" for i in range(9)]
    for _ in range(DEAD_AFTER):
        notes = said(history, **dict.fromkeys(names, 0.0))
    assert len(notes) == 6 and notes[-1] == "4 more layers are dead as well: layer5, layer6, layer7, layer8"


@pytest.mark.parametrize("kind", ["dead", "explodes"])
def test_a_run_says_so(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    if kind == "dead":
        nn.init.constant_(model[0].bias, -100.0)
    log = []
    with zest_fast.watch(model, every=1, log=log.append):
        for i in range(7):
            optimizer.zero_grad()
            scale = 100.0 if kind == "explodes" and i == 6 else 1.0
            (scale * model(torch.ones(3, 4)).sum()).backward()
            optimizer.step()
    notes = [note for step in log[:-1] for note in step.notes if kind in note]
    assert any(f"'0' {'is dead' if kind == 'dead' else kind}" in note for note in log[-1].notes)
    assert bool(notes) == (kind == "dead")
