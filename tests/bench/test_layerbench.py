"""The evaluation of rankings, on synthetic records: nothing leaks, measures are right, a run ends in the README."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pytest
import torch
from pyarrow import parquet
from synthetic_records import make_records
from torch import nn

import zest_fast

pytest.importorskip("sklearn", reason="the evaluation's ridge is scikit-learn's: pip install scikit-learn")

from bench import data, readme, spectra, sweeps
from bench.layerbench import baselines, evaluation, goals, protocol, report, rivals
from bench.layerbench.baselines import Ridge
from bench.layerbench.control_contestants import CONTROLS, NAMES, control_profiles
from bench.layerbench.measures import (
    Bootstrap,
    attainable_tau,
    kept_gain,
    recovered_gain,
    reliability,
    tau_b,
    tau_between_seeds,
)
from bench.layerbench.mlp_on_pairs import PairMLP
from bench.layerbench.profiles import (
    PROFILE,
    block_of,
    by_block,
    gains_by_seed,
    mean_gain,
    profiles,
    with_start_losses,
    z_scores,
)

SWEPT = (
    (("efficientnet-lite0", "mobilenet-v2"), ("mnist", "mnist-corrupted", "fashion")),
    (("efficientnet-lite1",), ("fashion",)),
    (("minilm",), ("trec", "sms-spam")),
)


@pytest.fixture(scope="module")
def records() -> pandas.DataFrame:
    """`grad_norm` and `rgn` tell the part of a gain that the data set decides, in every model."""
    parts = [make_records(models, datasets, blocks=3, kind=0.2, layer=0.5, metric=1.0) for models, datasets in SWEPT]
    return pandas.concat(parts, ignore_index=True)


def spectra_of(records: pandas.DataFrame):
    """The first layer of every model has no noise (None)."""
    return {
        model: {
            layer: {"snr": float(place) if place else None, "condition_number": 2.0 + place}
            for place, layer in enumerate(rows.layer.unique())
        }
        for model, rows in records.groupby("model")
    }


def write_parquet(records: pandas.DataFrame, path: Path) -> Path:
    """As `consolidate` writes them, with the least that it says of each sweep."""
    pairs = records[["model", "dataset", "family"]].drop_duplicates().to_dict("records")
    sweeps = [pair | {"recipe": {}, "recipe_hash": "0" * 16, "versions": {"definitions": 1}} for pair in pairs]
    table = pyarrow.Table.from_pandas(records, preserve_index=False)
    parquet.write_table(table.replace_schema_metadata({b"zest_fast.records": json.dumps(sweeps).encode()}), path)
    return path


# Measures


def test_tau_b_of_hand_examples():
    gains = np.array([4.0, 3.0, 2.0, 1.0])
    assert tau_b(gains, gains) == pytest.approx(1)
    assert tau_b(-gains, gains) == pytest.approx(-1)
    assert tau_b(np.array([4.0, 3.0, 1.0, 2.0]), gains) == pytest.approx((5 - 1) / 6)
    # one tie among the scores: 5 concordant pairs, √(5 * 6) below
    assert tau_b(np.array([4.0, 3.0, 1.0, 1.0]), gains) == pytest.approx(5 / np.sqrt(30))
    assert tau_b(np.array([4.0, 3.0, np.nan, np.nan]), gains) == pytest.approx(5 / np.sqrt(30))
    assert tau_b(np.zeros(4), gains) == 0


def test_recovered_gain_is_one_for_the_best_and_zero_for_no_order():
    gains = np.array([0.5, 0.3, 0.1, -0.1])  # mean 0.2, best two 0.4
    assert recovered_gain(gains, gains, 2) == pytest.approx(1)
    assert recovered_gain(-gains, gains, 2) == pytest.approx(-1)
    assert recovered_gain(np.zeros(4), gains, 2) == pytest.approx(0)
    assert recovered_gain(np.array([4.0, 1.0, 3.0, 2.0]), gains, 2) == pytest.approx((0.3 - 0.2) / 0.2)
    # the second place is shared by the second and the third layer: half of each
    assert recovered_gain(np.array([4.0, 3.0, 3.0, 2.0]), gains, 2) == pytest.approx((0.35 - 0.2) / 0.2)
    assert recovered_gain(np.array([np.nan, 1.0, 2.0, 3.0]), gains, 3) == pytest.approx((0.1 - 0.2) / (0.3 - 0.2))
    assert recovered_gain(gains, gains, 10) == 1  # fewer layers than asked for: nothing can be missed


def test_kept_gain_counts_from_where_gains_do():
    gains = np.array([0.5, 0.3, 0.1, -0.1])
    assert kept_gain(gains, gains, 2) == pytest.approx(1)
    assert kept_gain(np.array([1.0, 4.0, 3.0, 2.0]), gains, 2) == pytest.approx(0.2 / 0.4)
    assert kept_gain(np.zeros(4), gains, 2) == pytest.approx(0.2 / 0.4)  # random: the mean of all
    assert kept_gain(-gains, gains - 0.35, 2) == -1  # next to nothing to gain: no less than that
    assert kept_gain(-gains, gains - 1, 2) == 1  # nothing to gain


def test_attainable_tau_is_what_the_truth_attains():
    generator = np.random.default_rng(0)
    truth = generator.normal(size=4000)
    seeds = truth + generator.normal(size=(3, 4000))
    assert reliability(seeds) == pytest.approx(0.75, abs=0.02)  # three seeds of 0.5 each: 3 * 0.5 / 2
    assert attainable_tau(0.75) == pytest.approx(2 / 3)  # asin(√0.75) = π / 3
    assert tau_b(truth, seeds.mean(axis=0)) == pytest.approx(attainable_tau(reliability(seeds)), abs=0.02)
    assert tau_between_seeds(seeds) == pytest.approx(1 / 3, abs=0.02)  # (2/π) asin(0.5)
    diverged = seeds.copy()
    diverged[0, 0] = -1e6  # one layer decides nothing
    assert reliability(diverged) == pytest.approx(reliability(seeds), abs=0.01)


def test_reliability_needs_two_seeds_and_is_never_negative():
    order = np.arange(10.0)
    assert np.isnan(reliability(order[None]))
    assert reliability(np.stack([order, -order])) == 0
    assert reliability(np.stack([order, np.zeros(10)])) == 0


def test_bootstrap_over_pairs_and_over_folds():
    values = np.linspace(0, 2, 30)
    low, high = Bootstrap(30, draws=10_000, seed=1).interval(values)
    assert (low + high) / 2 == pytest.approx(1, abs=0.02)
    assert (high - low) / (2 * 1.96) == pytest.approx(values.std() / np.sqrt(30), rel=0.05)
    same = [Bootstrap(30, draws=100, seed=1).interval(values) for _ in range(2)]
    assert same[0] == same[1]
    missing = np.where(np.arange(30) < 20, values, np.nan)
    assert Bootstrap(30, draws=1000, seed=1).interval(missing)[1] < values[19]
    assert np.isnan(Bootstrap(30, draws=10, seed=1).interval(np.full(30, np.nan))).all()
    heavy = np.where(np.arange(30) < 15, 0.0, 1.0)  # only the second half counts
    assert Bootstrap(30, draws=1000, seed=1).interval(values, heavy)[0] > values[15]
    between = np.repeat([0.0, 1.0, 2.0], 10)  # all of the spread lies between three folds
    folds = Bootstrap(30, draws=10_000, seed=1, clusters=[*"a" * 10, *"b" * 10, *"c" * 10])
    assert folds.interval(between) == (0, 2)
    assert Bootstrap(30, draws=10_000, seed=1).interval(between)[0] > 0.6


# Protocol


def test_protocol_knows_every_pair_that_is_planned_and_its_model():
    assert {*sweeps.PAIRS, *sweeps.LATER_PAIRS} == {f"{model}/{dataset}" for model, dataset in protocol.PAIRS}
    assert set(sweeps.PAIRS) == {f"{model}/{dataset}" for model, dataset in protocol.VERSION_1_PAIRS}
    assert set(protocol.MODEL_FAMILIES) == set(data.MODELS)
    for name, model in data.MODELS.items():
        assert protocol.MODEL_FAMILIES[name] == model.family
        assert protocol.MODALITIES[model.family] == {"image": "vision", "text": "text"}[model.kind]


def test_every_shipped_pair_is_judged():
    shipped = zest_fast.load_records()
    pairs, left_out = protocol.pairs_in(shipped)
    assert not left_out and len(pairs) == len(shipped[["model", "dataset"]].drop_duplicates())
    assert {(pair.model, pair.dataset) for pair in pairs} <= set(protocol.PAIRS)


def test_no_fold_trains_on_what_it_holds_out(records):
    pairs, left_out = protocol.pairs_in(records)
    assert not left_out and len(pairs) == 9
    tested: dict[str, list[protocol.Pair]] = {}
    for fold in protocol.folds(pairs):
        train, test = protocol.rows_of(records, fold.train), protocol.rows_of(records, fold.test)
        assert len(train) and len(test)
        if fold.setting == "known models":
            assert not set(train.family) & set(test.family) and set(test.model) <= set(train.model)
        else:
            families = [{protocol.MODEL_FAMILIES[model] for model in part.model} for part in (train, test)]
            assert not families[0] & families[1]
        if fold.setting == "other modality":
            modalities = [{protocol.MODALITIES[family] for family in part} for part in families]
            assert modalities[0] == {"vision", "text"} - modalities[1]
        tested.setdefault(fold.setting, []).extend(fold.test)
    assert sorted(tested["new models"]) == sorted(tested["other modality"]) == pairs  # each pair once
    lite1 = [pair for pair in pairs if pair.model == "efficientnet-lite1"]  # swept on one family of data sets
    assert sorted(tested["known models"] + lite1) == pairs


def test_pairs_outside_the_protocol_are_named_and_left_out(records):
    other = records[records.dataset == "trec"].assign(dataset="mine", family="mine")
    pairs, left_out = protocol.pairs_in(pandas.concat([records, other]))
    assert left_out == ["minilm/mine"] and "mine" not in {pair.dataset for pair in pairs}


class Watcher:
    """Keeps what it is shown."""

    def __init__(self):
        self.trained, self.asked = [], []

    def fit(self, train):
        self.trained.append(train)
        return self

    def predict(self, profile):
        self.asked.append(profile)
        return np.zeros(len(profile))


def test_contestants_see_neither_held_out_rows_nor_outcomes(records):
    records, _ = with_start_losses(records, [])
    for fold in protocol.folds(protocol.pairs_in(records)[0]):
        watcher = Watcher()
        evaluation.run_fold(fold, records, {}, lambda train, spectra, watcher=watcher: {"ranker": watcher})
        (train,) = watcher.trained
        seen = {(row.model, row.dataset) for row in train.itertuples()}
        assert seen == {(pair.model, pair.dataset) for pair in fold.train}
        for profile in watcher.asked:
            assert not {*protocol.OUTCOMES, "start_loss", "gain"} & set(profile.columns)
            assert len(profile.groupby(["model", "dataset", "seed", "head_state"])) == 1


def test_held_out_outcomes_change_no_prediction(records):
    """The strongest form of "nothing leaks": with other gains in the held-out pairs, every score is the same."""
    (fold,) = [f for f in protocol.folds(protocol.pairs_in(records)[0]) if f.held_out == "fashion"]
    changed = records.copy()
    held_out = changed.family == "fashion"
    changed.loc[held_out, "loss"] = np.random.default_rng(5).normal(size=held_out.sum())
    for name in ("ridge", "layer prior", "kind prior", "best single metric", "mlp on pairs", "spectrum", "ranker"):
        scores = []
        for frame in (records, changed):
            train = protocol.rows_of(frame, fold.train)
            every = quick(train, spectra_of(records)) | {"ranker": zest_fast.Ranker()}
            contestant = every[name].fit(train)
            test = protocol.rows_of(frame, fold.test).drop(columns=list(protocol.OUTCOMES), errors="ignore")
            scores.append(np.concatenate([contestant.predict(rows) for _, rows in profiles(test)]))
        np.testing.assert_array_equal(*scores, err_msg=name)


# Contestants


def quick(train, spectra):
    """All contestants but most single metrics; the slow ones trained briefly, or stood in for."""
    slow = {"mlp on pairs": PairMLP(steps=60), "ranker": Ridge(), "ranker, metrics only": Ridge()}
    every = baselines.contestants(train, spectra) | slow
    return {
        name: c for name, c in every.items() if not name.startswith("metric ") or name in ("metric rgn", "metric snip")
    }


def test_gains_are_means_over_seeds(records):
    pair = records[(records.model == "minilm") & (records.dataset == "trec")]
    by_seed = gains_by_seed(pair)
    assert by_seed.shape == (2, 12)
    row = pair[(pair.seed == 1) & (pair.head_state == "warm")].iloc[3]
    assert by_seed.loc[1, row.layer] == pytest.approx(row.head_loss - row.loss)
    assert mean_gain(pair)[row.name] == pytest.approx(by_seed[row.layer].mean())


def test_gains_count_from_the_head_retrained_alone_where_it_is_known(records):
    retrained = {str(seed): {"accuracy": 0.5, "loss": 4.0 + seed} for seed in (0, 1)}
    sweeps_ = [{"model": "minilm", "dataset": "trec", "head_retrained": retrained}]
    found, lacking = with_start_losses(records, sweeps_)
    assert "minilm/trec" not in lacking and len(lacking) == 8
    trec = (found.model == "minilm") & (found.dataset == "trec")
    assert (found.start_loss[trec] == 4.0 + found.seed[trec]).all()
    assert (found.start_loss[~trec] == found.head_loss[~trec]).all()
    # every layer's gain moves by the same: 5 - (4 + 5) / 2
    np.testing.assert_allclose(mean_gain(records)[trec] - mean_gain(found)[trec], 0.5)


def test_contestants_of_probes_say_nothing_of_pairs_that_were_not_probed(records):
    scores = np.where(records.model == "minilm", np.arange(len(records)) % 7 / 7 - 0.5, np.nan)
    probed = records.assign(probe_score=scores)
    names = {"ranker, probed", "probe alone"}
    assert names <= set(baselines.contestants(probed, {})) and not names & set(baselines.contestants(records, {}))
    contest = baselines.contestants(probed, {})
    mine = next(rows for key, rows in profiles(probed) if key[0] == "minilm")
    other = next(rows for key, rows in profiles(probed) if key[0] != "minilm")
    np.testing.assert_array_equal(contest["probe alone"].predict(mine), mine.probe_score)
    fitted = contest["ranker, probed"].fit(probed)
    assert fitted.ranker is contest["ranker"] and np.isfinite(fitted.predict(mine)).all()
    assert not np.array_equal(fitted.predict(mine), contest["ranker"].predict(mine))
    assert np.isnan(fitted.predict(other)).all()


def test_blocks_of_real_names():
    blocks = {
        "body.encoder.encoder.layer.3.attention.output.dense": "body.encoder.encoder.layer.3",
        "_blocks.0._depthwise_conv": "_blocks.0",
        "body.model.layer.0.expand_1x1.convolution": "body.model.layer.0",
        "body.blocks.32_1.conv1": "body.blocks.32_1",
        "body.enter0.first.depthwise": "body.enter0",
        "body.dense0.conv1.depthwise": "body.dense0.conv1",
        "_conv_stem": "_conv_stem",
        "classifier.6": "classifier.6",
    }
    assert {layer: block_of(layer) for layer in blocks} == blocks
    means = by_block(["a.1.x", "a.0.x", "a.1.y", "a.2.y"], np.array([1.0, 5.0, 3.0, np.nan]))
    np.testing.assert_array_equal(means, [5.0, 2.0, np.nan])


def test_z_scores_are_of_the_profile_and_nan_is_its_mean(records):
    frame = records.copy()
    frame.loc[frame.index[0], "snip"] = np.nan
    frame["plain"] = 3.0
    scores = z_scores(frame, ("snip", "plain"))
    assert scores[0, 0] == 0 and not scores[:, 1].any()
    for _, rows in profiles(frame):
        assert scores[rows.index, 0].mean() == pytest.approx(0, abs=1e-12)
    scaled = frame.assign(snip=frame.snip * 1e30)
    np.testing.assert_allclose(z_scores(scaled, ("snip",)), scores[:, :1], atol=1e-12)


def test_single_metric_learns_its_sign_and_the_best_is_found(records):
    flipped = records.assign(fisher=-2 * records.rgn)
    flipped.loc[flipped.head_state == "warm", "fisher"] *= -1
    single = baselines.SignedMetric(("fisher",)).fit(flipped)
    assert single.choice("minilm", "fresh")[1] < 0 < single.choice("minilm", "warm")[1]
    best = baselines.SignedMetric(("snip", "rgn", "grad_mean")).fit(records)
    assert best.choice("thin-resnet50", "fresh")[0] == "rgn"
    profile = next(rows for key, rows in profiles(records) if key[-1] == "fresh")
    np.testing.assert_array_equal(best.predict(profile), profile.rgn)


def test_priors_are_ranks_on_training_pairs(records):
    train = records[records.family != "fashion"]
    prior = baselines.LayerPrior().fit(train)
    profile = records[(records.dataset == "fashion") & (records.seed == 0) & (records.head_state == "fresh")]
    lite = profile[profile.model == "efficientnet-lite0"]
    of_lite = train[train.model == "efficientnet-lite0"]
    expected = pandas.DataFrame(
        {name: gains_by_seed(rows).mean().rank(pct=True) for name, rows in of_lite.groupby("dataset")}
    ).mean(axis=1)
    np.testing.assert_allclose(prior.predict(lite), expected[lite.layer])
    assert np.isnan(prior.predict(profile[profile.model == "efficientnet-lite1"])).all()
    kinds = baselines.KindPrior().fit(train)
    assert len(set(kinds.predict(lite))) == 3
    unknown = profile[profile.model == "efficientnet-lite1"]
    ranks = mean_gain(train).groupby([train[name] for name in PROFILE]).rank(pct=True).groupby(train.kind).mean()
    np.testing.assert_allclose(kinds.predict(unknown), ranks[unknown.kind])


def test_what_learns_beats_random_where_there_is_something_to_learn(records):
    (fold,) = [f for f in protocol.folds(protocol.pairs_in(records)[0]) if f.held_out == "mobilenet-v2"]
    rows = pandas.DataFrame(evaluation.run_fold(fold, records, spectra_of(records), quick))
    tau = rows[rows.head_state == "fresh"].groupby("contestant").tau.mean()
    for name in ("metric rgn", "best single metric", "ridge", "mlp on pairs"):
        assert tau[name] > 0.3, name
    assert tau["random"] == 0 and "layer prior" not in tau


def test_the_mlp_on_pairs_is_deterministic_and_leaves_the_random_state(records):
    train, profile = records[records.family != "mnist"], next(profiles(records))[1]
    state = torch.get_rng_state()
    scores = [PairMLP(steps=30).fit(train).predict(profile) for _ in range(2)]
    np.testing.assert_array_equal(*scores)
    assert torch.equal(state, torch.get_rng_state())
    # a layer is scored by itself: from its metrics, which are normalised within its profile
    reordered = profile.iloc[::-1]
    np.testing.assert_allclose(PairMLP(steps=30).fit(train).predict(reordered), scores[0][::-1], rtol=1e-6)


def test_spectrum_ranks_within_types_of_modules(records):
    profile = next(profiles(records))[1]
    scores = baselines.Spectrum(spectra_of(records)).predict(profile)
    for part in ("expand", "depthwise", "project", "mix"):
        of_type = scores[profile.layer.str.contains(f"{part}_of")]
        assert sorted(of_type) == pytest.approx([1 / 3, 2 / 3, 1])
    assert scores[0] == 1  # no singular value is noise


def test_rankings_that_see_no_batch(records):
    profile = next(profiles(records))[1]
    layers = len(profile)
    np.testing.assert_array_equal(rivals.NumberOfParameters().predict(profile), profile.numel)
    middle = rivals.Middle().predict(profile)
    assert set(np.argsort(middle)[-2:]) == {layers // 2 - 1, layers // 2} and middle[0] == middle[-1] == -0.5
    shuffled = profile.sample(frac=1, random_state=0)
    scores = pandas.Series(rivals.Uniform().predict(shuffled), shuffled.index)[profile.index].to_numpy()
    np.testing.assert_array_equal(scores, rivals.Uniform().predict(profile))
    order = np.argsort(-scores)
    assert sorted(order) == list(range(layers)) and list(order[:3]) == [layers // 2, layers // 4, 3 * layers // 4]
    for layers in (1, 2, 3, 7, 49):
        frame = pandas.DataFrame({"depth": np.arange(layers)})
        assert len(set(rivals.Uniform().predict(frame))) == layers


def test_published_criteria_of_a_hand_made_profile():
    profile = pandas.DataFrame(
        {
            "layer": ["a.0.q", "a.0.k", "a.1.q"],
            "grad_norm": [3.0, 4.0, 4.5],
            "numel": [4, 16, 9],
            "shape": [[2, 2], [4, 4], [3, 3]],
            "weight_mean": [0.0, 3.0, 0.0],
            "weight_std": [1.0, 4.0, 2.0],
            "act_mean": [0.0, 30.0, 0.0],
            "act_std": [2.0, 40.0, 0.0],
        }
    )
    np.testing.assert_allclose(rivals.NormalisedGradient().predict(profile), [1.5, 1.0, 1.5])
    np.testing.assert_allclose(rivals.Grass().predict(profile), [3.5, 3.5, 4.5])
    np.testing.assert_allclose(rivals.AdaGradSelect().predict(profile), [5.0, 5.0, 4.5])
    np.testing.assert_allclose(rivals.LisaWeightNorm().predict(profile), [2.0, 20.0, 6.0])
    # RMS of the input: 2 / (1 * √2), 50 / (5 * 2), and of the last, whose output is zero, nothing is known
    np.testing.assert_allclose(rivals.Resnorm().predict(profile), [3 / np.sqrt(2), 0.8, np.nan])


def test_the_input_norm_that_resnorm_infers_is_that_of_the_input():
    generator = np.random.default_rng(0)
    x, w = 3 * generator.normal(size=(500, 64)), 0.2 * generator.normal(size=(32, 64))
    y = x @ w.T
    profile = pandas.DataFrame(
        {
            "layer": ["a"], "grad_norm": [1.0], "shape": [[32, 64]], "weight_mean": [w.mean()], "weight_std": [w.std()],
            "act_mean": [y.mean()], "act_std": [y.std()],
        }
    )  # fmt: skip
    assert 1 / rivals.Resnorm().predict(profile)[0] == pytest.approx(3, rel=0.05)


# Controls


def controls_of(records: pandas.DataFrame, path: Path) -> Path:
    """Of seed 0 of every pair but MiniLM's: rgn says nothing any more, in either control."""
    rows = records[(records.seed == 0) & (records.model != "minilm")].drop(columns=["accuracy", "loss"])
    rows = rows.drop(columns=["head_accuracy", "head_loss"])
    chance = np.random.default_rng(9)
    frames = [rows.assign(control=c, rgn=chance.random(len(rows)), grad_abs_mean=1.0) for c in CONTROLS]
    pandas.concat(frames).sample(frac=1, random_state=3).to_parquet(path)
    return path


