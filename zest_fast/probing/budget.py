"""How much of a probe a share of a sweep's cost pays for, and what it holds in memory. No torch.

The unit is the forward pass of one sample through what lies above a layer in the middle. A sweep passes the trained
samples of a layer through what lies above it, forward and backward; a probe passes its samples through the whole model,
for all layers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from zest_fast.sweeping.recipe import Recipe

BATCH = 8
"""Samples whose mean gradient is one observation."""
DIRECTIONS = (8, 4, 2, 1)
"""In which a layer may move, from each half of the samples: the most that memory and budget allow."""
PENDING = 2
"""Batches whose gradients are held until all directions are read once for them."""
MEMORY = 1 << 30
"""Bytes of directions and gradients that may be held at a time."""
_WHOLE = 2.0  # passes from the middle that a whole pass is worth
_PASSES = 3.0 + 5.0  # forward and backward for directions; forward and two times backward for slopes and curvature
_TRAINED = 2.5  # forward, and backward of the activations above the layer and of the one weight
_SCORED_BY_A_SWEEP = 1500
_LEAST, _LEAST_FOR_HEAD = 48, 16
_LEAST_PAID = 32  # what the budget must pay for: a model of one layer has little
_ENOUGH = 256


class TooFewSamples(ValueError):
    """Batches that do not hold enough for a probe."""


@dataclass(frozen=True)
class Sizes:
    """What a probe uses."""

    head: int
    """Samples that the head is fitted to."""
    probed: int
    """Samples of both halves."""
    directions: int
    """Of each half."""
    groups: tuple[tuple[int, ...], ...]
    """Which weights get their share of a pass over the samples."""

    @property
    def units(self) -> float:
        return _WHOLE * _PASSES * self.probed * len(self.groups)


def sweep_units() -> float:
    """Of one layer, by the default recipe."""
    recipe = Recipe()
    return len(recipe.seeds) * (_TRAINED * recipe.steps * recipe.batch_size + _SCORED_BY_A_SWEEP)


def bytes_of(numel: int, directions: int) -> int:
    """That a weight takes: directions of both halves, two gradients of each pending batch, one more."""
    return 4 * (2 * directions + 2 * PENDING + 1) * numel


def groups_of(numels: Sequence[int], directions: int) -> tuple[tuple[int, ...], ...]:
    """Which weights are probed in one pass: as many as MEMORY holds, at least one."""
    groups: list[tuple[int, ...]] = []
    held = 0
    for place, numel in enumerate(numels):
        size = bytes_of(numel, directions)
        if not groups or held + size > MEMORY:
            groups.append(())
            held = 0
        groups[-1] += (place,)
        held += size
    return tuple(groups)


def sizes_for(samples: int, budget: float, numels: Sequence[int], *, fits_head: bool) -> Sizes:
    """The most samples that `budget`, a share of a sweep of these weights, allows; where that is few, fewer directions.

    Raises ValueError where budget or samples are too few.
    """
    head = max(_LEAST_FOR_HEAD, samples // 4) if fits_head else 0
    if samples < head + _LEAST:
        raise TooFewSamples(
            f"the batches hold {samples} samples; a probe needs at least {_LEAST + head}: some to "
            f"{'fit the head to, some to ' if fits_head else ''}take gradients of and others to score (256 or more are "
            "better)"
        )
    allowed = budget * sweep_units() * len(numels)
    found = []
    for directions in DIRECTIONS:
        one = Sizes(head, 1, directions, groups_of(numels, directions))
        found.append(replace(one, probed=_in_batches(min(samples - head, int(allowed / one.units)))))
        if found[-1].probed >= min(_ENOUGH, _in_batches(samples - head)):
            return found[-1]
    most = max(found, key=lambda sizes: sizes.probed)
    if most.probed < _LEAST_PAID:
        least = replace(most, probed=_LEAST_PAID).units / (sweep_units() * len(numels))
        raise ValueError(
            f"budget={budget:g} of a sweep is too small for one probe of these {len(numels)} layers; at least "
            f"{least:.2g} is needed"
        )
    return most


def _in_batches(samples: int) -> int:
    """The most of them that make two halves of whole batches."""
    return samples // (2 * BATCH) * 2 * BATCH
