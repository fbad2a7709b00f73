"""What others wrote, checked before it is used: files that end, JSON, and tables of types and bounds for its keys.

A specification (`Text`, `Number`, `Flag`, `Null`, `Json`, `ListOf`, `MapOf`, `Keys`, `OneOf`) says what may stand
somewhere; `check(value, key)` raises ValueError that names the key, what was expected and what was found.
"""

from __future__ import annotations

import hashlib
import json
import math
import numbers
import os
import stat
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from zest_fast.foundation.nearest import nearest
from zest_fast.foundation.text_table import printable

MOST_BYTES = 2**28
"""Of a file that is read as a whole; a profile of 100,000 layers has half of that."""
_MOST_DIGITS = 60  # of an integer: Python takes a time that grows with their square, where it takes them at all
_MOST_DEPTH = 100


def whole_file(path: str | os.PathLike[str], most: int = MOST_BYTES) -> bytes:
    """The bytes of a regular file. Raises ValueError, naming it, for a device, a pipe, a folder, or too large a file;
    OSError as `open` does."""
    check_regular(path, most)
    with open(path, "rb") as file:
        contents = file.read(most + 1)
    if len(contents) > most:
        raise ValueError(f"{os.fspath(path)!r} grows beyond {most:,} bytes while it is read; name a file at rest")
    return contents


def check_regular(path: str | os.PathLike[str], most: int | None = None) -> None:
    """Raises ValueError where `path` is no regular file (reading a device may never end) or above `most` bytes."""
    found = os.stat(path)
    if kind := not_regular(found):
        raise ValueError(f"{os.fspath(path)!r} is {kind}, no regular file; name a file")
    if most is not None and found.st_size > most:
        raise ValueError(f"{os.fspath(path)!r} has {found.st_size:,} bytes, and at most {most:,} are read; split it")


def not_regular(found: os.stat_result) -> str:
    """What something is that is no regular file ("a device"); empty for a file."""
    kinds = {stat.S_IFREG: "", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(found.st_mode), "a device")


def check_stored(path: str | os.PathLike[str]) -> None:
    """Raises ValueError for an archive (zip) of which more bytes unfold than it has; zipfile.BadZipFile for none.

    torch.save stores and does not compress, but torch.load unfolds what somebody else has compressed.
    """
    with zipfile.ZipFile(path) as archive:
        unfolded = sum(one.file_size for one in archive.infolist())
    if unfolded > (size := os.path.getsize(path)):
        raise ValueError(f"{size:,} bytes unfold to {unfolded:,}, and torch.save compresses nothing")


def check_links(folder: Path, entries: Iterable[Path], taken: str) -> None:
    """Raises ValueError where one of the entries of a folder leads out of it; the cache of the hub may link to its own.

    Of a folder from elsewhere a link may lead to any file of the user's. taken: what would become of it, for the
    message.
    """
    home = folder.resolve()
    inside = [home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])]
    for entry in entries:
        target = entry.resolve()
        if not any(target.is_relative_to(one) for one in inside):
            raise ValueError(
                f"{os.fspath(entry)!r} is a link to {os.fspath(target)!r}, outside of the folder, which would be "
                f"{taken}: remove it, or put a copy in its place"
            )


