"""Where the steps of a watched run go: from what a user writes to something that is called with each WatchedStep."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from zest_fast.foundation.nearest import nearest
from zest_fast.profiling.layer_profile import LayerProfile
from zest_fast.watching.logs.jsonl_log import JsonlLog
from zest_fast.watching.logs.lines import Layout
from zest_fast.watching.logs.parquet_log import ParquetLog
from zest_fast.watching.logs.trackers import TensorBoardLog, TrackioLog, WandbLog
from zest_fast.watching.watched_step import WatchedStep

Sink = Callable[[WatchedStep], object]


@runtime_checkable
class ChecksLayout(Protocol):
    """A sink that can say before the first step whether it takes steps of this layout."""

    def check(self, layout: Layout) -> None:
        """Raises ValueError where it does not."""


@runtime_checkable
class Closes(Protocol):
    """A sink that holds something open."""

    def close(self) -> None:
        """Let go of it."""


RowSelection = str | re.Pattern[str] | Iterable[str] | Callable[[str, Mapping[str, Any]], bool] | None

_FILES: dict[str, Callable[[Path], Sink]] = {".jsonl": JsonlLog, ".parquet": ParquetLog}
_TENSORBOARD = "tensorboard:"


def sink_for(
    what: str | os.PathLike[str] | Sink, *, layers: RowSelection = None, metrics: Iterable[str] | None = None
) -> Sink:
    """What logs the steps of a watched run, and which part of them.

    The sink is called with each WatchedStep. Where it holds something open it has a `close()`: `watch` closes the sinks
    that it made of names itself, others are yours to close. A file is opened here: one that cannot be written is
    refused before training begins.

    A file that is there is continued, if it is the log of the same model and metrics; each start is a segment of it.
    `.jsonl` has a line for each step, at once. `.parquet` has a row for each layer and step, and is written when the
    sink is closed; until then, and after a killed process, the steps are in a journal beside it.

    Args:
        what: a path that ends in .jsonl or .parquet; "wandb" or "trackio", for the run that has begun;
            "tensorboard:FOLDER"; or any function of one WatchedStep.
        layers: some of the watched layers: a pattern that matches whole names of layers or modules, names, or a
            predicate of a layer's name and its `info`. Totals stay those over all watched layers.
        metrics: some of the metrics.

    Returns:
        The sink.

    Raises:
        ValueError: an unknown name or ending; a file that is something else, or too new; at the first step the log
            of another model, and layers or metrics that the watch does not have.
        TypeError: nothing that could be a sink.
        RuntimeError: a file that another process logs to; wandb without a run.
        ImportError: wandb, trackio or tensorboard is not installed.
        OSError: the file cannot be written.

    Examples:
        >>> import zest_fast
        >>> sink = zest_fast.sink_for("run.jsonl", metrics=["grad_norm", "rgn"])
        >>> sink.close()
        >>> zest_fast.load_watch("run.jsonl")
        WatchLog of 'run.jsonl': no step yet
    """
    sink = _opened(what)
    if layers is None and metrics is None:
        return sink
    return FilteredSink(sink, layers, metrics)


def _opened(what: Any) -> Sink:
    if isinstance(what, str | os.PathLike):
        return _named(os.fspath(what))
    if callable(what):
        return what
    raise TypeError(f"a sink is a path, a name or a function of one WatchedStep, not {type(what).__name__}")


def _named(name: str | bytes) -> Sink:
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    if name == "wandb":
        return WandbLog()
    if name == "trackio":
        return TrackioLog()
    if name.startswith(_TENSORBOARD) and name != _TENSORBOARD:
        return TensorBoardLog(name.removeprefix(_TENSORBOARD))
    ending = Path(name).suffix.lower()
    if ending not in _FILES:
        known = [*_FILES, "wandb", "trackio", "tensorboard:FOLDER"]
        raise ValueError(f"{name!r} is no sink; {nearest(ending or name, known)}")
    return _FILES[ending](Path(name))


class FilteredSink:
    """Passes some layers and metrics on to a sink."""

    def __init__(self, sink: Sink, layers: RowSelection, metrics: Iterable[str] | None) -> None:
        self._sink = sink
        self._chooses, self._names = _chooser(layers)
        self._seen: set[str] = set()
        if isinstance(metrics, str):
            raise TypeError(f"metrics is a string; pass a list, [{metrics!r}]")
        self._metrics = None if metrics is None else list(metrics)
        if self._metrics is not None and not self._metrics:
            raise ValueError("metrics is empty; pass None for all that are watched")

    def __call__(self, step: WatchedStep) -> None:
        self._sink(self._part_of(step))

    def check(self, layout: Layout) -> None:
        """As the sink's own, for the part of the layout that it gets; nothing where it has none."""
        if isinstance(self._sink, ChecksLayout):
            values = np.zeros((len(layout.names), len(layout.metrics)))
            whole = LayerProfile(
                layout.names, layout.metrics, values, info=layout.info, loss=0.0, backend="", uncovered=layout.uncovered
            )
            self._sink.check(Layout.of(self._profile(whole, self._rows(whole))))

    def close(self) -> None:
        """Close the sink, if there is something to close."""
        if isinstance(self._sink, Closes):
            self._sink.close()

    def _part_of(self, step: WatchedStep) -> WatchedStep:
        names = self._rows(step.profile)
        kept = set(names)
        return dataclasses.replace(
            step,
            profile=self._profile(step.profile, names),
            parts=tuple(self._profile(part, [name for name in part if name in kept]) for part in step.parts),
            histograms={layer: found for layer, found in step.histograms.items() if layer in kept},
        )

    def _rows(self, profile: LayerProfile) -> list[str]:
        chosen = [name for name in profile.names if self._chooses(name, profile.info[name])]
        self._seen |= {known for name in chosen for known in (name, profile.info[name].get("module", name))}
        for name in self._names:
            if name not in self._seen:  # one that was there before may have been frozen since
                raise ValueError(f"layers: no watched layer is named {name!r}; {nearest(name, profile.names)}")
        if not self._seen:
            raise ValueError(f"layers= chooses none of the watched layers; {nearest('', profile.names)}")
        return chosen

    def _profile(self, profile: LayerProfile, names: list[str]) -> LayerProfile:
        metrics = profile.metrics if self._metrics is None else self._metrics
        for metric in metrics:
            if metric not in profile.metrics:
                raise ValueError(f"metrics: {metric!r} is not watched; {nearest(metric, profile.metrics)}")
        metrics = [metric for metric in profile.metrics if metric in metrics]
        row_of = {name: row for row, name in enumerate(profile.names)}
        rows = [row_of[name] for name in names]
        columns = [profile.metrics.index(metric) for metric in metrics]
        return LayerProfile(
            names,
            metrics,
            profile.values[np.ix_(rows, columns)],
            info={name: profile.info[name] for name in names},
            loss=profile.loss,
            backend=profile.backend,
            uncovered=profile.uncovered,
        )


def _chooser(layers: RowSelection) -> tuple[Callable[[str, Mapping[str, Any]], bool], list[str]]:
    """A predicate of name and info, and the names that have to be there."""
    if layers is None:
        return (lambda name, info: True), []
    if isinstance(layers, str | re.Pattern):
        try:
            pattern = re.compile(layers)
        except re.error as error:
            raise ValueError(f"layers={layers!r} is no regular expression: {error}") from error
        return lambda name, info: bool(pattern.fullmatch(name) or pattern.fullmatch(str(info.get("module", name)))), []
    if callable(layers):
        return lambda name, info: bool(layers(name, info)), []
    try:
        names = list(layers)
    except TypeError:
        raise TypeError(
            f"layers is a {type(layers).__name__}; a pattern, an iterable of names, a predicate or None is needed"
        ) from None
    if not names:
        raise ValueError("layers is empty; pass None for every layer")
    return lambda name, info: name in names or info.get("module") in names, names
