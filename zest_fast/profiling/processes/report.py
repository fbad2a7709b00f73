"""What one process found of its part of a profile, as plain numbers, and how the parts become one: Chan's formula."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from zest_fast.foundation.nearest import some
from zest_fast.kernels.moments import GradientMoments, Moments, SquaredProducts

T = TypeVar("T")

_LOSS_ALIKE = 1e-5  # of one batch, whatever the weights are: what goes into it was summed up for all processes alike
_WEIGHT_ALIKE = 1e-6  # of the same entries, summed in another order
_ALIKE = 1e-3  # of copies: what was computed twice from the same numbers, in any precision but half
_ALIKE_IN_HALF = 5e-2


@dataclass
class Part:
    """Statistics of layers (by their place among the chosen ones), and of weights (by that of their first layer)."""

    outputs: dict[int, Moments] = field(default_factory=dict)
    gradients: dict[int, GradientMoments] = field(default_factory=dict)
    weights: dict[int, Moments] = field(default_factory=dict)
    fisher: dict[int, list[SquaredProducts]] = field(default_factory=dict)


@dataclass
class Report:
    """All that one process knows after its pass."""

    own: Part
    """What no other process has."""
    copies: Part
    """What the first process has as well: compared, not counted."""
    missed_outputs: dict[int, str]
    missed_gradients: dict[int, str]
    overwritten: set[int]
    order: list[str]
    """Names of modules by their first call."""
    uses: dict[str, int]
    with_other_weights: dict[str, int]
    backends: set[str]
    loss: float
    loss_is_half: bool
    """Whether it has less than four bytes."""


def merged(reports: list[Report], names: list[str], half: set[int], share: float, splits_the_batch: bool) -> Report:
    """One report of all processes.

    Args:
        reports: of all processes in the order of their ranks.
        names: of the layers, for errors.
        half: layers whose weight has less than four bytes an entry.
        share: as in ``Layout``.
        splits_the_batch: as in ``Layout``.

    Raises:
        ValueError, NotImplementedError: copies that should be alike are not.
    """
    first = reports[0]
    own = Part(
        outputs=_merged_by_key([r.own.outputs for r in reports], Moments.merge),
        gradients=_merged_by_key([r.own.gradients for r in reports], GradientMoments.merge),
        weights=_merged_by_key([r.own.weights for r in reports], Moments.merge),
    )
    missed = _merged_by_key([r.missed_gradients for r in reports], lambda a, _: a)
    for key in sorted(set().union(*(r.own.fisher for r in reports))):
        uses = [r.own.fisher[key] for r in reports if r.own.fisher.get(key)]
        if len({len(found) for found in uses}) > 1:
            missed.setdefault(key, "processes use the layer in different ways, and their samples cannot be matched")
        else:
            by_use = (functools.reduce(SquaredProducts.merge, same) for same in zip(*uses, strict=True))
            own.fisher[key] = [SquaredProducts(p.total * share**2, p.samples) for p in by_use]
    for key in missed:
        own.fisher.pop(key, None)
    missed_outputs = _merged_by_key([r.missed_outputs for r in reports], lambda a, _: a)
    for key in missed_outputs:
        own.outputs.pop(key, None)
    if splits_the_batch:
        _require_the_same_weights(own, reports, names)
    else:
        _require_alike(reports, names, half)
    return Report(
        own=own,
        copies=Part(),
        missed_outputs=missed_outputs,
        missed_gradients=missed,
        overwritten=set().union(*(r.overwritten for r in reports)),
        order=list(dict.fromkeys(itertools.chain.from_iterable(r.order for r in reports))),
        uses=_merged_by_key([r.uses for r in reports], max),
        with_other_weights=_merged_by_key([r.with_other_weights for r in reports], max),
        backends=set().union(*(r.backends for r in reports)),
        loss=sum(r.loss for r in reports) * share if splits_the_batch else first.loss,
        loss_is_half=first.loss_is_half,
    )


def _merged_by_key(parts: Iterable[dict[int, T]] | Iterable[dict[str, T]], merge: Callable[[T, T], T]) -> dict:  # type: ignore[type-arg]
    found: dict[int | str, T] = {}
    for part in parts:
        for key, value in part.items():
            found[key] = merge(found[key], value) if key in found else value
    return found


def _require_the_same_weights(own: Part, reports: list[Report], names: list[str]) -> None:
    """Of HSDP, which takes replicas for copies and does not make them so: models of different seeds would pass."""
    copies = _merged_by_key([r.copies.gradients for r in reports], GradientMoments.merge)
    for key, copy in copies.items():
        counted: GradientMoments = own.gradients[key]
        alike = _close(copy.weight_mean, counted.weight_mean, counted.weight_std, _WEIGHT_ALIKE) and _close(
            copy.weight_std, counted.weight_std, counted.weight_std, _WEIGHT_ALIKE
        )
        if not alike:
            raise ValueError(
                f"the weight of layer {names[key]!r} differs between the replicas of HSDP, which are taken for copies: "
                "load the same weights everywhere, or make the model from the same seed, before fully_shard"
            )


def _require_alike(reports: list[Report], names: list[str], half: set[int]) -> None:
    """Of tensor parallelism: every process has the same batch, and computes the same wherever a layer is not split."""
    first, wrong = reports[0], []
    tolerance = _ALIKE_IN_HALF if first.loss_is_half else _LOSS_ALIKE
    if any(not _close(r.loss, first.loss, abs(first.loss), tolerance) for r in reports):
        raise ValueError(
            "the loss differs between processes of one tensor-parallel model "
            f"({', '.join(f'{r.loss:.7g}' for r in reports)}): all of them need the same batch, and the same random "
            "state (dropout)"
        )
    for report in reports[1:]:
        for key, copy in report.copies.outputs.items():
            if not _alike(copy, first.own.outputs.get(key), key in half):
                wrong.append(f"{names[key]} (its output)")
        for key, gradient in report.copies.gradients.items():
            counted = first.own.gradients.get(key)
            if not _alike(gradient.gradient, counted.gradient if counted else None, key in half):
                wrong.append(f"{names[key]} (its gradient)")
        wrong += [
            f"{names[key]} (its weight)"
            for key, w in report.copies.weights.items()
            if not _alike(w, first.own.weights.get(key), False)
        ]
    if wrong:
        raise NotImplementedError(
            f"layers that every process holds whole differ between processes: {some(wrong)}; each then sees a part "
            "of their inputs that nothing tells (sequence parallelism around a plain module?): parallelise these "
            "modules as well, or leave them out with layers="
        )


def _alike(a: Moments, b: Moments | None, half: bool) -> bool:
    if b is None or a.count != b.count or a.nonfinite != b.nonfinite:
        return False
    tolerance = _ALIKE_IN_HALF if half else _ALIKE
    return (
        a.nonfinite > 0
        or a.count == 0
        or (_close(a.abs_mean, b.abs_mean, b.abs_mean, tolerance) and _close(a.norm, b.norm, b.norm, tolerance))
    )


def _close(a: float, b: float, scale: float, tolerance: float) -> bool:
    return a == b or abs(a - b) <= tolerance * scale or (math.isnan(a) and math.isnan(b))