def test_controls_are_scored_by_the_contestant_that_was_fitted_to_the_true_records(records, tmp_path):
    controls = control_profiles(controls_of(records, tmp_path / "controls.parquet"))
    records, _ = with_start_losses(records, [])
    for held_out in ("mobilenet-v2", "minilm"):
        (fold,) = [
            f
            for f in protocol.folds(protocol.pairs_in(records)[0])
            if f.held_out == held_out and f.setting == "new models"
        ]
        watcher = Watcher()
        rows = evaluation.run_fold(fold, records, {}, lambda *_, watcher=watcher: {"ranker": watcher}, controls)
        found = {row["contestant"] for row in rows}
        assert len(watcher.trained) == 1
        if held_out == "minilm":  # there are no control profiles of it
            assert found == {"ranker"}
            continue
        assert found == {"ranker", "ranker, labels shuffled", "ranker, noise inputs"}
        true, *shown = watcher.asked[:3]
        for profile in shown:
            assert list(profile.columns) == list(true.columns) and list(profile.layer) == list(true.layer)
            assert (profile.dtypes == true.dtypes).all() and (profile.index == true.index).all()
            assert not np.allclose(profile.rgn, true.rgn)
            for name in ("numel", "kind", "seed", "head_state", "weight_std"):
                assert (profile[name] == true[name]).all(), name


