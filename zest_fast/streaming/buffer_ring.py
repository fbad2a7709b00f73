"""Two buffers on a device that weights go through: read from the file by a thread, copied beside the computing, used.

Each buffer has one of the same size in pinned memory of the host. The thread reads the bytes of the weight that is
asked for into that (pread, not the mapping), when the copy before it has left it, and queues its copy to the device:
behind everything that was queued to compute with what the buffer held before. Whoever computes with a buffer holds it
meanwhile; nobody keeps it, autograd least of all, since the next weight overwrites it.

What a buffer holds stays there until it is overwritten, so that a weight which is used twice in a row is copied once.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from zest_fast.streaming.mapped_files import Pages
from zest_fast.streaming.transfer import Event, Transfer

BUFFERS = 2  #: one is computed with, the other is filled
_ALIGNED = 256  # bytes, from which on a tensor begins in a buffer: what torch gives a tensor of its own


@dataclass(frozen=True)
class Part:
    """A tensor, or rows of one, as it goes into a buffer."""

    pages: Pages
    dtype: torch.dtype
    shape: tuple[int, ...]


class CopiedWeight:
    """What goes into a buffer together: the tensors of one layer, or some rows of a head's."""

    def __init__(self, name: str, parts: tuple[Part, ...]) -> None:
        """name: of the layer, for messages."""
        self.name, self._parts = name, parts
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + buffer_bytes([part.pages.size]))
        self._starts, self.size = starts[:-1], starts[-1]

    @property
    def pages(self) -> tuple[Pages, ...]:
        return tuple(part.pages for part in self._parts)

    @property
    def stamp(self) -> tuple[tuple[int, ...], ...]:
        return tuple(part.pages.stamp for part in self._parts)

    def read(self, staging: Tensor) -> None:
        for part, start in zip(self._parts, self._starts, strict=True):
            part.pages.read(staging[start : start + part.pages.size])

    def views(self, buffer: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            buffer[start : start + part.pages.size].view(part.dtype).view(part.shape)
            for part, start in zip(self._parts, self._starts, strict=True)
        )


