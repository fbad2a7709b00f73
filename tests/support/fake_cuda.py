"""A stand-in for torch.cuda, for what times kernels on a GPU: a clock of its own, streams, events and graphs.

A kernel that runs takes a microsecond of its clock, within a capture none: it is recorded, and replayed later.
"""

from __future__ import annotations

from contextlib import contextmanager


class FakeCuda:
    def __init__(self, captures: bool = True) -> None:
        self.now, self.captures = 0.0, captures
        self.log: list[str] = []
        self.recording: FakeGraph | None = None

    def work(self) -> None:
        """What a kernel on the device would be."""
        if self.recording is not None:
            self.recording.kernels += 1
        else:
            self.now += 1e-3  # ms

    def Event(self, enable_timing: bool) -> FakeEvent:
        assert enable_timing
        return FakeEvent(self)

    def Stream(self) -> FakeStream:
        return FakeStream()

    def current_stream(self) -> FakeStream:
        return FakeStream()

    def synchronize(self) -> None:
        self.log.append("synchronize")

    @contextmanager
    def stream(self, stream: FakeStream):
        self.log.append("side stream")
        yield

    def CUDAGraph(self) -> FakeGraph:
        return FakeGraph(self)

    @contextmanager
    def graph(self, graph: FakeGraph):
        self.recording = graph
        try:
            yield
        finally:
            self.recording = None
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.log.append("captured")


class FakeStream:
    def wait_stream(self, other: FakeStream) -> None:
        assert isinstance(other, FakeStream)


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.at, self.waited = cuda, -1.0, False

    def record(self) -> None:
        self.cuda.now += 1e-9
        self.at = self.cuda.now

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.at >= 0 and end.waited, "read before it was recorded and waited for"
        return end.at - self.at


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.kernels = cuda, 0

    def replay(self) -> None:
        self.cuda.log.append("replay")
        self.cuda.now += 1e-3 * self.kernels
