"""What a watch asks of the processes that share its model: one exchange at each logged step, when it is logged.

Gradients of DDP are those of all processes already, and outputs those of a part of the batch; under FSDP2 and tensor
parallelism each process has a part of everything. Each reduces what lies on it, and the parts become one table by
Chan's formula. No collective runs for it, with one exception: outputs and gradients that tensor parallelism leaves as
parts of a sum. There the processes meet at the beginning of a logged step as well, so that none is alone in a sum.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zest_fast.foundation.nearest import some
from zest_fast.kernels.moments import GradientMoments
from zest_fast.profiling.layers import Weight
from zest_fast.profiling.processes.layout import DDP, TENSOR_PARALLEL, Layout
from zest_fast.profiling.processes.report import Part as PartOfAReport
from zest_fast.profiling.processes.report import Report, merged
from zest_fast.watching.processes.shared_window import SharedWindowStatistics
from zest_fast.watching.processes.step_meeting import Apart, Mark, meeting_of_a_watch

if TYPE_CHECKING:
    from zest_fast.watching.window import Window

DID_NOT_MEET = "the processes did not meet at this step"
_NOT_ON_ALL = "it was not read on all processes"
_ALIKE = 1e-5  # of one gradient, reduced to statistics on several machines
_LOCAL = (
    "it differs between processes: the gradients of this step were not averaged (no_sync() in the last micro-batch, "
    "or a backward pass around DistributedDataParallel)"
)


@dataclass
class PartSquares:
    """Of one micro-batch on one process: |g|² of each weight, NaN where it is not known; of how many samples."""

    samples: int | None
    squares: dict[int, float]


@dataclass
class _PartReport:
    """One backward pass: whole gradients of this process's batch, or its part of those of the whole batch."""

    samples: int | None
    scale: float
    gradients: dict[int, GradientMoments]
    squares: dict[int, float]
    wrong: set[int]


@dataclass
class _StepReport:
    """What one process knows of a logged step, and after the merge what all do. Layers and weights by their place."""

    watched: tuple[Any, ...]
    """What has to be the same everywhere."""
    statistics: Report
    missed_weights: dict[int, str]
    updates: dict[int, tuple[float, float]]
    updated: set[int]
    """Weights of which the step was seen, also where this process has a copy only."""
    parts: list[_PartReport]
    skipped: bool
    squares: list[PartSquares] = field(default_factory=list)
    """After the merge: of every process's micro-batches."""


