"""Hand-made profiles for the tests of what reads them."""

from __future__ import annotations

import numpy as np

from zest_fast.profiling.layer_profile import LayerProfile


def make_profile(
    scores: dict[str, float], *, heads: tuple[str, ...] = (), depths: dict[str, int] | None = None, **kwargs
):
    """A profile of the layers of `scores`, which are its snip; the metric `plain` is the negative of it."""
    values = np.array([[score, -score] for score in scores.values()], dtype=np.float64).reshape(-1, 2)
    info = {
        name: {
            "numel": 6,
            "kind": "linear",
            "depth": (depths or {}).get(name, row),
            "shape": [2, 3],
            "head": name in heads,
        }
        for row, name in enumerate(scores)
    }
    given = {"info": info, "loss": 2.5, "backend": "reference", "uncovered": {"embed.weight": "unprofiled embedding"}}
    return LayerProfile(list(scores), ["snip", "plain"], values, **{**given, **kwargs})
