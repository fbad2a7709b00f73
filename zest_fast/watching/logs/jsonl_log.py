"""The sink that writes a log of lines, one for each logged step. No torch."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from zest_fast.foundation.documents import check_regular
from zest_fast.foundation.file_lock import lock_file
from zest_fast.sweeping.records import write_fully
from zest_fast.watching.logs.lines import Layout, header_line, step_line
from zest_fast.watching.logs.reader import LogReader
from zest_fast.watching.watched_step import WatchedStep

_IN_USE = (
    "another watch; choose another file, or wait for the other one. "
    "Of several processes that train one model, only one logs"
)


class JsonlLog:
    """Appends a line to `path` for each step that it is called with.

    The line is with the operating system at the return: a killed process loses nothing, a power cut what the disk had
    not taken yet. The file is locked while it is open; a line that a killed process left half written is cut off when
    it is opened. A file that is removed, moved or shortened meanwhile is begun anew.

    known: layouts of steps that this file continues and another one holds.

    Raises ValueError where `path` is some other file, or the log of another model (at the first step, or by `check`);
    RuntimeError where another process logs to it; OSError.
    """

    def __init__(self, path: str | os.PathLike[str], *, known: Sequence[Layout] = ()) -> None:
        self.path = Path(path)
        self._run = uuid.uuid4().hex[:12]
        self._elsewhere = list(known)
        self._known: list[Layout] = []
        self._layout: Layout | None = None  # of the header that this sink wrote last
        self._last = (0, 0.0)  # step and seconds
        self._end = 0
        self._file = -1
        self._open()

    def check(self, layout: Layout) -> None:
        """Raises ValueError where the file holds the log of another model, as the first step would."""
        if not self._known or any(not layout.difference(known) for known in self._known):
            return
        raise ValueError(
            f"{str(self.path)!r} is the log of another model or another watch ({layout.difference(self._known[-1])}); "
            "choose another file, or watch the same layers and metrics"
        )

    def __call__(self, step: WatchedStep) -> None:
        """Write one step. Raises OSError on a full disk, the file as before; the next step is tried all the same."""
        if not self._is_as_it_was():
            self.close()
            self._open()
        layout = Layout.of(step.profile)
        lines = b""
        follows = self._layout is not None and (step.step, step.seconds) >= self._last
        if self._layout is None:
            self.check(layout)
        if self._layout is None or not follows or layout.difference(self._layout):
            lines = header_line(
                layout,
                run=self._run,
                segment=uuid.uuid4().hex[:12],
                began=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                continues=follows,
            )
        else:
            layout = self._layout
        lines += step_line(step, layout)
        self._append(lines)
        self._layout, self._last = layout, (step.step, step.seconds)

    def close(self) -> None:
        """Let go of the file. A step that comes later opens it again."""
        if self._file >= 0:
            descriptor, self._file = self._file, -1
            os.close(descriptor)

    def _append(self, lines: bytes) -> None:
        try:
            write_fully(self._file, lines)
        except OSError as error:
            with contextlib.suppress(OSError):  # else the torn line is cut off when the file is opened again
                os.ftruncate(self._file, self._end)
            raise OSError(
                error.errno, f"{error.strerror}; the steps before are safe in it", os.fspath(self.path)
            ) from error
        self._end += len(lines)

    def _is_as_it_was(self) -> bool:
        """Whether the name still means the file that is open, and nobody has shortened it or added to it."""
        if self._file < 0:
            return False
        try:
            named, held = os.stat(self.path), os.fstat(self._file)
        except OSError:
            return False
        return os.path.samestat(named, held) and held.st_size == self._end

    def _open(self) -> None:
        if not self.path.parent.is_dir():
            raise FileNotFoundError(
                f"cannot write {str(self.path)!r}: there is no folder {str(self.path.parent)!r}; create it"
            )
        if self.path.exists():
            check_regular(self.path)
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            lock_file(self._file, self.path, _IN_USE)
            found = LogReader(self.path, steps=False)
            found.poll()
            if found.torn:
                os.ftruncate(self._file, found.end)
        except BaseException:
            self.close()
            raise
        self._end = found.end
        self._known = [*self._elsewhere, *(segment.layout for segment in found.segments)]
        self._layout, self._last = None, (0, 0.0)
