import builtins
import json

import numpy as np
import pytest
from profiles import make_profile

from zest_fast.profiling.heat_map import layer_types
from zest_fast.profiling.layer_profile import LayerProfile

AWKWARD = [0.1, -0.0, 5e-324, 1.7976931348623157e308, 1e61, np.nan, np.inf, -np.inf, np.nextafter(1.0, 2.0)]


@pytest.fixture
def profile():
    scores = {f"model.layers.{i}.self_attn.q_proj": value for i, value in enumerate(AWKWARD)}
    return make_profile(scores, loss=float("nan"))


def bits(values):
    return np.where(np.isnan(values), np.nan, values).tobytes()  # one NaN for all: its payload carries nothing


def test_lookup(profile):
    name = "model.layers.0.self_attn.q_proj"
    assert profile[name]["snip"] == 0.1 and type(profile[name]["snip"]) is float
    assert dict(profile[name]) == {"snip": 0.1, "plain": -0.1}
    assert list(profile) == profile.names and len(profile) == len(AWKWARD)
    assert name in profile and "nonsense" not in profile and ["unhashable"] not in profile
    assert bits(profile.column("snip")) == bits(np.array(AWKWARD))
    assert profile.info[name]["kind"] == "linear" and profile.uncovered == {"embed.weight": "unprofiled embedding"}


def test_values_are_a_read_only_copy():
    values = np.ones((1, 1))
    profile = LayerProfile(["a"], ["snip"], values, info={"a": {}}, loss=1, backend="cpu", uncovered={})
    values[0, 0] = 7
    assert profile["a"]["snip"] == 1
    with pytest.raises(ValueError, match="read-only"):
        profile.values[0, 0] = 7
    with pytest.raises(TypeError):
        profile["a"]["snip"] = 7


def test_unknown_names_suggest_near_ones(profile):
    with pytest.raises(KeyError, match=r"no layer 'q_projj'.*there are"):
        profile["q_projj"]
    with pytest.raises(KeyError, match=r"nearest: 'model.layers.0.self_attn.q_proj'"):
        profile["layers.0.self_attn.q_proj"]
    with pytest.raises(KeyError, match=r"no metric 'snap'; nearest: 'snip'"):
        profile[profile.names[0]]["snap"]
    with pytest.raises(KeyError, match="nearest: 'plain'"):
        profile.column("plane")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": np.ones((1, 2))}, r"shape \[1, 2\].*2 names and 2 metrics"),
        ({"names": ["a", "a"]}, "names holds 'a' more than once"),
        ({"metrics": ["snip", "snip"]}, "metrics holds 'snip'"),
        ({"info": {"a": {}}}, "info needs one entry.*'b'"),
    ],
)
def test_constructor_refuses_what_does_not_fit(change, message):
    given = {"names": ["a", "b"], "metrics": ["snip", "rgn"], "values": np.ones((2, 2)), "info": {"a": {}, "b": {}}}
    with pytest.raises(ValueError, match=message):
        LayerProfile(**{**given, **change}, loss=0.0, backend="cpu", uncovered={})


def test_constructor_refuses_one_string_as_names():
    with pytest.raises(TypeError, match="names must be a sequence"):
        LayerProfile("ab", ["snip"], np.ones((2, 1)), info={"a": {}, "b": {}}, loss=0.0, backend="cpu", uncovered={})


def test_to_pandas_has_metrics_then_info(profile):
    frame = profile.to_pandas()
    assert frame.index.name == "layer" and list(frame.index) == profile.names
    assert list(frame.columns) == ["snip", "plain", "numel", "kind", "depth", "shape", "head"]
    assert frame["shape"].iloc[0] == [2, 3]
    assert bits(frame["snip"].to_numpy()) == bits(np.array(AWKWARD))


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_round_trip_is_exact(profile, tmp_path, suffix):
    profile.info[profile.names[0]]["uses"] = np.int64(2)  # NumPy scalars are plain numbers in a file
    path = profile.save(tmp_path / f"profile.{suffix}")
    loaded = LayerProfile.load(path)
    assert bits(loaded.values) == bits(profile.values)
    assert (loaded.names, loaded.metrics, loaded.info) == (profile.names, profile.metrics, profile.info)
    assert np.isnan(loaded.loss) and loaded.backend == "reference" and loaded.uncovered == profile.uncovered
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_empty_profile_round_trip(tmp_path, suffix):
    loaded = LayerProfile.load(make_profile({}).save(tmp_path / f"empty.{suffix}"))
    assert loaded.values.shape == (0, 2) and loaded.metrics == ["snip", "plain"]


