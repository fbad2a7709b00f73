"""How much of a probe a share of a sweep's cost pays for. No torch.

The unit is the forward pass of one sample through what lies above a layer; what lies below is computed once in both, so
that a share of these is a share of the time. A trained sample counts two and a half: forward, backward of the
activations above the layer and of the one weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from zest_fast.sweeping.recipe import Recipe

STEP_SIZES = (0.3, 1.0, 3.0, 10.0)
"""Of the learning rate of the default recipe: from well below one step of Adam to most of a sweep's steps in one.
Beyond, what a layer gains says little of what training it gains (30 was tried)."""
BATCH = 16
"""Samples whose gradients are averaged before they are compared: Adam's second moment is of such batches."""
_GRADIENT = 3.0  # forward and backward of a sample, all layers at once
_WHOLE = 2.0  # passes from the middle that a whole pass is worth
_TRAINED = 2.5
_SCORED_BY_A_SWEEP = 1500
_SCORED, _LEAST = 512, 16


class TooFewSamples(ValueError):
    """Batches that do not hold enough for a probe."""


@dataclass(frozen=True)
class Sizes:
    head: int
    """Samples that the head is fitted to."""
    directions: int
    """Samples whose gradients give the directions."""
    scored: int

    def units(self, layers: int, passes: int) -> float:
        """Of a probe, at most. passes: how often the gradients are computed."""
        return _WHOLE * _GRADIENT * self.directions * passes + len(STEP_SIZES) * self.scored * layers


def sweep_units() -> float:
    """Of one layer, by the default recipe."""
    recipe = Recipe()
    return len(recipe.seeds) * (_TRAINED * recipe.steps * recipe.batch_size + _SCORED_BY_A_SWEEP)


def sizes_for(samples: int, budget: float, layers: int, *, passes: int, fits_head: bool) -> Sizes:
    """The largest sizes that `budget`, a share of a sweep, and the samples allow.

    passes: how often the gradients are computed. Raises ValueError where budget or samples are too few.
    """
    allowed = budget * sweep_units() * layers
    least = Sizes(0, _LEAST, _LEAST).units(layers, passes)
    if allowed < least:
        raise ValueError(
            f"budget={budget:g} of a sweep is too small for one probe of each of the {layers} layers; at least "
            f"{least / (sweep_units() * layers):.2g} is needed"
        )
    parts = 4 if fits_head else 3
    if samples < parts * _LEAST:
        raise TooFewSamples(
            f"the batches hold {samples} samples; a probe needs at least {parts * _LEAST}: some to "
            f"{'fit the head to, some to ' if fits_head else ''}take gradients of and others to score (256 or more are "
            "better)"
        )
    head = samples // 4 if fits_head else 0
    scored = samples // 4
    directions = samples - head - scored
    # Half of the budget at most for directions, which cost little but where memory wants several passes.
    directions = min(directions, max(_LEAST, int(0.5 * allowed / (_WHOLE * _GRADIENT * passes))))
    left = allowed - Sizes(head, directions, 0).units(layers, passes)
    affordable = int(left / (len(STEP_SIZES) * layers))
    return Sizes(head, directions, min(_SCORED, scored, affordable))
