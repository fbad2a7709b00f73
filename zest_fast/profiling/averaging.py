"""Profiles of several batches -> one of means, with how far the batches lie apart. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from zest_fast.profiling.layer_profile import LayerProfile, Spread


def profile_each(batches: Iterable[Any], profile_one: Callable[[Any], LayerProfile]) -> LayerProfile:
    """Raises TypeError for what is one batch, ValueError for none; an error of a batch gets a note with its number."""
    if isinstance(batches, Mapping | str | bytes) or hasattr(batches, "backward"):  # a tensor iterates over its rows
        raise TypeError(
            f"batches is a {type(batches).__name__}, one batch or part of it: pass batch=, or a list of batches"
        )
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches is a {type(batches).__name__}; a list of batches or a data loader is needed")
    found: list[LayerProfile] = []
    for batch in batches:
        try:
            found.append(profile_one(batch))
        except Exception as error:
            error.add_note(f"in batch {len(found)} of batches= (the first is 0)")
            raise
    if not found:
        raise ValueError("batches yields no batch")
    return mean_profile(found)


def mean_profile(profiles: Sequence[LayerProfile]) -> LayerProfile:
    """Each cell the mean over the batches in which it is defined; a row for each layer that has one in any batch."""
    names = _by_depth(profiles)
    metrics = profiles[0].metrics
    values = np.full((len(profiles), len(names), len(metrics)), np.nan)
    for place, one in enumerate(profiles):
        rows = [row for row, name in enumerate(names) if name in one]
        values[place, rows] = [list(one[names[row]].values()) for row in rows]
    counts = (~np.isnan(values)).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):  # inf - inf, 0 / 0: there is no such figure
        means = np.where(counts > 0, np.nansum(values, axis=0) / counts, np.nan)
        squares = np.nansum(np.square(values - means), axis=0)
        deviations = np.where((counts > 1) & np.isfinite(means), np.sqrt(squares / (counts - 1)), np.nan)
    covered = {profile.info[name].get("parameter", name) for profile in profiles for name in profile}
    uncovered = {name: why for profile in profiles for name, why in profile.uncovered.items() if name not in covered}
    return LayerProfile(
        names,
        metrics,
        means,
        info={name: _info(name, depth, profiles) for depth, name in enumerate(names)},
        loss=float(np.mean([profile.loss for profile in profiles])),
        backend="+".join(sorted({part for profile in profiles for part in profile.backend.split("+")})),
        uncovered=uncovered,
        spread=Spread(len(profiles), deviations, counts),
    )


def _by_depth(profiles: Sequence[LayerProfile]) -> list[str]:
    """All layers, in the order of first use on average over the batches that reached them."""
    depths: dict[str, list[int]] = {}
    for profile in profiles:
        for name in profile:
            depths.setdefault(name, []).append(profile.info[name]["depth"])
    return sorted(depths, key=lambda name: float(np.mean(depths[name])))


def _info(name: str, depth: int, profiles: Sequence[LayerProfile]) -> dict[str, Any]:
    found = [profile.info[name] for profile in profiles if name in profile]
    notes = [str(info["note"]) for info in found if info["note"]]
    if len(found) < len(profiles):
        notes.append(f"reached in {len(found)} of {len(profiles)} batches, of which the means are")
    return found[0] | {
        "depth": depth,
        "uses": max(info["uses"] for info in found),
        "nonfinite": sum(info["nonfinite"] for info in found),
        "note": "; ".join(dict.fromkeys(notes)),
    }
