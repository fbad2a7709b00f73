"""Deltas for llama.cpp: the patched file is that of the tuned model; an adapter adds what was trained."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
import transformers
from checkpoints import save_llama
from torch import nn

from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.integrations.sharing.gguf_files import delta_to_gguf, delta_to_gguf_lora

gguf = pytest.importorskip("gguf")
from gguf_models import read, rotated, save_gguf, tensors  # noqa: E402 (it imports gguf)

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def llama(**settings):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **settings))


def gpt2():
    config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def bert():
    sizes = {key: size for key, size in SIZES.items() if key != "num_key_value_heads"}
    return transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False)


ATTENTION = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"]
CASES = {
    "llama": (llama, ATTENTION, ["model.norm"]),
    "llama-bias": (lambda: llama(attention_bias=True), ATTENTION, None),
    "llama-head": (llama, [*ATTENTION, "lm_head", "model.embed_tokens"], None),
    "llama-tied": (lambda: llama(tie_word_embeddings=True), [*ATTENTION, "lm_head"], None),
    "qwen2": (lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)), ATTENTION, None),
    "qwen3": (lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=8)), ATTENTION, None),
    "mistral": (lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES)), ATTENTION, ["lm_head"]),
    "bert": (bert, ["encoder.layer.0.attention.self.query", "encoder.layer.1.output.dense"], ["embeddings"]),
    "gpt2": (gpt2, ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj", "transformer.wpe"], None),
}


def moved(kind, path):
    build, layers, head = CASES[kind]
    torch.manual_seed(0)
    base = build().eval()
    with torch.no_grad():
        for parameter in base.parameters():  # biases and norms, too: what is all zeros has no order
            parameter.add_(torch.randn_like(parameter) * 0.02)
    tuned = copy.deepcopy(base)
    with SelectiveBackward(tuned, layers, head=head) as wrapped:
        with torch.no_grad():
            for parameter in wrapped.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        delta = wrapped.save(path)
    return base, tuned, delta


@pytest.mark.parametrize("kept", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("kind", CASES)
def test_a_patched_file_is_that_of_the_tuned_model(kind, kept, tmp_path):
    base, tuned, delta = moved(kind, tmp_path / "d.safetensors")
    file = save_gguf(base, tmp_path / "base.gguf", kept)
    before = file.read_bytes()
    patch = delta_to_gguf(delta, base, file, tmp_path / "tuned.gguf")
    wanted = save_gguf(tuned, tmp_path / "wanted.gguf", kept)
    assert (tmp_path / "tuned.gguf").read_bytes() == wanted.read_bytes() and file.read_bytes() == before
    there, exact = read(wanted), {name: torch.from_numpy(one) for name, one in tensors(tuned).items()}
    assert patch.lost == sum(int((there[name] != exact[name]).sum()) for name in patch.tensors)
    assert (patch.lost == 0) == (kept == "f32") and patch.entries >= patch.lost
    assert len(patch.tensors) == len([name for name in there if not torch.equal(read(file)[name], there[name])])


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2"])
def test_transformers_reads_it_as_the_tuned_model(kind, tmp_path):
    base, tuned, delta = moved(kind, tmp_path / "d.safetensors")
    save_gguf(base, tmp_path / "base.gguf")
    delta_to_gguf(delta, base, tmp_path / "base.gguf", tmp_path / "tuned.gguf")
    for file, model in (("base.gguf", base), ("tuned.gguf", tuned)):
        read_back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file).eval()
        assert not [
            name for name, tensor in model.state_dict().items() if not torch.equal(tensor, read_back.state_dict()[name])
        ]
        tokens = torch.arange(12).reshape(2, 6)
        with torch.no_grad():
            assert torch.allclose(read_back(tokens).logits, model(tokens).logits, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "llama-head", "qwen2", "qwen3", "mistral", "gpt2", "bert"])
def test_an_adapter_adds_what_was_trained(kind, tmp_path):
    """By what llama.cpp computes: W + alpha / rank B A, of an embedding the rows of A times B."""
    base, _, _ = moved(kind, tmp_path / "d.safetensors")
    layers = [name for name in CASES[kind][1] if "wpe" not in name]
    tuned = copy.deepcopy(base)
    with SelectiveBackward(tuned, layers, head=None) as wrapped:
        with torch.no_grad():
            for name, parameter in zip(wrapped.trainable_names, wrapped.parameters(), strict=True):
                if name.endswith("weight"):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        delta = wrapped.save(tmp_path / "d.safetensors")
    export = delta_to_gguf_lora(delta, base, tmp_path / "adapter.gguf", error=0.2)
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    said = {
        name: reader.get_field(name).contents() for name in ("general.type", "adapter.type", "general.architecture")
    }
    assert said == {
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.architecture": "llama" if kind == "mistral" else base.config.model_type,
    }
    alpha = reader.get_field("adapter.lora.alpha").contents()
    assert len({one.rank for one in export.layers}) > 1 and alpha == max(one.rank for one in export.layers)
    found, before, after = read(tmp_path / "adapter.gguf"), tensors(base), tensors(tuned)
    homes = {name.removesuffix(".lora_a") for name in found if name.endswith(".lora_a")}
    assert homes == {name for name in before if (before[name] != after[name]).any()}
    missing, total = 0.0, 0.0
    for home in homes:
        a, b = found[f"{home}.lora_a"], found[f"{home}.lora_b"]
        scale = alpha / b.shape[1]
        added = scale * (a @ b.T if home == "token_embd.weight" else b @ a)
        difference = torch.from_numpy(after[home] - before[home])
        left = (difference - added).norm() / difference.norm()
        assert left <= 0.2 + 1e-5
        missing, total = missing + float((difference - added).square().sum()), total + float(difference.square().sum())
    assert export.error == pytest.approx((missing / total) ** 0.5, abs=1e-4)


def test_rows_of_queries_and_keys_go_where_the_definition_says():
    rows = torch.arange(16).reshape(8, 2).numpy()
    assert rotated(rows, 2)[:, 0].tolist() == [0, 4, 2, 6, 8, 12, 10, 14]


def test_what_an_adapter_of_llama_cpp_cannot_hold_is_named(tmp_path):
    for kind, named in (("llama", "model.norm"), ("llama-bias", r"model\.layers\.\d\..*"), ("llama-tied", "lm_head")):
        base, _, delta = moved(kind, tmp_path / "d.safetensors")
        with pytest.raises(ValueError, match=rf"adapters of llama\.cpp hold no .*{named}"):
            delta_to_gguf_lora(delta, base, tmp_path / "adapter.gguf", rank=4)
    torch.manual_seed(0)
    base = gpt2()
    with SelectiveBackward(tuned := copy.deepcopy(base), ["transformer.wpe"], head=None) as wrapped:
        nn.init.normal_(tuned.transformer.wpe.weight)
        delta = wrapped.save(tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match=r"'transformer\.wpe' is no matrix that llama\.cpp adapts"):
        delta_to_gguf_lora(delta, base, tmp_path / "adapter.gguf", rank=4)
    assert not (tmp_path / "adapter.gguf").exists() and not list(tmp_path.glob(".*"))


def test_other_files_are_refused_and_nothing_is_left(tmp_path):
    base, _, delta = moved("llama", tmp_path / "d.safetensors")
    file, out = save_gguf(base, tmp_path / "base.gguf"), tmp_path / "tuned.gguf"
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.model.layers[1].mlp.gate_proj.weight[0, 0] += 1e-3  # which was not trained
    with pytest.raises(ValueError, match=r"holds other values in 'blk\.1\.ffn_gate\.weight' than the base"):
        delta_to_gguf(delta, base, save_gguf(other, tmp_path / "other.gguf"), out)
    with pytest.raises(ValueError, match=r"d\.safetensors' does not fit"):
        delta_to_gguf(delta, other, file, out)
    torn = tmp_path / "torn.gguf"
    for size in (10, 300, file.stat().st_size - 100):
        torn.write_bytes(file.read_bytes()[:size])
        with pytest.raises(ValueError, match=r"torn\.gguf' is torn or no GGUF"):
            delta_to_gguf(delta, base, torn, out)
    with pytest.raises(FileNotFoundError):
        delta_to_gguf(delta, base, tmp_path / "missing.gguf", out)
    with pytest.raises(ValueError, match="is a GGUF of 'gpt2', and the base is 'llama'"):
        delta_to_gguf(delta, base, save_gguf(gpt2(), tmp_path / "gpt2.gguf"), out)
    wide = copy.deepcopy(base)
    wide.lm_head = nn.Linear(32, 48, bias=False)
    with pytest.raises(ValueError, match=r"has 'output\.weight' of shape \[48, 32\]"):
        delta_to_gguf(delta, base, save_gguf(wide, tmp_path / "wide.gguf"), out)
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_types_that_cannot_be_written_or_hold_the_values(tmp_path, monkeypatch):
    base, _, delta = moved("llama", tmp_path / "d.safetensors")
    file = save_gguf(base, tmp_path / "base.gguf", "q8_0")
    real = gguf.quantize

    def without_q8(values, kind):
        if kind == gguf.GGMLQuantizationType.Q8_0:
            raise NotImplementedError
        return real(values, kind)

    with monkeypatch.context() as patched:
        patched.setattr(gguf, "quantize", without_q8)  # as for the types of k-quants
        with pytest.raises(ValueError, match="is Q8_0, which the package gguf cannot write"):
            delta_to_gguf(delta, base, file, tmp_path / "tuned.gguf")
    with SelectiveBackward(tuned := copy.deepcopy(base), ["lm_head"], head=None) as wrapped:
        with torch.no_grad():
            tuned.lm_head.weight[0, 0] = 1e6
        large = wrapped.save(tmp_path / "e.safetensors")
    half = save_gguf(base, tmp_path / "half.gguf", "f16")
    with pytest.raises(ValueError, match=r"'lm_head\.weight' has values beyond the range of F16"):
        delta_to_gguf(large, base, half, tmp_path / "tuned.gguf")
    assert not (tmp_path / "tuned.gguf").exists()


def test_an_architecture_without_a_layout_is_named(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    base = transformers.ViTForImageClassification(config)
    with SelectiveBackward(copy.deepcopy(base), ["vit.layers.0.mlp.fc1"]) as wrapped:
        delta = wrapped.save(tmp_path / "d.safetensors")
    for write in (
        lambda: delta_to_gguf(delta, base, "x.gguf", tmp_path / "tuned.gguf"),
        lambda: delta_to_gguf_lora(delta, base, tmp_path / "adapter.gguf", rank=1),
    ):
        with pytest.raises(ValueError, match="'vit' models: how llama"):
            write()


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    folder = save_llama(tmp_path / "llama")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with SelectiveBackward(copy.deepcopy(base), ["model.layers.0.mlp.up_proj"]) as wrapped:
        nn.init.normal_(next(wrapped.parameters()))
        delta = wrapped.save(tmp_path / "d.safetensors")
    file = save_gguf(base, tmp_path / "base.gguf")
    out = tmp_path / "tuned.gguf"
    out.write_bytes(b"as it was")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", full)
        with pytest.raises(OSError, match="No space left"):
            delta_to_gguf(delta, str(folder), file, out)
    assert out.read_bytes() == b"as it was" and not list(tmp_path.glob(".*"))
    assert delta_to_gguf(delta, str(folder), file, out).tensors == ("blk.0.ffn_up.weight",)
