"""Work in a process of its own, forked from this one, which may be killed (SIGKILL) at a random moment."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress


class Killer:
    """Forks this process, which has imported everything, so that the moments fall into the work itself.

    seed: of the moments.
    """

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self.seconds = 1.0
        self.kills = 0

    def undisturbed(self, work: Callable[[], None], again: Callable[[], None]) -> None:
        """Both without a kill: the first here, so that all is imported, the second measured."""
        work()
        began = time.monotonic()
        assert not self._killed(again, after=300.0), "the work hangs"
        self.seconds = time.monotonic() - began

    def killed(self, work: Callable[[], None]) -> bool:
        """Whether the work was killed; False where it had ended before the moment came."""
        killed = self._killed(work, self._chance.uniform(0, 1.1 * self.seconds))
        self.kills += killed
        return killed

    def _killed(self, work: Callable[[], None], after: float) -> bool:
        process = os.fork()
        if not process:
            _run(work)
        until = time.monotonic() + after
        while time.monotonic() < until:
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                assert status == 0, f"the work failed by itself: status {status}"
                return False
            time.sleep(0.0005)
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        assert status in (0, signal.SIGKILL), f"the work failed by itself: status {status}"
        return status != 0


def said_by(work: Callable[[], object]) -> str:
    """What the work returns, as text; it may spoil its process."""
    ours, theirs = os.pipe()
    process = os.fork()
    if not process:
        os.close(ours)
        _run(lambda: os.write(theirs, str(work()).encode()))
    os.close(theirs)
    with open(ours) as pipe:
        said = pipe.read()
    assert os.waitpid(process, 0)[1] == 0, "the work failed"
    return said


def _run(work: Callable[[], object]) -> None:
    try:
        work()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
