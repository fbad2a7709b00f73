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

from bench import data, ranking, ranking_baselines, readme, spectra, sweeps
from bench import ranking_protocol as protocol
from bench.layerbench.mlp_on_pairs import PairMLP
from bench.layerbench.baselines import Ridge
from bench.layerbench.measures import (
    Bootstrap,
    attainable_tau,
    recovered_gain,
    reliability,
    tau_b,
    tau_between_seeds,
)
from bench.layerbench.profiles import PROFILE, gains_by_seed, mean_gain, profiles, z_scores

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
    between = np.repeat([0.0, 1.0, 2.0], 10)  # all of the spread lies between three folds
    folds = Bootstrap(30, draws=10_000, seed=1, clusters=[*"a" * 10, *"b" * 10, *"c" * 10])
    assert folds.interval(between) == (0, 2)
    assert Bootstrap(30, draws=10_000, seed=1).interval(between)[0] > 0.6


# Protocol


def test_protocol_knows_every_pair_that_it_was_frozen_with_and_their_models():
    assert set(sweeps.PAIRS) <= {f"{model}/{dataset}" for model, dataset in protocol.PAIRS}
    assert not set(sweeps.LATER_PAIRS) & {f"{model}/{dataset}" for model, dataset in protocol.PAIRS}
    for name in {pair.partition("/")[0] for pair in sweeps.PAIRS}:
        model = data.MODELS[name]
        assert protocol.MODEL_FAMILIES[name] == model.family
        assert protocol.MODALITIES[model.family] == {"image": "vision", "text": "text"}[model.kind]


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
    for fold in protocol.folds(protocol.pairs_in(records)[0]):
        watcher = Watcher()
        ranking.run_fold(fold, records, {}, lambda train, spectra, watcher=watcher: {"ranker": watcher})
        (train,) = watcher.trained
        seen = {(row.model, row.dataset) for row in train.itertuples()}
        assert seen == {(pair.model, pair.dataset) for pair in fold.train}
        for profile in watcher.asked:
            assert not set(protocol.OUTCOMES) & set(profile.columns)
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
            test = protocol.rows_of(frame, fold.test).drop(columns=list(protocol.OUTCOMES))
            scores.append(np.concatenate([contestant.predict(rows) for _, rows in profiles(test)]))
        np.testing.assert_array_equal(*scores, err_msg=name)


# Contestants


def quick(train, spectra):
    """All contestants but most single metrics; the slow ones trained briefly, or stood in for."""
    slow = {"mlp on pairs": PairMLP(steps=60), "ranker": Ridge(), "ranker, metrics only": Ridge()}
    every = ranking_baselines.contestants(train, spectra) | slow
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
    single = ranking_baselines.SignedMetric(("fisher",)).fit(flipped)
    assert single.choice("minilm", "fresh")[1] < 0 < single.choice("minilm", "warm")[1]
    best = ranking_baselines.SignedMetric(("snip", "rgn", "grad_mean")).fit(records)
    assert best.choice("thin-resnet50", "fresh")[0] == "rgn"
    profile = next(rows for key, rows in profiles(records) if key[-1] == "fresh")
    np.testing.assert_array_equal(best.predict(profile), profile.rgn)


def test_priors_are_ranks_on_training_pairs(records):
    train = records[records.family != "fashion"]
    prior = ranking_baselines.LayerPrior().fit(train)
    profile = records[(records.dataset == "fashion") & (records.seed == 0) & (records.head_state == "fresh")]
    lite = profile[profile.model == "efficientnet-lite0"]
    of_lite = train[train.model == "efficientnet-lite0"]
    expected = pandas.DataFrame(
        {name: gains_by_seed(rows).mean().rank(pct=True) for name, rows in of_lite.groupby("dataset")}
    ).mean(axis=1)
    np.testing.assert_allclose(prior.predict(lite), expected[lite.layer])
    assert np.isnan(prior.predict(profile[profile.model == "efficientnet-lite1"])).all()
    kinds = ranking_baselines.KindPrior().fit(train)
    assert len(set(kinds.predict(lite))) == 3
    unknown = profile[profile.model == "efficientnet-lite1"]
    ranks = mean_gain(train).groupby([train[name] for name in PROFILE]).rank(pct=True).groupby(train.kind).mean()
    np.testing.assert_allclose(kinds.predict(unknown), ranks[unknown.kind])


def test_what_learns_beats_random_where_there_is_something_to_learn(records):
    (fold,) = [f for f in protocol.folds(protocol.pairs_in(records)[0]) if f.held_out == "mobilenet-v2"]
    rows = pandas.DataFrame(ranking.run_fold(fold, records, spectra_of(records), quick))
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
    scores = ranking_baselines.Spectrum(spectra_of(records)).predict(profile)
    for part in ("expand", "depthwise", "project", "mix"):
        of_type = scores[profile.layer.str.contains(f"{part}_of")]
        assert sorted(of_type) == pytest.approx([1 / 3, 2 / 3, 1])
    assert scores[0] == 1  # no singular value is noise


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
    folder = tmp_path_factory.mktemp("ranking")
    (folder / "spectra.json").write_text(json.dumps(spectra_of(records)))
    path = write_parquet(records, folder / "records.parquet")
    arguments = ["--records", path, "--spectra", folder / "spectra.json", "--out", folder]
    threads = torch.get_num_threads()
    ranking.main(list(map(str, arguments)), contest=quick)
    torch.set_num_threads(threads)
    return folder / "ranking.json"


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
    text, plot = page.read_text(), (results / "ranking.svg").read_text()
    found = json.loads(document.read_text())
    ranker = found["summary"]["new models"]["fresh"]["contestants"]["ranker"]["tau"]["mean"]
    row = next(line for line in text.splitlines() if line.startswith("| **Ranker** |"))
    assert f"{ranker:.2f} (" in row and "metric rgn" in plot and "known models" in plot
    assert text.count(", met") + text.count(", **missed**") == len(found["must_reach"])
    run("--check")
    (results / "ranking.svg").write_text(plot.replace("SHA-256 ", "SHA-256 0"))
    with pytest.raises(SystemExit, match=r"README\.md"):
        run("--check")
    run()
    assert (results / "ranking.svg").read_text() == plot  # drawn again, to the byte


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
        ranking.measure(np.zeros(11), np.zeros(12))
    one = records[(records.model == "minilm") & (records.dataset == "trec")]
    with pytest.raises(ValueError, match="nothing to hold out"):
        ranking.evaluate(one, {})
