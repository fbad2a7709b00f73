"""Write a file completely or not at all, and read only what is a file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from zest_fast.foundation.documents import not_regular

_FULL = re.compile("No space left|File too large|unexpected pos|file write failed")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WRITER = re.compile(r"(\d+)-(\d*)\.[0-9a-f]{8}\.tmp")
_LONGEST = 150  # bytes of the target's name within a temporary's: most file systems end at 255


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes the place of `path` only when the block ends well.

    A full disk or an exception leaves an existing file as it was, and nothing of the new one. A link stays a link.
    Until then it lies in a folder that nobody else can read, then it has the permissions of the file that it replaces.
    What writers that were killed left beside this file is removed first; what a living process writes there stays.
    Errors of the operating system name `path`; what torch and safetensors make of a full disk becomes one again.
    Raises FileNotFoundError without the folder, OSError where `path` is no regular file (a folder, a device, a pipe).
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"cannot write {os.fspath(path)!r}: there is no folder {str(target.parent)!r}; create it"
        )
    check_regular(path, to="replace it by")
    _remove_leftovers(target)
    # A folder, because safetensors writes to a temporary of its own beside the one that it is given.
    folder = _temporary(target)
    temporary = folder / "new.tmp"
    try:
        folder.mkdir(mode=0o700)
        mode = _create(temporary, target)
        yield temporary
        temporary.chmod(mode)  # some writers (safetensors) leave a file that nobody else can read
        _to_disk(temporary)
        os.replace(temporary, target)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None and _is_of(error, folder):
            error.filename, error.filename2 = os.fspath(path), None  # which the user knows
            if error.errno in _NO_ROOM:
                error.strerror = f"{error.strerror}; make room: what was there is as it was"
        if isinstance(error, OSError) or not _FULL.search(str(error)):
            raise
        what = "no space left for it; make room: what was there is as it was"
        raise OSError(errno.ENOSPC, what, os.fspath(path)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a folder beside `path` to write into; it gets the name `path` only when the block ends well.

    An exception or a full disk leaves nothing. What writers that were killed left is removed first. Errors of the
    operating system name `path`.
    Raises FileExistsError where `path` is there already, FileNotFoundError without the folder around it.
    """
    target = Path(os.path.abspath(path))
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "it is there already; name a new folder", os.fspath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"cannot write {os.fspath(path)!r}: there is no folder {str(target.parent)!r}; create it"
        )
    _remove_leftovers(target)
    folder = _temporary(target)
    try:
        folder.mkdir(mode=0o700)
        yield folder
        for file in folder.rglob("*"):
            if file.is_file():
                _to_disk(file)
        folder.chmod(0o777 & ~_umask())
        os.rename(folder, target)
    except OSError as error:
        if error.errno is None or not str(error.filename or folder).startswith(str(folder)):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error  # which the user knows
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_regular(path: str | os.PathLike[str], to: str = "read") -> None:
    """Raise OSError, naming `path`, where it is there and no regular file: reading from a device need not end."""
    try:
        kind = not_regular(os.stat(path))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # whoever opens it says so
        return
    if kind == "a folder":
        raise IsADirectoryError(errno.EISDIR, f"a folder, and a file is needed to {to}", os.fspath(path))
    if kind:
        raise OSError(errno.EINVAL, f"{kind}, and a regular file is needed to {to}", os.fspath(path))


def _is_of(error: OSError, folder: Path) -> bool:
    """Of a file in the folder, or of one that is not named: what is written to an open file names none."""
    return error.filename is None or str(error.filename).startswith(str(folder))


def _create(temporary: Path, target: Path) -> int:
    """Make the empty file; returns the mode that it is to have: that of the target, or the usual one."""
    there = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if there is None else 0o600)
    try:
        if there is None:
            return stat.S_IMODE(os.fstat(descriptor).st_mode)
        if hasattr(os, "fchmod"):
            os.fchmod(descriptor, there | 0o600)  # a file that may only be read can be replaced all the same
        return there
    finally:
        os.close(descriptor)


def _to_disk(file: Path) -> None:
    """Before a name points to it: so it is whole after a power cut, too."""
    with open(file, "rb" if os.name == "posix" else "rb+") as written:
        os.fsync(written.fileno())


def _temporary(target: Path) -> Path:
    """A folder beside it that does not exist yet."""
    return target.with_name(f"{_prefix(target)}{os.getpid()}-{_started(os.getpid())}.{secrets.token_hex(4)}.tmp")


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _prefix(target: Path) -> str:
    """Of the names of all temporary folders that this machine makes for `target`."""
    name = target.name
    if len(os.fsencode(name)) > _LONGEST:
        name = hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()
    return f".{name}.{_machine()}-"


@cache
def _machine() -> str:
    """This host and its table of processes: a folder may be shared with others, whose processes cannot be seen."""
    try:
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:
        processes = ""
    return hashlib.blake2b(f"{socket.gethostname()}|{processes}".encode(), digest_size=4).hexdigest()


def _started(process: int) -> str:
    """When the process began, in ticks since boot, which tells it from another one with its number; "" unknown."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _lives(process: int, started: str) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's process
        pass
    now = _started(process)
    return not (now and started) or now == started


def _remove_leftovers(target: Path) -> None:
    """The temporary folders of `target` whose writers are dead."""
    prefix = _prefix(target)
    with contextlib.suppress(OSError):  # a folder that may be written to and not read
        for name in os.listdir(target.parent):
            found = _WRITER.fullmatch(name[len(prefix) :]) if name.startswith(prefix) else None
            if found and not _lives(int(found[1]), found[2]):
                shutil.rmtree(target.parent / name, ignore_errors=True)