def test_json_is_strict(profile, tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    document = json.loads(profile.save(tmp_path / "profile.json").read_text(), parse_constant=refuse)
    assert document["version"] == 1


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_failed_save_keeps_the_old_file(profile, tmp_path, suffix, monkeypatch):
    path = profile.save(tmp_path / f"profile.{suffix}")
    before = path.read_bytes()
    profile.info[profile.names[0]]["kind"] = object()
    with pytest.raises(ValueError, match="strict JSON"):
        profile.save(path)

    def full(*_):
        raise OSError(28, "No space left on device")

    profile.info[profile.names[0]]["kind"] = "linear"
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        profile.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", ["json", "parquet"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.98])
def test_torn_file(profile, tmp_path, suffix, part):
    path = profile.save(tmp_path / f"profile.{suffix}")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ValueError, match=rf"profile\.{suffix}.*torn.*profile again"):
        LayerProfile.load(path)


def test_foreign_files(profile, tmp_path):
    for content in ("[]", "3", '{"format": "other", "version": 1}', '{"layers": []}', '"\\ud800"'):
        path = tmp_path / "foreign.json"
        path.write_text(content)
        with pytest.raises(ValueError, match=r"foreign\.json"):
            LayerProfile.load(path)
    profile.to_pandas()[["snip"]].to_parquet(tmp_path / "foreign.parquet")
    with pytest.raises(ValueError, match=r"foreign\.parquet"):
        LayerProfile.load(tmp_path / "foreign.parquet")


def test_newer_version_asks_for_an_upgrade(profile, tmp_path):
    path = profile.save(tmp_path / "profile.json")
    path.write_text(path.read_text().replace('"version": 1', '"version": 3'))
    with pytest.raises(ValueError, match=r"format version 3.*upgrade zest_fast"):
        LayerProfile.load(path)


def test_paths(profile, tmp_path):
    with pytest.raises(ValueError, match=r"ends in '\.pkl'; a profile is a \.json or a \.parquet"):
        profile.save(tmp_path / "profile.pkl")
    with pytest.raises(ValueError, match="ends in ''"):
        LayerProfile.load(tmp_path / "profile")
    with pytest.raises(FileNotFoundError):
        LayerProfile.load(tmp_path / "missing.json")
    with pytest.raises(FileNotFoundError):
        LayerProfile.load(tmp_path / "missing.parquet")
    with pytest.raises(FileNotFoundError, match="create it"):
        profile.save(tmp_path / "no" / "folder.json")


def test_repr_is_a_compact_table(profile):
    lines = repr(profile).splitlines()
    assert lines[0] == "LayerProfile: 9 layers x 2 metrics, loss nan, backend reference, 1 uncovered"
    assert lines[1].split() == ["layer", "kind", "snip"]
    assert lines[2].split() == ["model.layers.0.self_attn.q_proj", "linear", "0.1"]
    many = repr(
        make_profile({f"layer_with_a_rather_long_name.{i}.self_attention.output.dense": 1.0 for i in range(300)})
    )
    assert len(many.splitlines()) < 15 and max(map(len, many.splitlines())) < 110
    assert repr(make_profile({})).startswith("LayerProfile: 0 layers")


def test_plot_draws_every_panel(profile, tmp_path):
    svg = profile.plot(tmp_path / "map.svg").read_text()
    assert all(f"<!-- {text} -->" in svg for text in ("snip", "plain", "q_proj", "rank among all layers"))
    assert "<!-- plain -->" not in profile.plot(tmp_path / "one.svg", ["snip"]).read_text()
    with pytest.raises(ValueError, match="no metric 'snop'; nearest: 'snip'"):
        profile.plot(tmp_path / "map.svg", ["snop"])
    with pytest.raises(ValueError, match="suffix"):
        profile.plot(tmp_path / "map")
    with pytest.raises(ValueError, match="nothing to plot"):
        make_profile({}).plot(tmp_path / "map.svg")


def test_plot_without_matplotlib_says_what_to_install(profile, tmp_path, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'zest_fast\[plot\]'"):
        profile.plot(tmp_path / "map.png")


def test_layer_types_of_bert_keep_its_three_dense_layers_apart():
    block = ["attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"]
    names = [f"encoder.layer.{i}.{name}" for i in range(2) for name in block] + ["pooler.dense"]
    types = layer_types(names)
    assert list(types) == [
        "query",
        "attention.output.dense",
        "intermediate.dense",
        "layer.output.dense",
        "pooler.dense",
    ]
    assert types["query"] == ["encoder.layer.0.attention.self.query", "encoder.layer.1.attention.self.query"]


def test_layer_types_group_digits():
    stages = [f"layer{stage}.{block}.conv{i}" for stage in (1, 2) for block in (0, 1) for i in (1, 2)]
    types = layer_types(["conv1", *stages, "layer2.0.downsample.0", "fc"])
    assert list(types) == ["conv1", "conv2", "downsample", "fc"]
    assert len(types["conv1"]) == 5 and len(types["conv2"]) == 4
    assert layer_types(["0", "2"]) == {"#": ["0", "2"]}
