"""Words that are added to an error that is not ours."""

from __future__ import annotations

import sys
import warnings


def add_note(error: BaseException, note: str) -> None:
    """`error.add_note`, which Python 3.10 lacks: there the note is a warning."""
    if sys.version_info >= (3, 11):
        error.add_note(note)
    else:
        warnings.warn(note, RuntimeWarning, stacklevel=2)