def test_a_ranking_that_reads_the_batch_falls_with_the_controls_and_a_goal_says_so(records, tmp_path):
    controls = control_profiles(controls_of(records, tmp_path / "controls.parquet"))

    def few(train, spectra):
        names = (
            "step gain",
            "middle",
            "number of parameters",
            "best single metric",
            "depth",
            "kind prior",
            "metric rgn",
        )
        every = quick(train, spectra)
        return {name: every[name] for name in names} | {"ranker": baselines.LargeFirst("rgn")}

    found = evaluation.evaluate(records, {}, few, controls=controls, settings=("new models",))
    new = found["summary"]["new models"]["fresh"]["contestants"]
    for name in ("ranker, labels shuffled", "ranker, noise inputs"):
        ahead = new[name]["ranker_ahead"]["tau"]
        assert new[name]["tau"]["pairs"] == ahead["pairs"] == 7 and ahead["interval"][0] > 0.15
        words = "one batch: what the tau falls by with " + name.removeprefix("ranker, ")
        (goal,) = [goal for goal in found["must_reach"] if goal["goal"].startswith(words)]
        assert goal["met"] and goal["value"] == ahead["mean"]
    assert "minilm/trec" not in found["controls_of"] and len(found["controls_of"]) == 7
    read = ("ranker", "step gain")
    assert set(NAMES) & set(new) == {f"{name}, {how}" for name in read for how in ("labels shuffled", "noise inputs")}
    assert set(goals.NO_BASELINES) >= set(NAMES)
    assert set(found["summary"]) == {"new models"} and "one batch: mean tau" in found["must_reach"][0]["goal"]
    document = {"summary": found["summary"], "summary_of_version_1_pairs": {}, "must_reach": [], "diagnosis": []}
    text = report.layerbench_text(document)
    shown = f"{new['ranker, noise inputs']['tau']['mean']:.2f}"
    assert f"with noise for inputs {shown}" in text and ", 7 pairs)" in text


