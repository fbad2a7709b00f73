"""A device on the host that does everything as badly as its queues allow: what a wrong order would spoil, it spoils.

Buffers are memory of their own. A copy writes NaN (or the last code of packed weights) into its buffer as soon as it is
queued, for from then on its contents are lost, and the bytes themselves only when somebody waits for them; then it
spoils the staging buffer likewise. A copy that is not told to wait for everything that was queued to compute with its
buffer is an error.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(eq=False)
class Moment:
    """An event: the number'th of a queue. of: the buffers that it is about."""

    queue: int
    number: int
    of: set[int] = field(default_factory=set)


class AdversarialTransfer:
    """late: copies are done when they are waited for; else at once. copies: sizes of those that were queued."""

    def __init__(self, device: str = "cpu", late: bool = True) -> None:
        self.device, self._late = torch.device(device), late
        self._lock = threading.Lock()
        self._queue: list[tuple[Moment, Tensor, Tensor]] = []
        self._used: dict[int, list[Moment]] = {}  # by buffer: what a copy has to come after
        self._fresh: set[int] = set()  # buffers whose earlier owners may still compute with them
        self._computing: dict[int, set[int]] = {}  # by thread: the buffers that it computes with
        self._moments = 0
        self.copies: list[int] = []
        self.alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def staging(self, size: int) -> Tensor:
        return self._kept(torch.empty(size, dtype=torch.uint8))

    def buffer(self, size: int) -> Tensor:
        buffer = self._kept(torch.empty(size, dtype=torch.uint8, device=self.device))
        self._fresh.add(_key(buffer))
        return buffer

    def _kept(self, buffer: Tensor) -> Tensor:
        self.alive.add(buffer)
        return _spoiled(buffer)

    def copy(self, staging: Tensor, buffer: Tensor, after: Iterable[Moment]) -> Moment:
        with self._lock:
            assert _key(buffer) not in self._fresh, "whoever had this memory before may still compute with it"
            for moment in self._used.pop(_key(buffer), ()):
                covered = any(one.queue == moment.queue and one.number >= moment.number for one in after)
                assert covered, "a buffer that is computed with would be overwritten"
            assert not any(_key(buffer) in one for one in self._computing.values()), "somebody computes with it"
            _spoiled(buffer)
            self.copies.append(buffer.numel())
            done = self._moment(0)
            self._queue.append((done, staging, buffer))
        if not self._late:
            self.synchronize(done)
        return done

    def record(self) -> tuple[int, Moment]:
        thread = threading.get_ident()
        with self._lock:
            moment = self._moment(thread)
            for buffer in self._fresh | self._computing.pop(thread, set()):
                self._used.setdefault(buffer, []).append(moment)
            self._fresh.clear()
        return thread, moment

    def wait(self, event: Moment) -> None:
        with self._lock:
            self._do(event)
            self._computing.setdefault(threading.get_ident(), set()).update(event.of)

    def synchronize(self, event: Moment) -> None:
        with self._lock:
            self._do(event)

    def _moment(self, queue: int) -> Moment:
        self._moments += 1
        return Moment(queue, self._moments)

    def _do(self, event: Moment) -> None:
        """The copies that were queued up to the event."""
        while any(done is event for done, _, _ in self._queue):
            done, staging, buffer = self._queue.pop(0)
            if self.device.type != "meta":
                buffer.copy_(staging)
            _spoiled(staging)
            done.of.add(_key(buffer))


def _spoiled(buffer: Tensor) -> Tensor:
    return buffer.fill_(0xFF)


def _key(buffer: Tensor) -> int:
    return buffer.untyped_storage()._cdata
