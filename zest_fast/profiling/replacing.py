"""Write a file completely or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = re.compile("No space left|File too large|unexpected pos|file write failed")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes the place of `path` only when the block ends well.

    A full disk or an exception leaves an existing file as it was, and nothing of the new one. A link stays a link.
    Errors of the operating system pass through; what torch and safetensors make of a full disk becomes one again.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"cannot write {os.fspath(path)!r}: there is no folder {str(target.parent)!r}; create it"
        )
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.touch()
        mode = (target if target.exists() else temporary).stat().st_mode
        yield temporary
        temporary.chmod(mode)  # some writers (safetensors) leave a file that nobody else can read
        with open(temporary, "rb+") as written:  # on disk before the name points to it, also after a power cut
            os.fsync(written.fileno())
        os.replace(temporary, target)
    except Exception as error:
        if isinstance(error, OSError) or not _FULL.search(str(error)):
            raise
        what = "no space left for it; what was there is as it was"
        raise OSError(errno.ENOSPC, what, os.fspath(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
