"""A delta as an adapter: PEFT loads it, the model that it makes is the tuned one within the error that was stated."""

from __future__ import annotations

import copy
import json
import re
import warnings

import peft
import pytest
import torch
import transformers
from checkpoints import save_llama
from safetensors.torch import load_file
from torch import nn

from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.integrations.sharing import low_rank
from zest_fast.integrations.sharing.lora import delta_to_lora

pytestmark = pytest.mark.usefixtures("one_thread")


def llama(tied=False, **settings):
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, **settings
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def vit():
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    return transformers.ViTForImageClassification(config)


def bert():
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def resnet():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    return transformers.ResNetForImageClassification(config)


TOKENS = {"input_ids": torch.arange(12).reshape(2, 6)}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)}
# kind: model, layers, head, input, what goes whole
CASES = {
    "bert": (
        bert,
        ["bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.attention.self.query"],
        "classifier",
        TOKENS,
        {"classifier"},
    ),
    "bert-embedding": (
        bert,
        ["bert.embeddings.word_embeddings", "bert.encoder.layer.1.intermediate.dense"],
        "classifier",
        TOKENS,
        {"classifier", "bert.encoder.layer.1.intermediate.dense"},  # its bias, which an embedding has none of
    ),
    "llama": (llama, ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.k_proj"], None, TOKENS, set()),
    "llama-head": (llama, ["model.layers.1.mlp.down_proj", "lm_head", "model.embed_tokens"], None, TOKENS, set()),
    "llama-tied": (lambda: llama(tied=True), ["model.layers.0.mlp.gate_proj"], None, TOKENS, set()),
    "llama-tied-head": (
        lambda: llama(tied=True),
        ["model.layers.1.mlp.up_proj", "lm_head"],
        None,
        TOKENS,
        {"model.embed_tokens", "lm_head"},
    ),
    "llama-norm": (
        llama,
        ["model.layers.1.mlp.up_proj"],
        ["model.norm"],
        TOKENS,
        {"model.norm"},
    ),
    "gpt2": (gpt2, ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"], None, TOKENS, set()),
    "gpt2-mixed": (
        gpt2,
        ["transformer.h.0.attn.c_attn", "transformer.wpe"],
        None,
        TOKENS,
        {"transformer.h.0.attn.c_attn"},
    ),
    "vit": (
        vit,
        ["vit.embeddings.patch_embeddings.projection", "vit.layers.1.mlp.fc1"],
        "classifier",
        PIXELS,
        {"classifier"},
    ),
    "resnet": (
        resnet,
        [
            "resnet.encoder.stages.0.layers.0.layer.0.convolution",
            "resnet.encoder.stages.1.layers.0.shortcut.convolution",
        ],
        "classifier",
        PIXELS,
        {"classifier"},
    ),
}


def moved(kind, path, seed=0):
    """base, tuned and the file of the delta: every chosen tensor moved by noise, as different in scale as weights."""
    build, layers, head, batch, whole = CASES[kind]
    torch.manual_seed(seed)
    base = build().eval()
    tuned = copy.deepcopy(base)
    with SelectiveBackward(tuned, layers, head=head) as wrapped:
        with torch.no_grad():
            for parameter in wrapped.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        delta = wrapped.save(path)
    return base, tuned, delta, batch, whole


def loaded(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a key that is missing or unexpected, a layer without bias
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")  # both modules are in it, with equal weights
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()


@torch.no_grad()
def output(model, batch):
    return model(**batch).logits


@pytest.mark.parametrize("kind", CASES)
def test_an_adapter_of_full_rank_is_the_tuned_model_to_rounding(kind, tmp_path):
    base, tuned, delta, batch, whole = moved(kind, tmp_path / "d.safetensors")
    before = copy.deepcopy(base.state_dict())
    export = delta_to_lora(delta, base, tmp_path / "adapter", rank=1000)
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    assert set(export.whole) == whole and export.unchanged == ()
    assert export.error < 1e-6 and all(one.rank == one.full_rank for one in export.layers)
    model = loaded(base, tmp_path / "adapter")
    distance = (output(model, batch) - output(tuned, batch)).abs().max()
    apart = (output(base, batch) - output(tuned, batch)).abs().max()
    assert distance < 2e-5 < apart / 100
    merged = model.merge_and_unload()
    for name, tensor in tuned.state_dict().items():
        assert torch.allclose(merged.state_dict()[name], tensor, atol=2e-6), name


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "resnet"])
def test_every_layer_holds_the_error_that_was_asked_for_and_says_its_own(kind, tmp_path):
    base, tuned, delta, _, _ = moved(kind, tmp_path / "d.safetensors")
    export = delta_to_lora(delta, base, tmp_path / "adapter", error=0.3)
    merged = loaded(base, tmp_path / "adapter").merge_and_unload().state_dict()
    squares, missing = 0.0, 0.0
    assert any(one.rank < one.full_rank for one in export.layers)
    for one in export.layers:
        name = f"{one.name}.weight"
        difference = tuned.state_dict()[name].double() - base.state_dict()[name].double()
        left = torch.linalg.vector_norm(merged[name].double() - tuned.state_dict()[name].double())
        assert 0 < one.rank <= one.full_rank and one.error <= 0.3
        assert float(left / torch.linalg.vector_norm(difference)) == pytest.approx(one.error, abs=1e-5)
        values = torch.linalg.svdvals(difference.flatten(1))
        best = float(values[one.rank :].square().sum().sqrt() / values.square().sum().sqrt())
        assert one.error == pytest.approx(best, rel=1e-5, abs=1e-6)  # Eckart and Young: no other factors are closer
        assert float(values[one.rank - 1 :].square().sum().sqrt() / values.square().sum().sqrt()) > 0.3  # least rank
        squares, missing = squares + float(difference.square().sum()), missing + float(left.square())
    assert export.error == pytest.approx((missing / squares) ** 0.5, abs=1e-5)


def test_settings_select_exactly_these_layers_with_a_scale_of_one(tmp_path):
    base, _, delta, _, _ = moved("llama", tmp_path / "d.safetensors")
    export = delta_to_lora(delta, base, tmp_path / "adapter", error=0.3)
    ranks = {one.name: one.rank for one in export.layers}
    assert len(set(ranks.values())) == 2
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == max(ranks.values()) and config["task_type"] == "CAUSAL_LM"
    assert sorted(config["target_modules"]) == sorted(ranks) and config["inference_mode"]
    ((pattern, rank),) = config["rank_pattern"].items()
    assert config["alpha_pattern"] == {pattern: rank} and re.match(pattern, min(ranks, key=ranks.get))
    model = loaded(base, tmp_path / "adapter")
    adapted = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert adapted == {name: (rank, 1.0) for name, rank in ranks.items()}
    said = str(export)
    assert "LoRA of rank" in said and "on 2 layers" in said
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert all(f"| `{one.name}` | {one.rank} | {one.full_rank} | {one.error:.3g} |" in card for one in export.layers)


def test_rank_alone_is_the_rank_of_every_layer(tmp_path):
    base, _, delta, _, _ = moved("llama", tmp_path / "d.safetensors")
    export = delta_to_lora(delta, base, tmp_path / "adapter", rank=3)
    assert [one.rank for one in export.layers] == [3, 3] and all(0.1 < one.error < 1 for one in export.layers)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert export.bytes == sum(tensor.nbytes for tensor in weights.values()) == 3 * (16 + 32 + 16 + 8) * 4


def test_an_error_that_cannot_be_held_is_refused_by_name(tmp_path):
    base, _, delta, _, _ = moved("llama", tmp_path / "d.safetensors")
    needed = {one.name: one.rank for one in delta_to_lora(delta, base, tmp_path / "all", error=0.05).layers}
    with pytest.raises(ValueError, match=r"error=0.05 cannot be held at rank=2") as caught:
        delta_to_lora(delta, base, tmp_path / "adapter", error=0.05, rank=2)
    for name, rank in needed.items():
        assert f"'{name}' needs rank {rank} (rank 2 leaves an error of 0." in str(caught.value)
    assert not (tmp_path / "adapter").exists() and not list(tmp_path.glob(".*"))


def test_a_large_matrix_is_decomposed_at_random_and_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(low_rank, "_WHOLE_SPECTRUM", 16)
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(90, 80))[0], torch.linalg.qr(torch.randn(120, 80))[0]
    values = 0.8 ** torch.arange(80.0)
    difference = (left * values) @ right.T
    state = torch.random.get_rng_state()
    found = low_rank.low_rank(difference, rank=6, error=None)
    assert torch.equal(torch.random.get_rng_state(), state)
    best = float(values[6:].square().sum().sqrt() / values.square().sum().sqrt())
    assert found.rank == 6 and found.error == pytest.approx(best, rel=1e-3)
    missing = torch.linalg.vector_norm(difference - found.b @ found.a) / torch.linalg.vector_norm(difference)
    assert found.error == pytest.approx(float(missing), rel=1e-5)
    short = low_rank.low_rank(difference, rank=6, error=0.01)
    assert short.needed == next(k for k in range(80) if values[k:].square().sum().sqrt() <= 0.01 * values.norm())


