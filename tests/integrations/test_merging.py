"""A folder and a delta make a folder: bit for bit the tuned model, whatever the files look like, or a refusal."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
import transformers
from checkpoints import save_bert, save_llama, save_resnet
from safetensors.torch import load_file, save_file

from zest_fast.finetuning import digests
from zest_fast.finetuning.delta_files import read_delta
from zest_fast.finetuning.delta_use import apply_delta, merge_delta
from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.integrations import merging
from zest_fast.integrations.differences import TensorFiles, differences
from zest_fast.integrations.merging import apply_to_folder, load_base, merge_folder, settings_of
from zest_fast.streaming.packing import pack

pytestmark = pytest.mark.usefixtures("one_thread")
LLAMA_LAYERS = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]


def tuned(folder, layers, out, *, kind=transformers.AutoModelForCausalLM, head=None, dtype="auto", **options):
    """The state of a model of the folder whose layers have moved, and the file of its delta."""
    model = kind.from_pretrained(folder, dtype=dtype)
    said = {key: options.pop(key) for key in ("class_names", "data", "ranking") if key in options}
    with SelectiveBackward(model, layers, head=head, **options) as wrapped:
        with torch.no_grad():
            for parameter in wrapped.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
        path = wrapped.save(out, **said)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, path


def loaded(folder, kind=transformers.AutoModelForCausalLM):
    return kind.from_pretrained(folder, dtype="auto").state_dict()


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def sharded(folder, out):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(out, max_shard_size="4KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, out)
    return out


@pytest.fixture
def llama(tmp_path):
    return save_llama(tmp_path / "llama")


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model is an error."""
    monkeypatch.setattr(merging, "load_base", lambda *arguments: pytest.fail("the model was loaded"))


def test_sharded_in_sharded_out_without_a_model(llama, tmp_path, no_model):
    base = sharded(llama, tmp_path / "sharded")
    (base / "optimizer.pt").write_bytes(b"of a trainer")
    (base / "LICENSE").write_text("as it was")
    shards = sorted(file.name for file in base.glob("*.safetensors"))
    assert len(shards) > 3
    state, delta = tuned(base, LLAMA_LAYERS, tmp_path / "d.safetensors")
    how = merge_folder(str(base), delta, tmp_path / "merged")
    assert "no model was loaded" in how
    assert_equal(loaded(tmp_path / "merged"), state)
    there = {file.name for file in (tmp_path / "merged").iterdir()}
    assert there == {*shards, "config.json", "generation_config.json", "LICENSE", "model.safetensors.index.json"} | {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    differing = {name for name in shards if (base / name).read_bytes() != (tmp_path / "merged" / name).read_bytes()}
    assert 1 <= len(differing) <= 2  # those that hold the two layers


def test_tensors_are_read_one_at_a_time(llama, tmp_path, no_model, monkeypatch):
    base, alive, most = sharded(llama, tmp_path / "sharded"), [], []

    def counted(tensor):
        alive.append(tensor.numel())
        most.append(len(alive))
        try:
            return digests.digest(tensor)
        finally:
            alive.pop()

    monkeypatch.setattr(merging, "digest", counted)
    _, delta = tuned(base, LLAMA_LAYERS, tmp_path / "d.safetensors")
    merge_folder(str(base), delta, tmp_path / "merged")
    assert max(most) == 1 and len(most) > 10


def test_in_place_only_what_changed_is_written(llama, tmp_path, no_model):
    base = sharded(llama, tmp_path / "sharded")
    state, delta = tuned(base, LLAMA_LAYERS, tmp_path / "d.safetensors")
    before = {file.name: (file.stat().st_ino, file.read_bytes()) for file in base.iterdir()}
    would, _ = apply_to_folder(str(base), delta, check=True)
    assert {file.name: (file.stat().st_ino, file.read_bytes()) for file in base.iterdir()} == before
    changed, rounded = apply_to_folder(str(base), delta)
    assert would == changed and rounded is None and {file.name for file in base.iterdir()} == before.keys()
    assert_equal(loaded(base), state)
    for name, (inode, contents) in before.items():
        same = (base / name).stat().st_ino == inode and (base / name).read_bytes() == contents
        assert same != (base / name in changed), name
    apply_to_folder(str(base), delta)  # the same delta again is no other base
    assert_equal(loaded(base), state)


def test_a_failure_in_the_middle_changes_no_file(llama, tmp_path, monkeypatch):
    base = sharded(llama, tmp_path / "sharded")
    _, delta = tuned(base, LLAMA_LAYERS, tmp_path / "d.safetensors")
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    copies, copyfile = [], shutil.copyfile

    def full(source, target):
        copies.append(target)
        if len(copies) == 2:
            raise OSError(28, "No space left on device")
        return copyfile(source, target)

    monkeypatch.setattr(merging.shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        apply_to_folder(str(base), delta)
    copies.clear()
    with pytest.raises(OSError, match="No space left"):
        merge_folder(str(base), delta, tmp_path / "merged")
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".*"))


