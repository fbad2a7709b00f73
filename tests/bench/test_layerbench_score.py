"""`python -m bench.layerbench score`: right figures for what is right, and a name for everything that is wrong."""

from __future__ import annotations

import hashlib
import json
import textwrap
from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pytest
from pyarrow import parquet
from synthetic_records import make_records

pytest.importorskip("sklearn", reason="contestants stand beside a ranking: pip install scikit-learn")

from bench.layerbench import __main__ as command
from bench.layerbench import protocol, scoring
from bench.layerbench.measures import recovered_gain, tau_b
from bench.layerbench.profiles import gains_by_seed
from bench.layerbench.submissions import ScoresFile, check_records

MODELS, DATASETS = ("efficientnet-lite0", "mobilenet-v2"), ("mnist", "fashion")


def write(records: pandas.DataFrame, path: Path, recipes=None, definitions: int = 1) -> Path:
    recipes = scoring._recipes() if recipes is None else recipes
    sweeps = [
        pair | {"recipe": {}, "recipe_hash": recipes[pair["model"]], "versions": {"definitions": definitions}}
        for pair in records[["model", "dataset", "family"]].drop_duplicates().to_dict("records")
    ]
    table = pyarrow.Table.from_pandas(records, preserve_index=False)
    parquet.write_table(table.replace_schema_metadata({b"zest_fast.records": json.dumps(sweeps).encode()}), path)
    return path


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> tuple[pandas.DataFrame, Path]:
    """Records in which rgn tells the gains of a pair, and the file of them."""
    records = make_records(MODELS, DATASETS, blocks=2, metric=1.0, layer=0.3, kind=0.1)
    return records, write(records, tmp_path_factory.mktemp("score") / "records.parquet")


def true_scores(records: pandas.DataFrame) -> pandas.DataFrame:
    """Of each layer its gain, less on the second data set of the second model: a ranking in reverse."""
    rows = []
    for (model, dataset), pair in records.groupby(["model", "dataset"]):
        gains = gains_by_seed(pair).mean()
        sign = -1 if (model, dataset) == (MODELS[1], DATASETS[1]) else 1
        rows += [{"model": model, "dataset": dataset, "layer": layer, "score": sign * g} for layer, g in gains.items()]
    return pandas.DataFrame(rows)


def csv(frame: pandas.DataFrame, folder: Path) -> Path:
    frame.to_csv(folder / "scores.csv", index=False)
    return folder / "scores.csv"


def code(text: str, folder: Path) -> Path:
    (folder / "ranking.py").write_text(textwrap.dedent(text))
    return folder / "ranking.py"


# What is right


def test_scores_of_a_file_are_held_against_the_true_gains(swept, tmp_path):
    records, path = swept
    found = scoring.score(csv(true_scores(records), tmp_path), path, published=tmp_path / "none.json")
    assert list(found["settings"]) == ["known models", "new models"] and not found["ranking"]["learns"]
    values = {entry["pair"]: entry for entry in found["results"] if entry["setting"] == "new models"}
    assert len(values) == 4
    for pair, entry in values.items():
        expected = -1 if pair == "mobilenet-v2/fashion" else 1
        assert entry["tau"]["yours"] == expected and entry["tau"]["random"] == 0
        assert (entry["top_3"]["yours"] == 1) == (expected == 1)
    part = found["settings"]["new models"]
    yours = part["contestants"]["yours"]
    assert part["pairs"] == 4 and yours["tau"]["mean"] == 0.5
    low, high = yours["tau"]["interval"]
    assert low <= 0.5 <= high
    ahead = part["contestants"]["number of parameters"]
    assert ahead["yours_ahead"]["mean"] == pytest.approx(0.5 - ahead["tau"]["mean"], abs=2e-4)
    assert "no none.json" in found["ranker"]


