"""The files of a run: which of them are ours, what each of them is, and what it says. Of a folder the newest count."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zest_fast.cli.jobs.record import SCORE
from zest_fast.foundation.documents import (
    Json,
    Keys,
    ListOf,
    MapOf,
    Null,
    Number,
    Text,
    not_regular,
    parse_json,
    text_of,
    whole_file,
)
from zest_fast.foundation.text_table import printable

if TYPE_CHECKING:
    from zest_fast.cli.jobs.runs import Progress
    from zest_fast.finetuning.delta_files import Delta
    from zest_fast.profiling.layer_profile import LayerProfile
    from zest_fast.ranking.ranking import Ranking
    from zest_fast.watching.logs.watch_log import WatchLog

WHAT = {
    "profile": "profile (zest-fast profile --out)",
    "ranking": "ranking (Ranking.save)",
    "delta": "delta (zest-fast finetune --out)",
    "finetuning": "figures of a fine-tuning (zest-fast finetune --json)",
    "plan": "plan (zest-fast plan --json)",
    "run": "interrupted run (zest-fast finetune --save-every)",
    "watch": "log of a watched run (zest_fast.watch)",
}
_MARKS = {
    "profile": b"zest_fast.LayerProfile",
    "ranking": b"zest_fast.Ranking",
    "delta": b"zest_fast.delta",
    "watch": b"zest_fast.watch",
}
_LOSS = Null(Number())
_SCORE = Null(SCORE)
_FINETUNING = Keys(
    {"training_loss": ListOf(_LOSS), "layers": ListOf(Text()), "before": _SCORE, "after": _SCORE, "plan": Null(Json())},
    {"trainable_parameters": Number(0), "parameters": Number(0)},
    others=True,
)
_PLAN = Keys({"model": Text(), "peak_bytes": Number(0), "breakdown": MapOf(Number(0))}, others=True)
_ENDINGS = (".json", ".jsonl", ".parquet", ".safetensors", ".pt")
_LOOKED_AT = 2**20  # bytes at both ends of a file that may be ours


@dataclass
class Sources:
    """What was found, None where there is nothing of the kind. paths: of these, by kind. notes: what was passed over
    and why. warnings: files that are ours and cannot be read, with the reason, or do not belong together."""

    profile: LayerProfile | None = None
    ranking: Ranking | None = None
    delta: Delta | None = None
    finetuning: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    run: Progress | None = None
    watch: WatchLog | None = None
    paths: dict[str, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def read_sources(given: Iterable[Path]) -> Sources:
    """Raises ValueError, naming the file, for one that was named and is damaged, none of ours, or a second of its kind,
    and where nothing was found. In a folder what is none of ours is passed over, what is damaged goes into `warnings`.
    """
    sources = Sources()
    for path in given:
        for file in _files(path) if path.is_dir() else [path]:
            _take(sources, file, named=file == path)
    if not sources.paths:
        damaged = f" ({'; '.join(sources.warnings)})" if sources.warnings else ""
        raise ValueError(
            f"there is nothing to report{damaged}: name a profile, a delta, a log of a watched run, or a folder of them"
        )
    return sources


def _files(folder: Path) -> list[Path]:
    """Those that may be ours, the newest first, and by name where two are equally old."""
    found = [entry for entry in os.scandir(folder) if entry.name.endswith(_ENDINGS) and entry.is_file()]
    return [Path(entry.path) for entry in sorted(found, key=lambda entry: (-entry.stat().st_mtime_ns, entry.name))]


def _take(sources: Sources, path: Path, named: bool) -> None:
    kind = _kind(path, named)
    if kind is None:
        return
    if kind in sources.paths:
        text = f"{path} is a second {WHAT[kind]} beside {sources.paths[kind]}"
        if named:
            raise ValueError(f"{text}: a page shows one of them; leave the other out")
        sources.notes.append(f"{printable(text)}, which is newer, and is not shown")
        return
    try:
        setattr(sources, kind, _READERS[kind](path))
    except (ValueError, KeyError, OSError) as error:
        if named:
            raise
        sources.warnings.append(printable(" ".join(str(error).split())))
        return
    sources.paths[kind] = path


def _kind(path: Path, named: bool) -> str | None:
    """None of a file in a folder that is none of ours. Raises ValueError for one that was named."""
    if problem := not_regular(os.stat(path)):
        raise ValueError(f"{str(path)!r} is {problem}; name a file")
    kind = None
    if path.suffix == ".pt":
        kind = "run" if named or path.name.endswith(".run.pt") else None
    elif path.suffix in _ENDINGS:
        ends = _ends(path)
        marked = [one for one, mark in _MARKS.items() if mark in ends]
        kind = marked[0] if marked else _kind_of_json(path) if path.suffix == ".json" else None
    if kind is None and named:
        raise ValueError(f"{str(path)!r} is none of what a report shows: {', '.join(WHAT.values())}")
    return kind


def _ends(path: Path) -> bytes:
    """The first and the last bytes: the format stands in the header of JSON and safetensors, at the end of Parquet."""
    with open(path, "rb") as file:
        first = file.read(_LOOKED_AT)
        file.seek(max(len(first), os.fstat(file.fileno()).st_size - _LOOKED_AT))
        return first + file.read()


def _kind_of_json(path: Path) -> str | None:
    """Of what `--json` printed: it has no format, but keys of its own."""
    try:
        document = parse_json(text_of(whole_file(path)))
    except ValueError:
        return None
    keys = set(document) if isinstance(document, dict) else set()
    if {"training_loss", "delta", "verified"} <= keys:
        return "finetuning"
    return "plan" if {"peak_bytes", "breakdown", "groups", "peak_tensor"} <= keys else None


def _profile(path: Path) -> LayerProfile:
    from zest_fast.profiling.layer_profile import LayerProfile

    return LayerProfile.load(path)


def _ranking(path: Path) -> Ranking:
    from zest_fast.ranking.ranking import Ranking

    return Ranking.load(path)


def _delta(path: Path) -> Delta:
    from zest_fast.finetuning.delta_files import read_delta

    return read_delta(path)


def _run(path: Path) -> Progress:
    from zest_fast.cli.jobs.runs import read_progress

    return read_progress(path)


def _watch(path: Path) -> WatchLog:
    from zest_fast.watching.logs.watch_log import read_log

    return read_log(path)


def _finetuning(path: Path) -> dict[str, Any]:
    return _checked(path, _FINETUNING)


def _plan(path: Path) -> dict[str, Any]:
    return _checked(path, _PLAN)


def _checked(path: Path, form: Keys) -> dict[str, Any]:
    document = parse_json(text_of(whole_file(path)))
    try:
        form.check(document, "")
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not what zest-fast printed ({error}); print it again") from error
    return dict(document)


_READERS: Mapping[str, Callable[[Path], Any]] = {
    "profile": _profile,
    "ranking": _ranking,
    "delta": _delta,
    "finetuning": _finetuning,
    "plan": _plan,
    "run": _run,
    "watch": _watch,
}