def test_buffers_that_moved_travel_with_their_module(tmp_path):
    torch.manual_seed(0)
    base = resnet().eval()
    tuned = copy.deepcopy(base)
    norm = "resnet.encoder.stages.1.layers.0.layer.0.normalization"
    convolution = "resnet.encoder.stages.1.layers.0.layer.0.convolution"
    with SelectiveBackward(tuned, [convolution], head=["classifier", norm]) as wrapped:
        tuned.train()(torch.randn(4, 3, 8, 8)).logits.square().sum().backward()
        torch.optim.SGD(wrapped.parameters(), lr=0.1).step()
        delta = wrapped.save(tmp_path / "d.safetensors")
    export = delta_to_lora(delta, base, tmp_path / "adapter", rank=1000)
    assert set(export.whole) == {"classifier", norm}
    model = loaded(base, tmp_path / "adapter")
    tuned.eval()
    assert torch.allclose(output(model, PIXELS), output(tuned, PIXELS), atol=1e-5)
    assert not torch.allclose(output(base, PIXELS), output(tuned, PIXELS), atol=1e-3)


@pytest.mark.parametrize("options", [{"groups": 2}, {"dilation": 2}, {"padding_mode": "circular", "padding": 1}])
def test_convolutions_that_peft_computes_otherwise_go_whole(options, tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 8, 3, **options), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(2, 4, 8, 8)
    base(x)
    tuned = copy.deepcopy(base)
    with SelectiveBackward(tuned, ["0", "2"], head="4") as wrapped:
        with torch.no_grad():
            for parameter in wrapped.parameters():
                parameter.add_(torch.randn_like(parameter))
        delta = wrapped.save(tmp_path / "d.safetensors")
    assert set(delta_to_lora(delta, base, tmp_path / "adapter", rank=100).whole) == {"0", "4"}
    with torch.no_grad():
        assert torch.allclose(loaded(base, tmp_path / "adapter")(x), tuned(x), atol=1e-4)


