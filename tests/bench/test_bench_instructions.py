"""The callgrind guard: no kernel needs more instructions than bench/results/instructions.json says, or many fewer."""

from __future__ import annotations

import json
import shutil

import pytest

from bench.kernels import instructions
from bench.measure import RESULTS

WITHIN = 0.03


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("valgrind")), reason="needs g++ and valgrind")
def test_kernels_execute_as_many_instructions_as_is_noted():
    noted = json.loads((RESULTS / "instructions.json").read_text())
    if noted["settings"]["compiler"] != instructions.compiler():
        pytest.skip(f"counted with {noted['settings']['compiler']}, here is {instructions.compiler()}")
    found = instructions.count()
    before = {(row["kernel"], row["dtype"]): row["instructions"] for row in noted["results"]}
    assert found.keys() == before.keys()
    moved = {case: f"{n:,} instead of {before[case]:,}" for case, n in found.items() if abs(n / before[case] - 1) > WITHIN}
    assert not moved, f"if that is meant: python -m bench.kernels.instructions; {moved}"


def test_the_flags_are_those_of_the_extension():
    assert "-O3" in instructions._flags_of_the_extension()
