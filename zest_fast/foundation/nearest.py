"""Names in error messages: suggestions for those that do not exist, and lists that stay short."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from zest_fast.foundation.text_table import printable


def nearest(wanted: object, names: Iterable[str], count: int = 3) -> str:
    """The end of an error message: the `names` most like `wanted`, else the first few of them.

    Layer names are long and share their beginning, so a name that goes on where `wanted` ends, or lacks a prefix that a
    wrapper added, comes before one that merely has many letters in common.
    """
    names = list(dict.fromkeys(names))
    if not names:
        return "there are none"
    text = str(wanted)
    related = [name for name in names if text and name and (_extends(name, text) or _extends(text, name))]
    found = list(dict.fromkeys(related + difflib.get_close_matches(text, names, n=count, cutoff=0.6)))[:count]
    if found:
        return f"nearest: {_quoted(found)}"
    rest = f" and {len(names) - 2 * count} more" if len(names) > 2 * count else ""
    return f"there are: {_quoted(names[: 2 * count])}{rest}"


def _extends(longer: str, shorter: str) -> bool:
    return longer.startswith(shorter + ".") or longer.endswith("." + shorter)


def _quoted(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names)


def some(names: Iterable[str], most: int = 5) -> str:
    """The first few names, fit to be printed, and how many more there are."""
    names = list(names)
    return ", ".join(printable(name) for name in names[:most]) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )
