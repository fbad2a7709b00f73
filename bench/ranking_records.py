"""Contribution records as rankings are fitted to them and judged by them: profiles, gains, normalised metrics."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas

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


def rank_in_profile(records: pandas.DataFrame, values: pandas.Series) -> pandas.Series:
    """Rank of each row's value within its profile: above 0, the largest 1, ties the mean of their ranks."""
    return values.groupby([records[name] for name in PROFILE]).rank(pct=True)


def z_scores(records: pandas.DataFrame, names: tuple[str, ...]) -> np.ndarray:
    """The metrics, comparable between models: float64 [rows, names].

    asinh(x / median |x|), which keeps signs and is a logarithm far out (metrics span many powers of ten), then the
    z-score, both within the profile. NaN, and whatever is constant in a profile, becomes 0.
    """
    values = records[list(names)].astype(np.float64)
    keys = [records[name] for name in PROFILE]
    median = values.abs().groupby(keys).transform("median")
    scaled = np.arcsinh(values / median.where(median > 0, 1.0))
    groups = scaled.groupby(keys)
    deviation = groups.transform("std", ddof=0)
    z = (scaled - groups.transform("mean")) / deviation.where(deviation > 1e-12)
    return z.fillna(0.0).to_numpy()