class Processes:
    """The processes of one watch.

    Args:
        layout: how the model lies on them.
        watched: what all of them have to be asked for.
    """

    def __init__(self, layout: Layout, watched: tuple[Any, ...]) -> None:
        self._layout = layout
        self._watched = watched
        self._logs = meeting_of_a_watch(layout.ranks)
        self._opens = meeting_of_a_watch(layout.ranks) if layout.kind == TENSOR_PARALLEL else None
        self._last: Mark = ()
        self._has_warned = False

    def begin(self) -> None:
        """Before the first step."""
        for meeting in self._meetings:
            meeting.begin()

    def leave(self, why: str) -> None:
        """The watch ends on this process."""
        for meeting in self._meetings:
            meeting.leave(why)

    def hurry(self) -> None:
        """The training of this process has failed: what is still to be logged waits for nobody for long."""
        for meeting in self._meetings:
            meeting.hurry()

    @property
    def _meetings(self) -> list[Any]:
        return [self._logs, *([self._opens] if self._opens is not None else [])]

    def open(self, step: int, needed: frozenset[str]) -> tuple[Mark, bool]:
        """A logged step begins: by what the processes will know it, and whether all watch it (tensor parallelism)."""
        again = self._last[1] + 1 if self._last[:1] == (step,) else 0
        self._last = (step, again)
        if self._opens is None:
            return self._last, False
        try:
            self._opens.exchange(self._last, sorted(needed), _require_the_same_kinds)
        except Apart as apart:
            self._warn(step, str(apart))
            return self._last, False
        return self._last, True

    def bring_together(self, window: Window) -> None:
        """A closed window gets the figures of all processes; where these do not come, what is not whole becomes NaN."""
        statistics = window.statistics
        assert isinstance(statistics, SharedWindowStatistics)
        layers = list(window.rows.layers)
        half = {i for i, layer in enumerate(layers) if layer.weight.parameter.dtype.itemsize < 4}
        names = [layer.name for layer in layers]
        report = self._report(window, statistics)
        try:
            whole = self._logs.exchange(
                window.mark, report, lambda reports: _merged(reports, names, half, self._layout)
            )
        except Apart as apart:
            self._warn(window.step, str(apart))
            self._keep_what_is_whole(window, statistics, str(apart))
            return
        self._take(window, statistics, whole)

    def _warn(self, step: int, why: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"zest_fast.watch: the processes did not meet at step {step} ({why}); training goes on, what one "
                "process cannot know alone is NaN there, and the notes of each step say so",
                RuntimeWarning,
                stacklevel=2,
            )

    def _report(self, window: Window, statistics: SharedWindowStatistics) -> _StepReport:
        names: dict[Any, str] = {}
        for name, module in window.rows.subject.modules.items():
            names.setdefault(module, name)
        place = _places(window)
        updates = window.updates.norms if window.updates is not None else {}
        losses = [loss for loss, _ in window.losses if loss is not None]
        own = [weight for weight in place if not statistics.is_a_copy(weight)]
        return _StepReport(
            watched=(
                *self._watched,
                [(layer.name, tuple(layer.weight.parameter.shape)) for layer in window.rows.layers],
                str(window.scales.of_the_gradient),
            ),
            statistics=statistics.report(
                window.taps, names, window.loss, any(loss.dtype.itemsize < 4 for loss in losses)
            ),
            missed_weights={place[weight]: why for weight, why in statistics.missed_weights.items() if weight in place},
            updates={place[weight]: updates[weight] for weight in own if weight in updates},
            updated={place[weight] for weight in updates if weight in place},
            parts=[
                _PartReport(
                    part.samples,
                    part.scale,
                    {place[w]: found for w, found in part.statistics.gradients.items() if w in own}
                    if self._is_split
                    else {},
                    {place[weight]: square for weight, square in part.squares(place).items()},
                    {place[weight] for weight in (*part.wrong, *part.statistics.missed_weights) if weight in place},
                )
                for part in window.parts
            ],
            skipped=window.was_skipped,
        )

    def _take(self, window: Window, statistics: SharedWindowStatistics, whole: _StepReport) -> None:
        statistics.take(whole.statistics, window.taps, window.rows.subject.modules)
        weights = {at: weight for weight, at in _places(window).items()}
        statistics.missed_weights = {weights[at]: why for at, why in whole.missed_weights.items()}
        for weight in weights.values():
            _drop_what_is_not_whole(statistics, weight)
        if window.updates is not None:
            window.updates.norms = {weights[at]: norms for at, norms in whole.updates.items()}
        window.was_skipped = whole.skipped
        window.loss = whole.statistics.loss
        window.squares = [
            (part.samples, {weights[at]: square for at, square in part.squares.items()}) for part in whole.squares
        ]
        for part, of_all in zip(window.parts, whole.parts, strict=True) if self._is_split else ():
            part.statistics.gradients = {weights[at]: found for at, found in of_all.gradients.items()}
            part.wrong.update({weights[at]: _NOT_ON_ALL for at in of_all.wrong})

    @property
    def _is_split(self) -> bool:
        return self._layout.kind == TENSOR_PARALLEL

    def _keep_what_is_whole(self, window: Window, statistics: SharedWindowStatistics, why: str) -> None:
        """Of DDP gradients and weights, which every process has; else nothing."""
        for layer in window.rows.layers:
            statistics.outputs.pop(layer, None)
            statistics.fisher.pop(layer, None)
            statistics.missed(layer, DID_NOT_MEET, outputs=True)
        if self._layout.kind != DDP:
            for weight in window.rows.weights:
                statistics.gradients.pop(weight, None)
                statistics.weights.pop(weight, None)
                statistics.missed_weights[weight] = DID_NOT_MEET
            if window.updates is not None:
                window.updates.norms.clear()
        if self._is_split:
            window.parts.clear()
        window.squares.clear()
        window.loss = math.nan
        window.did_not_meet = True
        kept = (
            "weights and gradients are those of all processes as ever, all else" if self._layout.kind == DDP else "all"
        )
        window.notes.append(f"{DID_NOT_MEET}, and {kept} is NaN: {why}")


def _places(window: Window) -> dict[Weight, int]:
    """Weights by the place of their first layer among the rows, as in a Report."""
    found: dict[Weight, int] = {}
    for at, layer in enumerate(window.rows.layers):
        found.setdefault(layer.weight, at)
    return found


def _drop_what_is_not_whole(statistics: SharedWindowStatistics, weight: Weight) -> None:
    """A part of a weight, where a process has not read its own, must not pass for all of it."""
    count = weight.parameter.numel()
    gradients, values = statistics.gradients.get(weight), statistics.weights.get(weight)
    if weight in statistics.missed_weights or (gradients is not None and gradients.gradient.count != count):
        statistics.gradients.pop(weight, None)
        statistics.missed_weights.setdefault(weight, _NOT_ON_ALL)
    if values is not None and values.count != count:
        del statistics.weights[weight]
        statistics.missed_weights.setdefault(weight, _NOT_ON_ALL)


def _require_the_same_kinds(messages: list[list[str]]) -> None:
    if any(message != messages[0] for message in messages):
        raise ValueError("they were asked for different metrics")