def test_tied_weights_are_written_under_all_their_names(tmp_path, no_model):
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config.tie_word_embeddings = True
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    weights = load_file(tmp_path / "tied" / "model.safetensors")
    assert "lm_head.weight" not in weights
    state, delta = tuned(tmp_path / "tied", ["lm_head"], tmp_path / "d.safetensors")
    merge_folder(str(tmp_path / "tied"), delta, tmp_path / "merged")
    assert_equal(loaded(tmp_path / "merged"), state)
    twice = tmp_path / "twice"  # as some tools write them
    shutil.copytree(tmp_path / "tied", twice)
    both = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(both, twice / "model.safetensors", {"format": "pt"})
    merge_folder(str(twice), delta, tmp_path / "merged2")
    merged = load_file(tmp_path / "merged2" / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert torch.equal(merged["lm_head.weight"], state["lm_head.weight"])


def test_a_new_head_makes_another_configuration(tmp_path):
    """An encoder of a masked language model, tuned to three classes: prefixes, shapes and names all change."""
    base = save_bert(tmp_path / "bert", transformers.BertForMaskedLM)
    data = {"task": "text-classification", "new_head": True, "seed": 3}
    names = ("bad", "fine", "good")
    torch.manual_seed(3)
    model = merging.load_model(str(base), task="text-classification", class_names=names).model
    fresh = ["bert.pooler.dense", "classifier"]
    with SelectiveBackward(model, ["bert.encoder.layer.1.output.dense"], head=fresh) as wrapped:
        for parameter in wrapped.parameters():
            torch.nn.init.normal_(parameter)
        delta = wrapped.save(tmp_path / "d.safetensors", class_names=names, data=data)
    how = merge_folder(str(base), delta, tmp_path / "merged")
    assert "merged in memory" in how
    tuned_model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert_equal(tuned_model.state_dict(), model.state_dict())
    assert tuned_model.config.id2label == dict(enumerate(names)) and tuned_model.config.label2id["good"] == 2
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")("a film")["input_ids"]
    with pytest.raises(ValueError, match="cannot be changed in place"):
        apply_to_folder(str(base), delta)


def test_class_names_of_a_head_that_was_kept(tmp_path, no_model):
    base = save_bert(tmp_path / "bert", num_labels=3)
    kind = transformers.AutoModelForSequenceClassification
    layer = "bert.encoder.layer.0.output.dense"
    state, delta = tuned(
        base, [layer], tmp_path / "d.safetensors", kind=kind, head="classifier", class_names=["a", "b", "c"]
    )
    merge_folder(str(base), delta, tmp_path / "merged")
    model = kind.from_pretrained(tmp_path / "merged")
    assert_equal(model.state_dict(), state)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"} and model.config.label2id == {"a": 0, "b": 1, "c": 2}
    config = json.loads((base / "config.json").read_text())
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert {key: value for key, value in written.items() if key not in ("id2label", "label2id")} == {
        key: value for key, value in config.items() if key not in ("id2label", "label2id")
    }
    wrong = tuned(base, [layer], tmp_path / "e.safetensors", kind=kind, head="classifier", class_names=["a", "b"])[1]
    merge_folder(str(base), wrong, tmp_path / "merged2")  # three outputs cannot have two names
    assert kind.from_pretrained(tmp_path / "merged2").config.id2label[2] == "LABEL_2"


def test_buffers_that_changed_are_written_too(tmp_path, no_model):
    base = save_resnet(tmp_path / "resnet", num_labels=3)
    kind = transformers.AutoModelForImageClassification
    model = kind.from_pretrained(base)
    with SelectiveBackward(model, [], head=["classifier", "resnet.encoder.stages.1"]) as wrapped:
        model.train()(torch.randn(4, 3, 32, 32)).logits.square().sum().backward()
        torch.optim.SGD(wrapped.parameters(), lr=0.1).step()
        delta = wrapped.save(tmp_path / "d.safetensors")
    assert read_delta(delta).buffers
    merge_folder(str(base), delta, tmp_path / "merged")
    assert_equal(kind.from_pretrained(tmp_path / "merged").state_dict(), model.state_dict())


@pytest.mark.parametrize("said", [None, "int8"])
def test_a_base_that_was_rounded_is_rounded_again(said, llama, tmp_path):
    state, delta = tuned(
        llama, LLAMA_LAYERS, tmp_path / "d.safetensors", frozen="int8", data={"frozen": said} if said else None
    )
    if said is None:  # nobody wrote down how it was rounded
        with pytest.raises(ValueError, match="differ from those it was trained on"):
            merge_folder(str(llama), delta, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        return
    assert "rounded to int8" in merge_folder(str(llama), delta, tmp_path / "merged")
    assert_equal(loaded(tmp_path / "merged"), state)


def test_dtypes_of_the_run_are_those_of_the_merged_model(llama, tmp_path):
    """A float32 folder that was loaded and tuned in bfloat16."""
    state, delta = tuned(llama, LLAMA_LAYERS, tmp_path / "d.safetensors", dtype=torch.bfloat16)
    merge_folder(str(llama), delta, tmp_path / "merged")
    assert_equal(loaded(tmp_path / "merged"), state)
    with pytest.raises(ValueError, match="cannot be changed in place"):
        apply_to_folder(str(llama), delta)


@pytest.mark.parametrize("changed", ["weight", "shape"])
def test_another_base_is_refused_and_nothing_is_left(changed, llama, tmp_path):
    _, delta = tuned(llama, LLAMA_LAYERS, tmp_path / "d.safetensors")
    weights = load_file(llama / "model.safetensors")
    if changed == "weight":
        weights["model.norm.weight"][0] += 1e-6
        save_file(weights, llama / "model.safetensors", {"format": "pt"})
    else:
        config = json.loads((llama / "config.json").read_text())
        config["intermediate_size"] = 16
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).save_pretrained(llama)
    before = {file.name: file.read_bytes() for file in llama.iterdir()}
    with pytest.raises(ValueError, match=r"d\.safetensors' does not fit"):
        merge_folder(str(llama), delta, tmp_path / "merged")
    with pytest.raises(ValueError, match=r"does not fit|cannot be changed in place"):
        apply_to_folder(str(llama), delta)
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".*"))
    assert {file.name: file.read_bytes() for file in llama.iterdir()} == before


