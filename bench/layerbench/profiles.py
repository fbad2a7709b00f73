"""Records as rankings are fitted to them and judged by them: profiles, gains, blocks, normalised metrics."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

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


def with_start_losses(
    records: pandas.DataFrame, sweeps: Iterable[Mapping[str, Any]]
) -> tuple[pandas.DataFrame, list[str]]:
    """The records with "start_loss", what gains count from: the loss of the head retrained alone, where it is known.

    Args:
        records: columns of `load_records()`.
        sweeps: what `sweeps_of()` says of them; `bench.head_alone` adds "head_retrained".

    Returns:
        The records, and the names of the pairs whose gains count from the head before it trains along.
    """
    known = {
        (sweep["model"], sweep["dataset"], int(seed)): result["loss"]
        for sweep in sweeps
        for seed, result in sweep.get("head_retrained", {}).items()
    }
    keys = pandas.MultiIndex.from_frame(records[[*PAIR, "seed"]])
    found = pandas.Series(known, dtype=np.float64).reindex(keys).to_numpy()
    lacking = records[np.isnan(found)][PAIR].drop_duplicates().sort_values(PAIR)
    start = np.where(np.isnan(found), records.head_loss, found)
    return records.assign(start_loss=start), [f"{row.model}/{row.dataset}" for row in lacking.itertuples()]


def block_of(layer: str) -> str:
    """The block that a layer is part of; the last component of its name is its own.

    >>> [block_of(name) for name in ("layer.3.attention.query", "body.dense0.conv1.depthwise", "stem")]
    ['layer.3', 'body.dense0.conv1', 'stem']
    """
    parts = layer.split(".")
    for form in (r"[\d_]*\d", r".*\d"):
        for end in range(len(parts) - 1, 0, -1):
            if re.fullmatch(form, parts[end - 1]):
                return ".".join(parts[:end])
    return layer


def by_block(layers: Iterable[str], values: np.ndarray) -> np.ndarray:
    """Means over the layers of each block, in the order of the blocks' names; NaN where all are."""
    return pandas.Series(values).groupby([block_of(layer) for layer in layers]).mean().to_numpy()


def mean_gain(records: pandas.DataFrame) -> pandas.Series:
    """For each row the gain of its layer as the mean over the seeds of its pair."""
    gain = _gain(records)
    return gain.groupby([records[name] for name in (*PAIR, "layer")]).transform("mean")


def gains_by_seed(records: pandas.DataFrame) -> pandas.DataFrame:
    """Of one pair: gains, [seeds x layers]."""
    gain = _gain(records)
    return gain.groupby([records.seed, records.layer], sort=True).first().unstack("layer")


def _gain(records: pandas.DataFrame) -> pandas.Series:
    """start_loss - loss; from the head before it trains along where the records have no start_loss."""
    start = records.start_loss if "start_loss" in records else records.head_loss
    return (start - records.loss).rename("gain")


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
