"""What the ring of buffers asks of a device: memory on both sides, a copy beside the computing, and their order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

Event = Any  #: a moment of a queue of work, which others can wait for


class Transfer(Protocol):
    """Copies go in a queue of their own. Queues know nothing of each other but by events."""

    device: torch.device

    def staging(self, size: int) -> Tensor:
        """Bytes on the host, from which a copy runs beside the computing."""

    def buffer(self, size: int) -> Tensor:
        """Bytes on the device, whose earlier owner may still be read by what is queued for computing now."""

    def copy(self, staging: Tensor, buffer: Tensor, after: Iterable[Event]) -> Event:
        """Queue a copy that begins when all of `after` have been reached; the event is reached when it is done."""

    def record(self) -> tuple[int, Event]:
        """Reached when what this thread has queued for computing is done; and a number for the queue."""

    def wait(self, event: Event) -> None:
        """Let what this thread queues for computing from now on begin after the event."""

    def synchronize(self, event: Event) -> None:
        """Return when the event has been reached."""


class CudaTransfer:
    """A GPU by torch.cuda: queues are streams. Has not run on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        self._stream = torch.cuda.Stream(self.device)

    def staging(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def copy(self, staging: Tensor, buffer: Tensor, after: Iterable[Event]) -> Event:
        with torch.cuda.stream(self._stream):
            for event in after:
                self._stream.wait_event(event)
            buffer.copy_(staging, non_blocking=True)
            return self._stream.record_event()

    def record(self) -> tuple[int, Event]:
        stream = torch.cuda.current_stream(self.device)
        return stream.cuda_stream, stream.record_event()

    def wait(self, event: Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def synchronize(self, event: Event) -> None:
        event.synchronize()