def text_of(contents: bytes, encoding: str = "utf-8") -> str:
    """Raises ValueError that names the line for bytes that are no UTF-8."""
    try:
        return contents.decode(encoding)
    except UnicodeDecodeError as error:
        line = contents[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from error


def parse_json(text: str | bytes) -> Any:
    """Raises ValueError for what is no JSON, or JSON that would take Python's stack or its time."""
    try:
        return json.loads(text, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise ValueError(f"torn JSON ({error.msg} at line {error.lineno}, column {error.colno})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason})") from error
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def json_hash(value: Any) -> str:
    """SHA-256 of a value as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def shown(value: Any, width: int = 60) -> str:
    """A value for a message: short, on one line, without control characters."""
    if isinstance(value, Mapping):
        return f"{len(value)} keys"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if value is None:
        return "nothing"
    text = printable(repr(value[: 2 * width] if isinstance(value, str | bytes) else value))
    return text if len(text) <= width else text[: width - 1] + "…"


class Specification(Protocol):
    def check(self, value: Any, key: str) -> None: ...


def _refuse(key: str, expected: str, value: Any) -> None:
    raise ValueError(f"{printable(key)}: expected {expected}, found {shown(value)}")


@dataclass(frozen=True)
class Text:
    most: int = 10_000
    among: tuple[str, ...] | None = None

    def check(self, value: Any, key: str) -> None:
        if not isinstance(value, str):
            _refuse(key, "a string", value)
        if len(value) > self.most:
            raise ValueError(f"{printable(key)}: expected at most {self.most:,} characters, found {len(value):,}")
        if any("\ud800" <= character <= "\udfff" for character in value):
            _refuse(key, "text without lone surrogates", value)  # it could not be written again
        if self.among is not None and value not in self.among:
            raise ValueError(f"{printable(key)}: {shown(value)} is unknown; {nearest(value[:1000], self.among)}")


@dataclass(frozen=True)
class Number:
    low: float = -math.inf
    high: float = math.inf
    integer: bool = False
    finite: bool = True

    def check(self, value: Any, key: str) -> None:
        kind = numbers.Integral if self.integer else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            _refuse(key, "an integer" if self.integer else "a number", value)
        try:
            size = float(value)
        except OverflowError:
            size = math.inf
        inside = math.isfinite(size) and self.low <= value <= self.high
        if not inside and (math.isfinite(size) or self.finite):
            _refuse(key, self._bounds(), value)

    def _bounds(self) -> str:
        what = "an integer" if self.integer else "a finite number"
        return f"{what} from {self.low:g} to {self.high:g}" if math.isfinite(self.high - self.low) else what


@dataclass(frozen=True)
class Flag:
    def check(self, value: Any, key: str) -> None:
        if not isinstance(value, bool):
            _refuse(key, "true or false", value)


@dataclass(frozen=True)
class Null:
    """Nothing, or what `other` takes."""

    other: Specification

    def check(self, value: Any, key: str) -> None:
        if value is not None:
            self.other.check(value, key)


@dataclass(frozen=True)
class OneOf:
    """Any of some specifications; the message is that of the last."""

    specifications: tuple[Specification, ...]

    def check(self, value: Any, key: str) -> None:
        for specification in self.specifications[:-1]:
            try:
                return specification.check(value, key)
            except ValueError:
                continue
        self.specifications[-1].check(value, key)


@dataclass(frozen=True)
class Json:
    """Anything that JSON holds, of bounded depth."""

    def check(self, value: Any, key: str) -> None:
        level = [value]
        for _ in range(_MOST_DEPTH):
            level = [
                entry
                for container in level
                if isinstance(container, list | dict)
                for entry in (container.values() if isinstance(container, dict) else container)
            ]
            if not level:
                return
        raise ValueError(f"{printable(key)}: nested more than {_MOST_DEPTH} deep")


@dataclass(frozen=True)
class ListOf:
    item: Specification
    least: int = 0
    most: int = 1_000_000
    unique: bool = False

    def check(self, value: Any, key: str) -> None:
        if not isinstance(value, list | tuple):
            _refuse(key, "a list", value)
        if not self.least <= len(value) <= self.most:
            bounds = str(self.least) if self.least == self.most else f"{self.least} to {self.most:,}"
            raise ValueError(f"{printable(key)}: expected {bounds} entries, found {len(value):,}")
        for place, entry in enumerate(value):
            self.item.check(entry, f"{key}[{place}]")
        if self.unique and len(set(value)) < len(value):
            twice = next(entry for entry, count in _counts(value).items() if count > 1)
            raise ValueError(f"{printable(key)}: {shown(twice)} occurs more than once")


@dataclass(frozen=True)
class MapOf:
    item: Specification
    names: Text = field(default_factory=Text)
    most: int = 1_000_000

    def check(self, value: Any, key: str) -> None:
        if not isinstance(value, Mapping):
            _refuse(key, "keys and values", value)
        if len(value) > self.most:
            raise ValueError(f"{printable(key)}: expected at most {self.most:,} keys, found {len(value):,}")
        for name, entry in value.items():
            self.names.check(name, f"{key}, a key")
            self.item.check(entry, _below(key, name))


@dataclass(frozen=True)
class Keys:
    """Keys that have to be there, and some that may be; others are refused, or passed over where `others` is set."""

    needed: Mapping[str, Specification]
    optional: Mapping[str, Specification] = field(default_factory=dict)
    others: bool = False

    def check(self, value: Any, key: str) -> None:
        if not isinstance(value, Mapping):
            _refuse(key or "the file", "keys and values", value)
        known = {**self.needed, **self.optional}
        for name in self.needed:
            if name not in value:
                raise ValueError(f"{printable(_below(key, name))}: it is not there")
        for name, entry in value.items():
            if name in known:
                known[name].check(entry, _below(key, name))
            elif not self.others:
                found = shown(str(name), 1000).strip("'\"")
                raise ValueError(f"{printable(_below(key, found[:60]))}: unknown key; {nearest(found[:200], known)}")
            else:
                Json().check(entry, _below(key, str(name)[:60]))


def _below(key: str, name: str) -> str:
    return f"{key}.{name}" if key else str(name)


def _counts(values: Iterable[Any]) -> dict[Any, int]:
    found: dict[Any, int] = {}
    for value in values:
        found[value] = found.get(value, 0) + 1
    return found
