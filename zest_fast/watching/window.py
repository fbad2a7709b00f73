"""One logged step, from its first forward to its optimizer: hooks while it lasts, and numbers afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from zest_fast.foundation.interrupts import HeldInterrupts
from zest_fast.foundation.nearest import some
from zest_fast.kernels.storage import has_storage
from zest_fast.profiling.layers import Layer, Weight
from zest_fast.profiling.metrics import FISHER, GRADIENT, GRADIENT_ABS, OUTPUT, PRODUCT, PRODUCT_ABS, WEIGHT
from zest_fast.profiling.taps import Routes, Taps
from zest_fast.profiling.watched import Watched
from zest_fast.watching.calls import Calls
from zest_fast.watching.gradients import AccumulatedGradients, PartGradients
from zest_fast.watching.histograms import histogram
from zest_fast.watching.loss_scales import LossScales
from zest_fast.watching.target import Rows, Target
from zest_fast.watching.updates import Updates
from zest_fast.watching.window_statistics import WindowStatistics

OF_WEIGHTS = frozenset({WEIGHT, GRADIENT, GRADIENT_ABS, PRODUCT, PRODUCT_ABS})
"""What is read where weights and gradients lie, without hooks on modules."""
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
    ) -> None:
        self.target, self.rows, self.asked, self.step = target, rows, asked, step
        self.notes: list[str] = []
        self.backwards = 0
        self.was_skipped = False
        self.parts: list[Part] = []
        self.histograms: dict[Weight, tuple[np.ndarray, np.ndarray]] = {}
        self.weight_histograms: dict[Weight, tuple[np.ndarray, np.ndarray]] = {}
        self.losses: list[tuple[Tensor | None, float]] = []
        self.stale = False
        """Whether the accumulated gradient is not the sum of the parts."""
        self._running = False
        self._handles: list[Any] = []
        trained = [weight for weight in rows.weights if weight.parameter.requires_grad]
        self.updates = Updates(trained, asked.backend) if asked.updates else None
        self.scales = LossScales(asked.grad_scaler, skipped)
        self.gradients = AccumulatedGradients(trained, self._receive, averaged=target.processes > 1)
        self._part_gradients = PartGradients(trained, self._receive, several)
        self.statistics = WindowStatistics(
            asked.needed | OF_WEIGHTS, asked.backend, lambda: self.calls.current, self._may_be_written
        )
        self.calls = Calls(self.statistics.counted_outputs, lambda: self._running, asked.samples)
        self.taps = self._taps(routes)

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
            self._handles.append(_Exit(self.scales))
            self._handles.append(self.gradients)
            if self.asked.parts or self.asked.noise:
                self._handles += self._part_gradients.hook()
            if self.taps is not None or (self.asked.noise and not isinstance(self.asked.samples, int)):
                self._handles += self.calls.hook(self.target.called)
            if self.taps is not None:
                self._handles.append(_Exit(self.taps))
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
        loss = roots[0].detach().clone() if len(roots) == 1 and roots[0].numel() == 1 else None
        self.losses.append((loss, 1.0))  # the scale is known when it is over
        self.backwards += 1
        self._running = True
        if self.asked.parts or self.asked.noise:
            part = Part(WindowStatistics(OF_WEIGHTS, self.asked.backend), loss)
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


def _names(weights: Iterable[Weight]) -> str:
    return some(layer.name for weight in weights for layer in weight.layers)


class _Exit:
    """A context that was entered, as a handle among others."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def remove(self) -> None:
        self._context.__exit__(None, None, None)
