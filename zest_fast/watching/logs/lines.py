"""The lines of a watched run's log, and what they say: JSON, exact to the bit, each with a checksum. No torch.

A header says what the steps after it have in common: names of layers and metrics, what is known of each layer. Steps
are a line each. A process that opens the log writes a header of its own, so that a file of several starts has several
segments. The last key of a line, `crc`, is the CRC-32 of what stands before it: a line that was cut off, or damaged
later, is told from one that is whole, and jq and pandas read the file all the same. NaN and infinities are the strings
"NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from zest_fast.foundation.documents import Flag, Keys, ListOf, MapOf, Number, Specification, Text, parse_json
from zest_fast.foundation.nearest import some
from zest_fast.foundation.text_table import printable
from zest_fast.profiling.layer_profile import LayerProfile
from zest_fast.profiling.profile_files import INFO, VALUE, NewerVersionError, plain_value, strict_number
from zest_fast.watching.watched_step import WatchedStep

FORMAT, VERSION = "zest_fast.watch", 1
BEGINNING = f'{{"record":"header","format":"{FORMAT}","version":'.encode()
"""Of the first line of every log."""

_MOST_LAYERS, _MOST_METRICS, _LARGEST = 1_000_000, 1_000, 2**53
_CRC = len(b',"crc":"01234567"}')
_NAMES = ListOf(Text(), most=_MOST_LAYERS, unique=True)
_METRICS = ListOf(Text(), most=_MOST_METRICS, unique=True)
_UNCOVERED = MapOf(Text(), most=_MOST_LAYERS)
_INFOS = MapOf(INFO, most=_MOST_LAYERS)
_HEADER = Keys(
    {
        "version": Number(1, VERSION, integer=True),
        "run": Text(100),
        "segment": Text(100),
        "began": Text(100),
        "continues": Flag(),
        "names": _NAMES,
        "metrics": _METRICS,
        "info": _INFOS,
        "uncovered": _UNCOVERED,
        "backend": Text(),
    },
    others=True,
)
# The values of a profile, most of a line, are looked at by `_matrix`, many at a time.
_OF_A_PROFILE: dict[str, Specification] = {"loss": VALUE}
_DIFFERENT: dict[str, Specification] = {
    "names": _NAMES,
    "metrics": _METRICS,
    "info": _INFOS,
    "uncovered": _UNCOVERED,
    "backend": Text(),
}
_PROFILE = Keys(_OF_A_PROFILE, _DIFFERENT)
_EDGES_AND_COUNTS = Keys({"counts": ListOf(VALUE, most=2**20), "edges": ListOf(VALUE, most=2**20)})
_STEP = Keys(
    {
        **_OF_A_PROFILE,
        "step": Number(0, _LARGEST, integer=True),
        "seconds": VALUE,
        "overflow": Flag(),
        "notes": ListOf(Text(100_000)),
    },
    {
        "info": _INFOS,
        "uncovered": _UNCOVERED,
        "backend": Text(),
        "totals": MapOf(VALUE),
        "histograms": MapOf(MapOf(_EDGES_AND_COUNTS)),
    },
)

Document = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """What the steps of a segment have in common."""

    names: list[str]
    metrics: list[str]
    info: Mapping[str, Mapping[str, Any]]
    uncovered: Mapping[str, str]
    backend: str

    @classmethod
    def of(cls, profile: LayerProfile) -> Layout:
        return cls(profile.names, profile.metrics, profile.info, profile.uncovered, profile.backend)

    def difference(self, other: Layout) -> str:
        """In which layers, shapes or metrics they differ, in words; "" of one and the same model and watch."""
        for what, ours, theirs in (("layers", self.names, other.names), ("metrics", self.metrics, other.metrics)):
            if ours != theirs:
                gone, new = _without(theirs, ours), _without(ours, theirs)
                parts = [f"{some(gone, 3)} only there"] * bool(gone) + [f"{some(new, 3)} only here"] * bool(new)
                return f"other {what}: " + (", ".join(parts) or "the same ones in another order")
        for name in self.names:
            ours, theirs = (list(one.info[name].get("shape") or []) for one in (self, other))
            if ours != theirs:
                return f"layer {printable(repr(name))} has shape {theirs} there and {ours} here"
        return ""


def _without(names: Iterable[str], others: Iterable[str]) -> list[str]:
    known = set(others)
    return [name for name in names if name not in known]


@dataclass
class Segment:
    """What one start of a watch has logged."""

    run: str
    """The same for all that one sink wrote."""
    segment: str
    began: str
    """Date and time, UTC."""
    continues: bool
    """Whether its first step follows the last one of the segment before: only the layers have changed."""
    layout: Layout
    steps: list[LoggedStep] = field(default_factory=list)


@dataclass(frozen=True)
class LoggedStep:
    """One step as the file has it: numbers as an array, the rest as JSON, until somebody asks."""

    layout: Layout
    values: np.ndarray
    """float64 [layers, metrics] of the layout."""
    document: Document

    @property
    def step(self) -> int:
        return int(self.document["step"])

    @property
    def seconds(self) -> float:
        return float(self.document["seconds"])

    @property
    def loss(self) -> float:
        return float(self.document["loss"])

    @property
    def overflow(self) -> bool:
        return bool(self.document["overflow"])

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self.document["notes"])

    @property
    def totals(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.document.get("totals", {}).items()}

    def watched(self) -> WatchedStep:
        """As the sink got it."""
        parts = self.document.get("parts", [])
        return WatchedStep(
            step=self.step,
            profile=_profile(self.document, self.values, self.layout),
            seconds=self.seconds,
            overflow=self.overflow,
            notes=self.notes,
            parts=tuple(_profile(part, _values_of(part, self.layout, "parts"), self.layout) for part in parts),
            totals=self.totals,
            histograms={
                layer: {kind: _histogram(found) for kind, found in kinds.items()}
                for layer, kinds in self.document.get("histograms", {}).items()
            },
        )


def header_line(layout: Layout, *, run: str, segment: str, began: str, continues: bool) -> bytes:
    """A header. Raises ValueError where JSON cannot hold what the layout says of its layers."""
    line = _line(
        {
            "record": "header",
            "format": FORMAT,
            "version": VERSION,
            "run": run,
            "segment": segment,
            "began": began,
            "continues": continues,
            "names": layout.names,
            "metrics": layout.metrics,
            "info": layout.info,
            "uncovered": layout.uncovered,
            "backend": layout.backend,
        }
    )
    header_of(line[:-1])  # what could not be read back is not written
    return line


def step_line(step: WatchedStep, layout: Layout) -> bytes:
    """A step under a header of `layout`. Raises ValueError where JSON cannot hold it."""
    document: Document = {
        "step": step.step,
        "seconds": strict_number(float(step.seconds)),
        "overflow": bool(step.overflow),
        "notes": list(step.notes),
        **_profile_document(step.profile, layout),
    }
    if step.totals:
        document["totals"] = {name: strict_number(float(value)) for name, value in step.totals.items()}
    if step.parts:
        document["parts"] = [_profile_document(part, layout) for part in step.parts]
    if step.histograms:
        document["histograms"] = {
            layer: {
                kind: {"counts": _numbers(np.asarray(counts)), "edges": _numbers(np.asarray(edges))}
                for kind, (counts, edges) in kinds.items()
            }
            for layer, kinds in step.histograms.items()
        }
    _check_step({**document}, layout)  # what could not be read back is not written
    return _line({"record": "step", **document})


def with_checksum(text: bytes) -> bytes:
    """The line of a JSON object, ended."""
    return text[:-1] + _mark(text[:-1]) + b"\n"


def text_of_line(line: bytes) -> bytes | None:
    """The JSON of a line, without the line break, whose checksum matches; None of one that is torn or damaged."""
    text, mark = line[:-_CRC], line[-_CRC:]
    return line if mark == _mark(text) else None


def header_of(text: bytes) -> Segment:
    """The segment that a header begins. Raises ValueError."""
    document = parse_json(text)
    Keys({"record": Text(among=("header",)), "format": Text(among=(FORMAT,))}, others=True).check(document, "")
    version = document.get("version")
    if isinstance(version, int) and version > VERSION:
        raise NewerVersionError(
            f"its format has version {version}, this zest_fast reads up to {VERSION}: upgrade zest_fast"
        )
    _HEADER.check(document, "")
    if set(document["info"]) != set(document["names"]):
        raise ValueError("info: expected one entry for each of names and no other")
    layout = Layout(*(document[name] for name in ("names", "metrics", "info", "uncovered", "backend")))
    return Segment(document["run"], document["segment"], document["began"], document["continues"], layout)


def step_of(text: bytes, layout: Layout) -> LoggedStep:
    """Raises ValueError."""
    document = parse_json(text)
    if not isinstance(document, dict) or document.pop("record", None) != "step":
        raise ValueError("expected a header or a step")
    values = _values_of({"values": document.pop("values", None)}, layout, "values")
    return logged_step(document, layout, values)


def logged_step(document: Document, layout: Layout, values: np.ndarray) -> LoggedStep:
    """A step, from its document without the values and they. Raises ValueError."""
    document.pop("crc", None)
    _check_step({**document}, layout)
    return LoggedStep(layout, values, document)


def _check_step(document: Document, layout: Layout) -> None:
    document.pop("values", None)
    parts = document.pop("parts", [])
    _STEP.check(document, "")
    _check_rows(document, layout)
    if not isinstance(parts, list):
        raise ValueError("parts: expected a list")
    for place, part in enumerate(parts):
        kept = {name: value for name, value in part.items() if name != "values"} if isinstance(part, dict) else part
        _PROFILE.check(kept, f"parts[{place}]")
        _check_rows(part, layout)
        _values_of(part, layout, f"parts[{place}].values")


def _check_rows(document: Document, layout: Layout) -> None:
    """Whether `info` is about layers of the profile, and about all of them where it has layers of its own."""
    named, known = set(document.get("names", layout.names)), set(document.get("info", {}))
    if known - named or ("names" in document and known != named):
        raise ValueError("info: expected one entry for each layer and no other")


def is_step(text: bytes) -> bool:
    return text.startswith(b'{"record":"step"')


def _line(document: Document) -> bytes:
    try:
        written = json.dumps(document, allow_nan=False, default=plain_value, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"info, uncovered and notes must hold what strict JSON can: {error}") from error
    return with_checksum(written.encode())


def _mark(text: bytes) -> bytes:
    return b',"crc":"%08x"}' % zlib.crc32(text)


def _profile_document(profile: LayerProfile, layout: Layout) -> Document:
    """Values and loss, and what else differs from the layout."""
    document: Document = {"loss": strict_number(profile.loss), "values": _numbers(profile.values)}
    if profile.names != layout.names:
        document |= {"names": profile.names, "info": profile.info}
    elif changed := {name: info for name, info in profile.info.items() if info != layout.info[name]}:
        document["info"] = changed
    for name in ("metrics", "uncovered", "backend"):
        if getattr(profile, name) != getattr(layout, name):
            document[name] = getattr(profile, name)
    return document


def _profile(document: Document, values: np.ndarray, layout: Layout) -> LayerProfile:
    names = document.get("names", layout.names)
    info = {**({} if "names" in document else layout.info), **document.get("info", {})}
    return LayerProfile(
        names,
        document.get("metrics", layout.metrics),
        values,
        info=info,
        loss=float(document["loss"]),
        backend=document.get("backend", layout.backend),
        uncovered=document.get("uncovered", layout.uncovered),
    )


def _numbers(values: np.ndarray) -> Any:
    """As nested lists that strict JSON holds."""
    if values.dtype.kind not in "iu":
        values = np.asarray(values, dtype=np.float64)
        if not np.isfinite(values).all():
            return _strict_lists(values.tolist())
    return values.tolist()


def _strict_lists(values: Any) -> Any:
    return [_strict_lists(value) for value in values] if isinstance(values, list) else strict_number(values)


def _values_of(document: Document, layout: Layout, where: str) -> np.ndarray:
    """Raises ValueError where `values` are no matrix of the document's layers and metrics."""
    rows = document.get("values")
    names, metrics = document.get("names", layout.names), document.get("metrics", layout.metrics)
    if not isinstance(rows, list) or len(rows) != len(names):
        raise ValueError(f"{where}: expected a list for each of {len(names)} layers")
    if any(not isinstance(row, list) or len(row) != len(metrics) for row in rows):
        raise ValueError(f"{where}: expected {len(metrics)} numbers for each layer")
    return np.array([_row(row, where) for row in rows], dtype=np.float64).reshape(len(names), len(metrics))


def _row(row: Sequence[Any], where: str) -> list[float]:
    if all(type(value) is float for value in row):
        return list(row)
    for place, value in enumerate(row):
        VALUE.check(value, f"{where}[{place}]")
    return [float(value) for value in row]


def _histogram(found: Document) -> tuple[np.ndarray, np.ndarray]:
    """Counts are integers where all of them were."""
    counts, edges = found["counts"], found["edges"]
    whole = all(isinstance(count, int) for count in counts)
    kind = np.int64 if whole and all(abs(count) < 2**63 for count in counts) else np.float64
    return (
        np.array(counts if kind is np.int64 else [float(count) for count in counts], dtype=kind),
        np.array([float(edge) for edge in edges], dtype=np.float64),
    )
