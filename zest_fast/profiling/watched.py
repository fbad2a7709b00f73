"""From the statistics that metrics need to what the taps watch: the one place, for the pass and for its plan alike."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from zest_fast.profiling.metrics import BACKWARD, FISHER, OUTPUT


@dataclass(frozen=True)
class Watched:
    """What of each layer the taps hand to their observer."""

    outputs: bool = False
    """Y of every use, in forward."""
    gradients: bool = False
    """dW, for which the weights have to require a gradient."""
    output_gradients: bool = False
    """Y and G of every use, in backward."""
    as_it_is: bool = False
    """Whether the passes are the user's own (``watching/``): nothing takes the place of an output, nothing is added to
    the graph, and no pass is run again; what is out of sight so is told to the observer as missed."""


def watched_for(needed: frozenset[str]) -> Watched:
    """What has to be watched for these statistics (``metrics.statistics_needed``)."""
    return Watched(
        outputs=bool(needed & {OUTPUT, FISHER}),  # for fisher: to see whether Y is still Y in backward
        # For fisher alone no weight takes part, so that no dW is formed: the taps anchor the graph themselves.
        gradients=bool(needed & (BACKWARD - {FISHER})),
        output_gradients=FISHER in needed,
    )


_beside = threading.local()


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Around passes on this thread that are none of the user's, though they run within a call of the user's model (by
    which a cache is held against it): taps see nothing of them."""
    before, _beside.runs = is_unwatched(), True
    try:
        yield
    finally:
        _beside.runs = before


def is_unwatched() -> bool:
    return getattr(_beside, "runs", False)
