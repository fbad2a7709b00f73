"""Ctrl-C at any line of wrapping and unwrapping: the model is as it was, or wrapped and unwrapped completely."""

from __future__ import annotations

import copy
import signal
import sys
import threading

import pytest
import torch
from small_models import conv_net, llama
from torch import nn
from untouched import changes, state_of

from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.finetuning.wrapped_models import refuse_wrapped
from zest_fast.foundation.interrupts import HeldInterrupts


class CtrlC:
    """Sends SIGINT to this process at the `at`-th line that runs in a file of the package's fine-tuning."""

    def __init__(self, at):
        self.at, self.lines = at, 0

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def trace(self, frame, event, arg):
        if "zest_fast/finetuning/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                signal.raise_signal(signal.SIGINT)
        return self.trace


@pytest.fixture(autouse=True)
def default_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


CASES = {
    "conv": (conv_net, ["3"], {}),
    "llama": (lambda: llama(num_hidden_layers=1), ["model.layers.0.mlp.up_proj"], {"checkpoint": "above-cut"}),
    "int8": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)), ["1"], {"frozen": "int8"}),
}


def lines_of(call):
    with CtrlC(-1) as counter:
        call()
    return counter.lines


def shape_of(model, rounded):
    """What must be as it was: packed weights come back rounded, in new parameters."""
    state = state_of(model)
    if rounded:
        kept = ("mode of", "attributes of", "_forward", "requires_grad", "hooks")
        state = {label: value for label, value in state.items() if label.startswith(kept)}
    return state | {"classes": [type(module) for module in model.modules()]}


@pytest.mark.parametrize("case", CASES)
def test_ctrl_c_while_wrapping(case):
    make, layers, options = CASES[case]
    model, whole = make(), 0
    SelectiveBackward(model, layers, **options).remove()  # nothing is imported or rounded for the first time below
    before = shape_of(model, "frozen" in options)
    lines = lines_of(lambda: SelectiveBackward(copy.deepcopy(model), layers, **options))
    for at in range(1, lines + 1, max(1, lines // 60)):
        try:
            with CtrlC(at):
                tuned = SelectiveBackward(model, layers, **options)
        except KeyboardInterrupt:
            refuse_wrapped(model)
        else:  # it came when all was done
            whole += 1
            tuned.remove()
        assert not changes(before, shape_of(model, "frozen" in options)), at
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert whole <= 1


@pytest.mark.parametrize("case", CASES)
def test_ctrl_c_while_unwrapping(case):
    make, layers, options = CASES[case]
    model = make()
    SelectiveBackward(model, layers, **options).remove()
    before = shape_of(model, "frozen" in options)
    lines = lines_of(SelectiveBackward(model, layers, **options).remove)
    interrupted = 0
    for at in range(1, lines + 1, max(1, lines // 40)):
        tuned = SelectiveBackward(model, layers, **options)
        try:
            with CtrlC(at):
                tuned.remove()
        except KeyboardInterrupt:
            interrupted += 1
            tuned.remove()  # does nothing, or all
        assert not changes(before, shape_of(model, "frozen" in options)), at
    assert interrupted > 30 or interrupted >= lines - 1


def test_ctrl_c_waits_for_the_end_of_the_block_and_then_comes():
    steps = []
    with pytest.raises(KeyboardInterrupt), HeldInterrupts():
        signal.raise_signal(signal.SIGINT)
        steps.append("done")
    assert steps == ["done"]
    with pytest.raises(KeyboardInterrupt), HeldInterrupts():
        with HeldInterrupts():
            signal.raise_signal(signal.SIGINT)
        steps.append("the outer block too")
    assert len(steps) == 2
    own = []
    signal.signal(signal.SIGINT, lambda *_: own.append(1))
    with HeldInterrupts():
        signal.raise_signal(signal.SIGINT)
        assert not own
    assert own == [1]


def test_other_threads_wrap_without_signals():
    model, results = conv_net(), []

    def work():
        with SelectiveBackward(model, ["3"]) as tuned:
            model(torch.randn(2, 1, 6, 6)).sum().backward()
            results.append(tuned.cut)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == ["3"]


def test_ctrl_c_while_resuming_is_all_or_nothing(tmp_path):
    model = conv_net()
    tuned = SelectiveBackward(model, ["3"])
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1, momentum=0.9)
    path = tuned.save_run(tmp_path / "run", optimizer)
    saved = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[3].weight += 1
        optimizer.param_groups[0]["lr"] = 0.7
    moved = copy.deepcopy(model.state_dict())
    lines = lines_of(lambda: tuned.resume(path, optimizer))
    found = set()
    for at in range(1, lines, max(1, lines // 60)):
        model.load_state_dict(moved)
        optimizer.param_groups[0]["lr"] = 0.7
        with pytest.raises(KeyboardInterrupt), CtrlC(at):
            tuned.resume(path, optimizer)
        now = optimizer.param_groups[0]["lr"]
        wanted = saved if now == 0.1 else moved
        assert now in (0.1, 0.7) and all(
            torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items()
        )
        found.add(now)
    assert found == {0.1, 0.7}
