"""Folders that `open_streamed` opens, and those that it refuses."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from streamed_models import LAYERS, resident, save_llama, save_shards, tokens

from zest_fast import open_streamed
from zest_fast.streaming import empty_models, mapped_files, opening
from zest_fast.streaming.mapped_files import pages_of

pytestmark = [pytest.mark.usefixtures("one_thread")]


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(opening, "SMALL", 0)


@pytest.fixture
def folder(tmp_path):
    return save_llama(tmp_path / "llama", num_hidden_layers=4)


def shard_of(folder, name):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def change(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_resident_and_what_is_mapped(folder):
    model = open_streamed(folder, train=LAYERS)
    mapped = {name for name, parameter in model.named_parameters() if pages_of(parameter) is not None}
    trained = {f"{name}.weight" for name in LAYERS}
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    assert mapped == matrices - trained
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    assert type(model.get_submodule(LAYERS[0])) is torch.nn.Linear
    assert type(model.lm_head) is torch.nn.Linear and type(model.model.embed_tokens) is torch.nn.Embedding
    with torch.no_grad():
        model.get_submodule(LAYERS[0]).weight.add_(1)
    assert torch.equal(
        open_streamed(folder).get_submodule(LAYERS[0]).weight, resident(folder).get_submodule(LAYERS[0]).weight
    )


def test_one_file_the_dtypes_of_the_file_and_names_without_the_prefix(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50)
    model = transformers.GPT2LMHeadModel(config)
    folder = save_shards(tmp_path / "gpt2", model, size="1GB")
    path = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    tensors["h.0.ln_1.weight"] = tensors["h.0.ln_1.weight"].double()
    save_file(tensors, path)
    found = open_streamed(str(folder))
    assert found.transformer.h[0].ln_1.weight.dtype == torch.float64
    assert torch.equal(found.transformer.h[1].mlp.c_fc.weight, model.transformer.h[1].mlp.c_fc.weight)
    assert found.lm_head.weight is found.transformer.wte.weight


def test_batch_norms_and_convolutions_are_in_memory(tmp_path):
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    folder = save_shards(tmp_path / "resnet", transformers.ResNetForImageClassification(config))
    model, plain = open_streamed(folder), resident(folder)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images).logits, plain(images).logits)
    for (name, found), expected in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name
    model.train()(images)  # moves running statistics, which are nobody else's
    assert torch.equal(open_streamed(folder)(images).logits, plain(images).logits)


def test_tied_weights_that_the_files_have_twice(tmp_path):
    folder = save_llama(tmp_path / "tied", tie_word_embeddings=True)
    path = shard_of(folder, "model.embed_tokens.weight")
    save_file({**load_file(path), "lm_head.weight": load_file(path)["model.embed_tokens.weight"].clone()}, path)
    model = open_streamed(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    change(path, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(ValueError, match=r"are tied there and differ in the files; set tie_word_embeddings"):
        open_streamed(folder)
    configure(folder, tie_word_embeddings=False)
    model = open_streamed(folder)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight + 1)


def test_in_inference_mode(folder):
    with torch.inference_mode():
        model = open_streamed(folder, train=LAYERS)
        found = model(**tokens()).logits
    assert torch.equal(found, resident(folder)(**tokens()).logits)
    model(**tokens()).loss.backward()
    assert model.get_submodule(LAYERS[0]).weight.grad.any()


def test_building_leaves_torch_and_other_threads_alone(folder):
    register = torch.nn.Module.register_parameter
    with empty_models._parameters_on_meta():
        made = torch.nn.Linear(2, 2)
        assert made.weight.is_meta and torch.nn.Module.register_parameter is not register
    assert torch.nn.Module.register_parameter is register
    state = torch.random.get_rng_state()
    open_streamed(folder)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_tensors_that_nobody_has_are_named_once(folder):
    path = shard_of(folder, LAYERS[0] + ".weight")
    change(path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    open_streamed(folder)  # as old checkpoints have it; transformers passes over it, too
    change(path, lambda tensors: tensors.update(stray=torch.ones(3)))
    with pytest.warns(UserWarning, match=r"holds 'stray', which LlamaForCausalLM does not have: not used"):
        open_streamed(folder)


# What is refused


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_torn_shard_is_named(folder, length):
    path = shard_of(folder, LAYERS[0] + ".weight")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=rf"{path.name}' is torn"):
        open_streamed(folder)


def test_a_deleted_shard_is_named(folder):
    path = shard_of(folder, LAYERS[0] + ".weight")
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path.name}' is missing"):
        open_streamed(folder)


def test_a_tensor_that_is_missing_is_named(folder):
    name = LAYERS[0] + ".weight"
    path = shard_of(folder, name)
    change(path, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"{path.name}' has no '{name}', although model\.safetensors\.index\.json"):
        open_streamed(folder)
    index = folder / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    del found["weight_map"][name]
    index.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=rf"LlamaForCausalLM of its config\.json: it lacks {name}|it lacks '{name}'"):
        open_streamed(folder)


def test_a_tensor_of_two_shards_is_named(folder):
    first, other = (shard_of(folder, name) for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"))
    assert first != other
    change(other, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64)}))
    with pytest.raises(ValueError, match=r"has 'model\.norm\.weight' twice"):
        open_streamed(folder)


def test_other_shapes_and_kinds_than_the_configuration_says(folder):
    name = LAYERS[0] + ".weight"
    path = shard_of(folder, name)
    change(path, lambda tensors: tensors.update({name: tensors[name][:5].contiguous()}))
    with pytest.raises(ValueError, match=rf"'{name}' has shape \[5, 64\], and \[172, 64\] there"):
        open_streamed(folder)
    change(path, lambda tensors: tensors.update({name: torch.ones(172, 64, dtype=torch.int8)}))
    with pytest.raises(ValueError, match=rf"'{name}' is stored as torch\.int8"):
        open_streamed(folder)


def test_a_layer_that_does_not_exist(folder):
    with pytest.raises(
        ValueError, match=r"no layer 'model\.layers\.2\.mlp\.up'; nearest: 'model\.layers\.2\.mlp\.up_proj'"
    ):
        open_streamed(folder, train=["model.layers.2.mlp.up"])
    with pytest.raises(ValueError, match=r"head: the model has no layer 'lm_hed'; nearest: 'lm_head'"):
        open_streamed(folder, head="lm_hed")
    with pytest.raises(TypeError, match="iterable of layer names"):
        open_streamed(folder, train="model.layers.2.mlp.up_proj")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"neither model\.safetensors nor model\.safetensors\.index\.json"),
        ({"model.safetensors.index.json": "{"}, r"index\.json': torn JSON"),
        ({"model.safetensors.index.json": "[]"}, "weight_map: expected files"),
        ({"model.safetensors.index.json": '{"weight_map": {"a": 3}}'}, "weight_map: expected files"),
        ({"model.safetensors.index.json": '{"weight_map": {"a": "../b"}}'}, "would lie outside of the folder"),
        ({"model.safetensors.index.json": '{"weight_map": {"a": "/etc/b"}}'}, "would lie outside of the folder"),
        ({"zest_fast.json": "{"}, r"zest_fast\.json' is not what zest_fast\.pack writes: torn JSON"),
        ({"zest_fast.json": '{"version": 9}'}, r"version 9, and this zest_fast reads 1: upgrade it"),
        ({"zest_fast.json": '{"format": "zip"}'}, r"zest_fast\.json'.*version: it is not there"),
    ],
)
def test_foreign_folders(files, message, tmp_path):
    (tmp_path / "there").mkdir()
    for name, text in files.items():
        (tmp_path / "there" / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        open_streamed(tmp_path / "there")
    with pytest.raises(ValueError, match=r"their' does not exist; nearest: 'there'"):
        open_streamed(tmp_path / "their")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file, not a folder"):
        open_streamed(tmp_path / "file")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "has no architectures"),
        ({"architectures": [3]}, "has no architectures"),
        ({"architectures": ["Llama"]}, "names 'Llama', which is no model of transformers"),
        ({"architectures": ["AutoConfig"]}, "which is no model of transformers"),
        ({"model_type": "llamma"}, "is no configuration that transformers knows"),
        ({"hidden_size": "wide"}, r"config\.json'"),
        ({"num_attention_heads": 5}, r"config\.json'"),
        ({"attn_implementation": "somebody/kernels"}, "code that would be fetched and run"),
    ],
)
def test_configurations_that_make_no_model(folder, changes, message):
    configure(folder, **changes)
    with pytest.raises(ValueError, match=message):
        open_streamed(folder)


def test_a_configuration_that_is_missing_or_torn(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json' is no configuration"):
        open_streamed(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json' does not exist"):
        open_streamed(folder)


def test_another_system_than_linux(folder, monkeypatch):
    monkeypatch.setattr(mapped_files.sys, "platform", "darwin")
    with pytest.raises(NotImplementedError, match="on Linux only, and this is darwin"):
        open_streamed(folder)


def test_without_transformers(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'zest_fast\[transformers\]'"):
        open_streamed(folder)


def test_a_pass_that_is_interrupted_leaves_nothing_resident(folder):
    """The hooks at the end of a pass run whatever happened in it."""
    model = open_streamed(folder)
    model.model.layers[3].mlp.forward = _interrupt
    with pytest.raises(KeyboardInterrupt):
        model(**tokens())
    del model.model.layers[3].mlp.forward
    assert torch.equal(model(**tokens()).logits, resident(folder)(**tokens()).logits)


def _interrupt(*_):
    raise KeyboardInterrupt
