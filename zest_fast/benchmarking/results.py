"""What a benchmark found, as an object and as a file (JSON, format 1)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from zest_fast.benchmarking.machine import describe_machine, describe_versions
from zest_fast.benchmarking.timing import Median
from zest_fast.foundation.documents import Flag, Json, Keys, ListOf, MapOf, Null, Number, Text, parse_json, whole_file
from zest_fast.foundation.replacing import replacing

FORMAT, VERSION = "zest-fast bench", 1
COMMANDS = ("kernels", "profile", "step", "plan")
ROLES = ("ours", "own", "peer", "floor")


@dataclass(frozen=True)
class Measured:
    """One candidate of a case.

    Attributes:
        name: of the candidate.
        role: ours, own (the user's), peer, or floor (a bound that computes less, with nothing to compare).
        match: whether its result is right; None where it has none to compare.
        error: the worst, relative; None where it could not be taken.
        tolerance: what the error may be.
        why: it is not timed; "" where it is.
        seconds: of one call.
        ratio: of its seconds to those of the case's baseline, each quotient taken inside a round.
        figures: what else was found, by name.
    """

    name: str
    role: str
    match: bool | None
    error: float | None = None
    tolerance: float | None = None
    why: str = ""
    seconds: Median | None = None
    ratio: Median | None = None
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """Candidates measured in the same rounds. name: the same in two files where they can be compared."""

    name: str
    baseline: str
    measured: tuple[Measured, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """All cases of one command, and where they were measured."""

    command: str
    date: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    cases: tuple[Case, ...]

    @property
    def wrong(self) -> list[str]:
        """What of ours or the user's is not right or not timed, with the reason."""
        return [
            f"{case.name}: {one.name}: {one.why}"
            for case in self.cases
            for one in case.measured
            if one.role in ("ours", "own") and one.why
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        document = {"format": FORMAT, "version": VERSION, **asdict(self)}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Result:
        """Raises ValueError, naming the file, for what is no such file; OSError as `open` does."""
        try:
            document = parse_json(whole_file(path))
            if isinstance(document, Mapping) and isinstance(newer := document.get("version"), int) and newer > VERSION:
                raise ValueError(f"it is of format {newer}, and {VERSION} is the newest known here; update zest_fast")
            _DOCUMENT.check(document, "")
            cases = tuple(_case(one) for one in document["cases"])
        except ValueError as error:
            raise ValueError(f"{Path(path)} is no result of `zest-fast bench`: {error}") from error
        fields = {key: value for key, value in document.items() if key not in ("format", "version")}
        return cls(**{**fields, "cases": cases})


def result_of(command: str, settings: Mapping[str, Any], cases: list[Case], device: torch.device) -> Result:
    """With today's date, this machine and these versions."""
    date = datetime.now(UTC).date().isoformat()
    return Result(command, date, describe_machine(device), describe_versions(), settings, tuple(cases))


def _case(found: Mapping[str, Any]) -> Case:
    measured = tuple(_measured(one) for one in found["measured"])
    return Case(**{**found, "measured": measured, "warnings": tuple(found["warnings"])})


def _measured(found: Mapping[str, Any]) -> Measured:
    medians = {name: None if found[name] is None else Median(**found[name]) for name in ("seconds", "ratio")}
    for name, one in medians.items():
        if one is not None and not one.low <= one.median <= one.high:
            raise ValueError(f"{name} of {found['name']!r}: {one.median} is not from {one.low} to {one.high}")
    return Measured(**{**found, **medians})


_POSITIVE = Number(low=1e-12, high=1e9)
_MEDIAN = Null(
    Keys(
        {
            "median": _POSITIVE,
            "low": _POSITIVE,
            "high": _POSITIVE,
            "coverage": Number(0, 1),
            "n": Number(1, 1e9, integer=True),
        }
    )
)
_MEASURED = Keys(
    {
        "name": Text(200),
        "role": Text(among=ROLES),
        "match": Null(Flag()),
        "error": Null(Number(low=0)),
        "tolerance": Null(Number(low=0)),
        "why": Text(),
        "seconds": _MEDIAN,
        "ratio": _MEDIAN,
        "figures": MapOf(Number()),
    }
)
_CASE = Keys(
    {
        "name": Text(200),
        "baseline": Text(200),
        "measured": ListOf(_MEASURED),
        "settings": MapOf(Json()),
        "figures": MapOf(Number()),
        "warnings": ListOf(Text()),
    }
)
_DOCUMENT = Keys(
    {
        "format": Text(among=(FORMAT,)),
        "version": Number(1, VERSION, integer=True),
        "command": Text(among=COMMANDS),
        "date": Text(40),
        "machine": MapOf(Json()),
        "versions": MapOf(Text(200)),
        "settings": MapOf(Json()),
        "cases": ListOf(_CASE, least=1),
    }
)