def test_what_is_there_is_not_replaced_and_links_are_not_written_through(llama, tmp_path):
    _, delta = tuned(llama, LLAMA_LAYERS, tmp_path / "d.safetensors")
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="it is there already"):
        merge_folder(str(llama), delta, tmp_path / "there")
    cache = tmp_path / "blob"
    (llama / "model.safetensors").rename(cache)
    (llama / "model.safetensors").symlink_to(cache)
    before = cache.read_bytes()
    with pytest.raises(ValueError, match="is a link to a file that others use"):
        apply_to_folder(str(llama), delta)
    assert cache.read_bytes() == before
    merge_folder(str(llama), delta, tmp_path / "merged")
    assert not (tmp_path / "merged" / "model.safetensors").is_symlink()


def test_links_that_lead_out_of_a_folder_are_not_copied(llama, tmp_path):
    """A folder from elsewhere may hold one to any file of the user's; the hub's cache is made of links to its own."""
    _, delta = tuned(llama, LLAMA_LAYERS, tmp_path / "d.safetensors")
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "id_rsa").write_text("a secret")
    templates = llama / "additional_chat_templates"
    (llama / "notes.txt").symlink_to(secrets / "id_rsa")
    with pytest.raises(ValueError, match=r"notes\.txt' is a link to '.*id_rsa', outside of the folder"):
        merge_folder(str(llama), delta, tmp_path / "merged")
    with pytest.raises(ValueError, match=r"notes\.txt' is a link to '.*id_rsa', outside of the folder"):
        pack(llama, tmp_path / "merged", frozen="int8")
    (llama / "notes.txt").unlink()
    templates.symlink_to(secrets)
    with pytest.raises(ValueError, match="additional_chat_templates' is a link to"):
        merge_folder(str(llama), delta, tmp_path / "merged")
    templates.unlink()
    templates.mkdir()
    (templates / "more").symlink_to(secrets)  # which copytree would follow
    with pytest.raises(ValueError, match="additional_chat_templates/more' is a link to"):
        merge_folder(str(llama), delta, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    (templates / "more").unlink()
    snapshot, blobs = (tmp_path / "models--a--b" / name for name in ("snapshots/0123", "blobs"))
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    llama.rename(snapshot)
    (snapshot / "config.json").rename(blobs / "1")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (tmp_path / "mine").symlink_to(snapshot)
    merge_folder(str(tmp_path / "mine"), delta, tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").read_bytes() == (blobs / "1").read_bytes()


@pytest.mark.parametrize(
    "data",
    [
        {"task": "chat"},
        {"task": 3},
        {"seed": True},
        {"seed": 2**70},
        {"frozen": "int3"},
        {"batch_size": 0},
        {"max_length": "long"},
        {"validation_share": 1.5},
        {"validation_share": -0.1},
        {"new_head": 1},
    ],
)
def test_settings_of_a_stranger_are_refused(data, llama, tmp_path):
    _, path = tuned(llama, LLAMA_LAYERS, tmp_path / "d.safetensors", data=data)
    delta = read_delta(path)
    for read in (settings_of, lambda delta: load_base(str(llama), delta)):
        with pytest.raises(ValueError, match="delta's data"):
            read(delta)
    with pytest.raises(ValueError, match="delta's data"):
        merge_folder(str(llama), path, tmp_path / "merged")


def test_merge_delta_writes_a_folder_of_the_model_at_hand(llama, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    before = copy.deepcopy(model.state_dict())
    state, delta = tuned(llama, LLAMA_LAYERS, tmp_path / "d.safetensors")
    out = merge_delta(model, delta, tmp_path / "folder")
    assert_equal(loaded(out), state)
    assert_equal(dict(model.state_dict()), before)
    with pytest.raises(FileExistsError):
        merge_delta(model, delta, out)
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    with SelectiveBackward(copy.deepcopy(plain), ["0"]) as wrapped:
        other = wrapped.save(tmp_path / "p.safetensors")
    merged = merge_delta(plain, other, f"{tmp_path}/plain.v1/")
    assert [file.name for file in merged.iterdir()] == ["model.safetensors"]
    with SelectiveBackward(model, LLAMA_LAYERS, frozen="int8") as wrapped:
        quantised = wrapped.save(tmp_path / "q.safetensors")
        folder = merge_delta(model, quantised, tmp_path / "unpacked")
    assert_equal(loaded(folder), dict(model.state_dict()))  # which .remove() has unpacked


def test_differences_of_bits(tmp_path):
    nan = float("nan")
    one = {
        "a": torch.tensor([1.0, -0.0, nan, 2.0]),
        "same": torch.tensor([nan, 1.0]),
        "b": torch.zeros(3, dtype=torch.bfloat16),
        "shape": torch.zeros(2),
        "empty": torch.zeros(0, 3),
        "number": torch.tensor(3),
        "mine": torch.ones(1),
    }
    other = {
        "a": torch.tensor([1.0, 0.0, nan, 5.0]),
        "same": torch.tensor([nan, 1.0]),
        "b": torch.tensor([0.0, 0.5, 0.0], dtype=torch.bfloat16),
        "shape": torch.zeros(2, 1),
        "empty": torch.zeros(0, 3),
        "number": torch.tensor(3),
    }
    save_file(one, tmp_path / "one.safetensors")
    save_file(other, tmp_path / "other.safetensors")
    with TensorFiles(tmp_path / "one.safetensors") as first, TensorFiles(tmp_path / "other.safetensors") as second:
        found = differences(first, second)
        same = differences(first, first)
    assert same.same and not same.changed
    assert set(found.equal) == {"same", "empty", "number"} and found.only_first == ("mine",)
    a, b = found.changed
    assert (a.name, a.count, a.moved, a.largest) == ("a", 4, 2, 3.0)
    assert a.relative == pytest.approx(3 / 5**0.5)
    assert (b.name, b.moved, b.largest, b.relative) == ("b", 1, 0.5, float("inf"))
    assert found.unlike == {"shape": "float32 [2] and float32 [2, 1]"} and not found.same and not found.partial


def test_differences_refuse_what_cannot_be_read(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.safetensors").write_bytes(b"\x10")
    for source, message in (
        ("empty", "holds no .safetensors"),
        ("torn.safetensors", "torn"),
        ("gone", "does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            TensorFiles(tmp_path / source)
    (tmp_path / "empty" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../torn.safetensors"}}')
    with pytest.raises(ValueError, match="outside of the folder"):
        TensorFiles(tmp_path / "empty")


def in_dtype(folder, out, dtype):
    """The folder with its weights in another dtype."""
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(out)
    return out


@pytest.mark.parametrize("route", ["files", "memory", "python"])
def test_a_float32_delta_onto_a_bfloat16_base(route, llama, tmp_path, monkeypatch):
    base = in_dtype(llama, tmp_path / "bf16", torch.bfloat16)
    state, delta = tuned(base, LLAMA_LAYERS, tmp_path / "d.safetensors", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"trained in float32, and the base has bfloat16: cast=True rounds"):
        apply_delta(transformers.AutoModelForCausalLM.from_pretrained(base), delta)
    with pytest.raises(ValueError, match="cast=True rounds"):
        apply_to_folder(str(base), delta)
    chosen = {f"{layer}.weight" for layer in LLAMA_LAYERS}
    lost = sum(int((state[name].bfloat16().float() != state[name]).sum()) for name in chosen)
    entries = sum(state[name].numel() for name in chosen)
    said = f"{lost:,} of {entries:,} trained entries"
    assert 0 < lost <= entries
    if route == "python":
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        with pytest.warns(UserWarning, match=said):
            apply_delta(model, delta, cast=True)
        merged = model.state_dict()
    else:
        with monkeypatch.context() as patched:
            if route == "memory":
                patched.setattr(merging, "_patch", lambda *arguments, **named: None)
            assert said in merge_folder(str(base), delta, tmp_path / "merged", cast=True)
        merged = loaded(tmp_path / "merged")
    assert_equal(merged, {name: tensor.to(torch.bfloat16) for name, tensor in state.items()})
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    assert said in str(apply_to_folder(str(base), delta, cast=True, check=True)[1])
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before
    apply_to_folder(str(base), delta, cast=True)
    assert_equal(loaded(base), merged)


def test_rounding_is_to_nearest_even_and_never_to_infinity(llama, tmp_path):
    base = in_dtype(llama, tmp_path / "f16", torch.float16)
    name = "model.layers.0.mlp.up_proj"
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with SelectiveBackward(model, [name]) as wrapped:
        with torch.no_grad():  # halfway between two neighbours: to the even one, down and up
            next(wrapped.parameters())[0, :2] = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11])
        delta = wrapped.save(tmp_path / "d.safetensors")
        with torch.no_grad():
            next(wrapped.parameters())[0, 0] = 70_000.0
        large = wrapped.save(tmp_path / "e.safetensors")
    half = transformers.AutoModelForCausalLM.from_pretrained(base)
    with pytest.warns(UserWarning, match="2 of 512 trained entries"):
        apply_delta(half, delta, cast=True)
    assert half.get_parameter(f"{name}.weight")[0, :2].tolist() == [1.0, 1 + 2**-9]
    untouched = transformers.AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ValueError, match=rf"'{name}.weight' has values beyond the range of float16"):
        apply_delta(untouched, large, cast=True)
    assert_equal(untouched.state_dict(), loaded(base))


def test_a_base_that_was_itself_rounded_is_another_one(llama, tmp_path):
    """No digest of the float32 base can vouch for what rounding made of it."""
    _, delta = tuned(llama, LLAMA_LAYERS, tmp_path / "d.safetensors", dtype=torch.float32)
    base = in_dtype(llama, tmp_path / "bf16", torch.bfloat16)
    with pytest.raises(ValueError, match="differ from those it was trained on"):
        apply_delta(transformers.AutoModelForCausalLM.from_pretrained(base), delta, cast=True)
    with pytest.raises(ValueError, match="differ from those it was trained on"):
        merge_folder(str(base), delta, tmp_path / "merged", cast=True)
    assert not (tmp_path / "merged").exists()


def test_a_bfloat16_run_into_its_float32_files_loses_nothing(llama, tmp_path, no_model):
    state, delta = tuned(llama, LLAMA_LAYERS, tmp_path / "d.safetensors", dtype=torch.bfloat16)
    how = merge_folder(str(llama), delta, tmp_path / "merged", cast=True)
    assert "no model was loaded; 0 of" in how
    merged = loaded(tmp_path / "merged")
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    assert_equal({name: tensor.bfloat16() for name, tensor in merged.items()}, state)


def test_shards_of_a_wanted_size(llama, tmp_path):
    state, delta = tuned(llama, LLAMA_LAYERS, tmp_path / "d.safetensors")
    merge_folder(str(llama), delta, tmp_path / "merged", max_shard_size="4KB")
    transformers.AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path / "as_is", max_shard_size="4KB")
    there = {file.name for file in (tmp_path / "as_is").iterdir()}
    assert len([name for name in there if name.endswith(".safetensors")]) > 3
    assert there <= {file.name for file in (tmp_path / "merged").iterdir()}
    assert_equal(loaded(tmp_path / "merged"), state)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    merge_delta(model, delta, tmp_path / "python", max_shard_size="4KB")
    assert there <= {file.name for file in (tmp_path / "python").iterdir()}
    with pytest.raises(ValueError, match="max_shard_size='4KB' is for folders"):
        merge_delta(model, delta, tmp_path / "one.safetensors", max_shard_size="4KB")
    with pytest.raises(ValueError, match="many"):
        merge_folder(str(llama), delta, tmp_path / "wrong", max_shard_size="many")
    assert not (tmp_path / "wrong").exists()


def as_pickles(folder, out, shards=1):
    """The folder as old versions of transformers wrote it."""
    shutil.copytree(folder, out)
    weights = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    names = sorted(weights)
    homes = {name: f"pytorch_model-{place % shards + 1:05}-of-{shards:05}.bin" for place, name in enumerate(names)}
    for file in set(homes.values()):
        torch.save({name: weights[name] for name in names if homes[name] == file}, out / file)
    if shards == 1:
        (out / file).rename(out / "pytorch_model.bin")
    else:
        index = {"metadata": {}, "weight_map": homes}
        (out / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return out


@pytest.mark.parametrize("shards", [1, 3])
def test_a_base_of_pickles_comes_out_as_safetensors(shards, llama, tmp_path):
    base = as_pickles(llama, tmp_path / "pickles", shards)
    state, delta = tuned(base, LLAMA_LAYERS, tmp_path / "d.safetensors")
    assert "merged in memory" in merge_folder(str(base), delta, tmp_path / "merged")
    there = {file.name for file in (tmp_path / "merged").iterdir()}
    assert "model.safetensors" in there and not [name for name in there if ".bin" in name]
    assert_equal(loaded(tmp_path / "merged"), state)


def test_a_pickle_with_code_is_refused_and_not_run(llama, tmp_path):
    _, delta = tuned(llama, LLAMA_LAYERS, tmp_path / "d.safetensors")
    base = as_pickles(llama, tmp_path / "pickles")

    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "was-run"), "w"))

    torch.save({"model.norm.weight": Harmful()}, base / "pytorch_model.bin")
    with pytest.raises(ValueError, match="its weights are a pickle with more in it than tensors"):
        merge_folder(str(base), delta, tmp_path / "merged")
    assert not (tmp_path / "was-run").exists() and not (tmp_path / "merged").exists()
