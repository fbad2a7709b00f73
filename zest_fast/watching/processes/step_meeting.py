"""Where the processes of one watch meet at a logged step: over the store by which they found each other.

Training goes on whatever becomes of the others, so that nothing here may wait for long, and no process can be expected
to come: one may have left its watch, log at other steps, or be stuck. Each keeps one message, its newest, and a mark
that says how far it is; who waits for it sees from the mark that it has gone past, or left. The first rank merges what
all have brought at the same mark, and says to all what became of it. What is in the store does not grow.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch

from zest_fast.foundation.torch_private import default_store

T = TypeVar("T")
R = TypeVar("R")
Mark = tuple[int, ...]
"""Grows from one meeting to the next, on every process alike."""

TIME_LIMIT_S = 60.0
"""How long a logged step waits for the others: less than the time limits of collectives, in which these may wait."""
AGAIN_S = 1.0
"""The same after a meeting that failed, until one succeeds."""
_LATER_S = 2.0  # that the first rank, which says who is missing, is waited for beyond that
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.0005, 0.02
_HAS_LEFT = "left"


class Apart(Exception):
    """The processes did not meet at this step, and why."""


class StepMeeting:
    """A channel between the processes of one watch.

    Args:
        ranks: global ones.
        store: that all of them share.
        number: which watch over these ranks it is.
    """

    def __init__(self, ranks: Sequence[int], store: Any, number: int) -> None:
        self._ranks = tuple(ranks)
        self._store = store
        self._me = torch.distributed.get_rank()
        self._prefix = f"zest_fast/watch/{'-'.join(map(str, self._ranks))}/{number}"
        self._limit = TIME_LIMIT_S

    def begin(self) -> None:
        """Says that this process is there."""
        self._set("at", self._me, ())

    def leave(self, why: str) -> None:
        """Says that it will not come any more; does not wait."""
        with suppress(Exception):  # the store may be gone, and with it whoever would read this
            self._set("at", self._me, (_HAS_LEFT, why))

    def hurry(self) -> None:
        """From now on nobody is waited for as long as usual."""
        self._limit = min(self._limit, AGAIN_S)

    def exchange(self, mark: Mark, message: T, merge: Callable[[list[T]], R]) -> R:
        """What ``merge`` makes, on the first rank, of the messages of all ranks in their order.

        Raises:
            Apart: one of the others does not come here, or ``merge`` raised.
        """
        try:
            found = self._exchange(mark, message, merge)
        except Apart:
            self._give_up(mark)
            raise
        except Exception as error:  # of the store, whose process is gone
            self._give_up(mark)
            raise Apart(f"the store of the processes failed ({type(error).__name__}: {error})") from error
        self._limit = TIME_LIMIT_S
        return found

    def _give_up(self, mark: Mark) -> None:
        """This process goes on; what it said here is of a step that will be past when another one reads it."""
        self.hurry()
        with suppress(Exception):
            self._set("at", self._me, (*mark, 1))

    def _exchange(self, mark: Mark, message: T, merge: Callable[[list[T]], R]) -> R:
        first = self._ranks[0]
        if self._me != first:
            self._set("said", self._me, (mark, message))
            self._set("at", self._me, mark)
            is_there, found = self._wait(first, mark, time.monotonic() + self._limit + _LATER_S, "done", "verdict")
        else:
            self._set("at", first, mark)
            is_there, found = self._merged(mark, message, merge)
            self._set("verdict", first, (mark, (is_there, found)))
            self._set("done", first, mark)
        if not is_there:
            raise Apart(found)
        return found

    def _merged(self, mark: Mark, message: Any, merge: Callable[[list[Any]], Any]) -> tuple[bool, Any]:
        end, messages = time.monotonic() + self._limit, []
        for rank in self._ranks:
            try:
                messages.append(message if rank == self._me else self._wait(rank, mark, end, "at", "said"))
            except Apart as apart:
                return False, str(apart)
        try:
            return True, merge(messages)
        except Exception as error:  # the others wait for an answer
            return False, str(error)

    def _wait(self, rank: int, mark: Mark, end: float, sign: str, what: str) -> Any:
        """What a process says at this mark, once its ``sign`` stands there."""
        pause = _SHORTEST_WAIT_S
        while True:
            at = self._get("at", rank)  # before the sign, which is set before the process goes on
            there = at if sign == "at" else self._get(sign, rank)
            if there == mark:
                said_at, said = self._get(what, rank)
                if said_at == mark:
                    return said
            if at is not None and at[:1] == (_HAS_LEFT,):
                raise Apart(f"process {rank} has left its watch ({at[1]})")
            if at is not None and at > mark:
                raise Apart(f"process {rank} has gone on without this process, to step {at[0]}")
            if time.monotonic() > end:
                begun = f"is at step {at[0]}" if at else "has begun its watch" if at == () else "has begun no watch"
                raise Apart(
                    f"process {rank} has not come within {self._limit:.0f} s (it {begun}): all processes have to begin "
                    "the same watches in the same order, and log at the same steps"
                )
            time.sleep(pause)
            pause = min(1.25 * pause, _LONGEST_WAIT_S)

    def _set(self, what: str, rank: int, value: Any) -> None:
        self._store.set(f"{self._prefix}/{what}/{rank}", pickle.dumps(value))

    def _get(self, what: str, rank: int) -> Any:
        key = f"{self._prefix}/{what}/{rank}"
        return pickle.loads(self._store.get(key)) if self._store.check([key]) else None


_numbers: dict[tuple[int, ...], tuple[Any, int]] = {}


def meeting_of_a_watch(ranks: Sequence[int]) -> StepMeeting:
    """A channel of its own for each watch over these ranks: the processes count them alike."""
    store, key = default_store(), tuple(ranks)
    known, count = _numbers.get(key, (store, 0))
    count = count + 1 if known is store else 1
    _numbers[key] = (store, count)
    return StepMeeting(key, store, count)
