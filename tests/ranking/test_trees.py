"""Trees of our own against LightGBM's, bit for bit, and what is no tree."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import lightgbm
import numpy as np
import pytest
from synthetic_records import make_records, one_profile, profile_of

from zest_fast.ranking.lightgbm_text import trees_from_text
from zest_fast.ranking.ranker import Ranker
from zest_fast.ranking.trees import Tree, explain_trees, predict_trees
from zest_fast.sweeping.tables import load_records

NAMES = [f"f{column}" for column in range(6)]
OLD = Path(__file__).parents[1] / "data" / "ranker_v1.json.gz"


def table(rows, seed):
    """Numbers, zeros, nearly zeros, NaN and infinities."""
    chance = np.random.default_rng(seed)
    values = np.round(chance.normal(size=(rows, len(NAMES))), 2)
    odd = np.array([0.0, -0.0, 1e-36, -1e-36, 1e-35, 1e-34, np.nan, np.inf, -np.inf])
    return np.where(chance.uniform(size=values.shape) < 0.3, chance.choice(odd, size=values.shape), values)


def grown(seed, rounds=12, finite=False, **parameters):
    chance = np.random.default_rng(seed)
    values = table(600, seed)
    if finite:
        values[np.isinf(values)] = np.nan
    target = np.nansum(np.where(np.isfinite(values), values, 2.0) * chance.normal(size=len(NAMES)), axis=1)
    if finite:
        target = target + 50 * np.isnan(values[:, 0])  # NaN apart from all numbers
    settings = {"objective": "regression", "num_leaves": 15, "min_data_in_leaf": 5, "verbosity": -1, "num_threads": 1}
    data = lightgbm.Dataset(values, label=target, feature_name=NAMES, params={"verbosity": -1})
    return lightgbm.train({**settings, "seed": seed, **parameters}, data, num_boost_round=rounds)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"zero_as_missing": True},
        {"use_missing": False},
        {"finite": True, "min_data_in_leaf": 2, "num_leaves": 40},
        {"monotone_constraints": [1, -1, 0, 0, 0, 0], "num_leaves": 7, "feature_fraction": 0.5},
        {"extra_trees": True, "num_leaves": 60, "min_data_in_leaf": 2},
    ],
)
def test_scores_are_those_of_lightgbm_to_the_bit(parameters, seed):
    booster = grown(seed, **parameters)
    trees = trees_from_text(booster.model_to_string(), NAMES)
    values = table(2000, seed + 100)
    thresholds = np.concatenate([tree.thresholds for tree in trees])
    values[: len(thresholds)] = thresholds[:2000, None]  # on the edge
    np.testing.assert_array_equal(predict_trees(trees, values), booster.predict(values, num_threads=1))
    contributions = booster.predict(values, pred_contrib=True, num_threads=1)[:, :-1]
    np.testing.assert_allclose(explain_trees(trees, values), contributions, rtol=0, atol=1e-12)
    if parameters == {}:
        assert {int(kind) for tree in trees for kind in tree.missing} >= {2}
    if "finite" in parameters:
        assert "inf" in booster.model_to_string().split("Tree=0")[1]  # all numbers to the left, NaN to the right
    if "zero_as_missing" in parameters:
        assert {int(kind) for tree in trees for kind in tree.missing} >= {1}
        assert len({bool(side) for tree in trees for side in tree.default_left}) == 2


def test_trees_that_found_no_split_are_their_leaf():
    booster = grown(0, rounds=2, min_data_in_leaf=10_000)
    trees = trees_from_text(booster.model_to_string(), NAMES)
    values = table(50, 1)
    np.testing.assert_array_equal(predict_trees(trees, values), booster.predict(values, num_threads=1))
    assert not explain_trees(trees, values).any()


def test_what_is_not_read_is_refused():
    text = grown(0).model_to_string()
    with pytest.raises(ValueError, match="feature_names: expected"):
        trees_from_text(text, NAMES[::-1])
    chance = np.random.default_rng(0)
    values = np.column_stack([chance.integers(0, 9, 500), chance.normal(size=(500, 5))])
    data = lightgbm.Dataset(values, label=np.sin(values[:, 0]), feature_name=NAMES, categorical_feature=["f0"])
    by_category = lightgbm.train({"verbosity": -1}, data, num_boost_round=3)
    with pytest.raises(ValueError, match="tree 0, num_cat: expected 0"):
        trees_from_text(by_category.model_to_string(), NAMES)
    with pytest.raises(ValueError, match="tree 0, is_linear"):
        trees_from_text(grown(0, linear_tree=True).model_to_string(), NAMES)
    with pytest.raises(ValueError, match="average_output"):
        trees_from_text(grown(0, boosting="rf", bagging_freq=1, bagging_fraction=0.5).model_to_string(), NAMES)
    with pytest.raises(ValueError, match="end of trees"):
        trees_from_text(text[: text.index("end of trees")], NAMES)


GOOD = {
    "features": [0, 1], "thresholds": [0.5, 1.5], "missing": [0, 2], "default_left": [True, False],
    "left": [1, -1], "right": [-2, -3], "values": [1.0, 2.0, 3.0], "counts": [5, 6, 7],
}  # fmt: skip


def tree(**changes):
    return Tree(**{name: np.array(entries) for name, entries in {**GOOD, **changes}.items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"left": [0, -1]}, "left"),  # a node below itself
        ({"left": [1, -2], "right": [-2, -3]}, "exactly once"),
        ({"left": [1, -1], "right": [1, -3]}, "exactly once"),
        ({"left": [2, -1], "right": [-2, -3]}, "exactly once"),
        ({"left": [1, -4]}, "exactly once"),
        ({"thresholds": [0.5, np.nan]}, "thresholds: expected finite"),
        ({"values": [1.0, np.inf, 3.0]}, "values: expected finite"),
        ({"features": [0, -1]}, "features"),
        ({"missing": [0, 3]}, "missing"),
        ({"counts": [5, 0, 7]}, "counts"),
        ({"thresholds": [0.5]}, "thresholds: expected 2 entries, found"),
        ({"values": [1.0] * 65}, "expected 1 to 64 leaves"),
        ({"values": []}, "expected 1 to 64 leaves"),
    ],
)
def test_what_is_no_tree_is_refused(changes, message):
    assert predict_trees([tree()], np.array([[0.0, 9.0], [1.0, 0.0], [np.nan, np.nan]])).tolist() == [3, 2, 3]
    with pytest.raises(ValueError, match=message):
        tree(**changes)


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    path = tmp_path_factory.mktemp("old") / "ranker.json"
    path.write_bytes(gzip.decompress(OLD.read_bytes()))
    return path


def test_the_ranker_of_the_first_format_scores_as_lightgbm_and_as_itself_in_the_second(old, tmp_path):
    """Saved again it is in today's format: the same trees, not fitted again."""
    first = Ranker.load(old)
    path = first.save(tmp_path / "converted.json")
    converted = Ranker.load(path)
    assert json.loads(path.read_text())["version"] == 2 and first.metadata == converted.metadata
    text = json.loads(old.read_text())["model"]["trees"]
    chance = np.random.default_rng(0)
    values = chance.normal(size=(500, 101))
    values[chance.uniform(size=values.shape) < 0.2] = np.nan
    expected = lightgbm.Booster(model_str=text).predict(values, raw_score=True, num_threads=1)  # a text of our own
    np.testing.assert_array_equal(predict_trees(first._model.trees, values), expected)
    records = load_records()
    for _, rows in records[records.head_state == "fresh"].groupby(["model", "dataset", "seed"]):
        a, b = first.assess(rows), converted.assess(rows)
        np.testing.assert_array_equal(a.scores, b.scores)
        np.testing.assert_array_equal(a.intervals, b.intervals)
        assert a.note == b.note


def test_ranking_imports_nothing_heavy(tmp_path):
    """By the shipped Ranker, in a process of its own: seconds of imports, for arithmetic on a hundred rows."""
    rows = one_profile(make_records(("tower",), ("cats",), blocks=2, seeds=1, states=("fresh",)), "tower", "cats")
    path = profile_of(rows).save(tmp_path / "profile.json")
    program = (
        "import sys; from zest_fast import LayerProfile, rank\n"
        f"ranking = rank(LayerProfile.load({str(path)!r})); ranking.top(3); repr(ranking)\n"
        "heavy = ('lightgbm', 'pandas', 'scipy', 'sklearn', 'pyarrow', 'torch', 'matplotlib')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
