"""What the kernel says of this process: resident memory, its largest value, what was read from disks."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

GIB = 2**30


@contextmanager
def sampled(*keys: str, every: float = 0.02) -> Iterator[dict[str, int]]:
    """The largest values seen of these lines of /proc/self/status."""
    largest, done = {key: status(key) for key in keys}, threading.Event()

    def sample() -> None:
        while not done.wait(every):
            for key in keys:
                largest[key] = max(largest[key], status(key))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield largest
    finally:
        done.set()
        thread.join()


def forget_peak() -> bool:
    """Let VmHWM begin anew at what is resident now; False where that is not allowed."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def read_bytes() -> int:
    """What this process has had read from disks."""
    return _number("/proc/self/io", "read_bytes", "")


def status(key: str) -> int:
    return _number("/proc/self/status", key, " kB") * 1024


def _number(path: str, key: str, unit: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+){unit}$", Path(path).read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{path} has no {key}: this benchmark needs Linux")
    return int(found[1])
