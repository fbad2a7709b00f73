import ast
import inspect
import json

import numpy as np
import pandas
import pytest
import torch
from profiles import make_profile
from torch import nn

import zest_fast
from zest_fast.profiling import heat_map, layer_profile, profile_files
from zest_fast.ranking import ranking as module
from zest_fast.ranking import shipped
from zest_fast.ranking.ranking import Ranking, rank

NAN = float("nan")


class Lengths:
    """A Ranker that prefers long names."""

    def predict(self, profile):
        return np.array([len(name) for name in profile], dtype=np.float32)


def test_largest_first_nan_last_ties_by_depth():
    scores = {"a": 1.0, "undefined": NAN, "b": 3.0, "late": 2.0, "early": 2.0, "lost": -np.inf}
    ranking = rank(make_profile(scores, depths={"late": 9, "early": 3}), by="snip")
    assert ranking.names == ["b", "early", "late", "a", "lost", "undefined"] == list(ranking)
    np.testing.assert_array_equal(ranking.scores, [3, 2, 2, 1, -np.inf, NAN])
    assert ranking.scores.dtype == np.float64 and len(ranking) == 6
    assert ranking.intervals.shape == (6, 2) and np.isnan(ranking.intervals).all()


def test_another_metric_gives_another_order():
    assert rank(make_profile({"a": 1.0, "b": 2.0}), by="plain").names == ["a", "b"]


def test_a_ranker_is_anything_that_predicts():
    ranking = rank(make_profile({"short": 2.0, "much_longer": 1.0}), by=Lengths())
    assert ranking.names == ["much_longer", "short"] and ranking.by == "Lengths"
    np.testing.assert_array_equal(ranking.scores, [11, 5])


def test_top_never_holds_the_head():
    ranking = rank(make_profile({"a": 1.0, "head": 9.0, "b": 2.0}, heads=("head",)), by="snip")
    assert ranking.names[0] == "head"
    assert ranking.top(1) == ("b",)
    assert ranking.top(np.int64(2)) == ("b", "a")


def test_top_says_how_many_there_are():
    ranking = rank(make_profile({"a": 1.0, "head": 9.0, "b": NAN}, heads=("head",)), by="snip")
    with pytest.raises(ValueError, match="n must be at least 1, not 0"):
        ranking.top(0)
    with pytest.raises(ValueError, match="n=3, but there are only 2 layers beside the head"):
        ranking.top(3)
    with pytest.raises(ValueError, match=r"snip is NaN for 1 of the 2 layers \(such as 'b'.*at most 1"):
        ranking.top(2)
    with pytest.raises(TypeError):
        ranking.top(1.5)


def test_refusals_name_what_can_be_used(monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path / "none.json")
    profile = make_profile({"a": 1.0})
    with pytest.raises(NotImplementedError, match=r"no Ranker ships.*snip, plain"):
        rank(profile)
    with pytest.raises(ValueError, match="by='snap' is no metric of this profile; nearest: 'snip'"):
        rank(profile, by="snap")
    with pytest.raises(ValueError, match="there are: 'snip', 'plain'"):
        rank(profile, by="fisher")
    with pytest.raises(TypeError, match=r"metric name or have .predict\(profile\), not int"):
        rank(profile, by=3)
    with pytest.raises(TypeError, match="must be a LayerProfile, not dict"):
        rank({"a": 1.0}, by="snip")


def test_scores_of_a_wrong_shape_are_refused():
    class Broken:
        def predict(self, profile):
            return np.ones((len(profile), 1))

    with pytest.raises(ValueError, match=r"by=Broken: scores must have shape \[2\].*not \[2, 1\]"):
        rank(make_profile({"a": 1.0, "b": 2.0}), by=Broken())


def test_explain():
    frame = rank(make_profile({"a": 0.0, "b": 4.0, "c": 0.0, "d": NAN}, heads=("b",)), by="snip").explain()
    assert list(frame.index) == ["b", "a", "c", "d"] and frame.index.name == "layer"
    assert list(frame["rank"]) == [1, 2, 3, 4]
    np.testing.assert_array_equal(frame["percentile"], [100, 25, 25, NAN])
    np.testing.assert_allclose(frame["z_score"], [2**0.5, -(2**-0.5), -(2**-0.5), NAN])
    assert list(frame["depth"]) == [1, 0, 2, 3] and list(frame["head"]) == [True, False, False, False]
    assert set(frame["kind"]) == {"linear"}


@pytest.mark.parametrize("scores", [{}, {"a": NAN}, {"a": 1.0, "b": 1.0}])
def test_explain_without_spread(scores):
    assert rank(make_profile(scores), by="snip").explain()["z_score"].isna().all()


def test_repr():
    scores = {f"blocks.{i}.fc": float(i) for i in range(30)} | {"undefined": NAN}
    lines = repr(rank(make_profile(scores, heads=("blocks.29.fc",)), by="snip")).splitlines()
    assert lines[0] == "Ranking of 31 layers by snip, 1 of them without a score"
    assert lines[2].split() == ["1", "blocks.29.fc", "(head)", "linear", "29"]
    assert lines[-1] == "… and 21 more"
    assert repr(rank(make_profile({}), by="snip")) == "Ranking of 0 layers by snip"


