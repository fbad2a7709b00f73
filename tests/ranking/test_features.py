"""What the ranker sees: relative to the other layers, whatever the scale, the order of rows and the head."""

from __future__ import annotations

import numpy as np
import pandas
import pytest
from synthetic_records import make_records, one_profile, profile_of

from zest_fast.profiling.metrics import ALL_METRIC_NAMES, METRIC_NAMES
from zest_fast.ranking.features import DYNAMIC_METRICS, FEATURES, METRICS, ON_REQUEST, features_of, z_scores
from zest_fast.ranking.groups import group_of
from zest_fast.ranking.learning.contributions import pairs_of, relevance, standard_errors

NAN = float("nan")


@pytest.fixture(scope="module")
def rows():
    return one_profile(make_records(models=("tower",), datasets=("digits",), blocks=4), "tower", "digits")


def features(rows):
    group = group_of(rows)
    unknown = np.full(len(group), NAN)
    return features_of(group, unknown, unknown, np.full((len(group), len(DYNAMIC_METRICS)), NAN))


def column(table, name):
    return table[:, FEATURES.index(name)]


def test_every_metric_of_a_profile_is_a_feature():
    assert set(METRICS) == set(ALL_METRIC_NAMES)
    assert set(ON_REQUEST) == set(ALL_METRIC_NAMES) - set(METRIC_NAMES)


def test_scales_of_loss_and_weights_do_not_matter(rows):
    scaled = rows.assign(grad_norm=rows.grad_norm * 1e-9, plain=rows.plain * 1e6, act_std=rows.act_std * 1e30)
    np.testing.assert_allclose(features(scaled), features(rows), atol=2e-6)


def test_ranks_are_positions_in_the_group_and_within_the_kind(rows):
    snip = np.arange(len(rows), dtype=float)
    snip[3] = NAN
    table = features(rows.assign(snip=snip, depth=range(len(rows))))
    rank, in_kind = column(table, "snip_rank"), column(table, "snip_rank_in_kind")
    defined = len(rows) - 1
    np.testing.assert_allclose(rank[:5], [0.5 / defined, 1.5 / defined, 2.5 / defined, NAN, 3.5 / defined], atol=1e-6)
    np.testing.assert_allclose(in_kind[rows.kind.to_numpy() == "depthwise"], (np.arange(4) + 0.5) / 4, atol=1e-6)


@pytest.mark.parametrize("values", [[NAN] * 16, [0.0] * 16, [3.0] * 16, [np.inf] * 16, [0.0] * 15 + [1e61]])
def test_odd_metrics_give_no_infinities(rows, values):
    table = features(rows.assign(synflow=values, plain=values))
    assert not np.isinf(table).any()
    finite = np.isfinite(values).any()
    assert (np.isnan(column(table, "synflow_z")) != finite).all() and (
        np.isnan(column(table, "plain_z")) != finite
    ).all()


def test_z_scores():
    np.testing.assert_allclose(z_scores(np.array([1.0, 3.0, NAN])), [-1, 1, NAN])
    np.testing.assert_array_equal(z_scores(np.array([2.0, 2.0])), [0, 0])
    assert z_scores(np.array([0.0] * 99 + [1.0])).max() == 4


def test_the_order_of_rows_and_the_head_change_nothing(rows):
    profile = profile_of(rows)
    group, shuffled = group_of(profile), group_of(rows.sample(frac=1, random_state=1))
    assert group.names == shuffled.names and "head" not in group.names
    np.testing.assert_array_equal(features(profile), features(rows))
    table = group.in_table(np.arange(len(group), dtype=float))
    assert np.isnan(table[-1]) and len(table) == len(profile)


def test_groups_refuse_what_they_cannot_read(rows):
    with pytest.raises(TypeError, match="LayerProfile or a DataFrame, not list"):
        group_of([1])
    with pytest.raises(ValueError, match="lack kind, shape"):
        group_of(rows.drop(columns=["kind", "shape"]))
    with pytest.raises(ValueError, match=r"several profiles \(seed: 0, 1\)"):
        group_of(make_records(models=("tower",), datasets=("digits",), blocks=1, states=("warm",)))
    with pytest.raises(ValueError, match="no layer to rank beside the head"):
        group_of(rows.assign(head=True))
    with pytest.raises(ValueError, match=r"'tower.0.expand_of_tower' occurs more than once"):
        group_of(rows.iloc[[0, 0]])


def test_layers_within_noise_share_a_level():
    gains = np.array([0.0, 0.1, 1.0, 1.05, 3.0])
    np.testing.assert_array_equal(relevance(gains, np.full(5, 0.2)), [0, 0, 1, 1, 2])
    np.testing.assert_array_equal(relevance(gains, np.zeros(5)), [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(relevance(-gains, np.full(5, 9.0)), [0] * 5)


def test_standard_errors_measure_the_noise_of_the_order():
    chance = np.random.default_rng(0)
    gains = chance.normal(size=(400, 1)) + 0.3 * chance.normal(size=(400, 3))
    assert np.sqrt((standard_errors(gains) ** 2).mean()) == pytest.approx(0.3 / 3**0.5, rel=0.1)
    shifted = gains + np.array([0.0, 5.0, -5.0])  # what a seed does to all layers alike
    np.testing.assert_allclose(standard_errors(shifted), standard_errors(gains))
    gains[7] = [-50, 80, 0]  # one layer diverges now and then
    errors = standard_errors(gains)
    assert errors[7] > 5 and np.median(errors) == pytest.approx(0.3 / 3**0.5, rel=0.15)
    np.testing.assert_array_equal(standard_errors(gains[:, :1]), np.zeros(400))


def test_a_layer_that_diverged_is_worth_no_more_than_the_worst(rows):
    records = make_records(models=("tower",), datasets=("digits",), blocks=3)
    lost = records.layer == "tower.1.mix_of_tower"
    (pair,) = pairs_of(records.assign(loss=records.loss.where(~lost, np.inf)))
    assert pair.gains["tower.1.mix_of_tower"] <= pair.gains.drop("tower.1.mix_of_tower").min()
    assert pair.levels["tower.1.mix_of_tower"] == 0


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("depth", NAN, "depth: expected a finite number"),
        ("numel", -1, "numel: expected a finite number from 0"),
        ("kind", None, "kind: expected a string"),
        ("shape", [3], "shape: expected 2 to 64 entries, found 1"),
        ("shape", ["a", "b"], r"shape\[0\]: expected an integer, found 'a'"),
        ("head", "yes", "head: expected true or false, found 'yes'"),
        ("head", NAN, "head: expected true or false"),
    ],
)
def test_what_is_said_of_a_layer_is_checked(rows, column, value, message):
    entries = rows[column].astype(object).tolist()
    entries[3] = value
    with pytest.raises(ValueError, match=r"layer 'tower.0.mix_of_tower'.*" + message):
        group_of(rows.assign(**{column: pandas.Series(entries, index=rows.index, dtype=object)}))
