"""How much of a probe a share of a sweep's cost pays for. No torch.

The unit is the forward pass of one sample through what lies above a layer; what lies below is computed once in both, so
that a share of these is a share of the time. A trained sample counts two and a half: forward, backward of the
activations above the layer and of the one weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from zest_fast.sweeping.recipe import Recipe

STEPS = 8
LAYER_LR_FACTORS = (1e-3, 1e-2)
"""Of RMS(W). What the sweeps' usual rate, the second, gains after so few steps says much of some models, and of others,
where its first steps break what later ones mend, nothing; at a tenth of it it is the other way round."""
_TRAINED = 2.5
_BATCH, _LEAST_BATCH = 16, 4
_SCORED, _LEAST_SCORED = 512, 16  # beyond, other training samples tell more than more scored ones
_SHARE_OF_TRAINING = 0.6  # of what there is, where it does not reach for whole batches
_SCORED_BY_A_SWEEP = 1500


@dataclass(frozen=True)
class Sizes:
    batch: int
    trained: int
    """Samples that a layer is trained on."""
    scored: int
    head: int
    """Samples that the head is fitted to."""

    @property
    def units(self) -> float:
        """Of one trial."""
        return _TRAINED * STEPS * self.batch + self.scored

    def round_units(self, layers: int) -> float:
        """Of a round over so many layers, with the head alone."""
        return (len(LAYER_LR_FACTORS) * layers + 1) * self.units


def sweep_units() -> float:
    """Of one layer, by the default recipe."""
    recipe = Recipe()
    return len(recipe.seeds) * (_TRAINED * recipe.steps * recipe.batch_size + _SCORED_BY_A_SWEEP)


def sizes_for(samples: int, budget: float, layers: int, *, fits_head: bool) -> Sizes:
    """The largest sizes that `budget`, a share of a sweep, and the samples allow.

    Raises ValueError where either is too small for one probe of each layer.
    """
    least = _TRAINED * STEPS * _LEAST_BATCH + _LEAST_SCORED
    share = sweep_units() * layers / (len(LAYER_LR_FACTORS) * layers + 1)  # the head alone is one more trial
    if budget * share < least:
        raise ValueError(
            f"budget={budget:g} of a sweep is too small for one probe of each of the {layers} layers; at least "
            f"{least / share:.2g} is needed"
        )
    parts = 3 if fits_head else 2
    if samples < parts * _LEAST_SCORED:
        raise ValueError(
            f"the batches hold {samples} samples; a probe needs at least {parts * _LEAST_SCORED}: some to "
            f"{'fit the head to, some to ' if fits_head else ''}train on and others to score (256 or more are better)"
        )
    head = round(0.35 * samples) if fits_head else 0
    affordable = int(_SHARE_OF_TRAINING * budget * share / (_TRAINED * STEPS))
    batch = max(_LEAST_BATCH, min(_BATCH, affordable, round(0.35 * samples)))
    trained = min(STEPS * batch, round(0.25 * samples))
    batch = min(batch, trained)
    scored = min(_SCORED, samples - head - trained, int(budget * share - _TRAINED * STEPS * batch))
    return Sizes(batch, trained, scored, head)
