"""The file that a sweep writes while it runs: append-only, a checksummed line for each piece of work. No torch.

A line is a CRC-32 of the rest in eight hexadecimal digits, a space, and JSON. The first one says what the file is
about. A line that a killed process or a full disk tore off at the end is dropped; damage anywhere else is an error.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zest_fast.foundation.documents import (
    Flag,
    Keys,
    ListOf,
    MapOf,
    Null,
    Number,
    Text,
    check_regular,
    parse_json,
    shown,
    whole_file,
)
from zest_fast.foundation.file_lock import lock_file
from zest_fast.ranking.features import METRICS

FORMAT = 1
_KEYS = {"head": ("seed",), "profile": ("seed", "head_state"), "layer": ("seed", "layer"), "strength": ()}
_MOST_BYTES = 2**30

_SEED = Number(-(2**63), 2**63 - 1, integer=True)
_SCORES = {"accuracy": Number(0, 1), "loss": Number(finite=False)}
_SECONDS = {"seconds": Number(0, 1e12)}
_ROW = Keys(
    {},
    {
        "kind": Text(),
        "numel": Number(0, 2**53),
        "depth": Number(0, 2**53),
        "shape": ListOf(Number(0, 2**53, integer=True), most=64),
        "head": Flag(),
        **dict.fromkeys(METRICS, Null(Number(finite=False))),
    },
    others=True,
)
VERSIONS = Keys({}, {"definitions": Null(Number(0, 2**31, integer=True))}, others=True)
_SPECIFICATIONS = {
    "header": Keys(
        {"format": Number(integer=True)},
        {
            **dict.fromkeys(("model", "dataset", "family", "recipe_hash"), Text()),
            "recipe": Keys({}, {"seeds": ListOf(_SEED, unique=True)}, others=True),
            "layers": ListOf(Text(), unique=True),
            "versions": VERSIONS,
        },
        others=True,
    ),
    "head": Keys({"seed": _SEED, **_SCORES}, {**_SECONDS, "weight": Text(2**30), "bias": Null(Text(2**30))}, True),
    "profile": Keys(
        {"seed": _SEED, "head_state": Text(100), "layers": MapOf(_ROW), "backend": Text()},
        {"loss": Number(finite=False), "metrics": ListOf(Text(), most=1000)},
        others=True,
    ),
    "layer": Keys({"seed": _SEED, "layer": Text(), **_SCORES}, _SECONDS, others=True),
    "strength": Keys({"value": Number()}, others=True),
}

Record = dict[str, Any]


class RecordFile:
    """Records of one sweep: those that were there and those that it appends.

    header: what all of them have in common. An existing file continues only under the same header.
    Raises ValueError, naming the file, where it differs or is damaged; RuntimeError where another process writes to it.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        header = json.loads(json.dumps({"record": "header", "format": FORMAT, **header}))
        if self.path.exists():
            check_regular(self.path, _MOST_BYTES)  # /dev/full, asked for what it holds, has no end
        self._file = open(self.path, "ab+")  # noqa: SIM115 (closed by close)
        try:
            lock_file(self._file.fileno(), self.path, "another sweep; wait for it or choose another file")
            records, end = _parse(self.path, whole_file(self.path, _MOST_BYTES))
            self._file.truncate(end)
            if records:
                _check_same(self.path, records[0], header)
            self._records = {_key(record): record for record in records[1:]}
            if not records:
                self._write(header)
        except BaseException:
            self._file.close()
            raise

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self._records

    def get(self, *key: Any) -> Record | None:
        """The record of this key, such as ("layer", seed, name); None where that work is still to be done."""
        return self._records.get(key)

    @property
    def records(self) -> list[Record]:
        """All but the header."""
        return list(self._records.values())

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record; it is on disk at the return. Raises RuntimeError, the file as before, on a full disk."""
        record = dict(record)
        self._write(record)
        self._records[_key(record)] = record

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        end = os.fstat(self._file.fileno()).st_size
        try:
            write_fully(self._file.fileno(), _line(record))
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(end)
            raise RuntimeError(
                f"{str(self.path)!r} cannot be written ({error.strerror or error}); what it holds is safe: make room "
                "and run the same sweep again, it goes on from there"
            ) from error


def read_records(path: str | os.PathLike[str]) -> tuple[Record, list[Record]]:
    """Header and records of a file, also of one that a sweep is writing. Raises ValueError where it is damaged."""
    path = Path(path)
    records, _ = _parse(path, whole_file(path, _MOST_BYTES))
    if not records:
        raise ValueError(f"{str(path)!r} holds no records")
    return records[0], list({_key(record): record for record in records[1:]}.values())


def write_fully(descriptor: int, data: bytes) -> None:
    """os.write may write less than it was given."""
    while data:
        data = data[os.write(descriptor, data) :]


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(path: Path, contents: bytes) -> tuple[list[Record], int]:
    """The records, header first, and where the last whole line ends."""
    records: list[Record] = []
    end = 0
    lines = contents.split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        text = _read(line)
        if text is None and number == len(lines) - 1 and not lines[-1]:
            break  # the last one: its bytes reached the disk in another order
        if text is None:
            raise ValueError(
                f"{str(path)!r}, line {number}: the checksum does not match; the file is damaged or no record file. "
                "Move it away, or delete the line to have its work done again"
            )
        try:
            record = parse_json(text)
        except ValueError as error:
            raise ValueError(f"{str(path)!r}, line {number}: {error}; the file is no record file") from error
        if number == 1 and (not isinstance(record, dict) or record.get("record") != "header"):
            raise ValueError(f"{str(path)!r} is no record file: its first line is no header")
        try:
            _check(record, first=number == 1)
        except ValueError as error:
            raise ValueError(
                f"{str(path)!r}, line {number}: {error}; delete the line to have its work done again"
            ) from error
        if number == 1 and record["format"] != FORMAT:
            raise ValueError(f"{str(path)!r} has format {record['format']}, this zest_fast reads {FORMAT}")
        records.append(record)
        end += len(line) + 1
    if not records and not _TORN_HEADER.match(contents):
        raise ValueError(f"{str(path)!r} is no record file; choose another path")
    return records, end


_TORN_HEADER = re.compile(rb"[0-9a-f]{0,8}\Z|[0-9a-f]{8} (\Z|\{)")  # anything else is somebody's own file


def _read(line: bytes) -> bytes | None:
    """The JSON of a line whose checksum matches."""
    checksum, _, text = line.partition(b" ")
    if len(checksum) != 8 or checksum != b"%08x" % zlib.crc32(text):
        return None
    return text


def _check(record: Any, *, first: bool) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"expected a record, found {shown(record)}")
    Text(among=("header",) if first else tuple(_KEYS)).check(record.get("record"), "record")
    _SPECIFICATIONS[record["record"]].check({k: v for k, v in record.items() if k != "record"}, "")


def _key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return (record["record"], *(record[name] for name in _KEYS[record["record"]]))


def _check_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in dict.fromkeys([*wanted, *found]):
        ours, theirs = wanted.get(name), found.get(name)
        if ours == theirs or name == "environment":
            continue
        if isinstance(ours, dict) and isinstance(theirs, dict):
            name, ours, theirs = next(
                (f"{name}.{key}", ours.get(key), theirs.get(key))
                for key in [*ours, *theirs]
                if ours.get(key) != theirs.get(key)
            )
        raise ValueError(
            f"{str(path)!r} was begun with another {name}: {_short(theirs)} there, {_short(ours)} now. Records of "
            "different sweeps are not mixed: choose another file"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
