"""Records -> what each layer of a pair of model and data set turned out to be worth, and how sure that is. No torch."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas

from zest_fast.ranking.groups import IDENTITY, Group, group_of
from zest_fast.ranking.probed import PROBED

OUTCOMES = ("accuracy", "loss", "head_accuracy", "head_loss")
_NEEDED = (*IDENTITY, "family", "layer", "loss", "head_loss", "kind", "depth", "numel", "shape")
_PRIOR_WEIGHT = 4  # in degrees of freedom: two or three seeds say little about the noise of a single layer


@dataclass(frozen=True)
class Pair:
    """A model on a data set: the target, and the profiles that are to predict it."""

    model: str
    dataset: str
    family: str
    gains: pandas.Series
    """Layer -> loss of the head alone minus loss with the layer, mean over the seeds."""
    positions: pandas.Series
    """Layer -> where its gain stands among the layers, in (0, 1); 1 = best."""
    levels: pandas.Series
    """Layer -> graded relevance 0, 1, ...; layers of one level differ by no more than noise."""
    views: tuple[Group, ...]
    """A profile of each seed and state of the head."""
    probe: pandas.Series | None = None
    """Layer -> score of a probe, where the layers were probed."""

    @property
    def name(self) -> str:
        return f"{self.model}/{self.dataset}"


def pairs_of(records: pandas.DataFrame) -> list[Pair]:
    """The pairs of records (columns of `load_records()`) that order their layers, by model and data set.

    A pair of one layer, or one whose layers all contribute the same, is left out with a warning.
    Raises ValueError where columns lack, a family is ambiguous, or no pair is left.
    """
    missing = [name for name in _NEEDED if name not in records]
    if missing:
        raise ValueError(f"records lack the columns {', '.join(missing)}; pass what load_records() gives")
    pairs = []
    for (model, dataset), rows in records.groupby(["model", "dataset"], sort=True):
        pair = _pair(str(model), str(dataset), rows)
        if pair.levels.nunique() > 1:
            pairs.append(pair)
        else:
            why = "one layer" if len(pair.levels) == 1 else f"{len(pair.levels)} layers of the same contribution"
            warnings.warn(f"{pair.name} has {why}, and orders nothing; it is left out", stacklevel=3)
    if not pairs:
        raise ValueError("records hold no pair of model and data set whose layers differ in their contribution")
    return pairs


def check_sweeps(sweeps: Iterable[Mapping[str, Any]]) -> None:
    """Raises ValueError where a model was swept under two recipes, or metrics were computed by two definitions."""
    sweeps = list(sweeps)
    check_one_recipe_a_model(sweeps)
    definitions = {_definitions(sweep): sweep for sweep in reversed(sweeps)}
    if len(definitions) > 1:
        found = ", ".join(f"{v} ({s['model']}/{s['dataset']})" for v, s in sorted(definitions.items(), key=str))
        raise ValueError(f"records hold metrics of different definitions: {found}; profile and sweep again with one")


def check_one_recipe_a_model(sweeps: Iterable[Mapping[str, Any]]) -> None:
    """Raises ValueError where a model was swept under two recipes: scores of the two do not compare."""
    first: dict[str, Mapping[str, Any]] = {}
    for sweep in sweeps:
        other = first.setdefault(sweep["model"], sweep)
        if other["recipe_hash"] != sweep["recipe_hash"]:
            raise ValueError(
                f"{sweep['model']} was swept under different recipes on {other['dataset']} ({other['recipe_hash']}) "
                f"and {sweep['dataset']} ({sweep['recipe_hash']}); their records are not mixed: leave one of them out"
            )


def _definitions(sweep: Mapping[str, Any]) -> Any:
    return sweep.get("versions", {}).get("definitions")


def _pair(model: str, dataset: str, rows: pandas.DataFrame) -> Pair:
    families = sorted(map(str, rows["family"].unique()))
    if len(families) > 1:
        raise ValueError(f"{model}/{dataset} belongs to several families: {', '.join(families)}")
    outcomes = rows.drop_duplicates(["seed", "layer"]).assign(gain=lambda r: r["head_loss"] - r["loss"])
    finite = outcomes["gain"].where(np.isfinite(outcomes["gain"]))
    if not finite.notna().any():
        raise ValueError(f"{model}/{dataset}: no layer has a finite loss")
    # A layer that diverged is worth no more than the worst of that seed that did not.
    outcomes["gain"] = finite.fillna(finite.groupby(outcomes["seed"]).transform("min"))
    gains = outcomes.pivot(index="layer", columns="seed", values="gain").dropna()
    if gains.empty:
        raise ValueError(f"{model}/{dataset}: no layer was scored under every seed")
    mean = gains.mean(axis=1)
    levels = pandas.Series(relevance(mean.to_numpy(), standard_errors(gains.to_numpy())), index=mean.index)
    views = tuple(group_of(view) for _, view in rows.groupby(["seed", "head_state"], sort=True, dropna=False))
    positions = (mean.rank() - 0.5) / len(mean)
    return Pair(model, dataset, families[0], mean, positions, levels, views, _probe(rows, mean.index))


def _probe(rows: pandas.DataFrame, layers: pandas.Index) -> pandas.Series | None:
    if PROBED not in rows:
        return None
    found = rows.groupby("layer")[PROBED].mean().reindex(layers)
    return found if found.notna().all() else None


def standard_errors(gains: np.ndarray) -> np.ndarray:
    """[layers, seeds] -> standard error of each layer's mean, [layers]; 0 where there is one seed.

    What a seed does to all layers alike (its head, its samples) is no noise of their order and taken out first. The
    variance of a layer is shrunk towards what is usual, the median: a layer that diverges must not make ties of all
    others (Smyth 2004 moderates variances of few replicates in this way).
    """
    layers, seeds = gains.shape
    if seeds < 2 or layers < 2:
        return np.zeros(layers)
    residuals = gains - gains.mean(axis=1, keepdims=True)
    residuals = residuals - np.median(residuals, axis=0)
    freedom = seeds - 1
    variances = (residuals**2).sum(axis=1) / freedom
    usual = np.median(variances) / (1 - 2 / (9 * freedom)) ** 3  # median of chi² over its mean (Wilson, Hilferty 1931)
    variances = (_PRIOR_WEIGHT * usual + freedom * variances) / (_PRIOR_WEIGHT + freedom)
    return np.sqrt(variances / seeds)


def relevance(gains: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Gains and their standard errors, [layers] -> levels 0, 1, ... [layers], larger is better.

    From the worst layer up, a level begins where a gain exceeds that of the layer which began the one before by more
    than the standard error of their difference.
    """
    levels = np.zeros(len(gains), dtype=np.int64)
    order = np.argsort(gains, kind="stable")
    begin, level = order[0], 0
    for layer in order[1:]:
        if gains[layer] - gains[begin] > np.hypot(errors[layer], errors[begin]):
            begin, level = layer, level + 1
        levels[layer] = level
    return levels