# Spectra


def test_condition_numbers_are_those_of_peft():
    peft = pytest.importorskip("peft")
    if not hasattr(peft.helpers, "KappaTuneSelector"):
        pytest.skip("this peft has no KappaTuneSelector")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4), nn.Linear(4, 4))
    selector = peft.helpers.KappaTuneSelector(model, show_progress=False)
    ours = spectra.of_model(model)
    assert selector.get_best_targets() == sorted(ours, key=lambda name: ours[name]["condition_number"])
    for name, value in selector._condition_numbers.items():
        assert ours[name]["condition_number"] == pytest.approx(value, rel=1e-5)


def test_signal_to_noise_of_a_known_spectrum():
    singular = torch.tensor([10.0, 2.0, 1.5, 1.0, 0.5])  # quartiles 1 and 2, σ = 1 / 1.349
    square = spectra.signal_to_noise(singular, 5, 5)  # edge 2σ = 1.48: 10, 2 and 1.5 lie beyond
    assert square == pytest.approx(13.5 / 1.5 / 10)
    wide = spectra.signal_to_noise(singular, 5, 500)  # edge 1.1 σ = 0.82
    assert wide == pytest.approx(14.5 / 0.5 / 10)
    assert spectra.signal_to_noise(torch.ones(4), 4, 4) == np.inf  # no spread, no noise


