"""The layer prior and the kind prior: matched, interpolated, and out of fold in training."""

from __future__ import annotations

import numpy as np
import pandas
import pytest
from synthetic_records import make_records, one_profile, profile_of

from zest_fast.ranking.architectures import architectures_of, find
from zest_fast.ranking.features import FEATURES, KIND_PRIOR, LAYER_PRIOR
from zest_fast.ranking.groups import group_of
from zest_fast.ranking.kind_prior import kind_prior
from zest_fast.ranking.layer_prior import layer_prior
from zest_fast.ranking.learning.contributions import pairs_of
from zest_fast.ranking.learning.training_rows import training_rows

MODELS = ("tower", "castle")
DATASETS = ("digits", "digits-corrupted", "cats", "cars")


@pytest.fixture(scope="module")
def records():
    return make_records(MODELS, DATASETS, blocks=4, seeds=1, states=("fresh",))


@pytest.fixture(scope="module")
def architectures(records):
    return architectures_of(pairs_of(records))


def priors(records):
    """Pair -> the known and the new rows' priors, [layers, 2] each."""
    pairs = pairs_of(records)
    rows = training_rows(pairs, architectures_of(pairs))
    columns = [FEATURES.index(LAYER_PRIOR), FEATURES.index(KIND_PRIOR)]
    return {(rows.names[view.pair], view.known): rows.values[view.rows][:, columns] for view in rows.views}


def turned_around(records, where):
    """The gains of some rows with the opposite sign."""
    return records.assign(loss=records.loss.where(~where, 2 * records.head_loss - records.loss))


def test_the_layer_prior_is_the_mean_position_on_other_families(records):
    positions = {pair.name: pair.positions for pair in pairs_of(records)}
    found = priors(records)["tower/cats", True][:, 0]
    digits = (positions["tower/digits"] + positions["tower/digits-corrupted"]) / 2
    names = group_of(one_profile(records, "tower", "cats")).names
    expected = ((digits + positions["tower/cars"]) / 2).reindex(list(names))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_priors_in_training_never_see_their_own_family(records):
    before = priors(records)
    after = priors(turned_around(records, records.family == "digits"))
    for name in ("tower/digits", "tower/digits-corrupted", "castle/digits"):
        np.testing.assert_array_equal(after[name, True], before[name, True])
        np.testing.assert_array_equal(after[name, False], before[name, False])
    assert not np.allclose(after["tower/cats", True], before["tower/cats", True])


def test_kind_priors_in_training_never_see_their_own_model(records):
    before = priors(records)
    after = priors(turned_around(records, records.model == "tower"))
    np.testing.assert_array_equal(after["tower/cats", True][:, 1], before["tower/cats", True][:, 1])
    assert not np.allclose(after["tower/cats", True][:, 0], before["tower/cats", True][:, 0])
    assert not np.allclose(after["castle/cats", True][:, 1], before["castle/cats", True][:, 1])


def test_the_sizes_of_one_family_of_models_are_no_strangers(records):
    """Their kind priors would be layer priors in disguise."""
    small = records[records.model == "tower"].assign(model="tower-small")
    small = small.assign(shape=[[size * 2 for size in shape] for shape in small["shape"]])
    found = priors(pandas.concat([records[records.model == "tower"], small]))
    assert all(np.isnan(table[:, 1]).all() for table in found.values())


def test_every_pair_is_also_a_view_of_a_new_model(records):
    found = priors(records)
    assert len(found) == 2 * len(MODELS) * len(DATASETS)
    assert all(np.isnan(table[:, 0]).all() != known for (_, known), table in found.items())
    one_family = priors(records[records.dataset == "cats"])
    assert not any(known for _, known in one_family)


@pytest.mark.parametrize("prefix", ["", "body.", "model.encoder."])
def test_a_wrapper_and_another_head_change_nothing(records, architectures, prefix):
    group = group_of(profile_of(one_profile(records, "castle", "cars"), prefix=prefix))
    (match,) = find(group, architectures)
    assert match.known and match.share == 1 and match.architecture.model == "castle"
    np.testing.assert_allclose(layer_prior(group, [match]), match.architecture.mean_positions())


def test_a_wrapper_in_the_records_changes_nothing(records):
    wrapped = architectures_of(pairs_of(records.assign(layer="body.net." + records.layer)))
    (match,) = find(group_of(one_profile(records, "tower", "cars").assign(layer=lambda r: "bert." + r.layer)), wrapped)
    assert match.known and match.share == 1


def test_other_names_of_the_same_shapes_in_order_are_known(records, architectures):
    rows = one_profile(records, "tower", "cars")
    (match,) = find(group_of(rows.assign(layer=[f"stage{i}" for i in range(len(rows))])), architectures)
    assert match.known and match.architecture.model == "tower"


def test_a_part_of_the_layers_is_known_and_another_width_is_not(records, architectures):
    rows = one_profile(records, "tower", "cars")
    (match,) = find(group_of(rows.iloc[3:9]), architectures)
    assert match.known and match.share == 1
    wider = rows.assign(shape=[[2 * size for size in shape] for shape in rows["shape"]])
    assert find(group_of(wider), architectures) == []


def test_a_layer_that_was_not_swept_takes_the_position_of_its_neighbours(records):
    swept = records[~records.layer.str.contains(r"tower\.2\.")]
    group = group_of(one_profile(records, "tower", "cars"))
    (match,) = find(group, architectures_of(pairs_of(swept)))
    prior = layer_prior(group, [match])
    assert match.known and match.share == 0.75 and not np.isnan(prior).any()
    around = [prior[group.names.index(f"tower.{block}.mix_of_tower")] for block in (1, 3)]
    between = prior[group.names.index("tower.2.mix_of_tower")]
    assert min(around) - 0.05 < between < max(around) + 0.05


def test_the_same_architecture_under_two_names_is_one_prior(records):
    own = records[(records.model == "tower") & (records.dataset == "cats")]
    theirs = records[(records.model == "tower") & (records.dataset != "cats")].assign(model="theirs")
    matches = find(
        group_of(one_profile(records, "tower", "cars")), architectures_of(pairs_of(pandas.concat([own, theirs])))
    )
    both = find(group_of(one_profile(records, "tower", "cars")), architectures_of(pairs_of(records)))
    assert len(matches) == 2
    group = group_of(one_profile(records, "tower", "cars"))
    np.testing.assert_allclose(layer_prior(group, matches), layer_prior(group, both))


def test_the_kind_prior_learns_kind_and_depth():
    records = make_records(
        ("tower", "castle", "bridge"), blocks=6, seeds=1, layer=0.0, metric=0.0, unseen=0.0, noise=0.0
    )
    architectures = architectures_of(pairs_of(records))
    group = group_of(one_profile(records, "tower", "cats"))
    prior = kind_prior(group.traits, [a for a in architectures if a.model != "tower"])
    (own,) = (a for a in architectures if a.model == "tower")
    assert np.corrcoef(prior, own.mean_positions())[0, 1] > 0.9
    assert np.isnan(kind_prior(group.traits, [])).all()


def test_a_layer_of_two_shapes_is_refused(records):
    other = records.dataset == "cats"
    shapes = [[9, 9] if wrong else shape for wrong, shape in zip(other, records["shape"], strict=True)]
    with pytest.raises(ValueError, match=r"castle: layer .* has shape .* different models different names"):
        architectures_of(pairs_of(records.assign(shape=shapes)))