def buffer_bytes(sizes: list[int]) -> int:
    """That tensors of these sizes take in a buffer."""
    return sum(-(-size // _ALIGNED) * _ALIGNED for size in sizes)


@dataclass(eq=False)
class _Slot:
    """A buffer. after: the latest of what was queued to compute with it, by queue. users: who hold it now."""

    staging: Tensor
    buffer: Tensor
    after: dict[int, Event]
    weight: CopiedWeight | None = None
    stamp: Any = None
    is_filled: bool = True
    copied: Event | None = None
    error: BaseException | None = None
    users: int = 0
    used: int = 0  # when it was last asked for


@dataclass(eq=False)
class _Shared:
    """What the thread sees: not the ring, which ends it when nobody holds the ring any more."""

    transfer: Transfer
    slots: list[_Slot]
    process: int = field(default_factory=os.getpid)
    lock: Any = field(default_factory=threading.Lock)
    requests: SimpleQueue[_Slot | None] = field(default_factory=SimpleQueue)

    def __post_init__(self) -> None:
        self.changed = threading.Condition(self.lock)
        self.thread = threading.Thread(target=_fill, args=(self,), name="zest_fast weights", daemon=True)


class BufferRing:
    """Safe for several threads: each holds one buffer at a time, so that those who wait for one get it.

    There are never more requests to the thread than buffers. It ends with the ring.
    """

    def __init__(self, transfer: Transfer, size: int, count: int = BUFFERS) -> None:
        """size: bytes of the largest weight; so many are allocated `count` times on the device, and on the host."""
        self.transfer, self.size = transfer, size
        with torch.inference_mode(False):
            both = [(transfer.staging(size), transfer.buffer(size)) for _ in range(count)]
        before = dict([transfer.record()])  # who had this memory before may still compute with it
        self._shared = _Shared(transfer, [_Slot(staging, buffer, dict(before)) for staging, buffer in both])
        self._clock = 0
        weakref.finalize(self, _close, self._shared)
        self._shared.thread.start()

    def prefetch(self, weight: CopiedWeight) -> None:
        """Begin to fill a buffer with it, where there is one that nobody waits for or holds."""
        self._check_process()
        with self._shared.lock:
            self._slot_for(weight)

    @contextmanager
    def holding(self, weight: CopiedWeight) -> Iterator[tuple[Tensor, ...]]:
        """The tensors of `weight` in a buffer, for what is queued within.

        Raises RuntimeError, naming the layer, where it could not be read or copied.
        """
        self._check_process()
        shared, slot = self._shared, None
        try:
            with shared.lock:
                while (found := self._slot_for(weight)) is None:
                    shared.changed.wait()
                found.users += 1
                slot = found
                while not slot.is_filled:
                    shared.changed.wait()
            if slot.error is not None:
                raise RuntimeError(
                    f"{weight.name}: its weight cannot be read as it is used: {slot.error}"
                ) from slot.error
            self.transfer.wait(slot.copied)
            yield weight.views(slot.buffer)
        finally:
            if slot is not None:
                self._release(slot)

    def _release(self, slot: _Slot) -> None:
        try:
            queue, event = self.transfer.record()
            slot.after[queue] = event
        finally:
            with self._shared.lock:
                slot.users -= 1
                if slot.error is not None:
                    slot.weight = None  # the next who asks for it lets it be read again
                self._shared.changed.notify_all()

    def _slot_for(self, weight: CopiedWeight) -> _Slot | None:
        """Where it is or will be; None where every buffer is held or being filled. With the lock."""
        self._clock += 1
        stamp, slots = weight.stamp, self._shared.slots
        slot = next((slot for slot in slots if slot.weight is weight and slot.stamp == stamp), None)
        if slot is None:
            free = [slot for slot in slots if not slot.users and slot.is_filled]
            if not free:
                return None
            slot = min(free, key=lambda slot: slot.used)
            slot.weight, slot.stamp, slot.error, slot.is_filled = weight, stamp, None, False
            self._shared.requests.put(slot)
        slot.used = self._clock
        return slot

    def _check_process(self) -> None:
        if os.getpid() != self._shared.process:
            raise RuntimeError(
                "a model whose weights are copied to a device as they are used cannot run in a process that was forked "
                "from that which opened it: call zest_fast.open_streamed there"
            )


def _fill(shared: _Shared) -> None:
    """The thread: one buffer after the other. Whatever goes wrong is for those who asked for the weight."""
    while (slot := shared.requests.get()) is not None:
        try:
            copied, error = _filled(slot, shared.transfer), None
        except BaseException as problem:
            copied, error = None, problem.with_traceback(None)
        with shared.lock:
            slot.is_filled, slot.error = True, error
            if copied is not None:
                slot.copied = copied
                slot.after.clear()
            elif not slot.users:
                slot.weight = None
            shared.changed.notify_all()
        del slot, copied, error


def _filled(slot: _Slot, transfer: Transfer) -> Event:
    assert slot.weight is not None
    if slot.copied is not None:
        transfer.synchronize(slot.copied)  # the copy before this one reads the staging buffer
    size = slot.weight.size
    slot.weight.read(slot.staging[:size])
    return transfer.copy(slot.staging[:size], slot.buffer[:size], list(slot.after.values()))


def _close(shared: _Shared) -> None:
    """End the thread, and let go of the buffers when nothing on the device writes or reads them any more."""
    if os.getpid() != shared.process:
        return
    shared.requests.put(None)
    if shared.thread.is_alive() and shared.thread is not threading.current_thread():
        shared.thread.join()
    for slot in shared.slots:
        for event in (slot.copied, *slot.after.values()):
            if event is not None:
                shared.transfer.synchronize(event)
