"""What a delta says of the training that it came from, beside the recipe: for `zest-fast report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from zest_fast.foundation.documents import Keys, Null, Number

FIGURES = ("accuracy", "mse", "pearson", "spearman", "f1_micro", "f1_macro", "token_f1", "entity_f1")
"""What a score may hold beside `loss` and `predictions`, by the task (scores.py)."""
SCORE = Keys(
    {"loss": Null(Number(finite=False)), "predictions": Number(0)}, dict.fromkeys(FIGURES, Null(Number(finite=False)))
)
_MOST_POINTS = 500  # a delta is read by its header first, which should stay small


def training_record(
    planned: Mapping[str, Any] | None, before: Mapping[str, Any] | None, losses: Sequence[float]
) -> dict[str, Any]:
    """Plan and score before training, None where there was none; the curve of the loss, as `thinned` makes it."""
    return {"plan": planned, "before": before, "curve": thinned(losses)}


def thinned(losses: Sequence[float], most: int = _MOST_POINTS) -> dict[str, list[Any]]:
    """At most so many points: `steps`, the last of each stretch of equal length, and `losses`, its mean."""
    stretches = np.array_split(np.asarray(losses, dtype=np.float64), max(1, min(most, len(losses))))
    ends = np.cumsum([len(stretch) for stretch in stretches])
    points = [(int(end), float(stretch.mean())) for end, stretch in zip(ends, stretches, strict=True) if len(stretch)]
    return {"steps": [step for step, _ in points], "losses": [loss for _, loss in points]}
