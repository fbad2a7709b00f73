import copy
import dataclasses
import errno
import json
import resource
import signal
from pathlib import Path

import pytest
import torch
from profiles import make_profile
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file
from small_models import Mlp, Recurrent, assert_same, conv_net, images, llama, snapshot, step
from torch import nn

from zest_fast.finetuning.delta_files import checksum, read_delta
from zest_fast.finetuning.delta_use import DeltaSwitch, apply_delta, merge_delta
from zest_fast.finetuning.digests import digest, hash_tensors
from zest_fast.finetuning.run_state import checksum as run_checksum
from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.ranking.ranking import rank
from zest_fast.sweeping.recipe import Recipe

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tuned_mlp(path):
    """A fresh model, and the file of a delta trained on a copy of it."""
    fresh = Mlp()
    model = copy.deepcopy(fresh)
    tuned = SelectiveBackward(model, ["a", "b"])
    step(tuned.parameters(), model(torch.randn(8, 4)).square().sum())
    assert tuned.save(path) == path
    return fresh, model


@pytest.mark.parametrize(
    ("make", "layers", "inputs"),
    [
        (Mlp, ["a"], lambda: torch.randn(8, 4)),
        (Recurrent, ["rnn.weight_hh_l0", "rnn.weight_ih_l1"], lambda: torch.randn(2, 5, 3)),
        (conv_net, ["3"], images),
        (lambda: Mlp().bfloat16(), ["c"], lambda: torch.randn(8, 4, dtype=torch.bfloat16)),
    ],
)
def test_round_trip_onto_a_fresh_copy_is_exact(make, layers, inputs, tmp_path):
    fresh, x = make(), inputs()
    model = copy.deepcopy(fresh)
    tuned = SelectiveBackward(model, layers)
    for _ in range(3):
        step(tuned.parameters(), model(x).square().mean())
    path = tuned.save(tmp_path / "delta.safetensors")
    assert set(load_file(path)) == set(tuned.trainable_names)  # nothing that is frozen
    loaded = SelectiveBackward(fresh, layers)
    assert loaded.load(path) is loaded
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name
    assert torch.equal(model(x), fresh(x))


def test_saving_and_loading_after_remove(tmp_path):
    fresh = Mlp()
    model = copy.deepcopy(fresh)
    with SelectiveBackward(model, ["a"]) as tuned:
        step(tuned.parameters(), model(torch.randn(8, 4)).square().sum())
    path = tuned.save(tmp_path / "delta.safetensors")
    with SelectiveBackward(fresh, ["a"]) as again:
        pass
    again.load(path)
    assert torch.equal(fresh.a.weight, model.a.weight)


def test_tied_weights_stay_tied(tmp_path):
    fresh, ids = llama(tie_word_embeddings=True), torch.arange(12).reshape(2, 6)
    model = copy.deepcopy(fresh)
    tuned = SelectiveBackward(model, ["lm_head"])
    step(tuned.parameters(), model(input_ids=ids, labels=ids).loss)
    SelectiveBackward(fresh, ["lm_head"]).load(tuned.save(tmp_path / "delta.safetensors"))
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight
    assert torch.equal(fresh.lm_head.weight, model.lm_head.weight)


