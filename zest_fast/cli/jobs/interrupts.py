"""Ctrl-C while training: the step that runs is finished, so that what is saved is no half of one."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupts:
    """happened: whether SIGINT came since `listening` began."""

    def __init__(self) -> None:
        self.happened = False

    def __call__(self, number: int, frame: Any) -> None:
        if self.happened:
            raise KeyboardInterrupt("at once, nothing more is saved")
        self.happened = True
        print("interrupted: finishing this step, then saving; once more ends at once", file=sys.stderr, flush=True)


@contextmanager
def listening() -> Iterator[Interrupts]:
    """The first SIGINT inside is only noted, the second one is a KeyboardInterrupt; afterwards all is as before.

    Outside the main thread, where Python lets nobody listen, nothing is noted.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = signal.signal(signal.SIGINT, interrupts)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)