def _merged(reports: list[_StepReport], names: list[str], half: set[int], layout: Layout) -> _StepReport:
    """One report of all processes; raises ValueError and NotImplementedError where they do not fit together."""
    _require_the_same(reports, layout)
    missed = dict(kv for r in reports for kv in r.missed_weights.items())
    if layout.kind == DDP:
        missed = _gradients_that_differ([r.statistics for r in reports]) | missed
        for r in reports[1:]:
            r.statistics.copies = PartOfAReport()
    _require_gradients_on_all([r.statistics for r in reports])
    _forget_copies_of_nothing([r.statistics for r in reports])
    whole = merged([r.statistics for r in reports], names, half, layout.share, layout.splits_the_batch)
    updated = set.intersection(*(r.updated for r in reports))
    updates = {
        at: (math.hypot(*(r.updates[at][0] for r in reports if at in r.updates)),
             math.hypot(*(r.updates[at][1] for r in reports if at in r.updates)))
        for at in sorted(updated)
    }  # fmt: skip
    parts, squares = _merged_parts(reports, layout)
    for part in parts:
        for at in part.gradients:
            if part.gradients[at].gradient.count != math.prod(reports[0].watched[-2][at][1]):
                part.wrong.add(at)
                part.squares[at] = math.nan
    return _StepReport(
        watched=reports[0].watched,
        statistics=whole,
        missed_weights=missed,
        updates=updates,
        updated=updated,
        parts=parts,
        skipped=any(r.skipped for r in reports),
        squares=squares,
    )


def _require_the_same(reports: list[_StepReport], layout: Layout) -> None:
    for rank, report in zip(layout.ranks, reports, strict=True):
        *asked, rows, scale = report.watched
        *first_asked, first_rows, first_scale = reports[0].watched
        if asked != first_asked:
            raise ValueError(f"process {rank} watches otherwise than process {layout.ranks[0]}: {asked}, {first_asked}")
        if rows != first_rows:
            odd = sorted({name for name, _ in set(rows) ^ set(first_rows)})
            raise ValueError(f"process {rank} watches other layers than process {layout.ranks[0]}: {some(odd)}")
        if scale != first_scale:
            raise ValueError(f"gradients carry different loss scales: {scale} on process {rank}, {first_scale} before")


def _gradients_that_differ(reports: list[Report]) -> dict[int, str]:
    """Of DDP, whose gradients are copies: where they are none, what a process has is its own."""
    odd = {}
    first = reports[0].own.gradients
    for report in reports[1:]:
        copies = report.copies.gradients
        for at in first.keys() | copies.keys():
            a, b = first.get(at), copies.get(at)
            if a is None or b is None:
                odd[at] = "a gradient reached it on some processes only"
            elif not _are_alike((a.gradient.norm, a.gradient.abs_mean), (b.gradient.norm, b.gradient.abs_mean)):
                odd[at] = _LOCAL
            elif not _are_alike((a.weight_norm, a.weight_std), (b.weight_norm, b.weight_std)):
                odd[at] = "its weight differs between processes, and DistributedDataParallel takes them for copies"
    return odd


def _are_alike(found: tuple[float, ...], others: tuple[float, ...]) -> bool:
    pairs = zip(found, others, strict=True)
    return all(a == b or abs(a - b) <= _ALIKE * abs(a) or (math.isnan(a) and math.isnan(b)) for a, b in pairs)


def _require_gradients_on_all(reports: list[Report]) -> None:
    """fisher: a process that called a layer and got no gradient has samples that count, and nothing says how many."""
    called = {at for r in reports for at in r.own.fisher}
    for at in called:
        found = [bool(r.own.fisher[at]) for r in reports if at in r.own.fisher]
        if any(found) and not all(found):
            reports[0].missed_gradients.setdefault(at, "no gradient reached its output on some of the processes")


def _forget_copies_of_nothing(reports: list[Report]) -> None:
    """Copies are compared with what the first process has; what it lacks is missing for all."""
    for report in reports:
        for at in report.copies.gradients.keys() - reports[0].own.gradients.keys():
            del report.copies.gradients[at]


def _merged_parts(reports: list[_StepReport], layout: Layout) -> tuple[list[_PartReport], list[PartSquares]]:
    """Micro-batches of the whole batch (tensor parallelism), and of every process for the noise scale."""
    if layout.kind != TENSOR_PARALLEL:
        every = [part for report in reports for part in report.parts]
        return [], [PartSquares(p.samples, _with_nan(p.squares, p.wrong)) for p in every]
    if len({len(report.parts) for report in reports}) > 1:
        raise ValueError("the processes have seen different numbers of backward passes")
    whole = []
    for same in zip(*(report.parts for report in reports), strict=True):
        gradients: dict[int, GradientMoments] = {}
        for part in same:
            for at, found in part.gradients.items():
                gradients[at] = gradients[at].merge(found) if at in gradients else found
        wrong = set().union(*(part.wrong for part in same))
        squares = {at: (found.gradient.norm / same[0].scale) ** 2 for at, found in gradients.items()}
        whole.append(_PartReport(same[0].samples, same[0].scale, gradients, _with_nan(squares, wrong), wrong))
    return whole, [PartSquares(part.samples, part.squares) for part in whole]


def _with_nan(squares: dict[int, float], wrong: set[int]) -> dict[int, float]:
    return squares | dict.fromkeys(wrong, math.nan)
