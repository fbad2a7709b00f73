"""Saving what was trained where the user said, and elsewhere where that fails: the weights took hours."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path


def save_somewhere(save: Callable[[Path], object], out: Path) -> tuple[Path, OSError | None]:
    """Calls `save(out)`, or with a new file in a folder for temporary files; returns the file and why not `out`.

    Raises what `save` raised where no place takes it, and at once where it is no error of the system.
    """
    try:
        save(out)
        return out, None
    except OSError as error:
        failure = error
    for folder in _elsewhere():
        path = folder / f"{out.stem}-{secrets.token_hex(4)}{out.suffix}"
        try:
            save(path)
            return path, failure
        except OSError:
            continue
    raise failure


def _elsewhere() -> list[Path]:
    folders = []
    with contextlib.suppress(OSError):  # none of the usual ones takes a byte
        folders.append(Path(tempfile.gettempdir()))
    folders += [Path.home(), Path.cwd()] if os.environ.get("HOME") else [Path.cwd()]
    return folders