def test_embeddings_that_peft_computes_otherwise_go_whole(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(10, 8, max_norm=1.0), nn.Linear(8, 3))
    x, tuned = torch.randint(10, (2, 5)), copy.deepcopy(base)
    delta = shifted(tuned, ["0", "1"], tmp_path)
    assert delta_to_lora(delta, base, tmp_path / "adapter", rank=100).whole == ("0",)
    with torch.no_grad():
        assert torch.allclose(loaded(base, tmp_path / "adapter")(x), tuned(x), atol=1e-5)


def test_layers_that_the_fast_path_of_torch_does_not_call_go_whole(tmp_path):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    base = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)).eval()
    x, tuned = torch.randn(2, 5, 8), copy.deepcopy(base)
    names = ["0.layers.1.linear1", "0.layers.1.self_attn.out_proj"]
    delta = shifted(tuned, [*names, "1"], tmp_path)
    assert delta_to_lora(delta, base, tmp_path / "adapter", rank=100).whole == tuple(names)
    with torch.no_grad():
        assert torch.allclose(loaded(base, tmp_path / "adapter").eval()(x), tuned(x), atol=1e-5)


def shifted(tuned, layers, tmp_path):
    """The delta of a random change of these layers."""
    with SelectiveBackward(tuned, layers, head=None) as wrapped:
        with torch.no_grad():
            for parameter in wrapped.parameters():
                parameter.add_(torch.randn_like(parameter))
        return wrapped.save(tmp_path / "d.safetensors")


