"""One logged step, from its first forward to its optimizer: hooks while it lasts, and numbers afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from zest_fast.foundation.interrupts import HeldInterrupts
from zest_fast.foundation.nearest import some
from zest_fast.foundation.removable import Leaving
from zest_fast.kernels.storage import has_storage
from zest_fast.profiling.layers import Layer, Weight
from zest_fast.profiling.metrics import FISHER, GRADIENT, GRADIENT_ABS, OUTPUT, PRODUCT, PRODUCT_ABS, WEIGHT
from zest_fast.profiling.processes.layout import DDP, FSDP2, Layout
from zest_fast.profiling.processes.local import is_distributed, local_part
from zest_fast.profiling.taps import Routes, Taps
from zest_fast.profiling.watched import Watched
from zest_fast.watching.calls import Calls
from zest_fast.watching.gradients import AccumulatedGradients, PartGradients
from zest_fast.watching.histograms import histogram
from zest_fast.watching.loss_scales import LossScales
from zest_fast.watching.processes.gathered_gradients import GatheredPartGradients
from zest_fast.watching.processes.shared_window import SharedWindowStatistics, WholeWeights
from zest_fast.watching.target import Rows, Target
from zest_fast.watching.updates import Updates
from zest_fast.watching.window_statistics import WindowStatistics

OF_WEIGHTS = frozenset({WEIGHT, GRADIENT, GRADIENT_ABS, PRODUCT, PRODUCT_ABS})
"""What is read where weights and gradients lie, without hooks on modules."""
_UNREDUCED = (
    "FSDP2 held gradients back when the step was taken (set_requires_gradient_sync(False), or set_requires_all_reduce "
    "of HSDP, in the last backward pass): shown is what .grad has, without them"
)
_NOT_CLEARED = (
    "gradients of before were not cleared, and are part of those of the step; loss, act and fisher are of its own "
    "backward passes"
)
_COMPILED = "its module is compiled, and compiled code sees no hooks"


@dataclass(frozen=True)
class Asked:
    """What a watch was asked for."""

    metrics: list[str]
    needed: frozenset[str]
    backend: str
    parts: bool
    histograms: bool
    updates: bool
    noise: bool
    samples: int | Callable[[tuple[Any, ...], Mapping[str, Any]], int] | None
    grad_scaler: Any
    writes: bool
    """Whether the model's code may write into an output past autograd (``functions.may_write``)."""


@dataclass
class Part:
    """One backward pass of the step by itself."""

    statistics: WindowStatistics
    loss: Tensor | None
    scale: float = 1.0
    samples: int | None = None
    wrong: dict[Weight, str] = field(default_factory=dict)

    def squares(self, weights: Iterable[Weight]) -> dict[Weight, float]:
        """|g|² of each, without the scale; NaN where it is not known."""
        gradients, unknown = self.statistics.gradients, {*self.wrong, *self.statistics.missed_weights}
        norms = {weight: gradients[weight].gradient.norm if weight in gradients else 0.0 for weight in weights}
        return {weight: math.nan if weight in unknown else (norm / self.scale) ** 2 for weight, norm in norms.items()}


