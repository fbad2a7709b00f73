"""The corrections: LightGBM's LambdaRank, started from the base. LightGBM grows the trees, and scores with none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from zest_fast.ranking.features import EXPECTED_RANKS, PRIORS, columns_of
from zest_fast.ranking.lightgbm_text import trees_from_text
from zest_fast.ranking.trees import Tree

ROUNDS = (5, 15, 40)
STRENGTH = 6.0
"""What the base is multiplied by: log odds, between two layers, of a difference of 1 in position."""

INCREASING = (*PRIORS, *EXPECTED_RANKS, "agree_dot_rank", "agree_sign_rank", "agree_cos_rank")
"""Theory gives these a sign: a prior is an expected position, EXPECTED_RANKS are of expected gains, and agreement
estimates the gain of a step on unseen samples."""


def train_trees(
    values: np.ndarray,
    levels: np.ndarray,
    weights: np.ndarray,
    initial: np.ndarray,
    sizes: Sequence[int],
    *,
    features: Sequence[str],
    rounds: int,
    seed: int,
) -> tuple[Tree, ...]:
    """Rows of groups of `sizes`, one after the other. levels: graded relevance. initial: the score to start from.

    values: [rows, FEATURES], of which `features` are used; the trees count columns among these. The same rows give the
    same trees, bit for bit.
    """
    import lightgbm

    data = lightgbm.Dataset(
        values[:, columns_of(features)],
        label=levels,
        weight=weights / weights.mean(),
        group=np.asarray(sizes),
        init_score=initial,
        feature_name=list(features),
        params={"max_bin": 63, "verbosity": -1, "num_threads": 1, "feature_pre_filter": False},
    )
    parameters: dict[str, Any] = {
        "objective": "lambdarank",
        "lambdarank_truncation_level": int(max(sizes)),  # the whole order counts, not its first thirty
        "label_gain": list(range(int(levels.max()) + 1)),  # linear: 2^level is for web search
        "learning_rate": 0.1,
        "num_leaves": 7,
        "min_data_in_leaf": max(5, len(values) // 60),
        "min_sum_hessian_in_leaf": 1e-3,
        "lambda_l2": 10.0,
        "feature_fraction": 0.5,
        "monotone_constraints": [int(name in INCREASING) for name in features],
        "seed": seed,
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": 1,
        "verbosity": -1,
    }
    booster = lightgbm.train(parameters, data, num_boost_round=rounds)
    return trees_from_text(booster.model_to_string(), features)
