"""A probe beside a profile: how its gains become scores, and how a Ranker learns to weigh them."""

from __future__ import annotations

import numpy as np
import pandas
import pytest
from scipy.stats import kendalltau
from synthetic_records import make_records, one_profile, profile_of

from zest_fast import Probe, Ranker, rank
from zest_fast.ranking.learning.contributions import OUTCOMES
from zest_fast.ranking.mixing import fit_weights, mixed_without_own
from zest_fast.ranking.probed import PROBED, evidence


def with_probes(records: pandas.DataFrame, noise: float, seed: int = 0) -> pandas.DataFrame:
    """Scores of probes that see the mean gain of a pair through so much noise, in standard deviations."""
    chance = np.random.default_rng(seed)
    scores = pandas.Series(np.nan, index=records.index)
    for _, rows in records.groupby(["model", "dataset"]):
        gains = (rows.head_loss - rows.loss).groupby(rows.layer).mean()
        seen = gains + noise * gains.std() * chance.normal(size=len(gains))
        places = (seen.rank() - 0.5) / len(seen) - 0.5
        scores[rows.index] = rows.layer.map(places)
    return records.assign(**{PROBED: scores})


def probe_of(rows: pandas.DataFrame) -> Probe:
    names, scores = tuple(rows.layer), rows[PROBED].to_numpy()
    return Probe(names, scores, scores, np.full(len(names), 0.1), np.ones(len(names)), start=1.0)


def fresh(records: pandas.DataFrame, model: str, dataset: str) -> pandas.DataFrame:
    chosen = (records.model == model) & (records.dataset == dataset) & (records.seed == 0)
    return records[chosen & (records.head_state == "fresh")]


@pytest.fixture(scope="module")
def records() -> pandas.DataFrame:
    return with_probes(make_records(), noise=0.5)


@pytest.fixture(scope="module")
def ranker(records: pandas.DataFrame) -> Ranker:
    return Ranker().fit(records[records.model != "bridge"])


def test_a_good_probe_decides_on_a_new_model(records: pandas.DataFrame, ranker: Ranker) -> None:
    taus = []
    for dataset in records.dataset.unique():
        rows = fresh(records, "bridge", dataset)
        gains = records[(records.model == "bridge") & (records.dataset == dataset)]
        truth = (gains.head_loss - gains.loss).groupby(gains.layer).mean()[rows.layer]
        profile = one_profile(records, "bridge", dataset).drop(columns=[PROBED])
        pair = [
            kendalltau(scores, truth).statistic
            for scores in (ranker.predict(profile), ranker.predict(profile, probe_of(rows)), rows[PROBED])
        ]
        taus.append(pair)
    alone, mixed, probe = np.mean(taus, axis=0)
    assert mixed > alone + 0.2 and mixed > probe - 0.03


def test_a_probe_of_noise_is_hardly_heard() -> None:
    records = make_records()
    chance = np.random.default_rng(0)
    noise = records.groupby(["model", "dataset", "layer"]).loss.transform(lambda column: chance.uniform(-0.5, 0.5))
    ranker = Ranker().fit(records.assign(**{PROBED: noise}))
    for mixing in ranker._model.probed:
        assert mixing.probe < 0.15 and mixing.ranker > 0.7


def test_intervals_of_probed_scores_are_from_where_both_were_held_out(
    records: pandas.DataFrame, ranker: Ranker
) -> None:
    rows = fresh(records, "tower", "digits")
    profile = profile_of(rows.drop(columns=[PROBED, *OUTCOMES]))
    plain, probed = rank(profile, by=ranker), rank(profile, by=ranker, probe=probe_of(rows))
    assert ", probed" in probed.note and "the probe " in probed.note and "probed" not in plain.note
    low, high = probed.intervals[:-1].T  # the head is last, and has none
    assert (low <= probed.scores[:-1]).all() and (probed.scores[:-1] <= high).all()
    parts = probed.explain()
    assert "probe" in parts and "probe" not in plain.explain()
    added = parts.drop(
        columns=["score", "rank", "percentile", "z_score", "depth", "kind", "numel", "head", "low", "high"]
    )
    assert np.allclose(added.sum(axis=1)[:-1], parts.score[:-1] - 0.5)


def test_weights_survive_the_file(records: pandas.DataFrame, ranker: Ranker, tmp_path) -> None:
    loaded = Ranker.load(ranker.save(tmp_path / "ranker.json"))
    rows = fresh(records, "tower", "cats")
    profile = one_profile(records, "tower", "cats").drop(columns=[PROBED])
    assert np.array_equal(loaded.predict(profile, probe_of(rows)), ranker.predict(profile, probe_of(rows)))
    assert loaded._model.probed == ranker._model.probed


def test_without_a_probe_the_scores_are_what_they_were() -> None:
    records = make_records(models=("tower", "castle"))
    rows = one_profile(records, "tower", "cats")
    plain, probed = Ranker().fit(records), Ranker().fit(with_probes(records, 0.5))
    assert np.array_equal(plain.predict(rows), probed.predict(rows))