def test_a_folder_and_a_bfloat16_base(tmp_path):
    folder = save_llama(tmp_path / "llama")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    base.save_pretrained(folder)
    tuned = copy.deepcopy(base)
    with SelectiveBackward(tuned, ["model.layers.1.mlp.up_proj"]) as wrapped:
        with torch.no_grad():
            next(wrapped.parameters()).add_(0.01 * torch.randn(32, 16))
        delta = wrapped.save(tmp_path / "d.safetensors")
    export = delta_to_lora(delta, str(folder), tmp_path / "adapter", rank=16)
    assert export.error < 1e-6
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    merged = loaded(base, tmp_path / "adapter").merge_and_unload()
    name = "model.layers.1.mlp.up_proj.weight"
    apart = (merged.state_dict()[name] != tuned.state_dict()[name]).float().mean()
    assert apart < 0.01  # base + difference is a bfloat16 again, but where float32 rounded it past one
    assert "llama" in (tmp_path / "adapter" / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "adapter" / "README.md").read_text()


def test_what_is_wrong_is_said_and_nothing_is_left(tmp_path):
    base, _, delta, _, _ = moved("llama", tmp_path / "d.safetensors")
    for wrong, match in (
        ({}, "say how exact"),
        ({"rank": 0}, "rank=0"),
        ({"rank": True}, "rank=True"),
        ({"error": 0}, "error=0"),
        ({"error": 1.5}, "error=1.5"),
        ({"error": float("nan")}, "error=nan"),
    ):
        with pytest.raises(ValueError, match=match):
            delta_to_lora(delta, base, tmp_path / "adapter", **wrong)
    other, _, _, _, _ = moved("llama", tmp_path / "e.safetensors", seed=1)
    with pytest.raises(ValueError, match=r"d\.safetensors' does not fit"):
        delta_to_lora(delta, other, tmp_path / "adapter", rank=2)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(delta.read_bytes()[:-10])
    with pytest.raises(ValueError, match="no delta that can be read"):
        delta_to_lora(torn, base, tmp_path / "adapter", rank=2)
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError):
        delta_to_lora(delta, base, tmp_path / "there", rank=2)
    base, _, heads, _, _ = moved("bert", tmp_path / "h.safetensors")
    with SelectiveBackward(copy.deepcopy(base), [], head="classifier") as wrapped:
        heads = wrapped.save(tmp_path / "h.safetensors")
    with pytest.raises(ValueError, match=r"no weight that changed and that LoRA could adapt \(whole: classifier\)"):
        delta_to_lora(heads, base, tmp_path / "adapter", rank=2)
    with SelectiveBackward(copy.deepcopy(base), ["bert.encoder.layer.0.output.dense"], frozen="int8") as wrapped:
        rounded = wrapped.save(tmp_path / "q.safetensors", data={"frozen": "int8"})
    with pytest.raises(ValueError, match=r"frozen weights were rounded to int8.*merge it instead"):
        delta_to_lora(rounded, base, tmp_path / "adapter", rank=2)
    assert not (tmp_path / "adapter").exists() and not list(tmp_path.glob(".*"))


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    base, _, delta, _, _ = moved("llama", tmp_path / "d.safetensors")

    def full(self, folder, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft.LoraConfig, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        delta_to_lora(delta, base, tmp_path / "adapter", rank=2)
    assert {file.name for file in tmp_path.iterdir()} == {"d.safetensors"}


def test_a_parameter_of_the_model_itself_is_refused_by_name(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4, 4))
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x @ self.scale)

    base = Scaled()
    with SelectiveBackward(tuned := copy.deepcopy(base), ["scale", "inner"], head=None) as wrapped:
        with torch.no_grad():
            tuned.scale.mul_(2)
            tuned.inner.weight.mul_(2)
        delta = wrapped.save(tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="'scale' belongs to no module"):
        delta_to_lora(delta, base, tmp_path / "adapter", rank=2)
