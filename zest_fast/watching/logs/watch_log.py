"""A log that is read back: its steps, tables, the drift of the ranking, a picture. No torch.

pandas, SciPy and matplotlib are imported by the methods that need them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np

from zest_fast.foundation.nearest import nearest
from zest_fast.foundation.text_table import number, printable, text_table
from zest_fast.watching.logs.drift import RankingDrift, ranking_drift
from zest_fast.watching.logs.lines import LoggedStep, Segment
from zest_fast.watching.logs.parquet_log import journal_of, segments_of_parquet
from zest_fast.watching.logs.reader import LogReader
from zest_fast.watching.watched_step import WatchedStep

if TYPE_CHECKING:
    import pandas

    from zest_fast.ranking.ranking import Scorer


def load_watch(path: str | os.PathLike[str]) -> WatchLog:
    """Read the log of a watched run, also of one that is still training.

    Steps that a run logged before it was started again further back are left out: a start that begins at step s takes
    the place of what earlier ones logged from s on, since those steps were made anew. (Of two runs from the beginning
    in one file, that is the second.) `.notes` says how many; `.segments` has all of them. A last line that is torn, as
    a killed process leaves it, is left out with a warning.

    Args:
        path: what a sink wrote: .parquet, with its journal where there is one, else lines of JSON.

    Returns:
        A WatchLog.

    Raises:
        ValueError: the file is damaged, no log, or of a newer format; the message names it and the line.
        OSError: it cannot be read, or is not there.

    Examples:
        >>> import torch, zest_fast
        >>> from torch import nn
        >>> from zest_fast.watching.watched_step import WatchedStep
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> profile = zest_fast.profile(model, (torch.randn(6, 4), torch.randint(3, (6,))), metrics=["snip", "rgn"])
        >>> sink = zest_fast.sink_for("run.jsonl")
        >>> for step in (0, 100):
        ...     sink(WatchedStep(step=step, profile=profile, seconds=step / 10, overflow=False, notes=()))
        >>> sink.close()
        >>> log = zest_fast.load_watch("run.jsonl")
        >>> log
        WatchLog of 'run.jsonl': 2 steps, 0 to 100, 2 layers x 2 metrics
        >>> bool((log.steps[1].profile.values == profile.values).all())
        True
        >>> log.column("snip").shape
        (2, 2)
    """
    log = read_log(path)
    if log.is_torn:
        warnings.warn(f"{printable(repr(str(log.path)))}: {log.notes[0]}", stacklevel=2)
    return log


def read_log(path: str | os.PathLike[str]) -> WatchLog:
    """The same without the warning."""
    path = Path(path)
    reader = LogReader(journal_of(path) if _is_parquet(path) else path)
    if not _is_parquet(path) or reader.path.exists():
        reader.poll()
    segments = segments_of_parquet(path, reader) if _is_parquet(path) else reader.segments
    return WatchLog(path, segments, torn=reader.torn)


class WatchLog:
    """The logged steps of a run; see `load_watch`.

    Args:
        path: of the file.
        segments: what it holds, one for each start.
        torn: bytes of a last line that is not whole.

    Attributes:
        path: as above.
        segments: every start, with what was replaced later.
        steps: WatchedStep of each logged step, in order. An overflow and the step that was made after it have one
            number.
        layers: names of all layers that any step has, in order of first appearance.
        metrics: the same of metrics.
        is_torn: whether the last line was left out.
        notes: that, and how many steps were replaced, in words.

    Raises:
        ValueError: not by this class; `load_watch` reads files, and says what is wrong with them.

    Examples:
        >>> import zest_fast
        >>> zest_fast.sink_for("run.jsonl").close()
        >>> log = zest_fast.load_watch("run.jsonl")
        >>> len(log.steps), log.layers, log.notes
        (0, [], ())
    """

    def __init__(self, path: str | os.PathLike[str], segments: Sequence[Segment], torn: int = 0) -> None:
        self.path = Path(path)
        self.segments = tuple(segments)
        self._logged, replaced = _history(self.segments)
        self.steps: Sequence[WatchedStep] = _Steps(self._logged)
        layouts = list({id(step.layout): step.layout for step in self._logged}.values())
        self.layers = list(dict.fromkeys(name for layout in layouts for name in layout.names))
        self.metrics = list(dict.fromkeys(metric for layout in layouts for metric in layout.metrics))
        self.is_torn = torn > 0
        about_the_end = f"the last line is torn ({torn:,} bytes) and left out: its step was not written whole"
        self.notes = (*([about_the_end] if torn else []), *replaced)

    def __len__(self) -> int:
        return len(self._logged)

    @property
    def logged(self) -> Sequence[LoggedStep]:
        """The steps as the file has them, without their profiles made."""
        return self._logged

    def column(self, metric: str) -> np.ndarray:
        """One metric over the run.

        Args:
            metric: its name.

        Returns:
            float64 [steps, layers], in the order of `steps` and `layers`; NaN where it is undefined, and where a step
            lacks the layer.

        Raises:
            KeyError: no step has such a metric; the message names the nearest.
        """
        if metric not in self.metrics:
            raise KeyError(f"the log has no metric {metric!r}; {nearest(metric, self.metrics)}")
        place = {name: column for column, name in enumerate(self.layers)}
        found = np.full((len(self), len(self.layers)), np.nan)
        for row, step in enumerate(self._logged):
            if metric in step.layout.metrics:
                columns = [place[name] for name in step.layout.names]
                found[row, columns] = step.values[:, step.layout.metrics.index(metric)]
        return found

    def to_pandas(self) -> pandas.DataFrame:
        """A row for each step and layer (the index): the metrics, then loss, seconds and overflow of the step."""
        import pandas

        rows = [(step, name) for step in self._logged for name in step.layout.names]
        index = pandas.MultiIndex.from_arrays(
            [np.array([step.step for step, _ in rows], dtype=np.int64), [name for _, name in rows]],
            names=["step", "layer"],
        )
        blocks = [_columns(step, self.metrics) for step in self._logged]
        values = np.concatenate([np.empty((0, len(self.metrics))), *blocks])
        frame = pandas.DataFrame(values, index=index, columns=self.metrics)
        for name in ("loss", "seconds"):
            frame[name] = np.array([getattr(step, name) for step, _ in rows], dtype=np.float64)
        frame["overflow"] = np.array([step.overflow for step, _ in rows], dtype=bool)
        return frame

    def drift(self, by: str | Scorer | None = None, *, top: int = 5) -> RankingDrift:
        """How far the ranking of layers has moved.

        Args:
            by: as `rank` takes it: a metric, a Ranker, None = the Ranker that ships.
            top: of how many of the best layers it is counted how many stay among them.

        Returns:
            A RankingDrift: Kendall's tau and that overlap, to the first logged step and to the one before.

        Raises:
            ValueError: no metric of the log, or `top` below 1.
            TypeError: nothing that can score a profile.
        """
        if isinstance(by, str) and by not in self.metrics:
            raise ValueError(f"by={by!r} is no metric of this log; {nearest(by, self.metrics)}")
        return ranking_drift(self.steps, by, top)

    def plot(self, path: str | os.PathLike[str], metric: str = "grad_norm") -> Path:
        """Draw a heat map of one metric, layer x step. Needs `pip install 'zest_fast[plot]'`.

        Args:
            path: ending in .png, .svg or .pdf.
            metric: one of the log's.

        Returns:
            The path.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: another ending, a metric that the log lacks, or no step.
        """
        from zest_fast.watching.logs.picture import draw

        return draw(self, path, metric)

    def __repr__(self) -> str:
        head = f"WatchLog of {printable(repr(str(self.path)))}: "
        if not self._logged:
            return head + "; ".join(["no step yet", *map(printable, self.notes)])
        first, last = self._logged[0].step, self._logged[-1].step
        head += f"{len(self)} step{'s' * (len(self) > 1)}, {first} to {last}, "
        head += f"{len(self.layers)} layers x {len(self.metrics)} metrics"
        return "; ".join([head, *map(printable, self.notes)])


class LogFollower:
    """A log that is read again and again: only what is new, where that can be.

    Raises as load_watch, FileNotFoundError also while the file is not there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._journal = LogReader(journal_of(path) if _is_parquet(path) else path)
        self._state: object = None

    def poll(self) -> WatchLog | None:
        """The log where it has changed since the last call; None where it has not."""
        if not _is_parquet(self.path):
            changed = self._journal.poll() or self._state is None
            self._state = True
            return WatchLog(self.path, self._journal.segments) if changed else None
        state = [_signature(path) for path in (self.path, journal_of(self.path))]
        if state == self._state:
            return None
        there = journal_of(self.path).exists()
        if there:
            self._journal.poll()
        log = WatchLog(self.path, segments_of_parquet(self.path, self._journal if there else None))
        self._state = state
        return log


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _signature(path: Path) -> tuple[int, ...]:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _history(segments: Sequence[Segment]) -> tuple[list[LoggedStep], list[str]]:
    """The steps that led to the last one, and what was replaced, in words."""
    steps: list[LoggedStep] = []
    notes = []
    for segment in segments:
        if not segment.steps:
            continue
        first, before = segment.steps[0].step, len(steps)
        while not segment.continues and steps and steps[-1].step >= first:
            steps.pop()
        if gone := before - len(steps):
            notes.append(
                f"{gone} step{'s' * (gone > 1)} from {first} on, logged before the start at {segment.began}, "
                "gave way to what was logged after it"
            )
        steps += segment.steps
    return steps, notes