class Window:
    """See above. ``open`` it before the first forward of the step, ``close`` it before the optimizer moves the weights.

    Args:
        target: the model.
        rows: of it.
        asked: what is wanted.
        step: its number.
        routes: what steps before have found out about the model.
        several: weights (by id) whose gradient arrives in several parts; added to.
        skipped: called when a gradient scaler ended the iteration without a step.
        mark: by what the processes that share the model know the step.
        together: whether all of them watch it, where that is asked beforehand (tensor parallelism).
    """

    def __init__(
        self,
        target: Target,
        rows: Rows,
        asked: Asked,
        step: int,
        routes: Routes,
        several: set[int],
        skipped: Callable[[], None],
        mark: tuple[int, ...] = (),
        together: bool = False,
    ) -> None:
        self.target, self.rows, self.asked, self.step, self.mark = target, rows, asked, step, mark
        self._together = together
        self.notes: list[str] = []
        self.backwards = 0
        self.was_skipped = False
        self.parts: list[Part] = []
        self.histograms: dict[Weight, tuple[np.ndarray, np.ndarray]] = {}
        self.weight_histograms: dict[Weight, tuple[np.ndarray, np.ndarray]] = {}
        self.losses: list[tuple[Tensor | None, float]] = []
        self.loss = math.nan
        """The sum of these without scales, of all processes; known once the window is closed."""
        self.squares: list[tuple[int | None, dict[Weight, float]]] = []
        """Samples and |g|² of each part, of all processes; known once the window is closed."""
        self.did_not_meet = False
        """Whether it has the figures of this process only, and what is not whole is gone."""
        self.stale = False
        """Whether the accumulated gradient is not the sum of the parts."""
        self._running = False
        self._handles: list[Any] = []
        trained = [weight for weight in rows.weights if weight.parameter.requires_grad]
        self.updates = Updates(trained, asked.backend) if asked.updates else None
        self.scales = LossScales(asked.grad_scaler, skipped)
        layout = target.layout
        held = target.unreduced if layout is not None and layout.kind == FSDP2 else list
        self.gradients = AccumulatedGradients(
            trained, self._receive, averaged=layout is not None and layout.kind == DDP, held=held
        )
        self._part_gradients = (
            GatheredPartGradients(trained, self._receive, several, layout)
            if layout is not None and layout.kind == FSDP2
            else PartGradients(trained, self._receive, several)
        )
        self.statistics = self._statistics(layout, asked.needed | OF_WEIGHTS, outputs=True)
        self.calls = Calls(self.statistics.counted_outputs, lambda: self._running, asked.samples)
        self.taps = self._taps(routes)

    def _statistics(self, layout: Layout | None, needed: frozenset[str], *, outputs: bool) -> WindowStatistics:
        call = (lambda: self.calls.current) if outputs else (lambda: None)
        if layout is None:
            return WindowStatistics(needed, self.asked.backend, call, self._may_be_written)
        return SharedWindowStatistics(
            needed, self.asked.backend, call, self._may_be_written, layout, self.rows.layers, self._together
        )

    def _statistics_of_a_part(self) -> WindowStatistics:
        """Of gradients before they are averaged: with DDP and FSDP2 those of this process's own micro-batch."""
        layout = self.target.layout
        if isinstance(self._part_gradients, GatheredPartGradients):
            return WholeWeights(OF_WEIGHTS, self.asked.backend, self._part_gradients.gathered)
        if layout is None or layout.splits_the_batch:
            return WindowStatistics(OF_WEIGHTS, self.asked.backend)
        return self._statistics(layout, OF_WEIGHTS, outputs=False)

    def _taps(self, routes: Routes) -> Taps | None:
        """Hooks on modules, only where outputs are asked for: they cost a little, and code that is compiled while they
        are there is compiled again when they are gone."""
        wanted = bool(self.asked.needed & {OUTPUT, FISHER})
        layers = [layer for layer in self.rows.layers if layer not in self.rows.compiled] if wanted else []
        if not layers:
            return None
        watched = Watched(outputs=True, output_gradients=FISHER in self.asked.needed, as_it_is=True)
        return Taps(layers, [], [], self.statistics, routes, watched)

    def _may_be_written(self, y: Tensor) -> bool:
        return self.asked.writes or (has_storage(y) and y.data_ptr() in self.calls.returned)

    def open(self) -> None:
        """Hooks, with Ctrl-C held back until all are there."""
        with HeldInterrupts():
            self.scales.__enter__()
            self._handles.append(Leaving(self.scales))
            self._handles.append(self.gradients)
            if self.asked.parts or self.asked.noise:
                self._handles += self._part_gradients.hook()
            if self.taps is not None or (self.asked.noise and not isinstance(self.asked.samples, int)):
                self._handles += self.calls.hook(self.target.called)
            if self.taps is not None:
                self._handles.append(Leaving(self.taps))
                self.taps.__enter__()

    def discard(self) -> None:
        """Takes every hook away."""
        with HeldInterrupts():
            self._running = False
            while self._handles:
                self._handles.pop().remove()

    def begin_backward(self, roots: Any) -> None:
        """The user's backward pass begins."""
        if not self.backwards:
            self.stale = self.gradients.are_there()
        self.scales.begin_backward()
        roots = [root for root in roots if isinstance(root, Tensor)]
        loss = _copy_of_a_loss(roots[0]) if len(roots) == 1 and roots[0].numel() == 1 else None
        self.losses.append((loss, 1.0))  # the scale is known when it is over
        self.backwards += 1
        self._running = True
        if self.asked.parts or self.asked.noise:
            part = Part(self._statistics_of_a_part(), loss)
            self.parts.append(part)
            self._part_gradients.begin(part.statistics.weight_gradient)
        self.gradients.begin()
        if self.taps is not None:
            self.statistics.begin_pass()
            self.taps.begin_backward(roots)

    def end_backward(self) -> bool:
        """It is over, and all that it accumulated is there. False where it was that of another model, also one that
        went through this one while nothing of it trained (a discriminator in the step of its generator)."""
        self._running = False
        arrived = self.taps is not None and self.taps.end_backward()
        ours = self.gradients.end() or (arrived and any(p.requires_grad for p in self.target.model.parameters()))
        if self.taps is not None and not ours:
            self.statistics.forget_pass()
        elif arrived:
            self.statistics.end_pass()
        if self.parts:
            self._part_gradients.end()
            self.parts[-1].wrong.update(self._part_gradients.wrong)
            self.parts[-1].samples = self.calls.samples_of_part()
        if ours:
            if self.backwards == 1 and self.stale:
                self.notes.append(_NOT_CLEARED)
            scale = self.scales.of_this_backward()
            self.losses[-1] = (self.losses[-1][0], scale)
            if self.parts:
                self.parts[-1].scale = scale
            return True
        self.backwards -= 1
        self.losses.pop()
        if self.parts:
            self.parts.pop()
        return False

    def look_for_cleared(self) -> None:
        """Another backward pass of the step begins: what was cleared since the last one is forgotten."""
        cleared = self.gradients.cleared()
        for weight in cleared:
            self.statistics.forget_gradient(weight)
        if cleared:
            self.stale = True
            self.notes.append(
                f"{_names(cleared)}: the gradient was cleared between two backward passes of the step; loss, act and "
                "fisher are of all of them"
            )

    def look_for_changed(self) -> None:
        """The step is about to be taken with the gradients that are there now."""
        for weight in self.gradients.taken_away():
            self.statistics.missed_weights.setdefault(weight, "it was cleared before the step")
        replaced = self.gradients.replaced()
        if replaced:
            self.notes.append(
                f"{_names(replaced)}: another gradient was put into .grad after the backward pass; shown is the one "
                "that the pass left"
            )

    def close(self) -> None:
        """The step is about to be taken: numbers are fetched, hooks go."""
        if not self.backwards:
            self.gradients.read_what_is_there()
        if self.gradients.are_held_back():
            self.notes.append(_UNREDUCED)
        if self.taps is not None:
            self.taps.tell_what_was_missed()
        self.discard()
        for layer in self.rows.compiled:
            self.statistics.missed(layer, _COMPILED, outputs=True)
        for weight in self.gradients.in_parts:
            self.statistics.missed_weights.setdefault(weight, "its gradient was freed before it was complete")
        for weight in self.rows.weights if self.asked.histograms else []:
            if weight not in self.weight_histograms:
                self.weight_histograms[weight] = histogram(weight.parameter)
        for part in self.parts:
            part.statistics.finish(self.rows.layers)
        self.statistics.finish(self.rows.layers)
        self.loss = _sum([number(*loss) for loss in self.losses])
        self.squares = [(part.samples, part.squares(self.rows.weights)) for part in self.parts]

    def ran_again(self, why: str) -> None:
        """Backward passes of the step were no parts of one gradient; what stands is the last."""
        self.notes.append(f"{why}: gradients are those of the last")
        self.losses = self.losses[-1:]
        self.stale = True

    def found_routes(self) -> Routes:
        """What the next step can do better."""
        if self.taps is None:
            return Routes()
        revised = self.taps.revised() or self.taps.routes
        return Routes(threads=revised.threads)

    def _receive(self, weight: Weight, gradient: Tensor) -> None:
        self.statistics.weight_gradient(weight, gradient)
        if self.asked.histograms:
            self.histograms[weight] = histogram(gradient)
            self.weight_histograms[weight] = histogram(weight.parameter)

    @property
    def layers_that_train(self) -> list[Layer]:
        return [layer for layer in self.rows.layers if self.rows.subject.trainable[layer]]


def number(loss: Tensor | None, scale: float) -> float:
    """A loss without its scale, NaN where it is not known."""
    return math.nan if loss is None else float(loss) / scale


def _sum(values: list[float]) -> float:
    if not values:
        return math.nan
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def _copy_of_a_loss(loss: Any) -> Tensor | None:
    """None where it is a part of a loss, which other processes have the rest of."""
    if is_distributed(loss) and not all(placement.is_replicate() for placement in loss.placements):
        return None
    return local_part(loss.detach()).clone()


def _names(weights: Iterable[Weight]) -> str:
    return some(layer.name for weight in weights for layer in weight.layers)