def test_baselines_are_the_protocols_and_a_metric_scored_as_code_or_as_a_file_is_the_same(swept, tmp_path):
    records, path = swept
    ranking = code("def score(profile):\n    return profile.rgn.tolist()", tmp_path)
    from_code = scoring.score(ranking, path, published=tmp_path / "none.json")
    fresh = records[records.head_state == "fresh"].rename(columns={"rgn": "score"})
    file = csv(fresh[["model", "dataset", "seed", "layer", "score"]], tmp_path)
    from_file = scoring.score(file, path, published=tmp_path / "none.json")
    assert from_code["settings"] == from_file["settings"] and from_code["results"] == from_file["results"]
    both = records[["model", "dataset", "seed", "head_state", "layer", "rgn"]].rename(columns={"rgn": "score"})
    assert scoring.score(csv(both, tmp_path), path, published=tmp_path / "none.json")["results"] == from_file["results"]
    pair = records[(records.model == MODELS[0]) & (records.dataset == "mnist")]
    gains = gains_by_seed(pair).mean()
    taus, tops = [], []
    for _, profile in pair[pair.head_state == "fresh"].groupby("seed"):
        truth = gains[profile.layer].to_numpy()
        taus.append(tau_b(profile.numel.to_numpy(float), truth))
        tops.append(recovered_gain(profile.rgn.to_numpy(), truth, 5))
    (entry,) = [
        e for e in from_code["results"] if e["pair"] == "efficientnet-lite0/mnist" and e["setting"] == "new models"
    ]
    assert entry["tau"]["number of parameters"] == pytest.approx(np.mean(taus), abs=1e-4)
    assert entry["top_5"]["yours"] == pytest.approx(np.mean(tops), abs=1e-4)
    warm = scoring.score(ranking, path, published=tmp_path / "none.json", head_state="warm")
    assert warm["results"] != from_code["results"]


def test_code_that_learns_is_fitted_to_the_training_part_of_each_fold_anew(swept, tmp_path):
    _, path = swept
    log = tmp_path / "log.txt"
    ranking = code(
        f"""
        fitted = []
        def fit(train):
            assert not fitted, "a fold saw the one before"
            fitted.append(sorted(set(train.model + "/" + train.dataset)))
            assert (train.head_loss - train.loss).groupby([train.model, train.dataset, train.layer]).mean().size
            assert "gain" in train
        def score(profile):
            assert not {{"gain", "loss", "accuracy", "head_loss", "head_accuracy", "start_loss"}} & set(profile)
            pair = profile.model[0] + "/" + profile.dataset[0]
            assert pair not in fitted[0]
            open({str(log)!r}, "a").write(pair + " after " + ", ".join(fitted[0]) + "\\n")
            return profile.rgn
        """,
        tmp_path,
    )
    found = scoring.score(ranking, path, published=tmp_path / "none.json")
    assert found["ranking"]["learns"]
    lines = log.read_text().splitlines()
    assert len(lines) == 2 * 4 * 2  # settings, pairs, seeds
    assert sum(line.startswith("mobilenet-v2/mnist after efficientnet-lite0/fashion, ") for line in lines) == 4


def test_partial_files_leave_pairs_out_of_every_figure(swept, tmp_path):
    records, path = swept
    scores = true_scores(records)
    file = csv(scores[scores.dataset != "fashion"], tmp_path)
    with pytest.raises(
        ValueError, match=r"no scores of 2 of 4 pairs: efficientnet-lite0/fashion, mobilenet-v2/fashion"
    ):
        scoring.score(file, path, published=tmp_path / "none.json")
    found = scoring.score(file, path, published=tmp_path / "none.json", partial=True)
    assert found["left_out"] == ["efficientnet-lite0/fashion", "mobilenet-v2/fashion"]
    assert all(part["pairs"] == 2 for part in found["settings"].values())
    assert found["settings"]["new models"]["contestants"]["yours"]["tau"]["mean"] == 1