def _columns(step: LoggedStep, metrics: Sequence[str]) -> np.ndarray:
    """[layers, metrics], NaN where the step lacks a metric."""
    found = np.full((len(step.layout.names), len(metrics)), np.nan)
    for column, metric in enumerate(metrics):
        if metric in step.layout.metrics:
            found[:, column] = step.values[:, step.layout.metrics.index(metric)]
    return found


class _Steps(Sequence[WatchedStep]):
    """Made when they are asked for: the profiles of all steps of a long run would not fit into memory."""

    def __init__(self, logged: Sequence[LoggedStep]) -> None:
        self._logged = logged

    @overload
    def __getitem__(self, place: int) -> WatchedStep: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[WatchedStep]: ...

    def __getitem__(self, place: int | slice) -> WatchedStep | Sequence[WatchedStep]:
        if isinstance(place, slice):
            return _Steps(self._logged[place])
        return self._logged[place].watched()

    def __len__(self) -> int:
        return len(self._logged)

    def __iter__(self) -> Iterator[WatchedStep]:
        return (step.watched() for step in self._logged)

    def __repr__(self) -> str:
        rows = [[str(step.step), number(step.loss), "overflow" if step.overflow else ""] for step in self._logged[:10]]
        rest = f"\n… and {len(self) - 10} more" if len(self) > 10 else ""
        return f"{len(self)} steps\n{text_table(['step', 'loss', ''], rows, left=0)}{rest}" if rows else "no step"
