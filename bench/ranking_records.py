"""Contribution records as rankings are fitted to them and judged by them: profiles, gains, normalised metrics."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas
from scipy import stats

PAIR = ["model", "dataset"]
PROFILE = [*PAIR, "seed", "head_state"]
PAPER_METRICS = (
    "weight_mean", "weight_std", "act_mean", "act_std", "act_abs_mean", "act_abs_std", "grad_mean", "grad_std",
    "grad_abs_mean", "grad_abs_std", "grad_norm", "plain", "snip", "fisher", "grasp", "synflow",
)  # fmt: skip
"""Those of the paper: its section 3.1 and the rows of its Table 1."""
METRICS = (*PAPER_METRICS, "rgn", "agree_dot", "agree_sign", "agree_cos")


def present(records: pandas.DataFrame, names: tuple[str, ...] = METRICS) -> tuple[str, ...]:
    """The metrics of `names` that the records have a number for."""
    return tuple(name for name in names if name in records and records[name].notna().any())


def profiles(records: pandas.DataFrame) -> Iterator[tuple[tuple, pandas.DataFrame]]:
    """((model, data set, seed, head_state), rows), one profile after another."""
    yield from records.groupby(PROFILE, sort=True)


def mean_gain(records: pandas.DataFrame) -> pandas.Series:
    """For each row the gain of its layer, head_loss - loss, as the mean over the seeds of its pair."""
    gain = (records.head_loss - records.loss).rename("gain")
    return gain.groupby([records[name] for name in (*PAIR, "layer")]).transform("mean")


def gains_by_seed(records: pandas.DataFrame) -> pandas.DataFrame:
    """Of one pair: gains, [seeds x layers]."""
    gain = (records.head_loss - records.loss).rename("gain")
    return gain.groupby([records.seed, records.layer], sort=True).first().unstack("layer")


def places(records: pandas.DataFrame) -> list[np.ndarray]:
    """Of each profile, which rows (counted from 0) are its."""
    return list(records.groupby(PROFILE, sort=True).indices.values())


def rank_in_profile(records: pandas.DataFrame, values: pandas.Series) -> np.ndarray:
    """Rank of each row's value within its profile: above 0, the largest 1, ties the mean of their ranks."""
    ranks = np.empty(len(records))
    for rows in places(records):
        ranks[rows] = stats.rankdata(values.to_numpy()[rows]) / len(rows)
    return ranks


def z_scores(records: pandas.DataFrame, names: tuple[str, ...]) -> np.ndarray:
    """The metrics, comparable between models: float64 [rows, names].

    asinh(x / median |x|), which keeps signs and is a logarithm far out (metrics span many powers of ten), then the
    z-score, both within the profile. NaN, and whatever is constant in a profile, becomes 0.
    """
    values = records[list(names)].to_numpy(np.float64)
    scores = np.zeros_like(values)
    for rows in places(records):
        scores[rows] = _z_scores(values[rows])
    return scores


def _z_scores(values: np.ndarray) -> np.ndarray:
    """Of one profile, [layers, metrics]."""
    defined = np.ma.masked_invalid(values)
    median = np.ma.median(abs(defined), axis=0)
    scaled = np.arcsinh(defined / np.ma.where(median > 0, median, 1.0))
    deviation = scaled.std(axis=0)
    z = (scaled - scaled.mean(axis=0)) / np.ma.masked_less(deviation, 1e-12)
    return z.filled(0.0)
