"""A note reaches the user on Python 3.10 as well, whose exceptions have no `add_note`."""

from __future__ import annotations

import sys

import pytest

from zest_fast.foundation.notes import add_note


class Old(ValueError):
    add_note = None


def test_a_note_is_a_warning_where_errors_take_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 14))
    with pytest.warns(RuntimeWarning, match="load the model again"):
        add_note(Old("torn"), "load the model again")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="add_note is of Python 3.11")
def test_a_note_stands_below_the_error() -> None:
    error = ValueError("torn")
    add_note(error, "load the model again")
    assert error.__notes__ == ["load the model again"]