def published(records_path: Path, path: Path, **other: str) -> Path:
    """As `evaluate` writes it, with the least that is read."""
    sha256 = hashlib.sha256(records_path.read_bytes()).hexdigest()
    results = [
        {"setting": setting, "pair": f"{model}/{dataset}", "head_state": state}
        | {name: {"ranker": 0.25 if state == "fresh" else 0.75} for name in scoring.SHOWN}
        for setting in ("known models", "new models")
        for model in MODELS
        for dataset in DATASETS
        for state in ("fresh", "warm")
    ]
    found = {"records": sha256, "protocol": protocol.protocol_hash()} | other
    path.write_text(json.dumps({name: {"sha256": value} for name, value in found.items()} | {"results": results}))
    return path


def test_the_rankers_published_figures_stand_beside_where_they_are_of_the_same_records(swept, tmp_path):
    records, path = swept
    file = csv(true_scores(records), tmp_path)
    found = scoring.score(file, path, published=published(path, tmp_path / "layerbench.json"))
    ranker = found["settings"]["new models"]["contestants"]["ranker (published)"]
    assert ranker["tau"]["mean"] == 0.25 and ranker["yours_ahead"]["mean"] == 0.25 and not found["ranker"]
    for what in ("records", "protocol"):
        other = published(path, tmp_path / "layerbench.json", **{what: "f" * 64})
        found = scoring.score(file, path, published=other)
        assert f"is of other {what} (ffffffffffff, not " in found["ranker"]
        assert "ranker (published)" not in found["settings"]["new models"]["contestants"]


