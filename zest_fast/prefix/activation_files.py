"""Activations of samples on disk: files to which records of one size are appended, each with its own checksum.

A record is the digest of a sample, a checksum and the bytes of its activations. Nothing else says what a file holds, so
a process that is killed leaves a record that is either whole or cut off at the end of its file; the latter is not
counted. Each process appends to a file of its own and reads those of others, so several may share a folder. Bytes are
read by `pread`, not through a mapping, in which a file that somebody shortens would end the process (SIGBUS). No torch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
import time
import uuid
import warnings
import weakref
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zest_fast.foundation.documents import json_hash, parse_json, whole_file
from zest_fast.foundation.nearest import some
from zest_fast.foundation.replacing import replacing

DIGEST = 16
"""Bytes of the digest of a sample."""
_HEAD = struct.Struct(f"<{DIGEST}sI")
_SUFFIX = ".activations"
_DESCRIPTION = "description.json"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Room:
    """What all files below a folder may take, and do; those of other processes are looked at now and then."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._taken = self._since = 0
        self._knows = False

    def has(self, size: int) -> bool:
        """Whether so many bytes more fit; they count as taken then."""
        if not self._knows or self._since > self.limit // 64:
            self._taken = sum(path.stat().st_size for path in self.folder.glob(f"*/*{_SUFFIX}"))
            self._knows, self._since = True, 0
        if self._taken + size > self.limit:
            return False
        self._taken += size
        self._since += size
        return True


class ActivationFiles:
    """The records of one kind, in a subfolder that is named after what they depend on.

    room: of all kinds; what does not fit is not kept. description: what the records depend on, ready for JSON; another
    one is another subfolder, so that nothing is ever read that was written for something else. size: bytes of a
    record's activations.

    Raises OSError where the folder cannot be made, but for a full disk, which a warning says.
    """

    def __init__(self, room: Room, description: Mapping[str, Any], size: int) -> None:
        self._room, self._size = room, size
        self._folder = room.folder / json_hash(description)[:32]
        self._places: dict[bytes, tuple[int, int]] = {}  # of each sample: number of the file, offset
        self._files: list[int] = []
        self._paths: list[Path] = []
        self._own: int | None = None
        self._end = 0  # of the own file
        self.full = ""
        """Why nothing is written any more; empty while it is."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not (self._folder / _DESCRIPTION).exists():
                with replacing(self._folder / _DESCRIPTION) as temporary:
                    Path(temporary).write_text(json.dumps(dict(description), indent=1))
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            self._stop(error)
        self._closer = weakref.finalize(self, _close, self._files)
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            self._open(path)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, sample: bytes) -> bool:
        return sample in self._places

    @property
    def bytes_kept(self) -> int:
        """Of the records that can be read."""
        return len(self) * self._record

    @property
    def _record(self) -> int:
        return _HEAD.size + self._size

    def read(self, sample: bytes, into: memoryview) -> bool:
        """Whether the activations of this sample are there, whole; then they are in `into`, `size` bytes.

        Of a damaged file a warning says so, once for each record; it counts as not there from then on.
        """
        place = self._places.get(sample)
        if place is None:
            return False
        number, offset = place
        with contextlib.suppress(OSError):  # a disk that cannot be read is as good as a damaged file
            head = bytearray(_HEAD.size)
            if _read_whole(self._files[number], [memoryview(head), into], offset) == self._record:
                found, checksum = _HEAD.unpack(head)
                if found == sample and checksum == _checksum(sample, into):
                    return True
        del self._places[sample]
        warnings.warn(
            f"prefix cache: {os.fspath(self._paths[number])!r} is damaged at byte {offset:,}; that sample is computed "
            "again",
            stacklevel=2,
        )
        return False

    def write(self, sample: bytes, contents: memoryview) -> bool:
        """Whether the activations are kept now: not beyond the limit, and not on a full disk, which a warning says."""
        if sample in self._places:
            return True
        if self.full:
            return False
        try:
            if self._own is None:
                self._begin()
            assert self._own is not None
            if not self._room.has(self._record):
                self.full = f"the limit of {self._room.limit:,} bytes is reached"
                return False
            head = _HEAD.pack(sample, _checksum(sample, contents))
            _write_whole(self._files[self._own], [memoryview(head), contents], self._end)
        except OSError as error:
            if self._own is not None:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._files[self._own], self._end)
            self._stop(error)
            return False
        self._places[sample] = self._own, self._end
        self._end += self._record
        return True

    def _stop(self, error: OSError) -> None:
        """Keep nothing more."""
        self.full = f"{os.fspath(self._folder)!r} cannot be written ({error.strerror})"
        what = "is full" if error.errno in _NO_ROOM else f"cannot be written ({error.strerror})"
        warnings.warn(
            f"prefix cache: {os.fspath(self._folder)!r} {what}; what is kept is used, the rest is computed in every "
            "epoch",
            stacklevel=3,
        )

    def disown(self) -> None:
        """Throw away what this process has written: it turned out to be wrong."""
        if self._own is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._files[self._own], 0)
            self._places = {sample: place for sample, place in self._places.items() if place[0] != self._own}
            self._end = 0

    def others(self) -> list[Mapping[str, Any]]:
        """The descriptions of what else is in the folder."""
        found = []
        for path in sorted(self._room.folder.glob(f"*/{_DESCRIPTION}")):
            if path.parent != self._folder:
                with contextlib.suppress(OSError, ValueError):
                    document = parse_json(whole_file(path))
                    found += [document] if isinstance(document, Mapping) else []
        return found

    def close(self) -> None:
        """Let go of the files: nothing can be read or written any more. A second call does nothing."""
        self._closer()

    def _begin(self) -> None:
        path = self._folder / f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}-{uuid.uuid4().hex[:8]}{_SUFFIX}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._own, self._end = len(self._files), 0
        self._files.append(descriptor)
        self._paths.append(path)

    def _open(self, path: Path) -> None:
        if not path.is_file():  # a pipe of this name would be waited for
            return
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # another process has removed it since
            return
        number = len(self._files)
        self._files.append(descriptor)
        self._paths.append(path)
        for offset in range(0, os.fstat(descriptor).st_size - self._record + 1, self._record):
            head = os.pread(descriptor, _HEAD.size, offset)
            if len(head) == _HEAD.size:
                self._places.setdefault(_HEAD.unpack(head)[0], (number, offset))


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """In which of their entries two descriptions differ."""
    return some(sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)))


def _checksum(sample: bytes, contents: memoryview) -> int:
    return zlib.crc32(contents, zlib.crc32(sample))


def _read_whole(descriptor: int, into: list[memoryview], offset: int) -> int:
    """One after another, by a single call where the system reads all at once; how many bytes there are."""
    done = 0
    while into:
        count = os.preadv(descriptor, into, offset + done)
        if not count:
            break
        done += count
        while into and count >= len(into[0]):
            count -= len(into[0])
            into = into[1:]
        into = [into[0][count:], *into[1:]] if into else []
    return done


def _write_whole(descriptor: int, parts: list[memoryview], offset: int) -> None:
    """Raises OSError; what is written until then lies beyond the end that is counted."""
    for part in parts:
        done = 0
        while done < len(part):
            count = os.pwrite(descriptor, part[done:], offset + done)
            if not count:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done += count
        offset += len(part)


def _close(descriptors: list[int]) -> None:
    while descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptors.pop())
