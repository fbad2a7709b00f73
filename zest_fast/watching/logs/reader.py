"""Reads a log from where it ended the last time: all of it at first, then what a running watch has added. No torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from zest_fast.foundation.documents import check_regular
from zest_fast.profiling.profile_files import NewerVersionError
from zest_fast.watching.logs.lines import BEGINNING, Segment, header_of, is_step, step_of, text_of_line

_MOST_LINE = 2**28  # bytes; a line of 100,000 layers and 15 metrics has a tenth of that
_TAIL = 256  # bytes before the end that tell whether a file is still the one that was read


class LogReader:
    """What a JSONL log holds, in the order of the file.

    steps: whether to keep them; without, headers alone are read, and of steps the checksums.

    Attributes:
        segments: of all that was read so far.
        end: where the last whole line ends.
        torn: bytes after it: the beginning of a line, which its writer has not finished or never will.
        file: device and number of the file that was read.
    """

    def __init__(self, path: str | os.PathLike[str], *, steps: bool = True) -> None:
        self.path = Path(path)
        self._keeps_steps = steps
        self._forget()

    def _forget(self) -> None:
        self.segments: list[Segment] = []
        self.end = self.torn = 0
        self.file = (0, 0)
        self._tail = b""
        self._lines = 0

    def poll(self) -> bool:
        """Read what is new; whether there was anything. A file that was replaced or shortened is read anew.

        Raises FileNotFoundError, ValueError that names the file for one that is damaged, foreign or too new.
        """
        check_regular(self.path)
        with open(self.path, "rb") as file:
            found = os.fstat(file.fileno())
            another = self._lines > 0 and not self._is_continued_by(file, found)
            if another:
                self._forget()
            self.file = (found.st_dev, found.st_ino)
            return self._read(file) or another

    def _is_continued_by(self, file: BinaryIO, found: os.stat_result) -> bool:
        if (found.st_dev, found.st_ino) != self.file or found.st_size < self.end:
            return False
        file.seek(self.end - len(self._tail))
        return file.read(len(self._tail)) == self._tail

    def _read(self, file: BinaryIO) -> bool:
        before = self.end
        file.seek(self.end)
        line = file.readline(_MOST_LINE)
        while line.endswith(b"\n"):
            following = file.readline(_MOST_LINE)
            text = text_of_line(line[:-1])
            if text is None and not following and not self._is_foreign(line):
                break  # the last line: its bytes reached the disk in another order
            self._take(line, text)
            self.end += len(line)
            self._tail = (self._tail + line)[-_TAIL:]
            line = following
        if line and self._is_foreign(line):
            raise self._foreign()
        if len(line) >= _MOST_LINE:
            raise ValueError(f"{str(self.path)!r}, line {self._lines + 1}: longer than {_MOST_LINE:,} bytes")
        self.torn = len(line)
        return self.end > before

    def _is_foreign(self, line: bytes) -> bool:
        """Whether the first line, perhaps torn, is none of ours."""
        common = min(len(line), len(BEGINNING))
        return not self._lines and line[:common] != BEGINNING[:common]

    def _foreign(self) -> ValueError:
        return ValueError(f"{str(self.path)!r} is no log of a watched run: its first line is no header of one")

    def _take(self, line: bytes, text: bytes | None) -> None:
        if self._is_foreign(line):
            raise self._foreign()
        place = f"{str(self.path)!r}, line {self._lines + 1}"
        if text is None:
            raise ValueError(
                f"{place}: the checksum does not match; the file is damaged or was edited. Delete the line to read "
                "the rest"
            )
        try:
            if not is_step(text):
                self.segments.append(header_of(text))
            elif self._keeps_steps:
                segment = self.segments[-1]
                segment.steps.append(step_of(text, segment.layout))
        except NewerVersionError as error:
            raise NewerVersionError(f"{str(self.path)!r}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{place}: {error}; the file is no log that can be read") from error
        self._lines += 1