@pytest.mark.parametrize("source", [module, layer_profile, profile_files, heat_map])
def test_profiles_and_rankings_import_no_torch(source):
    imports = [
        node for node in ast.walk(ast.parse(inspect.getsource(source))) if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = [getattr(node, "module", None) or node.names[0].name for node in imports]
    assert names and not any(name.split(".")[0] == "torch" for name in names)


def _ranked():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)), nn.Linear(4, 3))
    return zest_fast.rank(zest_fast.profile(model, (torch.randn(6, 4), torch.arange(6) % 3)))


def test_places_are_indexed_as_a_sequence():
    ranking = _ranked()
    assert ranking[0] == ranking.names[0] and ranking[-1] == "6" and ranking[:2] == tuple(ranking.names[:2])
    assert list(ranking) == [ranking[place] for place in range(len(ranking))]
    with pytest.raises(IndexError):
        ranking[7]
    with pytest.raises(TypeError):
        ranking["0"]


def test_to_pandas_has_scores_and_intervals_in_order():
    ranking = _ranked()
    frame = ranking.to_pandas()
    assert list(frame.index) == ranking.names and frame["rank"].tolist() == list(range(1, 8))
    np.testing.assert_array_equal(frame[["low", "high"]].to_numpy(), ranking.intervals)
    explained = ranking.explain()
    pandas.testing.assert_frame_equal(frame, explained[list(frame)])


def test_reasons_are_the_largest_parts_of_the_explanation():
    ranking = _ranked()
    explained = ranking.explain()
    reasons = ranking.reasons(most=2)
    assert set(reasons) == set(ranking.names) - {"6"}
    for name, parts in reasons.items():
        added = explained.loc[name].drop([*ranking.to_pandas(), "percentile", "z_score"]).astype(float)
        assert [abs(value) for _, value in parts] == sorted(added.abs(), reverse=True)[: len(parts)]
        assert all(explained.loc[name, part] == value for part, value in parts)
    with pytest.raises(ValueError, match="most must be at least 1"):
        ranking.reasons(most=0)


def test_a_saved_ranking_is_the_same(tmp_path):
    for ranking in (_ranked(), rank(make_profile({"a": np.nan, "b": np.inf, "c": 1.0}), by="snip")):
        loaded = Ranking.load(ranking.save(tmp_path / "ranking.json"))
        assert (loaded.names, loaded.by, loaded.note, loaded.heads) == (
            ranking.names,
            ranking.by,
            ranking.note,
            ranking.heads,
        )
        np.testing.assert_array_equal(loaded.scores, ranking.scores)
        np.testing.assert_array_equal(loaded.intervals, ranking.intervals)
        pandas.testing.assert_frame_equal(loaded.explain(), ranking.explain(), check_exact=True)
        assert loaded.is_new == ranking.is_new and loaded.reasons() == ranking.reasons()
        assert repr(loaded) == repr(ranking)
        assert loaded.plain() == ranking.plain() == json.loads(json.dumps(ranking.plain(), allow_nan=False)) or (
            ranking.note  # where reasons are tuples, and lists in JSON
        )


def test_damaged_rankings_are_named(tmp_path):
    path = _ranked().save(tmp_path / "ranking.json")
    document = json.loads(path.read_text())

    def refused(message, **changes):
        path.write_text(json.dumps({**document, **changes}))
        with pytest.raises(ValueError, match=rf"ranking\.json.*{message}"):
            Ranking.load(path)

    refused("format version 2.*upgrade", version=2)
    refused("no ranking that can be read.*format", format="zest_fast.LayerProfile")
    refused("does not stand where its score belongs", layers=document["layers"][::-1])
    refused("does not stand|occurs|more than once", layers=document["layers"] + document["layers"][:1])
    parts = {name: values[1:] for name, values in document["assessment"]["parts"].items()}
    refused("expected 6 entries, found 5", assessment={**document["assessment"], "parts": parts})
    refused("'nonsense' is none of the layers", assessment={**document["assessment"], "layers": ["nonsense"]})
    path.write_text(json.dumps(document)[:-20])
    with pytest.raises(ValueError, match="torn"):
        Ranking.load(path)
    with pytest.raises(ValueError, match=r"ends in '\.csv'"):
        _ranked().save(tmp_path / "ranking.csv")


def test_plot_draws_the_best_layers(tmp_path):
    svg = _ranked().plot(tmp_path / "ranking.svg", n=3).read_text()
    assert "<!-- score, with its 80 % interval -->" in svg
    assert sum(f"<!-- {name} -->" in svg for name in _ranked().top(3)) == 3
    by_metric = rank(make_profile({"a": 2.0, "b": 1.0, "c": np.nan}), by="snip")
    assert "<!-- snip -->" in by_metric.plot(tmp_path / "metric.svg").read_text()
    with pytest.raises(ValueError, match="n must be at least 1"):
        by_metric.plot(tmp_path / "metric.svg", n=0)
    with pytest.raises(ValueError, match="no layer has a score by snip"):
        rank(make_profile({"a": np.nan}), by="snip").plot(tmp_path / "none.svg")
    with pytest.raises(ValueError, match="suffix"):
        by_metric.plot(tmp_path / "metric")
