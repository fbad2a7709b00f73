"""Where processes meet: small messages over the store by which they found each other.

Not over a process group: a process that fails in the middle of a pass leaves collectives of others open (those of FSDP2
in forward, say), and a message in the same group would be taken for their answer. A message in the store waits for
whoever looks, so that who fails says so and goes, and whoever waits for it learns why.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from zest_fast.foundation.torch_private import default_store

T = TypeVar("T")
R = TypeVar("R")

TIME_LIMIT_S = 300.0
"""How long one process waits at a meeting for the others."""
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.0005, 0.02


class OtherProcessFailed(RuntimeError):
    """Another process of the same profile raised."""


class Meeting:
    """A channel between the processes of these global ranks, for the life of their store.

    Messages are numbered: every process of the channel takes part in every meeting, in the same order. The first rank
    merges what all have brought, so that N processes exchange 2N messages and all get the same.
    """

    def __init__(self, ranks: Sequence[int], store: Any) -> None:
        self.ranks = tuple(ranks)
        self.store = store
        self._me = torch.distributed.get_rank()
        self._number = 0
        self._prefix = "zest_fast/profile/" + "-".join(map(str, self.ranks))

    def exchange(self, message: T, merge: Callable[[list[T]], R]) -> R:
        """What ``merge`` makes, on the first rank, of the messages of all ranks in their order.

        Raises:
            OtherProcessFailed: another process failed, or has not come within the time limit.
            Exception: what ``merge`` raises, on every process.
        """
        leader = self.ranks[0]
        if self._me != leader:
            self._post(("said", message))
            kind, found = self._wait(self._key("all"), f"process {leader}")
        else:
            kind, found = self._merged(message, merge)
            self.store.set(self._key("all"), pickle.dumps((kind, found)))
        self._number += 1
        self._forget(self._number - 2)
        if kind == "failed":
            raise OtherProcessFailed(found)
        if kind == "refused":
            raise found
        return found

    def fail(self, error: BaseException) -> None:
        """Says at the next meeting that this process will not come, and why; does not wait for the others."""
        text = _failed(self._me, error)
        if self._me == self.ranks[0]:
            self.store.set(self._key("all"), pickle.dumps(("failed", text)))
        else:
            self._post(("failed", text))
        self._number += 1

    def failure(self) -> str:
        """What a process has said that failed before the next meeting; empty where none has."""
        keys = [self._key(rank) for rank in self.ranks if rank != self._me] + [self._key("all")]
        for key in keys:
            if self.store.check([key]):
                kind, text = pickle.loads(self.store.get(key))
                if kind == "failed":
                    return str(text)
        return ""

    def _merged(self, message: Any, merge: Callable[[list[Any]], Any]) -> tuple[str, Any]:
        messages = []
        for rank in self.ranks:
            kind, said = ("said", message)
            if rank != self._me:
                try:
                    kind, said = self._wait(self._key(rank), f"process {rank}")
                except OtherProcessFailed as error:
                    return "failed", str(error)
            if kind == "failed":
                return "failed", said
            messages.append(said)
        try:
            return "all", merge(messages)
        except Exception as error:  # for all, as the others wait for an answer
            return "refused", error

    def _wait(self, key: str, whom: str) -> tuple[str, Any]:
        end, pause = time.monotonic() + TIME_LIMIT_S, _SHORTEST_WAIT_S
        while not self.store.check([key]):
            if time.monotonic() > end:
                raise OtherProcessFailed(
                    f"{whom} has not come within {TIME_LIMIT_S:.0f} s: a model on several processes is profiled by all "
                    f"of them (here ranks {', '.join(map(str, self.ranks))}), each of which has to call profile"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_WAIT_S)
        return pickle.loads(self.store.get(key))

    def _post(self, message: tuple[str, Any]) -> None:
        self.store.set(self._key(self._me), pickle.dumps(message))

    def _key(self, who: int | str, number: int | None = None) -> str:
        return f"{self._prefix}/{self._number if number is None else number}/{who}"

    def _forget(self, number: int) -> None:
        """Drops what this process posted at an earlier meeting, which all have read by now."""
        if number >= 0:
            self.store.delete_key(self._key(self._me, number))
            if self._me == self.ranks[0]:
                self.store.delete_key(self._key("all", number))


def _failed(rank: int, error: BaseException) -> str:
    return f"process {rank} failed in this profile: {type(error).__name__}: {error}"


_meetings: dict[tuple[int, ...], Meeting] = {}


def meeting_of(ranks: Sequence[int]) -> Meeting:
    """The channel of these ranks: the same one as long as the default process group is, since it counts."""
    store, key = default_store(), tuple(ranks)
    meeting = _meetings.get(key)
    if meeting is None or meeting.store is not store:
        meeting = _meetings[key] = Meeting(key, store)
    return meeting
