"""Damaged files of every format: answered or refused by name, and nothing worse.

The default suite reads a few hundred of each; `pytest -m slow tests/foundation/test_mutations.py` reads 3,000 of each
(half an hour, of which the files of trainers take most). One format alone:
`python tests/support/mutations.py ranker 0 3000`.
"""

from __future__ import annotations

import pytest
from mutations import FORMATS, run

FEW = dict.fromkeys(FORMATS, 200) | {"trainer-yaml": 25}  # each of those plans a step
MANY = 3000


def check(name: str, start: int, stop: int) -> None:
    counts, faults, slowest, _ = run(name, start, stop)
    assert not faults
    assert counts["read"] + counts["refused"] == stop - start and slowest < 5
    assert counts["read"] and counts["refused"]  # neither all refused, nor nothing damaged


@pytest.mark.parametrize("name", FORMATS)
def test_a_few_hundred(name: str) -> None:
    check(name, 0, FEW[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_three_thousand(name: str) -> None:
    check(name, FEW[name], FEW[name] + MANY)
