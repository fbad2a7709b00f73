"""Layers that are dead, explode or are not finite, in words."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping

from zest_fast.foundation.nearest import some
from zest_fast.foundation.text_table import printable

DEAD_AFTER = 3
"""Logged steps in a row in which the gradient of a layer is 0 to the last entry."""
EXPLODES_AT = 20.0
"""Times the median of a layer's gradient norms at the logged steps before."""
MEDIAN_OF = 10
"""How many of these the median is taken of, at most."""
MEDIAN_FROM = 5
"""And at least: before, nothing is called exploding."""


class History:
    """Gradient norms of the last logged steps by layer."""

    def __init__(self) -> None:
        self._norms: dict[str, deque[float]] = {}

    def notes(self, norms: Mapping[str, float], nonfinite: Mapping[str, int]) -> list[str]:
        """What is to be said of this step.

        norms: of the gradients, those of layers that none reached left out; NaN where one is not finite, which is no
        part of the history. nonfinite: layer -> how many entries of its weight, gradient and output are not finite.
        """
        notes = [f"layer {printable(n)!r}: {count} entries of its weight, gradient or output are not finite"
                 for n, count in nonfinite.items() if count][:_MOST]  # fmt: skip
        notes += _rest([n for n, count in nonfinite.items() if count], "have entries that are not finite")
        dead, exploding = [], []
        for name, norm in norms.items():
            before = self._norms.setdefault(name, deque(maxlen=MEDIAN_OF))
            if not math.isfinite(norm):
                continue
            median = statistics.median(before) if len(before) >= MEDIAN_FROM else 0.0
            if median > 0 and norm > EXPLODES_AT * median:
                exploding.append((name, norm / median, len(before)))
            before.append(norm)
            if len(before) >= DEAD_AFTER and not any(list(before)[-DEAD_AFTER:]):
                dead.append(name)
        notes += [
            f"layer {printable(name)!r} explodes: its gradient norm is {times:.0f} times the median of its last {count}"
            for name, times, count in exploding[:_MOST]
        ]
        notes += _rest([name for name, *_ in exploding], "explode as well")
        notes += [
            f"layer {printable(name)!r} is dead: its gradient has been 0 for the last {self._zeros(name)} logged steps"
            for name in dead[:_MOST]
        ]
        return notes + _rest(dead, "are dead as well")

    def _zeros(self, name: str) -> int:
        norms = list(self._norms[name])
        return next((i for i, norm in enumerate(reversed(norms)) if norm), len(norms))


_MOST = 5  # layers that get a sentence of their own


def _rest(names: Iterable[str], what: str) -> list[str]:
    names = list(names)[_MOST:]
    return [f"{len(names)} more layers {what}: {some(names)}"] if names else []
