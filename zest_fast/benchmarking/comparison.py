"""Two results of `zest-fast bench` beside each other, case by case: faster, slower, the same, or ambiguous.

The rule. Of each candidate a file has a median with a 95 % interval. The time in b relative to that in a then lies from
b.low / a.high to b.high / a.low. "same" where all of that is within the margin around 1; else "faster" where it ends
below 1, "slower" where it begins above; else, and where there were too few rounds for an interval of 95 %,
"ambiguous": measure with more rounds, or on a machine at rest. What
differs between two runs but not within one (a clock, a neighbour) is in no interval: look at the peers, whose code is
the same in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from zest_fast.benchmarking.results import Case, Measured, Result
from zest_fast.benchmarking.timing import CONFIDENCE, Median
from zest_fast.foundation.nearest import some

MARGIN = 0.05
_OF_THE_MOMENT = {"load_average", "threads"}  # of a machine; the threads of a case are in its name


@dataclass(frozen=True)
class Line:
    """One candidate of one case. answer: faster, slower, same, ambiguous; "broken" where it was timed in a and is wrong
    or raises in b, "not timed" where it was not. low, high: of b relative to a. why: it is broken."""

    case: str
    name: str
    role: str
    answer: str
    low: float | None = None
    high: float | None = None
    why: str = ""

    @property
    def is_worse(self) -> bool:
        """Whether what is judged (ours, or the user's) got slower, or is not right any more."""
        return self.role in ("ours", "own") and self.answer in ("slower", "broken")


@dataclass(frozen=True)
class Comparison:
    """notes: what else differs between the files."""

    lines: tuple[Line, ...]
    notes: tuple[str, ...]

    @property
    def is_worse(self) -> bool:
        return any(line.is_worse for line in self.lines)


def compare(a: Result, b: Result, margin: float = MARGIN) -> Comparison:
    """b beside a. Raises ValueError where they are of different commands or cases."""
    if a.command != b.command:
        raise ValueError(
            f"the first file is of `bench {a.command}`, the second of `bench {b.command}`: measure one again"
        )
    cases, others = ({case.name: case for case in result.cases} for result in (a, b))
    for where, missing in (("second", cases.keys() - others.keys()), ("first", others.keys() - cases.keys())):
        if missing:
            raise ValueError(
                f"the cases do not match: the {where} file lacks {some(sorted(missing))}; measure both with the same "
                "threads, types and sizes"
            )
    lines = [line for name, case in cases.items() for line in _lines(case, others[name], margin)]
    return Comparison(tuple(lines), tuple(_notes(a, b)))


def _lines(a: Case, b: Case, margin: float) -> Iterator[Line]:
    """Of the candidates that both have."""
    before = {one.name: one for one in a.measured}
    for after in b.measured:
        if after.name in before:
            yield _line(a.name, before[after.name], after, margin)


def _line(case: str, a: Measured, b: Measured, margin: float) -> Line:
    if a.seconds is None:
        return Line(case, b.name, b.role, "not timed")
    if b.seconds is None:
        return Line(case, b.name, b.role, "broken", why=b.why)
    low, high = b.seconds.low / a.seconds.high, b.seconds.high / a.seconds.low
    return Line(case, b.name, b.role, answer_of(a.seconds, b.seconds, margin), low, high)


def answer_of(a: Median, b: Median, margin: float = MARGIN) -> str:
    """By the rule above."""
    if min(a.coverage, b.coverage) < CONFIDENCE:
        return "ambiguous"
    low, high = b.low / a.high, b.high / a.low
    if 1 - margin <= low and high <= 1 + margin:
        return "same"
    return "faster" if high < 1 else "slower" if low > 1 else "ambiguous"


def _notes(a: Result, b: Result) -> Iterator[str]:
    machine = _differences(a.machine, b.machine, _OF_THE_MOMENT)
    if machine:
        yield f"ANOTHER MACHINE: {machine}; this compares machines as much as code"
    if versions := _differences(a.versions, b.versions):
        yield f"other versions: {versions}"
    if settings := _differences(a.settings, b.settings):
        yield f"other settings: {settings}"
    for case, other in zip(sorted(a.cases, key=_name), sorted(b.cases, key=_name), strict=True):
        if found := _differences(case.settings, other.settings):
            yield f"other settings of {case.name}: {found}"
        names, others = ({one.name for one in one_case.measured} for one_case in (case, other))
        if only := names ^ others:
            yield f"in one of the files only, of {case.name}: {some(sorted(only))}"
    for which, result in (("first", a), ("second", b)):
        if warnings := [warning for case in result.cases for warning in case.warnings]:
            yield f"the {which} file has {len(warnings)} warnings: {warnings[0]}"


def _name(case: Case) -> str:
    return case.name


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], but: set[str] | None = None) -> str:
    """ "cpu: X, now Y; ...", empty where there are none."""
    names = [name for name in {**a, **b} if name not in (but or ()) and a.get(name) != b.get(name)]
    return "; ".join(f"{name}: {a.get(name, 'nothing')}, now {b.get(name, 'nothing')}" for name in names)
