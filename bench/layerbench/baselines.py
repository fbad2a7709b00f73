"""What the Ranker is held against. Each fits records of training pairs and scores the layers of one profile.

A contestant has `fit(train)`, the rows of the training pairs (columns of `load_records()`), and `predict(profile)`, the
rows of one profile without their outcomes -> scores [rows], larger is better, NaN where it has none. zest_fast.Ranker
is one. Where the records have them, both frames hold the scores of probes ("probe_score", NaN for pairs that were not
probed); contestants of "one batch" leave them alone. `contestants()` gives all of them, fresh, by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import pandas
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold

from bench.layerbench.measures import tau_b
from bench.layerbench.mlp_on_pairs import PairMLP
from bench.layerbench.profiles import mean_gain, present, profiles, rank_in_profile, z_scores
from bench.layerbench.rivals import (
    AdaGradSelect,
    Grass,
    LisaWeightNorm,
    Middle,
    NormalisedGradient,
    NumberOfParameters,
    Resnorm,
    Uniform,
)
from zest_fast.ranking.features import METRICS, STEP_GAIN, first_order
from zest_fast.ranking.probed import PROBED, Probe
from zest_fast.ranking.ranker import Ranker

Spectra = Mapping[str, Mapping[str, Mapping[str, float | None]]]
"""model -> layer -> "snr" and "condition_number", as bench/spectra.py computes them."""


class Contestant(Protocol):
    def fit(self, train: pandas.DataFrame) -> Contestant: ...

    def predict(self, profile: pandas.DataFrame) -> np.ndarray: ...


def contestants(records: pandas.DataFrame, spectra: Spectra) -> dict[str, Contestant]:
    """Every contestant by its name in the results, unfitted.

    Single metrics are those that any pair of `records` holds; where a profile lacks one, that has no order.
    """
    metrics = present(records)
    ranker = Ranker()
    probed: dict[str, Contestant] = {}
    if PROBED in records:
        probed = {"ranker, probed": ProbedRanker(ranker), "probe alone": LargeFirst(PROBED)}
    return {
        "ranker": ranker,
        "ranker, metrics only": Ranker(features="metrics"),
        **probed,
        "mlp on pairs": PairMLP(),
        "ridge": Ridge(),
        "layer prior": LayerPrior(),
        "kind prior": KindPrior(),
        "depth": SignedMetric(("depth",)),
        "best single metric": SignedMetric(metrics),
        "rgn": LargeFirst("rgn"),
        "step gain": StepGain(),
        "spectrum": Spectrum(spectra),
        "kappatune": KappaTune(spectra),
        "number of parameters": NumberOfParameters(),
        "middle": Middle(),
        "uniform": Uniform(),
        "resnorm": Resnorm(),
        "normalised gradient": NormalisedGradient(),
        "grass": Grass(),
        "adagradselect": AdaGradSelect(),
        "lisa weight norm": LisaWeightNorm(),
        "random": Random(),
        **{f"metric {name}": SignedMetric((name,)) for name in metrics},
    }


class SignedMetric:
    """The metric of `candidates` with the largest absolute mean tau on training pairs, with the sign of that tau.

    Both are chosen for each state of the head by itself, on training pairs of the same model where there are any, else
    on all: what a careful user would take from these records.
    """

    def __init__(self, candidates: tuple[str, ...]) -> None:
        self.candidates = candidates

    def fit(self, train: pandas.DataFrame) -> SignedMetric:
        gains = mean_gain(train)
        rows = []
        for (model, dataset, _, state), rows_of_profile in profiles(train):
            truth = gains[rows_of_profile.index].to_numpy()
            taus = {name: tau_b(rows_of_profile[name].to_numpy(np.float64), truth) for name in self.candidates}
            rows.append({"model": model, "dataset": dataset, "head_state": state, **taus})
        pairs = pandas.DataFrame(rows).groupby(["head_state", "model", "dataset"]).mean()
        self._of_all = pairs.groupby("head_state").mean()
        self._of_model = pairs.groupby(["head_state", "model"]).mean()
        return self

    def choice(self, model: str, head_state: str) -> tuple[str, float]:
        """The metric and its mean tau on the training pairs that count for this model."""
        key = (head_state, model)
        taus = self._of_model.loc[key] if key in self._of_model.index else self._of_all.loc[head_state]
        name = taus.abs().idxmax()
        return name, float(taus[name])

    def predict(self, profile: pandas.DataFrame) -> np.ndarray:
        name, tau = self.choice(profile.model.iloc[0], profile.head_state.iloc[0])
        return profile[name].to_numpy(np.float64) * (1 if tau >= 0 else -1)


class LargeFirst:
    """A metric as its authors use it, nothing learned: Lee et al. (2022) tune the layers with the largest RGN."""

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def fit(self, train: pandas.DataFrame) -> LargeFirst:
        return self

    def predict(self, profile: pandas.DataFrame) -> np.ndarray:
        return profile[self.metric].to_numpy(np.float64)


class ProbedRanker:
    """The Ranker of the same contest, shown the probe as well: it learns both at once, and is fitted as "ranker"."""

    def __init__(self, ranker: Ranker) -> None:
        self.ranker = ranker

    def fit(self, train: pandas.DataFrame) -> ProbedRanker:
        if not self.ranker.is_fitted:
            self.ranker.fit(train)
        return self

    def predict(self, profile: pandas.DataFrame) -> np.ndarray:
        scores = profile[PROBED].to_numpy(np.float64)
        if np.isnan(scores).any():
            return np.full(len(profile), np.nan)
        ones = np.ones(len(profile))
        probe = Probe(tuple(profile.layer), scores, scores, ones, ones, start=1.0)
        return self.ranker.predict(profile, probe)


class StepGain:
    """What the first step of Adam at the rates of the sweeps gains to first order; nothing learned."""

    def fit(self, train: pandas.DataFrame) -> StepGain:
        return self

    def predict(self, profile: pandas.DataFrame) -> np.ndarray:
        metrics = {name: profile[name].to_numpy(np.float64) for name in METRICS if name in profile}
        return first_order(metrics, profile["numel"].to_numpy(np.float64))[STEP_GAIN]


class LayerPrior:
    """Mean rank that the same layer of the same model has on the training pairs; NaN for what they do not hold."""

    def fit(self, train: pandas.DataFrame) -> LayerPrior:
        ranks = pandas.Series(rank_in_profile(train, mean_gain(train)), index=train.index)
        self._prior = ranks.groupby([train.model, train.layer]).mean()
        return self

    def predict(self, profile: pandas.DataFrame) -> np.ndarray:
        keys = pandas.MultiIndex.from_frame(profile[["model", "layer"]])
        return self._prior.reindex(keys).to_numpy()


class KindPrior:
    """Mean rank of the layers of a kind, on training pairs of the same model where there are any, else on all."""

    def fit(self, train: pandas.DataFrame) -> KindPrior:
        ranks = pandas.Series(rank_in_profile(train, mean_gain(train)), index=train.index)
        self._of_all = ranks.groupby(train.kind).mean()
        self._of_model = ranks.groupby([train.model, train.kind]).mean()
        return self

    def predict(self, profile: pandas.DataFrame) -> np.ndarray:
        keys = pandas.MultiIndex.from_frame(profile[["model", "kind"]])
        of_model = self._of_model.reindex(keys).to_numpy()
        return of_model if np.isfinite(of_model).any() else self._of_all.reindex(profile.kind).to_numpy()


class Ridge:
    """Linear regression of a layer's rank on z-scored metrics and structure, its strength by cross-validation.

    The folds of the cross-validation are families of data sets, inside the training part.
    """

    STRENGTHS = np.logspace(0, 5, 11)

    def fit(self, train: pandas.DataFrame) -> Ridge:
        self._metrics, self._kinds = present(train), sorted(train.kind.unique())
        families = train.family.nunique()
        splits = None  # one family: leave-one-out, for want of better
        if families > 1:
            splits = list(GroupKFold(min(5, families)).split(train, groups=train.family))
        self._model = RidgeCV(self.STRENGTHS, cv=splits)
        self._model.fit(self._features(train), rank_in_profile(train, mean_gain(train)))
        return self

    def predict(self, profile: pandas.DataFrame) -> np.ndarray:
        return self._model.predict(self._features(profile))

    def _features(self, records: pandas.DataFrame) -> np.ndarray:
        depth = rank_in_profile(records, records.depth)[:, None]
        kinds = np.stack([(records.kind == kind).to_numpy(np.float64) for kind in self._kinds], axis=1)
        sizes = z_scores(records, ("numel",))
        return np.hstack([z_scores(records, self._metrics), depth, depth**2, sizes, kinds])


class Random:
    """No order: measures of tied scores are expectations over random ones."""

    def fit(self, train: pandas.DataFrame) -> Random:
        return self

    def predict(self, profile: pandas.DataFrame) -> np.ndarray:
        return np.zeros(len(profile))


class Spectrum:
    """Signal-to-noise of the pretrained weight, large first within each type of module (Hartford et al. 2024).

    Spectrum takes the same share of every type of module, so a layer's score is its rank within its type: the name of
    the layer without its numbers.
    """

    def __init__(self, spectra: Spectra) -> None:
        self._spectra = spectra

    def fit(self, train: pandas.DataFrame) -> Spectrum:
        return self

    def predict(self, profile: pandas.DataFrame) -> np.ndarray:
        ratios = _spectral(self._spectra, profile, "snr").fillna(np.inf)  # no singular value is noise
        types = [re.sub(r"\d+", "#", name) for name in profile.layer]
        return ratios.groupby(types).rank(pct=True).to_numpy()


class KappaTune:
    """Condition number of the pretrained weight, small first (PEFT's KappaTuneSelector)."""

    def __init__(self, spectra: Spectra) -> None:
        self._spectra = spectra

    def fit(self, train: pandas.DataFrame) -> KappaTune:
        return self

    def predict(self, profile: pandas.DataFrame) -> np.ndarray:
        return -_spectral(self._spectra, profile, "condition_number").to_numpy()


def _spectral(spectra: Spectra, profile: pandas.DataFrame, name: str) -> pandas.Series:
    of_model = spectra[profile.model.iloc[0]]
    return pandas.Series([of_model[layer][name] for layer in profile.layer], dtype=np.float64)
