"""Layers in the order that real fine-tuning runs have shown, predicted from a profile. No torch.

A score is where a layer is expected to stand among the layers of its profile: 1/2 is the middle, towards 1 the best,
towards 0 the worst. It is a sum of what the features add (`explain`), so the ends can be passed a little.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zest_fast.foundation.options import FeatureSet
from zest_fast.profiling.layer_profile import LayerProfile
from zest_fast.ranking.assessment import Assessment, Known
from zest_fast.ranking.features import FEATURE_SETS, METRICS
from zest_fast.ranking.groups import Group, group_of
from zest_fast.ranking.model import Model
from zest_fast.ranking.probed import Probe
from zest_fast.ranking.ranker_files import load_ranker, save_ranker

if TYPE_CHECKING:
    import pandas


class Ranker:
    """Learns from records of sweeps what makes a layer worth fine-tuning.

    Args:
        seed: of the trees.
        features: "all", or "metrics", an ablation that sees the batch and nothing of the architecture: no sizes, kinds,
            weights or priors.

    Attributes:
        seed: as above.
        features: as above.

    Raises:
        ValueError: unknown features.
        RuntimeError: of what asks for scores, before `fit` or `load`.

    Examples:
        >>> import zest_fast
        >>> records = zest_fast.load_records()
        >>> bert = records[(records.model == records.model[0]) & (records.dataset == records.dataset[0])]
        >>> rows = bert[(bert.seed == bert.seed.min()) & (bert.head_state == "warm")].set_index("layer")
        >>> zest_fast.Ranker()
        Ranker, not fitted
        >>> zest_fast.Ranker().predict(rows)
        Traceback (most recent call last):
        RuntimeError: this Ranker has learned nothing yet; fit it to records, or load one

        `zest_fast.Ranker().fit(records)` takes half a minute; what `save` then writes, `Ranker.load(path)` reads.
    """

    def __init__(self, *, seed: int = 0, features: FeatureSet = "all") -> None:
        if features not in FEATURE_SETS:
            raise ValueError(f"features must be 'all' or 'metrics', not {features!r}")
        self.seed, self.features = int(seed), features
        self._model: Model | None = None
        self._metadata: dict[str, Any] = {}

    def fit(self, records: pandas.DataFrame, *, sweeps: Sequence[Mapping[str, Any]] | None = None) -> Ranker:
        """Learn from records; half a minute for those that ship. What was learned before is replaced.

        Args:
            records: columns of `load_records()`, "probe_score" among them if the Ranker is to weigh probes. A pair of
                one layer, or of equal contributions, is left out with a warning.
            sweeps: what `sweeps_of()` says of each sweep, of which recipes and definitions are checked and kept.

        Returns:
            The Ranker itself.

        Raises:
            ValueError: records that do not fit together, or order no layers.
        """
        from zest_fast.ranking.learning.fitting import (
            fit_model,  # LightGBM, pandas and SciPy: only who fits waits for them
        )

        self._model, self._metadata = fit_model(records, sweeps, features=self.features, seed=self.seed)
        return self

    @property
    def is_fitted(self) -> bool:
        """Whether it has learned or loaded something."""
        return self._model is not None

    @property
    def metadata(self) -> dict[str, Any]:
        """What it was fitted to, the settings that were chosen, and what held-out records said of it."""
        return dict(self._metadata)

    def assess(self, profile: LayerProfile | pandas.DataFrame | Group, probe: Probe | None = None) -> Assessment:
        """Scores, intervals and what is known, of one profile at once; see `predict`, `intervals` and `knows`.

        Args:
            profile: as in `predict`.
            probe: as in `predict`.

        Returns:
            An assessment: `.scores`, `.intervals`, `.known`, `.expected_tau`, `.note`, `.explain()`, `.rests_on()`.

        Raises:
            ValueError: a profile that lacks metrics which the Ranker has learned from; a probe of other layers, or
                beside a Ranker that has learned from none.
        """
        if self._model is None:
            raise RuntimeError("this Ranker has learned nothing yet; fit it to records, or load one")
        group = group_of(profile)
        assessment = self._model.assess(group, None if probe is None else probe.of(group.names))
        if isinstance(profile, LayerProfile):
            ignored = tuple(metric for metric in profile.metrics if metric not in METRICS)
            assessment = dataclasses.replace(assessment, ignored=ignored)
        return assessment

    def predict(self, profile: LayerProfile | pandas.DataFrame, probe: Probe | None = None) -> np.ndarray:
        """Scores of the layers.

        Args:
            profile: a LayerProfile, or its rows as `to_pandas()` and `load_records()` have them, of one model, data
                set, seed and state of the head.
            probe: of the same layers, to be mixed in.

        Returns:
            float64 [rows], in row order; larger is better, NaN for the head.

        Raises:
            ValueError: as `assess`.
        """
        return self.assess(profile, probe).scores

    def intervals(self, profile: LayerProfile | pandas.DataFrame, probe: Probe | None = None) -> np.ndarray:
        """80 % intervals of the scores, from errors on held-out records: of other data sets where the architecture is
        known, of other architectures where it is not.

        Args:
            profile: as in `predict`.
            probe: as in `predict`.

        Returns:
            float64 [rows, 2]; NaN where the records allowed no such test.

        Raises:
            ValueError: as `assess`.
        """
        return self.assess(profile, probe).intervals

    def knows(self, profile: LayerProfile | pandas.DataFrame) -> Known:
        """Whether the records hold the architecture.

        Args:
            profile: as in `predict`.

        Returns:
            Which share of the layers matches an architecture of the records, and its name, or None.

        Raises:
            ValueError: as `assess`.
        """
        return self.assess(profile).known

    def explain(self, profile: LayerProfile | pandas.DataFrame) -> pandas.DataFrame:
        """What adds up to score - 1/2.

        Args:
            profile: as in `predict`.

        Returns:
            A row for each layer but the head (index "layer", in row order). Columns: base_layer_prior, base_kind_prior,
            base_structure, base_weights (metrics of the weights alone) and base_metrics (those that see the batch), the
            parts of the smooth base, then one for each feature, what the trees add for it (SHAP values), all relative
            to the mean layer of the profile.

        Raises:
            ValueError: as `assess`.
        """
        return self.assess(profile).explain()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one JSON file with a checksum; no pickle.

        Args:
            path: of the file.

        Returns:
            The path.

        Raises:
            RuntimeError: there is nothing to save yet.
        """
        if self._model is None:
            raise RuntimeError("this Ranker has learned nothing yet; fit it to records before saving it")
        settings = {"seed": self.seed, "features": self.features}
        return save_ranker(path, settings, self._model, self._metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ranker:
        """Read what `save` wrote.

        Args:
            path: of the file.

        Returns:
            A Ranker that is fitted.

        Raises:
            ValueError: a file that is torn, foreign, or of other features; the message names it.
        """
        settings, model, metadata = load_ranker(path)
        ranker = cls(**settings)
        ranker._model, ranker._metadata = model, metadata
        return ranker

    def __repr__(self) -> str:
        if self._model is None:
            return "Ranker, not fitted"
        held_out = ", ".join(
            f"{errors.tau:.2f} on {what}"
            for errors, what in ((self._model.known, "other data sets"), (self._model.new, "other architectures"))
            if errors.pairs
        )
        count = len(self._metadata["pairs"])
        pairs = f"{count} pair{'s' if count > 1 else ''} of model and data set"
        return f"Ranker of {pairs}" + (f", held-out tau {held_out}" if held_out else "")
