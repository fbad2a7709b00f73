"""Steps of a watched run, made by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from zest_fast.profiling.layer_profile import LayerProfile
from zest_fast.watching.watched_step import WatchedStep

LAYERS = ("blocks.0.q", "blocks.0.mlp", "blocks.1.q", "blocks.1.mlp", "head")
METRICS = ("snip", "grad_norm", "rgn")


def make_step(
    step: int,
    *,
    layers: Sequence[str] = LAYERS,
    metrics: Sequence[str] = METRICS,
    values: np.ndarray | None = None,
    seconds: float | None = None,
    overflow: bool = False,
    notes: Sequence[str] = (),
    loss: float | None = None,
    shape: Sequence[int] = (2, 3),
    full: bool = False,
) -> WatchedStep:
    """values: drawn by the number of the step where there are none. full: parts, totals and histograms as well."""
    chance = np.random.default_rng(step)
    if values is None:
        values = chance.lognormal(size=(len(layers), len(metrics)))
        if overflow:
            values[:, 1:] = [math.nan, math.inf][: len(metrics) - 1]
    loss = 1 / (step + 1) if loss is None else loss
    profile = make_rows(layers, metrics, values, loss=loss, overflow=overflow, shape=shape)
    seconds = step / 10 if seconds is None else seconds
    if not full:
        return WatchedStep(step, profile, seconds, overflow, tuple(notes))
    return WatchedStep(
        step,
        profile,
        seconds,
        overflow,
        tuple(notes),
        parts=(profile, make_rows(layers[:2], metrics, values[:2] / 2, loss=math.nan)),
        totals={"grad_norm": 0.1 + step, "noise_scale": math.inf},
        histograms={layers[0]: {"weight": (np.array([1, 0, 5]), np.array([-1.0, 0.1, 0.2, 3.0]))}},
    )


def make_rows(
    layers: Sequence[str],
    metrics: Sequence[str],
    values: np.ndarray,
    *,
    loss: float,
    overflow: bool = False,
    shape: Sequence[int] = (2, 3),
) -> LayerProfile:
    info = {
        name: {
            "numel": 6,
            "kind": "linear",
            "depth": depth,
            "shape": list(shape),
            "head": name == "head",
            "module": name.removesuffix(".weight"),
            "nonfinite": 6 if overflow else 0,
        }
        for depth, name in enumerate(layers)
    }
    uncovered = {"embed.weight": "an embedding"}
    return LayerProfile(list(layers), list(metrics), values, info=info, loss=loss, backend="cpu", uncovered=uncovered)


def assert_same_profile(found: LayerProfile, made: LayerProfile) -> None:
    assert found.names == made.names and found.metrics == made.metrics
    assert found.values.tobytes() == made.values.tobytes()  # to the bit, NaN and -0.0 as well
    assert found.info == made.info and found.uncovered == made.uncovered and found.backend == made.backend
    assert found.loss == made.loss or (math.isnan(found.loss) and math.isnan(made.loss))


def assert_same_step(found: WatchedStep, made: WatchedStep) -> None:
    assert (found.step, found.seconds, found.overflow, found.notes) == (
        made.step,
        made.seconds,
        made.overflow,
        made.notes,
    )
    assert_same_profile(found.profile, made.profile)
    assert len(found.parts) == len(made.parts)
    for one, other in zip(found.parts, made.parts, strict=True):
        assert_same_profile(one, other)
    np.testing.assert_equal(dict(found.totals), dict(made.totals))
    assert found.histograms.keys() == made.histograms.keys()
    for layer, kinds in made.histograms.items():
        for kind, (counts, edges) in kinds.items():
            np.testing.assert_array_equal(found.histograms[layer][kind][0], counts, strict=True)
            np.testing.assert_array_equal(found.histograms[layer][kind][1], edges, strict=True)
