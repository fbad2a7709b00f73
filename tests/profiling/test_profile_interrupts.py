"""Ctrl-C at any moment of a profile leaves the model as it was, and usable."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

import pytest
import torch
from torch import Tensor, nn
from untouched import changes, state_of

import zest_fast
from zest_fast.foundation.interrupts import HeldInterrupts


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.BatchNorm1d(16), nn.Linear(16, 4))


class AfterLines:
    """Sends SIGINT to this process at the n-th line that the library executes."""

    def __init__(self, n: int) -> None:
        self._left = n

    def __call__(self, frame: FrameType, event: str, arg: object) -> AfterLines | None:
        if "zest_fast" not in frame.f_code.co_filename or "/tests/" in frame.f_code.co_filename:
            return None
        if event == "line":
            self._left -= 1
            if self._left == 0:
                signal.raise_signal(signal.SIGINT)
        return self

    @property
    def is_over(self) -> bool:
        return self._left > 0


def interrupted(model: nn.Module, data: tuple[Tensor, Tensor], n: int) -> tuple[bool, bool]:
    """Whether SIGINT at line n came out as KeyboardInterrupt, and whether the pass was over before."""
    tracer = AfterLines(n)
    sys.settrace(tracer)
    try:
        zest_fast.profile(model, data)
    except KeyboardInterrupt:
        return True, False
    finally:
        sys.settrace(None)
    return False, tracer.is_over


def test_sigint_at_every_line_of_a_profile() -> None:
    """Every 7th, in an order in which each stage has its turn."""
    data = torch.randn(6, 8), torch.randint(4, (6,))
    model = mlp()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[3].weight.requires_grad_(False)
    expected = zest_fast.profile(model, data).to_pandas()
    before = state_of(model)
    handler = signal.getsignal(signal.SIGINT)
    n, hit = 3, 0
    while True:
        came, over = interrupted(model, data, n)
        assert signal.getsignal(signal.SIGINT) is handler, n
        assert changes(before, state_of(model)) == [], n
        if over:
            break
        assert came, n
        hit += 1
        n += 7
    assert hit > 100
    assert zest_fast.profile(model, data).to_pandas().equals(expected)


def test_sigint_in_the_user_s_code_comes_at_once() -> None:
    model, x = mlp(), torch.randn(6, 8)
    reached = []

    def closure() -> Tensor:
        signal.raise_signal(signal.SIGINT)
        reached.append("after")
        return model(x).sum()

    with pytest.raises(KeyboardInterrupt):
        zest_fast.profile(model, closure=closure)
    assert not reached


def test_what_is_held_back_is_delivered_at_the_end_and_once() -> None:
    calls = []
    before = signal.signal(signal.SIGINT, lambda *_: calls.append(1))
    try:
        with HeldInterrupts() as held:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert calls == []
            with held.interruptible():
                assert calls == [1]
            signal.raise_signal(signal.SIGINT)
            assert calls == [1]
        assert calls == [1, 1]
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_and_ignored_signals_are_left_alone() -> None:
    def run() -> None:
        with HeldInterrupts() as held, held.interruptible():
            seen.append(signal.getsignal(signal.SIGINT))

    seen: list[object] = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run()
        assert seen[-1] is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