def test_changed_buffers_travel_and_others_do_not(tmp_path):
    def make():
        torch.manual_seed(1)
        trunk = [nn.Linear(4, 4), nn.BatchNorm1d(4)]  # frozen, its statistics rest
        return nn.Sequential(*trunk, nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)))

    model, fresh = make(), make()
    tuned = SelectiveBackward(model, [], head="2")
    step(tuned.parameters(), model(torch.randn(6, 4)).square().sum())
    path = tuned.save(tmp_path / "delta.safetensors")
    with safe_open(path, "pt") as file:
        changed = json.loads(file.metadata()["buffers"])
    assert changed == ["2.0.running_mean", "2.0.running_var", "2.0.num_batches_tracked"]
    SelectiveBackward(fresh, [], head="2").load(path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name


def test_metadata(tmp_path):
    tuned_mlp(tmp_path / "delta.safetensors")
    with safe_open(tmp_path / "delta.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["layers"]) == ["a", "b"] and json.loads(metadata["head"]) == ["head"]
    assert metadata["torch"] == torch.__version__ and metadata["zest_fast"]
    assert len(metadata["base"]) == 64


def other_base(model):
    with torch.no_grad():
        model.c.bias[0] += 1e-7
    return model


def renamed(model):
    model.extra = nn.Linear(1, 1)
    return model


@pytest.mark.parametrize(
    ("change", "layers", "message"),
    [
        (other_base, ["a", "b"], "frozen parameters or buffers of this model differ"),
        (renamed, ["a", "b"], "frozen parameters or buffers of this model differ"),
        (lambda model: model, ["a"], r"saved with layers=\['a', 'b'\], this model is wrapped with \['a'\]"),
        (
            lambda model: model.double(),
            ["b", "a"],
            r"'a\.bias' has dtype torch\.float32 in the delta and torch\.float64",
        ),
    ],
)
def test_a_delta_that_does_not_fit_changes_nothing(change, layers, message, tmp_path):
    path = tmp_path / "delta.safetensors"
    fresh, _ = tuned_mlp(path)
    tuned = SelectiveBackward(change(fresh), layers, head="head")
    before = snapshot(fresh)
    with pytest.raises(ValueError, match=rf"delta\.safetensors' does not fit: .*{message}"):
        tuned.load(path)
    assert_same(before, snapshot(fresh))


def test_another_head_is_refused(tmp_path):
    fresh, _ = tuned_mlp(tmp_path / "delta.safetensors")
    with pytest.raises(ValueError, match=r"saved with head=\['head'\], this model is wrapped with \[\]"):
        SelectiveBackward(fresh, ["a", "b"], head=None).load(tmp_path / "delta.safetensors")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop("b.bias"), r"lacks the parameter 'b\.bias'"),
        (
            lambda tensors: tensors.update({"b.bias": torch.zeros(5)}),
            r"'b\.bias' has shape \[5\] in the delta and \[4\]",
        ),
        (lambda tensors: tensors.update({"z": torch.zeros(5)}), r"has a parameter 'z', the model has none"),
    ],
)
def test_edited_tensors_are_refused(edit, message, tmp_path):
    path = tmp_path / "delta.safetensors"
    fresh, _ = tuned_mlp(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {**metadata, "checksum": checksum(metadata, tensors)})
    tuned = SelectiveBackward(fresh, ["a", "b"])
    before = snapshot(fresh)
    with pytest.raises(ValueError, match=message):
        tuned.load(path)
    assert_same(before, snapshot(fresh))


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99])
def test_torn_file(part, tmp_path):
    path = tmp_path / "delta.safetensors"
    fresh, _ = tuned_mlp(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    tuned = SelectiveBackward(fresh, ["a", "b"])
    before = snapshot(fresh)
    with pytest.raises(ValueError, match=r"delta\.safetensors' is no delta that can be read .*torn"):
        tuned.load(path)
    assert_same(before, snapshot(fresh))


def test_foreign_newer_and_missing_files(tmp_path):
    tuned = SelectiveBackward(Mlp(), ["a", "b"])
    path = tmp_path / "delta.safetensors"
    save_file({"a.weight": torch.zeros(4, 4)}, path)
    with pytest.raises(ValueError, match=r"its format is None, not 'zest_fast\.delta'"):
        tuned.load(path)
    save_file({"a.weight": torch.zeros(4, 4)}, path, {"format": "zest_fast.delta", "version": "5"})
    with pytest.raises(ValueError, match=r"format version 5, .*upgrade zest_fast"):
        tuned.load(path)
    save_file({"a.weight": torch.zeros(4, 4)}, path, {"format": "zest_fast.delta", "version": "1"})
    with pytest.raises(ValueError, match=r"format version 1, .*save it again"):
        tuned.load(path)
    with pytest.raises(FileNotFoundError):
        tuned.load(tmp_path / "missing.safetensors")


def test_a_file_has_the_usual_permissions(tmp_path):
    path = tmp_path / "delta.safetensors"
    tuned_mlp(path)
    (tmp_path / "usual").touch()
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode
    path.chmod(0o640)
    tuned_mlp(path)
    assert path.stat().st_mode & 0o777 == 0o640


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "delta.safetensors"
    _, model = tuned_mlp(path)
    before = path.read_bytes()

    def full(tensors, temporary, metadata):
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zest_fast.finetuning.delta_files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        SelectiveBackward(copy.deepcopy(model).requires_grad_(True), ["a"]).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_hash_tells_names_shapes_dtypes_and_bytes_apart():
    tensor = torch.arange(4.0)
    same = [("a", tensor), ("a", torch.arange(8.0)[::2] / 2)]  # strides do not matter
    others = [
        ("b", tensor),
        ("a", tensor.view(2, 2)),
        ("a", tensor.view(torch.int32)),
        ("a", -tensor),
        ("a", tensor[:0]),
    ]
    assert len({hash_tensors([pair]) for pair in same}) == 1
    assert len({hash_tensors([pair]) for pair in same + others}) == 6
    assert hash_tensors([("a", torch.tensor(True)), ("b", torch.ones(1, dtype=torch.bfloat16))])
    with pytest.raises(ValueError, match="'a' is on the meta device"):
        hash_tensors([("a", torch.ones(1, device="meta"))])


def test_hashes_are_those_of_files_written_before():
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.tensor(True),
        "c": torch.ones(0, 2, dtype=torch.bfloat16),
    }
    assert digest(tensors["a"]) == "f673e35edf0f227af4f82aa1d3bd6fb6"
    assert hash_tensors(tensors.items()) == "6c0c861f6b963adeffe6ed11a33e133cb7fe323b1ee868958b8893ddcdb3a836"
    assert checksum({"x": "y"}, tensors) == "a4c0cac0bab07e92d9d4f893e78aa8435273cec51b5f10250837d2eee5ded30d"
    content = {"k": tensors, "n": [1, 2.5, "s"]}
    assert run_checksum(content) == "a28b58b0164061106b200c0e0fa15de826b6f89665db5b2467663cd4656f8fcb"
    assert Recipe().hash == "11a7a7269ffdd8b6"