def test_spectra_are_computed_once_and_unknown_models_are_named(tmp_path):
    path = tmp_path / "spectra.json"
    path.write_text(json.dumps({"mine": {"a": {"snr": 1.0, "condition_number": 2.0}}}))
    assert spectra.load_spectra(["mine"], path)["mine"]["a"]["snr"] == 1.0
    with pytest.raises(ValueError, match="'other'"):
        spectra.load_spectra(["other"], path)


# The whole run


@pytest.fixture(scope="module")
def document(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layerbench")
    (folder / "spectra.json").write_text(json.dumps(spectra_of(records)))
    path = write_parquet(records, folder / "records.parquet")
    arguments = ["--records", path, "--spectra", folder / "spectra.json", "--out", folder]
    arguments += ["--controls", folder / "none.parquet"]
    threads = torch.get_num_threads()
    evaluation.main(list(map(str, arguments)), contest=quick)
    torch.set_num_threads(threads)
    return folder / "layerbench.json"


def test_the_json_holds_every_pair_contestant_setting_and_state(document, records):
    found = json.loads(document.read_text())
    assert found["protocol"]["sha256"] == protocol.protocol_hash() and "Clean and" in found["protocol"]["text"]
    assert len(found["records"]["sha256"]) == 64 and found["not_known"] == ["efficientnet-lite1/fashion"]
    pairs = {f"{row.model}/{row.dataset}" for row in records.itertuples()}
    for setting in ("known models", "new models", "other modality"):
        for state in ("fresh", "warm"):
            entries = [e for e in found["results"] if (e["setting"], e["head_state"]) == (setting, state)]
            expected = pairs - set(found["not_known"]) if setting == "known models" else pairs
            assert {entry["pair"] for entry in entries} == expected and len(entries) == len(expected)
            part = found["summary"][setting][state]["contestants"]
            assert ("layer prior" in part) == (setting == "known models")
            for name, contestant in part.items():
                taus = [entry["tau"][name] for entry in entries]
                low, high = contestant["tau"]["interval"]
                assert contestant["tau"]["mean"] == pytest.approx(np.mean(taus), abs=1e-4)
                assert low - 1e-9 <= contestant["tau"]["mean"] <= high + 1e-9
                lead = part["ranker"]["tau"]["mean"] - contestant["tau"]["mean"]
                assert contestant["ranker_ahead"]["tau"]["mean"] == pytest.approx(lead, abs=2e-4)
            assert part["random"]["tau"]["mean"] == part["random"]["top_5"]["mean"] == 0
            for contestant in part.values():
                values = contestant["tau"]
                assert values["weighted_interval"][0] - 1e-9 <= values["weighted_mean"]
    apart = found["summary_of_version_1_pairs"]["new models"]["fresh"]
    assert (
        apart["pairs"] == 9
        and apart["contestants"]["ranker"] == found["summary"]["new models"]["fresh"]["contestants"]["ranker"]
    )
    assert found["head_not_retrained"] == sorted(pairs) and found["protocol"]["version"] == 2
    assert {entry["pair"] for entry in found["diagnosis"]} == pairs
    assert all(0 < entry["attainable_tau"] <= 1 and entry["layers"] in (12, 16) for entry in found["diagnosis"])
    for goal in found["must_reach"]:
        words, bar = goal["goal"].rsplit(" ", 1)
        assert goal["met"] is (goal["value"] > float(bar) if words.endswith("above") else goal["value"] >= float(bar))


def test_the_readme_shows_the_run_and_drift_is_found(document, tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    page.write_text("<!-- bench:ranking:begin -->\n<!-- bench:ranking:end -->\n")
    results = document.parent

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["readme", "--readme", str(page), "--results", str(results), *arguments])
        readme.main()

    run()
    text, plot = page.read_text(), (results / "layerbench.svg").read_text()
    found = json.loads(document.read_text())
    ranker = found["summary"]["new models"]["fresh"]["contestants"]["ranker"]["tau"]["mean"]
    row = next(line for line in text.splitlines() if line.startswith("| **Ranker, one batch** |"))
    assert f"the Ranker {ranker:.2f}; number of parameters alone" in text and "version 1 of the protocol" in text
    assert "*no batch:* middle first" in text and "*control:*" not in text.split("*Tau*")[0]
    assert f"{ranker:.2f} (" in row and "metric rgn" in plot and "known models" in plot
    assert text.count(", met") + text.count(", **missed**") == len(found["must_reach"])
    run("--check")
    (results / "layerbench.svg").write_text(plot.replace("SHA-256 ", "SHA-256 0"))
    with pytest.raises(SystemExit, match=r"README\.md"):
        run("--check")
    run()
    assert (results / "layerbench.svg").read_text() == plot  # drawn again, to the byte


def test_what_stands_out_about_a_pair_that_ranks_badly():
    from bench.layerbench.diagnosis import signs

    target = pandas.Series({"attainable_tau": 0.8, "reliability": 0.5, "worse_than_head_alone": 6, "layers": 12})
    taus = {"ranker": 0.1, "layer_prior": 0.6, "best_metric": -0.5}
    noise, recipe, prior, metric = signs(target, taus)
    assert noise.startswith("noise") and "0.50" in noise and "50%" in recipe
    assert "layer prior" in prior and "hindsight" in metric
    assert signs(target, taus | {"ranker": 0.7}) == []
    clean = pandas.Series({"attainable_tau": 0.9, "reliability": 0.95, "worse_than_head_alone": 0, "layers": 12})
    assert signs(clean, {"ranker": 0.1, "layer_prior": np.nan, "best_metric": 0.1}) == [
        "nothing measured here explains it"
    ]


def test_scores_of_another_shape_and_records_that_hold_nothing_out_are_errors(records):
    with pytest.raises(ValueError, match="12 layers"):
        evaluation.measure(np.zeros(11), np.zeros(12), list("abcdefghijkl"))
    one = records[(records.model == "minilm") & (records.dataset == "trec")]
    with pytest.raises(ValueError, match="nothing to hold out"):
        evaluation.evaluate(one, {})
