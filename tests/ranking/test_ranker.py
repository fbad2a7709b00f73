"""Rankers fitted to records whose truth is known: what they find, that they repeat themselves, what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import kendalltau
from synthetic_records import make_records, one_profile, profile_of, true_gains

from zest_fast.profiling.layer_profile import LayerProfile
from zest_fast.ranking import shipped
from zest_fast.ranking.architectures import find
from zest_fast.ranking.features import FEATURES, KIND_PRIOR, LAYER_PRIOR, METRICS, columns_of
from zest_fast.ranking.groups import group_of
from zest_fast.ranking.learning.boosted_trees import train_trees
from zest_fast.ranking.learning.contributions import pairs_of
from zest_fast.ranking.learning.cross_validation import cross_validate
from zest_fast.ranking.learning.selection import split
from zest_fast.ranking.ranker import Ranker
from zest_fast.ranking.ranking import rank
from zest_fast.ranking.trees import predict_trees

NAN = float("nan")
MODELS, DATASETS = ("tower", "castle", "bridge"), ("digits", "digits-corrupted", "cats", "cars")


@pytest.fixture(scope="module")
def records():
    return make_records(MODELS, DATASETS, blocks=5, seeds=2, states=("fresh",))


@pytest.fixture(scope="module")
def ranker(records):
    """Has seen neither digits nor the bridge."""
    return Ranker().fit(records[(records.family != "digits") & (records.model != "bridge")])


@pytest.fixture(scope="module")
def few():
    return make_records(("tower", "castle"), ("digits", "cats"), blocks=3, seeds=1, states=("fresh",))


@pytest.fixture(scope="module")
def small(few):
    return Ranker().fit(few)


def tau(scores, records, rows):
    """Mean over seeds is what counts; here the scores of one."""
    gains = true_gains(records, rows.model.iloc[0], rows.dataset.iloc[0])
    return kendalltau(scores, gains.reindex(list(rows.layer))).statistic


def mean_tau(score, records, pairs):
    profiles = [one_profile(records, *pair, seed) for pair in pairs for seed in (0, 1)]
    return np.mean([tau(score(rows), records, rows) for rows in profiles])


def test_known_models_on_new_data_are_ranked_better_than_by_prior_or_metric(records, ranker):
    pairs = [("tower", "digits"), ("castle", "digits"), ("tower", "digits-corrupted")]
    found = mean_tau(ranker.predict, records, pairs)
    means = {
        model: np.mean([p.positions for p in pairs_of(records) if p.model == model and p.family != "digits"], axis=0)
        for model in ("tower", "castle")
    }
    index = {p.model: p.positions.index for p in pairs_of(records)}

    def prior(rows):
        model = rows.model.iloc[0]
        return means[model][index[model].get_indexer(rows.layer)]

    assert found > mean_tau(prior, records, pairs) + 0.05
    assert found > mean_tau(lambda rows: rows.grad_norm, records, pairs) + 0.2


def test_new_models_are_ranked_by_metrics_and_kinds():
    """Better than by the metric that tells of the data, since kinds and depths tell something everywhere."""
    models = (*MODELS, "harbour")
    shared = make_records(models, ("digits", "cats", "cars"), blocks=4, seeds=2, states=("fresh",), layer=0.3)
    fitted = Ranker().fit(shared[shared.model != "harbour"])
    pairs = [("harbour", dataset) for dataset in ("digits", "cats", "cars")]
    assert fitted.knows(one_profile(shared, *pairs[0])).model is None
    assert mean_tau(fitted.predict, shared, pairs) > mean_tau(lambda rows: rows.grad_norm, shared, pairs) + 0.05


def test_what_is_unusual_for_a_known_layer_counts():
    """Where a metric is mostly a constant of the layer, only its distance from what is usual tells of the data."""
    constants = make_records(MODELS[:2], DATASETS, blocks=5, seeds=1, states=("fresh",), constant=2.0)
    fitted = Ranker().fit(constants[constants.family != "digits"])
    rows = one_profile(constants, "tower", "digits")
    metric, prior = FEATURES.index("grad_norm_surprise"), FEATURES.index("grad_norm_z")
    weights = np.abs(fitted._model.base.known)
    assert weights[metric] > 2 * weights[prior]
    assert tau(fitted.predict(rows), constants, rows) > 0.6
    assert fitted._model.base.new[metric] == 0


def test_a_prior_that_says_all_is_not_spoiled(records):
    """Layers that gain the same on all data: whatever else is fitted must not disturb the order by much."""
    only = make_records(MODELS, DATASETS, blocks=5, seeds=1, states=("fresh",), metric=0.0, unseen=0.0, noise=0.1)
    fitted = Ranker().fit(only[only.family != "digits"])
    assert np.mean([tau(fitted.predict(r), only, r) for r in (one_profile(only, m, "digits") for m in MODELS)]) > 0.85


def test_scores_are_positions_and_intervals_hold_them(records, ranker):
    known, new = one_profile(records, "tower", "digits"), one_profile(records, "bridge", "cats")
    for rows in (known, new):
        scores, ends = ranker.predict(rows), ranker.intervals(rows)
        assert scores.dtype == np.float64 and scores.mean() == pytest.approx(0.5)
        assert (ends[:, 0] <= scores).all() and (scores <= ends[:, 1]).all()
    width = {name: np.ptp(ranker.intervals(rows), axis=1).mean() for name, rows in (("known", known), ("new", new))}
    assert width["new"] > width["known"] > 0.1


def test_four_of_five_held_out_layers_are_inside_their_interval(records, ranker):
    inside = []
    for pair in pairs_of(records):
        if pair.family == "digits" or pair.model == "bridge":
            for seed in (0, 1):
                rows = one_profile(records, pair.model, pair.dataset, seed)
                low, high = ranker.intervals(rows).T
                position = pair.positions.reindex(list(rows.layer)).to_numpy()
                inside.append(((low <= position) & (position <= high)).mean())
    assert 0.7 < np.mean(inside) < 0.92


def test_two_fits_are_the_same_to_the_bit_whatever_the_order_of_rows(few, small, tmp_path):
    again = Ranker().fit(few.sample(frac=1, random_state=3))
    assert small.save(tmp_path / "a.json").read_bytes() == again.save(tmp_path / "b.json").read_bytes()


def test_a_saved_ranker_is_the_same_to_the_bit(few, small, tmp_path):
    loaded = Ranker.load(small.save(tmp_path / "r.json"))
    rows = one_profile(few, "castle", "cats")
    np.testing.assert_array_equal(loaded.predict(rows), small.predict(rows))
    np.testing.assert_array_equal(loaded.intervals(rows), small.intervals(rows))
    assert loaded.metadata == small.metadata and repr(loaded) == repr(small)
    assert loaded.save(tmp_path / "again.json").read_bytes() == (tmp_path / "r.json").read_bytes()


def test_scores_follow_their_rows(few, small):
    rows = one_profile(few, "tower", "digits")
    order = np.random.default_rng(0).permutation(len(rows))
    np.testing.assert_array_equal(small.predict(rows.iloc[order]), small.predict(rows)[order])


def test_a_profile_and_its_rows_have_the_same_scores_and_the_head_none(few, small):
    rows = one_profile(few, "tower", "digits")
    profile = profile_of(rows)
    scores = small.predict(profile)
    np.testing.assert_array_equal(scores[:-1], small.predict(rows))
    assert np.isnan(scores[-1]) and np.isnan(small.intervals(profile)[-1]).all()
    np.testing.assert_array_equal(small.predict(profile.to_pandas()), scores)


@pytest.mark.parametrize("value", [NAN, np.inf, -np.inf, 0.0])
def test_metrics_that_are_no_numbers_are_endured(few, small, value):
    rows = one_profile(few, "tower", "digits")
    column = rows.snip.to_numpy().copy()
    column[[0, 4]] = value
    for odd in (column, np.full(len(rows), value)):
        assert np.isfinite(small.predict(rows.assign(snip=odd, act_mean=odd, agree_cos=odd))).all()


def test_one_layer_stands_in_the_middle(few, small):
    assert small.predict(one_profile(few, "tower", "digits").iloc[[2]]).tolist() == [0.5]


def test_a_profile_that_lacks_metrics_is_refused_but_those_on_request_are_not_needed(few, small):
    rows = one_profile(few, "tower", "digits")
    with pytest.raises(ValueError, match="lacks grad_norm, snip, which this Ranker learned from"):
        small.predict(rows.drop(columns=["snip", "grad_norm"]))
    on_request = ["grasp", "synflow", "agree_dot", "agree_sign", "agree_cos"]
    np.testing.assert_array_equal(small.predict(rows.drop(columns=on_request)), small.predict(rows))


def test_it_says_what_it_knows(records, ranker):
    tower = profile_of(one_profile(records, "tower", "digits"), prefix="body.")
    assert ranker.knows(tower) == (1.0, "tower")
    assert ranker.knows(profile_of(one_profile(records, "bridge", "digits"))) == (0.0, None)
    assert ranker.assess(tower).note.startswith("knows tower (100% of the layers), held-out tau 0.")
    note = rank(profile_of(one_profile(records, "bridge", "digits")), by=ranker).note
    assert note.startswith("has not seen this architecture, held-out tau 0.") and "80% intervals 0." in note


def test_explanations_add_up_and_are_named(records, ranker):
    profile = profile_of(one_profile(records, "tower", "digits"))
    scores, added = ranker.predict(profile)[:-1], ranker.explain(profile)
    assert list(added.index) == profile.names[:-1]
    base = ["base_layer_prior", "base_kind_prior", "base_structure", "base_weights", "base_metrics"]
    assert list(added) == [*base, *FEATURES]
    np.testing.assert_allclose(added.sum(axis=1) + 0.5, scores, atol=1e-12)
    assert added["base_layer_prior"].std() > added["base_structure"].std()


def test_a_ranking_holds_what_its_ranker_says(records, ranker):
    profile = profile_of(one_profile(records, "tower", "digits"))
    ranking = rank(profile, by=ranker)
    best = int(np.nanargmax(ranker.predict(profile)))
    assert ranking.by == "Ranker" and ranking.names[0] == profile.names[best] and ranking.names[-1] == "head"
    np.testing.assert_array_equal(ranking.intervals[0], ranker.intervals(profile)[best])
    frame = ranking.explain()
    parts = frame.loc[:, "high":].drop(columns="high")
    np.testing.assert_allclose(parts.sum(axis=1).iloc[:-1] + 0.5, frame.score.iloc[:-1], atol=1e-12)
    assert (frame.low <= frame.score)[:-1].all() and (parts != 0).any().all() and frame.loc["head", "head"]
    lines = repr(ranking).splitlines()
    assert lines[0].startswith("Ranking of 21 layers by Ranker: knows tower (100% of the layers)")
    assert lines[1].split() == ["layer", "kind", "score", "low", "high"]


def test_the_shipped_ranker_is_the_default(few, small, tmp_path, monkeypatch):
    profile = profile_of(one_profile(few, "tower", "digits"))
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path / "ranker.json")
    with pytest.raises(NotImplementedError, match=r"no Ranker ships.*weight_mean, weight_std"):
        rank(profile)
    small.save(shipped.SHIPPED)
    assert rank(profile).names == rank(profile, by=small).names


def test_metrics_only_sees_nothing_of_the_architecture(few):
    ablation = Ranker(features="metrics").fit(few)
    rows = one_profile(few, "tower", "digits")
    chance = np.random.default_rng(0)
    disguised = rows.assign(
        layer=[f"l{i}" for i in range(len(rows))],
        numel=chance.integers(1, 99, len(rows)),
        kind="linear",
        shape=[[2, 2]] * len(rows),
        weight_std=chance.normal(size=len(rows)),
        weight_mean=chance.normal(size=len(rows)),
    )
    np.testing.assert_array_equal(ablation.predict(disguised), ablation.predict(rows))
    assert ablation.knows(rows) == (0.0, None)


def test_theory_gives_priors_their_sign():
    """Even where the rows say the opposite, a larger prior is never worse for the trees."""
    chance = np.random.default_rng(0)
    values = np.full((200, len(FEATURES)), NAN)
    prior, other = FEATURES.index(LAYER_PRIOR), FEATURES.index("snip_z")
    values[:, [prior, other]] = chance.uniform(size=(200, 2))
    levels = np.argsort(np.argsort(values[:, other] - values[:, prior])) // 20
    names = [LAYER_PRIOR, KIND_PRIOR, "snip_z"]
    trees = train_trees(values, levels, np.ones(200), np.zeros(200), [50] * 4, features=names, rounds=20, seed=0)
    added = predict_trees(trees, values[:, columns_of(names)])
    values[:, prior] += 0.3
    assert (predict_trees(trees, values[:, columns_of(names)]) >= added).all()
    assert np.corrcoef(added, levels)[0, 1] > 0.5


def test_without_anything_held_out_nothing_is_claimed(few):
    single = few[(few.model == "tower") & (few.dataset == "cats")]
    ranker = Ranker().fit(single)
    rows = one_profile(few, "tower", "cats")
    assert np.isfinite(ranker.predict(rows)).all() and np.isnan(ranker.intervals(rows)).all()
    assert repr(ranker) == "Ranker of 1 pair of model and data set"
    assert rank(profile_of(rows), by=ranker).note == "knows tower (100% of the layers), rests on this batch 100%"


def test_pairs_that_order_nothing_are_left_out_with_a_warning(few):
    tower = few.model == "tower"
    equal = few.assign(loss=few.loss.where(~(tower & (few.dataset == "cats")), 4.0))
    with pytest.warns(UserWarning, match="tower/cats has 12 layers of the same contribution, and orders nothing"):
        assert [pair.name for pair in pairs_of(equal)] == ["castle/cats", "castle/digits", "tower/digits"]
    one = few[(few.layer == few.layer[0]) & tower]
    with pytest.warns(UserWarning, match="has one layer"), pytest.raises(ValueError, match="hold no pair"):
        Ranker().fit(one)


def test_records_that_do_not_fit_together_are_refused(few):
    sweep = {"model": "tower", "dataset": "digits", "recipe_hash": "aa", "versions": {"definitions": 1}}
    other = {**sweep, "dataset": "cats"}
    with pytest.raises(ValueError, match=r"tower was swept under different recipes on digits \(aa\) and cats \(bb\)"):
        Ranker().fit(few, sweeps=[sweep, {**other, "recipe_hash": "bb"}])
    with pytest.raises(ValueError, match=r"different definitions: 1 \(tower/digits\), 2 \(tower/cats\)"):
        Ranker().fit(few, sweeps=[sweep, {**other, "versions": {"definitions": 2}}])
    with pytest.raises(ValueError, match="lack the columns family, head_loss"):
        Ranker().fit(few.drop(columns=["family", "head_loss"]))
    with pytest.raises(ValueError, match="castle/cats belongs to several families: cats, dogs"):
        Ranker().fit(few.assign(family=["dogs", *few.family[1:-1], "dogs"]))
    with pytest.raises(ValueError, match="castle/cats: no layer has a finite loss"):
        Ranker().fit(few.assign(loss=NAN))


def test_an_unfitted_ranker_says_so(few, tmp_path):
    rows = one_profile(few, "tower", "cats")
    with pytest.raises(RuntimeError, match="learned nothing yet"):
        Ranker().predict(rows)
    with pytest.raises(RuntimeError, match="learned nothing yet"):
        Ranker().save(tmp_path / "r.json")
    assert repr(Ranker()) == "Ranker, not fitted" and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="features must be 'all' or 'metrics', not 'some'"):
        Ranker(features="some")


def resigned(document):
    """A changed document with the checksum of its contents."""
    from zest_fast.foundation.documents import json_hash

    del document["checksum"]
    return {**document, "checksum": json_hash(document)}


def test_damaged_and_foreign_files_are_refused_by_name(small, tmp_path):
    path = small.save(tmp_path / "r.json")
    text = path.read_text()
    document = json.loads(text)
    renamed = [*FEATURES[:-1], "something_new"]
    cases = {
        text[: len(text) // 2]: "is torn or no Ranker",
        "": "is torn or no Ranker",
        "{}": "is no Ranker",
        "[1]": "is no Ranker",
        text.replace('"slope": 0.', '"slope": 1.', 1): "checksum does not match",
        text.replace('"counts": [', '"counts": [1', 1): "checksum does not match",
        json.dumps({**document, "version": 3}): "format version 3, this zest_fast reads 1 and 2",
        json.dumps(
            resigned({**document, "metadata": {**document["metadata"], "features": renamed}})
        ): r"other features .*agreed_gain_surprise, something_new",
    }
    for damaged, message in cases.items():
        assert damaged != text
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"r\.json'.*" + message):
            Ranker.load(path)
    with pytest.raises(FileNotFoundError):
        Ranker.load(tmp_path / "none.json")


def test_the_file_says_where_it_comes_from(few, tmp_path):
    sweeps = [
        {"model": m, "dataset": d, "recipe_hash": "aa" + m, "versions": {"definitions": 1}}
        for m, d in dict.fromkeys(zip(few.model, few.dataset, strict=True))
    ]
    metadata = Ranker().fit(few, sweeps=sweeps).metadata
    assert metadata["recipes"] == {"tower": "aatower", "castle": "aacastle"} and metadata["definitions"] == 1
    assert metadata["pairs"] == ["castle/cats", "castle/digits", "tower/cats", "tower/digits"]
    changed = few.assign(snip=[few.snip[0] + 1, *few.snip[1:]])
    assert len(metadata["records"]) == 16 and Ranker().fit(changed).metadata["records"] != metadata["records"]


def test_cross_validation_holds_out_whole_families(monkeypatch):
    records = make_records(
        ("tower", "castle"), ("digits", "digits-corrupted", "cats"), blocks=3, seeds=1, states=("warm",)
    )
    seen = []
    fit = Ranker.fit

    def spy(self, frame, **keywords):
        seen.append(set(frame.family))
        return fit(self, frame, **keywords)

    monkeypatch.setattr(Ranker, "fit", spy)
    found = cross_validate(records, folds=5)
    assert seen == [{"cats"}, {"digits"}]
    assert list(zip(found.model, found.dataset, strict=True)) == [
        (model, dataset) for model in ("castle", "tower") for dataset in ("cats", "digits", "digits-corrupted")
    ]
    assert found[["ranker", "layer_prior", "best_metric"]].notna().all(axis=None)
    one = found.iloc[0]
    (cats,) = (p for p in pairs_of(records) if p.name == "castle/cats")
    digits = [p.positions for p in pairs_of(records) if p.model == "castle" and p.family == "digits"]
    assert one.layer_prior == pytest.approx(kendalltau(cats.gains, sum(digits)).statistic)
    with pytest.raises(ValueError, match="at least two folds and two families"):
        cross_validate(records[records.family == "cats"])


def test_folds_keep_groups_together_and_alike_in_size():
    groups = ["a"] * 4 + ["b"] * 2 + ["c", "d"]
    assert split(groups, 2) == [{"a"}, {"b", "c", "d"}]
    assert sorted(map(sorted, split(groups, 9))) == [["a"], ["b"], ["c"], ["d"]]


def test_a_ranker_of_few_layers_of_a_model_does_not_know_it(records):
    """Eight of 49 layers were once enough for "knows", with the figure of known models."""
    pairs = records[records.family != "digits"]
    few_layers = pairs[(pairs.model != "tower") | pairs.layer.str.contains(r"tower\.0\.")]
    ranker = Ranker().fit(few_layers)
    profile = profile_of(one_profile(records, "tower", "digits"))
    assessment = ranker.assess(profile)
    assert assessment.known == (0.2, None) and assessment.expected_tau == ranker._model.new.tau
    assert assessment.note.startswith(
        "has seen 4 of the 20 layers of tower (20%), and ranks it as new, held-out tau 0."
    )
    assert "on other architectures" in assessment.note
    group_values = ranker._model._values(group_of(profile), find(group_of(profile), ranker._model.architectures))
    assert np.isnan(group_values[:, FEATURES.index(LAYER_PRIOR)]).sum() == 16  # none takes that of a far block
    # All ends as wide as those of a new model: positions among four layers are no positions among twenty.
    new = np.array(ranker._model.new.span) * [-1, 1] @ [1, 1]
    known = np.array(ranker._model.known.span) * [-1, 1] @ [1, 1]
    widths = np.ptp(assessment.intervals[:-1], axis=1)
    assert new > known and (widths <= new + 1e-12).all() and np.median(widths) > known


@pytest.mark.parametrize(("blocks", "known"), [(4, True), (3, False)])
def test_a_model_is_known_from_three_quarters_of_its_layers_on(records, blocks, known):
    pairs = records[records.family != "digits"]
    kept = "|".join(rf"tower\.{block}\." for block in range(blocks))
    ranker = Ranker().fit(pairs[(pairs.model != "tower") | pairs.layer.str.contains(kept)])
    found = ranker.knows(profile_of(one_profile(records, "tower", "digits")))
    assert found == (blocks / 5, "tower" if known else None)


def test_a_profile_of_nan_alone_is_refused(few, small):
    rows = one_profile(few, "tower", "digits")
    metrics = [name for name in METRICS if name in rows]
    for value in (NAN, np.inf):
        with pytest.raises(
            ValueError, match=r"no finite value of any metric .* none of its 12 layers \(such as 'tower"
        ):
            small.predict(rows.assign(**dict.fromkeys(metrics, value)))
    profile = profile_of(rows)
    nothing = LayerProfile(
        profile.names,
        profile.metrics,
        np.full_like(profile.values, NAN),
        info=profile.info,
        loss=NAN,
        backend="cpu",
        uncovered={},
    )
    with pytest.raises(ValueError, match="no finite value of any metric"):
        rank(nothing, by=small)
    with pytest.raises(ValueError, match="no finite value of any metric"):
        rank(nothing)


def test_layers_without_any_metric_are_named(few, small):
    rows = one_profile(few, "tower", "digits").reset_index(drop=True)
    metrics = [name for name in METRICS if name in rows]
    rows.loc[[1, 2], metrics] = NAN
    ranking = rank(profile_of(rows), by=small)
    assert ranking.note.endswith("2 layers without any metric: placed by what is known of such layers alone")
    assert "without any metric" not in rank(profile_of(one_profile(few, "tower", "cats")), by=small).note


def test_metrics_that_no_ranker_knows_are_named(few, small):
    profile = profile_of(one_profile(few, "tower", "digits"))
    values = np.column_stack([profile.values, np.ones(len(profile))])
    more = LayerProfile(
        profile.names, [*profile.metrics, "snap"], values, info=profile.info, loss=1.0, backend="cpu", uncovered={}
    )
    assert rank(more, by=small).note.endswith("does not read 'snap'")
    np.testing.assert_array_equal(small.predict(more), small.predict(profile))