def norm_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3))


def test_loading_puts_buffers_back_that_had_not_changed_when_saved(tmp_path):
    model, x = norm_net(), torch.randn(16, 6)
    tuned = SelectiveBackward(model, ["0"], head=["1", "3"])
    path = tuned.save(tmp_path / "delta.safetensors")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()(x * 3)
    assert not torch.equal(before["1.running_mean"], model.state_dict()["1.running_mean"])
    tuned.load(path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_base_whose_statistics_differ_is_another_base(tmp_path):
    path = SelectiveBackward(norm_net(), ["0"], head=["3"]).save(tmp_path / "delta.safetensors")
    other = norm_net()
    other.train()(torch.randn(16, 6) * 3)
    with pytest.raises(ValueError, match="buffers of this model differ"):
        SelectiveBackward(other, ["0"], head=["3"]).load(path)


@pytest.mark.parametrize("buffer", [torch.eye(5).to_sparse(), torch.randn(8, dtype=torch.complex64).conj()])
def test_buffers_that_are_not_plain_memory(buffer, tmp_path):
    model = norm_net()
    model.register_buffer("extra", buffer)
    tuned = SelectiveBackward(model, ["0"], head=["3"])
    tuned.load(tuned.save(tmp_path / "delta.safetensors"))


def test_ranking_and_recipe_travel_as_metadata(tmp_path):
    @dataclasses.dataclass
    class Recipe:
        rate: float = 0.1
        decay: tuple = (1, 2)

    model = Mlp()
    tuned = SelectiveBackward(model, ["a"])
    ranking = rank(make_profile({"a": 1.0, "b": float("nan"), "head": 3.0}, heads=("head",)), by="snip")
    delta = read_delta(tuned.save(tmp_path / "delta.safetensors", ranking=ranking, recipe=Recipe()))
    assert delta.ranking == {"by": "snip", "names": ["head", "a", "b"], "scores": [3.0, 1.0, None]}
    assert delta.recipe == {"rate": 0.1, "decay": [1, 2]} and delta.dtypes == ("float32",)
    with pytest.raises(TypeError, match="recipe must be plain data"):
        tuned.save(tmp_path / "delta.safetensors", recipe={"loss": torch.nn.functional.mse_loss})
    assert read_delta(tmp_path / "delta.safetensors").recipe == delta.recipe


def several_deltas(folder):
    """A base, the state of two models tuned from it, and the files of their deltas; the second changes buffers too."""
    base, states, paths = norm_net(), [], []
    for number, head in enumerate((["3"], ["1", "3"])):
        model = copy.deepcopy(base)
        with SelectiveBackward(model, ["0"] if number else [], head=head) as tuned:
            step(tuned.parameters(), model.train()(torch.randn(16, 6)).square().sum())
            paths.append(tuned.save(folder / f"{number}.safetensors"))
        states.append(model.state_dict())
    return base, states, paths


def assert_state(model, state):
    for name, tensor in state.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_switching_between_deltas_and_back_to_the_base(tmp_path):
    model, states, paths = several_deltas(tmp_path)
    base = copy.deepcopy(model.state_dict())
    with DeltaSwitch(model) as switch:
        for number in (0, 1, 1, 0):
            assert switch.use(paths[number]).current == paths[number]
            assert_state(model, states[number])
        assert switch.use(None).current is None
        assert_state(model, base)
        switch.use(paths[1])
        paths[0].write_bytes(paths[0].read_bytes()[:-8])
        with pytest.raises(ValueError, match="torn"):
            switch.use(paths[0])
        assert_state(model, states[1])
    assert_state(model, base)


def test_applying_and_merging(tmp_path):
    model, states, paths = several_deltas(tmp_path)
    base = copy.deepcopy(model.state_dict())
    merged = merge_delta(model, paths[1], tmp_path / "merged.safetensors")
    assert_state(model, base)
    fresh = norm_net()
    load_model(fresh, merged)
    assert_state(fresh, states[1])
    assert apply_delta(model, paths[1]).layers == ("0",)
    assert_state(model, states[1])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"0\.safetensors' does not fit: .*differ from those it was trained on"):
        apply_delta(model, paths[0])  # its base is no longer there
    with pytest.raises(ValueError, match=r"'0\.bias' has shape \[8\] in the delta and \[9\]"):
        apply_delta(nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3)), paths[1])
    assert_same(before, snapshot(model))


