"""One writer for a file: an advisory lock for as long as it is open."""

from __future__ import annotations

import warnings
from pathlib import Path


def lock_file(descriptor: int, path: Path, in_use: str) -> None:
    """Takes the lock of an open file; it ends when the file is closed, also by the end of the process.

    Where the system has no such locks (Windows), nothing happens; where the file system has none (some in a network), a
    UserWarning says so.

    Args:
        descriptor: of the open file.
        path: for messages.
        in_use: who holds it, if another process does, and what to do then.

    Raises:
        RuntimeError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(f"{str(path)!r} is in use by {in_use}") from None
    except OSError as error:
        warnings.warn(
            f"{str(path)!r} cannot be locked ({error.strerror}): see to it that no other process writes to it",
            stacklevel=5,
        )