def test_a_ranker_that_learned_from_no_probe_refuses_one(records: pandas.DataFrame) -> None:
    ranker = Ranker().fit(records.drop(columns=[PROBED]))
    rows = fresh(records, "tower", "cats")
    with pytest.raises(ValueError, match=r"learned from records without probes.*by=probe"):
        ranker.predict(one_profile(records, "tower", "cats"), probe_of(rows))


def test_probes_of_other_layers_are_refused(records: pandas.DataFrame, ranker: Ranker) -> None:
    rows = fresh(records, "tower", "digits")
    profile, whole = profile_of(rows.drop(columns=[PROBED, *OUTCOMES])), probe_of(rows)
    with pytest.raises(ValueError, match=r"the probe has nothing of tower\.0\.expand"):
        rank(profile, by=ranker, probe=probe_of(rows.iloc[1:]))
    other = rows.assign(layer=["elsewhere", *rows.layer[1:]])
    with pytest.raises(ValueError, match="the probe has nothing of"):
        rank(profile, by=ranker, probe=probe_of(other))
    more = pandas.concat([rows, rows.iloc[:1].assign(layer="elsewhere")])
    with pytest.raises(ValueError, match="layers that are not there: elsewhere"):
        rank(profile, by=ranker, probe=probe_of(more))
    with pytest.raises(ValueError, match=r"probe= is for a Ranker"):
        rank(profile, by="grad_norm", probe=whole)
    with pytest.raises(TypeError, match=r"what zest_fast\.probe returns, not list"):
        rank(profile, by=ranker, probe=[1.0])
    assert rank(profile, by=whole).names[0] == whole.top(1)[0]


def test_records_that_were_probed_in_part_count_as_unprobed(records: pandas.DataFrame) -> None:
    holes = records.copy()
    holes.loc[holes.layer == holes.layer.iloc[0], PROBED] = np.nan
    ranker = Ranker().fit(holes)
    assert ranker._model.probed[1].errors.pairs == 8  # of twelve: those of the one model are left out


def test_gains_that_noise_explains_say_little() -> None:
    chance = np.random.default_rng(0)
    true = np.linspace(0, 1, 40)
    sure = evidence(true, np.full(40, 0.01))
    assert np.array_equal(np.argsort(sure), np.arange(40)) and sure.max() > 0.45
    doubtful = evidence(true, np.full(40, 0.25))
    assert np.allclose(doubtful, sure * doubtful.max() / sure.max()) and doubtful.max() < 0.9 * sure.max()
    noise = evidence(chance.normal(size=40) * 0.1, np.full(40, 1.0))
    assert 0 < np.abs(noise).max() < 0.025
    assert not evidence(np.zeros(40), np.zeros(40)).any()


def test_how_layers_lose_makes_no_signal() -> None:
    """Losses count as no gain: of layers that lose, however differently, next to nothing is believed."""
    assert np.abs(evidence(np.linspace(-10, -1, 10), np.full(10, 0.01))).max() < 0.025


def test_a_layer_that_diverged_stands_last() -> None:
    found = evidence(np.array([0.1, np.nan, 0.3, -0.2]), np.full(4, 0.01))
    assert np.argmin(found) == 1
    assert not evidence(np.full(3, np.nan), np.full(3, np.nan)).any()


def test_a_probe_has_an_entry_for_each_layer() -> None:
    two = np.zeros(2)
    with pytest.raises(ValueError, match=r"errors has shape \[3\]; an entry for each of 2 layers"):
        Probe(("a", "b"), two, two, np.zeros(3), two, start=1.0)


def test_weights_are_never_negative_and_are_of_the_other_groups() -> None:
    chance = np.random.default_rng(0)
    places = chance.uniform(size=200)
    wrong, right = 1 - places, places - 0.5
    assert fit_weights(wrong, right, places, np.ones(200)) == pytest.approx((0.0, 1.0))
    groups = np.repeat([0, 1], 100)
    scores = np.where(groups == 0, places, 1 - places)
    mixed = mixed_without_own(scores, np.zeros(200), places, np.ones(200), list(groups))
    assert np.allclose(mixed[:100], 0.5)  # what the second group taught of the scores: nothing
    assert np.allclose(mixed[100:], scores[100:])


def test_the_note_says_what_the_scores_rest_on(records: pandas.DataFrame, ranker: Ranker) -> None:
    rows = fresh(records, "tower", "digits")
    profile = one_profile(records, "tower", "digits").drop(columns=[PROBED])
    known, probed = ranker.assess(profile), ranker.assess(profile, probe_of(rows))
    new = ranker.assess(one_profile(records, "bridge", "digits").drop(columns=[PROBED]))
    for found in (known, probed, new):
        assert sum(found.rests_on().values()) == pytest.approx(1.0)
    assert max(known.rests_on(), key=known.rests_on().get) == "this layer on other data"
    assert "this layer on other data" not in new.note and "rests on kind, size and weights" in new.note
    assert probed.rests_on()["the probe"] > 0.1 and "the probe" not in known.rests_on()
    share = known.rests_on()["this layer on other data"]
    assert f"rests on this layer on other data {share:.0%}" in known.note