def test_merging_tied_weights(tmp_path):
    model = llama(tie_word_embeddings=True)
    fresh = copy.deepcopy(model)
    with SelectiveBackward(model, ["lm_head"]) as tuned:
        nn.init.normal_(model.lm_head.weight)
        path = tuned.save(tmp_path / "delta.safetensors")
    merged = merge_delta(fresh, path, tmp_path / "merged.safetensors")
    load_model(fresh, merged)
    assert torch.equal(fresh.lm_head.weight, model.lm_head.weight)
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight


def test_a_full_disk_keeps_the_old_files(tmp_path):
    _, _, paths = several_deltas(tmp_path)
    model = norm_net()
    tuned, merged, run = SelectiveBackward(model, ["0"], head=["3"]), tmp_path / "merged", tmp_path / "run"
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
    for path in (merged, run):
        path.write_bytes(b"before")
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    state = copy.deepcopy(model.state_dict())
    found = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, found[1]))
    try:
        for path, write in (
            (paths[0], lambda: tuned.save(paths[0])),
            (merged, lambda: merge_delta(model, paths[1], merged)),
            (run, lambda: tuned.save_run(run, optimizer)),
        ):
            with pytest.raises(OSError) as caught:
                write()
            assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, found)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert_state(model, state)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """A loss of NaN ends in them; what was saved before it stays."""
    path = tmp_path / "delta.safetensors"
    _, model = tuned_mlp(path)
    before = path.read_bytes()
    tuned = SelectiveBackward(copy.deepcopy(model).requires_grad_(True), ["a"])
    next(iter(tuned.parameters())).data[0] = torch.nan
    for save in (lambda: tuned.save(path), lambda: tuned.save_run(path, torch.optim.SGD(tuned.parameters()))):
        with pytest.raises(RuntimeError, match=r"'a\.weight' is not finite \(was the loss NaN\?\): nothing is written"):
            save()
    assert path.read_bytes() == before


def test_class_names_and_settings_of_the_data_travel(tmp_path):
    data = {"task": "text-classification", "max_length": 12}
    tuned = SelectiveBackward(Mlp(), ["a"])
    path = tuned.save(tmp_path / "delta.safetensors", class_names=["no", "yes"], data=data)
    delta = read_delta(path)
    assert delta.class_names == ("no", "yes") and delta.data == data
    before = path.read_bytes()
    for names, error, message in (
        ("no", TypeError, "not the single string 'no'"),
        (["a", 1], TypeError, "1 is a int"),
        (["a", "a"], ValueError, "class_names has a name twice"),
    ):
        with pytest.raises(error, match=message):
            tuned.save(path, class_names=names)
    with pytest.raises(TypeError, match="data must be plain data"):
        tuned.save(path, data={"model": tuned})
    assert path.read_bytes() == before
    assert read_delta(tuned.save(path)).class_names == ()


def test_deltas_of_before_say_nothing_of_classes():
    for version, names in ((2, ()), (3, ()), (4, ("no", "yes"))):
        delta = read_delta(DATA / f"delta_v{version}.safetensors")
        assert delta.class_names == names and delta.layers == ("1",)
        assert delta.data == ({"task": None, "batch_size": 4} if version == 4 else None)
