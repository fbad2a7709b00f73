"""The callgrind guard: what each CPU kernel executes is what bench/results/instructions.json has, within 3 %."""

from dataclasses import replace

import pytest

from bench.kernels import instructions
from bench.kernels.instructions import Counts


def times(counts: Counts, factor: float) -> Counts:
    first, *others = counts.results
    return replace(counts, results=[{**first, "instructions": round(first["instructions"] * factor)}, *others])


@pytest.mark.parametrize(("factor", "lines"), [(1.0, 0), (1.02, 0), (0.98, 0), (1.04, 1), (0.96, 1)])
def test_a_count_that_is_more_than_three_percent_off_is_named(factor: float, lines: int) -> None:
    before = instructions.recorded()
    changed = instructions.changes(times(before, factor), before)
    assert len(changed) == lines
    assert all(line.startswith("moments, float32: ") for line in changed)


def test_a_case_that_only_one_of_the_two_has_is_named() -> None:
    before = instructions.recorded()
    fewer = replace(before, results=before.results[1:])
    assert instructions.changes(fewer, before) == ["moments, float32: not counted any more"]
    assert instructions.changes(before, fewer) == ["moments, float32: not recorded"]


def test_counts_of_another_compiler_are_not_compared_and_those_of_other_flags_are() -> None:
    before = instructions.recorded()
    other = replace(before, settings={**before.settings, "compiler": "g++ 99"})
    flags = replace(before, settings={**before.settings, "flags": "-O2"})
    assert instructions.not_comparable(before, before) == instructions.not_comparable(flags, before) == ""
    assert instructions.not_comparable(other, before).startswith("compiler is g++ 99, the recorded counts have g++ ")


@pytest.mark.slow
def test_no_kernel_executes_more_instructions_than_were_recorded_nor_fewer() -> None:
    if reason := instructions.cannot_count():
        pytest.skip(reason)
    before, found = instructions.recorded(), instructions.count()
    if reason := instructions.not_comparable(found, before):
        pytest.skip(reason)
    assert instructions.changes(found, before) == [], "intended? python -m bench.kernels.instructions writes them anew"
