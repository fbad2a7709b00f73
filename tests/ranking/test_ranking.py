import ast
import inspect

import numpy as np
import pytest
from profiles import make_profile

from zest_fast.profiling import heat_map, layer_profile, profile_files
from zest_fast.ranking import ranking as module
from zest_fast.ranking import shipped
from zest_fast.ranking.ranking import rank

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