def test_the_command_prints_tables_and_writes_every_figure(swept, tmp_path, capsys):
    records, path = swept
    file, out = csv(true_scores(records), tmp_path), tmp_path / "mine.json"
    arguments = ["score", file, "--records", path, "--published", tmp_path / "none.json", "--out", out]
    command.main(list(map(str, arguments)))
    text = capsys.readouterr().out
    assert "new models: 4 pairs" in text and "number of parameters" in text and "yours learns nothing" in text
    found = json.loads(out.read_text())
    assert found["records"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found["protocol"] == {"version": protocol.VERSION, "sha256": protocol.protocol_hash()}
    file.write_text("model\n")
    with pytest.raises(SystemExit) as stopped:
        command.main(list(map(str, arguments)))
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: '{file}': column 'dataset' is missing; there are 'model'")


# What is wrong


def _renamed(scores: pandas.DataFrame, column: str, value: object, rows=slice(0, 1)) -> pandas.DataFrame:
    changed = scores.astype({column: object})
    changed.iloc[rows, changed.columns.get_loc(column)] = value
    return changed


WRONG = {
    "no scores": (lambda s: s[:0], "it holds no scores"),
    "wrong column": (lambda s: s.rename(columns={"layer": "name"}), "column 'layer' is missing; there are 'model'"),
    "more columns": (lambda s: s.assign(notes="x"), "column 'notes' is unknown; model, dataset, layer, score"),
    "NaN": (lambda s: _renamed(s, "score", float("nan")), "1 scores are no finite number, the first is '' of eff"),
    "infinite": (lambda s: _renamed(s, "score", "inf"), r"the first is 'inf' of efficientnet-lite0/fashion, layer '"),
    "a word": (lambda s: _renamed(s, "score", "high"), "the first is 'high'"),
    "unknown model": (
        lambda s: _renamed(s, "model", "mobilenet"),
        "model 'mobilenet' is not in the records; nearest: 'mobilenet-v2'",
    ),
    "unknown data set": (lambda s: _renamed(s, "dataset", "mnits"), "dataset 'mnits' is not in the records; nearest"),
    "missing pair": (lambda s: s[s.model != MODELS[1]], "no scores of 2 of 4 pairs: mobilenet-v2/fashion"),
    "missing layer": (lambda s: s[1:], r"efficientnet-lite0/fashion: no score of 1 of 8 layers: efficientnet-lite0\.0"),
    "unknown layer": (
        lambda s: pandas.concat([s, s[:1].assign(layer="efficientnet-lite0.0.expand")]),
        "efficientnet-lite0/fashion has no layer 'efficientnet-lite0.0.expand'; nearest",
    ),
    "twice": (lambda s: pandas.concat([s, s[:1]]), "1 layers have two scores, the first is efficientnet-lite0/fashion"),
    "unknown seed": (lambda s: s.assign(seed=7), "seed '7' is not in the records; nearest|there are: '0', '1'"),
    "missing seed": (lambda s: s.assign(seed=1), "no scores of efficientnet-lite0/fashion, seed 0"),
    "unknown state": (lambda s: s.assign(head_state="hot"), "head_state is 'hot'; there are fresh, warm"),
    "other state": (lambda s: s.assign(head_state="warm"), "no scores of 4 of 4 pairs"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_with_a_file_of_scores_is_named(kind, swept, tmp_path):
    records, _ = swept
    change, words = WRONG[kind]
    file = csv(change(true_scores(records)), tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        ScoresFile(file, records)
    assert str(file) in str(error.value)


def test_files_that_are_no_csv_are_named(swept, tmp_path):
    records, _ = swept
    for content in (b"", b"\xff\xfe\x00", b'model,dataset,layer,score\n"a,b\n', b"model,dataset\n1,2,3\n1,2,3,4\n"):
        (tmp_path / "scores.csv").write_bytes(content)
        with pytest.raises(ValueError, match=r"scores\.csv"):
            ScoresFile(tmp_path / "scores.csv", records)
    with pytest.raises(ValueError, match="a folder, no regular file"):
        ScoresFile(tmp_path, records)
    with pytest.raises(FileNotFoundError):
        ScoresFile(tmp_path / "none.csv", records)


BAD_CODE = {
    "no function": ("x = 1", "it has no function 'score'"),
    "no function to fit": ("fit = 3\ndef score(profile): return profile.rgn", "it has no function 'fit'"),
    "a syntax error": ("def score(profile) return 1", "the import ended in SyntaxError"),
    "an error": ("def score(profile): return profile.nothing", "score of .* ended in AttributeError"),
    "an error in fit": ("def fit(train): 1 / 0\ndef score(profile): return profile.rgn", "fit ended in ZeroDivision"),
    "too few": ("def score(profile): return profile.rgn[1:]", r"has shape \[7\], there are 8 layers"),
    "a number": ("def score(profile): return 1.0", r"has shape \[\], there are 8"),
    "words": ("def score(profile): return list(profile.layer)", "is a list; numbers are needed"),
    "NaN": (
        "def score(profile): return profile.rgn.where(profile.depth > 0)",
        "is no finite number for 1 layers: efficientnet-lite0",
    ),
}


@pytest.mark.parametrize("kind", BAD_CODE)
def test_what_is_wrong_with_code_is_named(kind, swept, tmp_path):
    text, words = BAD_CODE[kind]
    ranking = code(text, tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        scoring.score(ranking, swept[1], published=tmp_path / "none.json")
    assert str(ranking) in str(error.value)


def test_records_of_another_protocol_are_refused(swept, tmp_path):
    records, _ = swept
    ranking = code("def score(profile): return profile.rgn", tmp_path)
    recipes = scoring._recipes()
    other = write(records, tmp_path / "other.parquet", recipes | {"mobilenet-v2": "0" * 16})
    with pytest.raises(
        ValueError, match=r"mobilenet-v2/mnist was swept by the recipe 0000000000000000, the protocol's"
    ):
        scoring.score(ranking, other)
    other = write(records, tmp_path / "other.parquet", definitions=2)
    with pytest.raises(ValueError, match="efficientnet-lite0/mnist has metrics of version 2, the protocol's have 1"):
        scoring.score(ranking, other)
    mine = records.assign(dataset="mine", family="mine")
    with pytest.raises(ValueError, match="holds no pair of the protocol; it has efficientnet-lite0/mine, mob"):
        scoring.score(ranking, write(mine, tmp_path / "other.parquet"))
    (tmp_path / "other.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"other\.parquet"):
        scoring.score(ranking, tmp_path / "other.parquet")


def test_the_shipped_records_are_of_this_protocol():
    from zest_fast.sweeping.tables import sweeps_of

    check_records(sweeps_of(), scoring._recipes(), scoring._definitions())
