"""Why a pair ranks badly: is it the noise of its target, its recipe, or what the ranking knows?"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pandas

from bench.layerbench.measures import attainable_tau, reliability, tau_between_seeds
from bench.layerbench.profiles import gains_by_seed
from bench.layerbench.protocol import HEAD_STATES, Pair, rows_of

NOISY = 0.6
"""A reliability below this: more than two fifths of the target's variance is noise."""
BROKEN = 0.2
"""This share of layers worse than the head alone: part of the ranking is who breaks under the recipe."""
FAR = 0.6
"""Of the attainable tau: a ranking below this share of it calls for an explanation."""


def targets(records: pandas.DataFrame, pairs: Iterable[Pair]) -> pandas.DataFrame:
    """What the records say of each pair (the index): noise, what is attainable, and the spread of gains."""
    return pandas.DataFrame({pair.name: _target(rows_of(records, [pair])) for pair in pairs}).T.astype(float)


def _target(rows: pandas.DataFrame) -> dict[str, float]:
    by_seed = gains_by_seed(rows)
    gains, seeds = by_seed.mean().to_numpy(), by_seed.to_numpy()
    certain = reliability(seeds)
    return {
        "layers": len(gains),
        "seeds": len(seeds),
        "reliability": certain,
        "attainable_tau": attainable_tau(certain),
        "tau_between_seeds": tau_between_seeds(seeds),
        "worse_than_head_alone": int((gains < 0).sum()),
        "mean_gain": gains.mean(),
        "std_gain": gains.std(),
        "smallest_gain": gains.min(),
        "median_gain": float(np.median(gains)),
        "largest_gain": gains.max(),
    }


def diagnose(truth: pandas.DataFrame, results: pandas.DataFrame) -> list[dict[str, object]]:
    """For each pair and setting, fresh head: the target, the Ranker beside prior and best metric, and what stands out.

    The best metric of a pair is found with its outcomes: an explanation, no contestant.
    """
    entries = []
    fresh = results[results.head_state == HEAD_STATES[0]]
    for (pair, setting), part in fresh.groupby(["pair", "setting"]):
        taus = part.set_index("contestant").tau
        metrics = taus[taus.index.str.startswith("metric ")]
        best = metrics.abs().idxmax()
        found = {
            "ranker": taus["ranker"],
            "layer_prior": taus.get("layer prior", math.nan),
            "best_metric": metrics[best],
        }
        target = truth.loc[pair]
        entries.append(
            {"pair": pair, "setting": setting}
            | {name: _number(value) for name, value in target.items()}
            | {f"tau_{name}": _number(value) for name, value in found.items()}
            | {
                "best_metric_of_this_pair": best.removeprefix("metric "),
                "share_of_attainable": _number(
                    taus["ranker"] / target.attainable_tau if target.attainable_tau else math.nan
                ),
                "stands_out": signs(target, found),
            }
        )
    return entries


def signs(target: pandas.Series, taus: dict[str, float]) -> list[str]:
    """What may explain a tau far below the attainable one; empty where it is not far below."""
    if not taus["ranker"] < FAR * target.attainable_tau:
        return []
    found = []
    if target.reliability < NOISY:
        found.append(f"noise: the reliability of the target is {target.reliability:.2f}")
    if (share := target.worse_than_head_alone / target.layers) > BROKEN:
        found.append(f"recipe: {share:.0%} of the layers end worse than the head alone")
    for name, words in (("layer_prior", "the layer prior"), ("best_metric", "a single metric, known in hindsight,")):
        if abs(taus[name]) > taus["ranker"] + 0.1:
            found.append(f"features: {words} has a tau of {taus[name]:+.2f}")
    return found or ["nothing measured here explains it"]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 4)
