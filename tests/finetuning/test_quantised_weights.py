"""Frozen weights in int8 and nf4: what is computed, what is held, and what the way back gives."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_model
from small_models import Mlp, assert_same, llama, snapshot
from torch import nn

from zest_fast import SelectiveBackward, merge_delta
from zest_fast.benchmarking import models
from zest_fast.benchmarking.real_steps import counted_step
from zest_fast.finetuning import selective_backward
from zest_fast.finetuning.quantised_formats import FORMATS
from zest_fast.finetuning.quantised_weights import QuantisedLinear
from zest_fast.planning.plan import plan

LAYERS = ["model.layers.1.mlp.up_proj", "model.layers.2.self_attn.q_proj"]
SIZES = {"hidden_size": 64, "intermediate_size": 144, "num_attention_heads": 4}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["int8", "nf4"])
def kind(request):
    if request.param == "nf4":
        pytest.importorskip("bitsandbytes")
    return request.param


def language_model(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return llama(**SIZES, use_cache=False).to(dtype)


def tokens():
    ids = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def gradients(model, parameters):
    loss = model(**tokens()).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in parameters]


def cosine(a, b):
    return torch.cosine_similarity(torch.cat([g.flatten() for g in a]), torch.cat([g.flatten() for g in b]), dim=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 7), (3, 96), (64, 48), (1, 1), (2100, 1000)])  # odd, blocks over rows, in parts
def test_rounding_is_within_half_a_step(kind, shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0] = 0  # a scale of zero
    packed, scale = FORMATS[kind].pack(weight)
    back = FORMATS[kind].unpack(packed, scale, weight.shape, dtype)
    assert back.dtype == dtype and back.shape == weight.shape and not back[0].any()
    per_weight = scale.unsqueeze(1) if kind == "int8" else scale.repeat_interleave(64)[: weight.numel()].view(shape)
    widest = 0.5 if kind == "int8" else (1 - 0.6962) / 2  # of nf4's 16 values the first two are furthest apart
    room = 4 * torch.finfo(dtype).eps * weight.abs().float()
    assert ((back.float() - weight.float()).abs() <= widest * 1.001 * per_weight + room).all()


def test_a_step_is_that_of_the_rounded_model(kind):
    """Loss and gradients equal those of the same model with unpacked weights, bit for bit; frozen bits stay."""
    model = language_model()
    plain = copy.deepcopy(model)
    tuned = SelectiveBackward(model, LAYERS, frozen=kind)
    packed = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert {p.dtype for p in tuned.parameters()} == {torch.bfloat16}
    assert isinstance(model.lm_head, nn.Linear) and isinstance(model.model.layers[0].mlp.up_proj, QuantisedLinear)

    rounded = copy.deepcopy(plain)
    for name, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            rounded.get_submodule(name).weight.data = module.weight
    with SelectiveBackward(rounded, LAYERS) as same:
        expected = gradients(rounded, same.parameters())
    found = gradients(model, tuned.parameters())
    assert torch.equal(found[0], expected[0])
    for a, b in zip(found[1], expected[1], strict=True):
        assert torch.isfinite(a).all() and torch.equal(a, b)

    with SelectiveBackward(plain, LAYERS) as unquantised:
        exact = gradients(plain, unquantised.parameters())
    assert cosine(found[1], exact[1]) > (0.99 if kind == "int8" else 0.9)

    torch.optim.AdamW(tuned.parameters(), lr=1e-2).step()
    tuned.verify()
    for name, before in packed.items():
        assert torch.equal(dict(model.named_parameters())[name], before), name


def test_remove_gives_plain_layers_with_rounded_weights(kind):
    model = language_model()
    found = snapshot(model)
    names = [name for name, _ in model.named_parameters()]
    module = model.model.layers[0].mlp.up_proj
    with SelectiveBackward(model, LAYERS, frozen=kind) as tuned:
        rounded = module.weight
        logits = model(**tokens()).logits
        assert "frozen    19 Linear layers in " + kind in str(tuned.summary())
        total = sum(p.numel() for p in language_model().parameters())
        assert tuned.summary().total_parameters == total
        assert tuned.summary().skipped_parameters < total
    assert module is model.model.layers[0].mlp.up_proj and type(module) is nn.Linear
    assert torch.equal(module.weight, rounded) and "format" not in vars(module)
    assert names == [name for name, _ in model.named_parameters()]
    after = snapshot(model)
    assert found[1:] == after[1:]
    assert found[0].keys() == after[0].keys()
    assert torch.equal(model(**tokens()).logits, logits)


def test_deltas_fit_what_is_quantised_likewise(kind, tmp_path):
    path = tmp_path / "delta.safetensors"
    model, again = language_model(), language_model()
    with SelectiveBackward(model, LAYERS, frozen=kind) as tuned:
        for parameter in tuned.parameters():
            parameter.data.add_(0.5)
        tuned.save(path)
        expected = model(**tokens()).logits
    with SelectiveBackward(again, LAYERS, frozen=kind) as other:
        other.load(path)
        assert torch.equal(again(**tokens()).logits, expected)
    with SelectiveBackward(language_model(), LAYERS) as plain, pytest.raises(ValueError, match="differ from those"):
        plain.load(path)


@pytest.mark.parametrize("checkpoint", [None, "above-cut"])
def test_bytes_are_those_of_the_plan(kind, checkpoint):
    """Counted by the allocator, scratch included, with everything that is held."""
    config = {"num_hidden_layers": 4, "vocab_size": 2000, "hidden_size": 512, "intermediate_size": 1376}
    model, batch = models.llama(2, 64, **config)
    model = model.to(torch.bfloat16)
    layers = [f"model.layers.{block}.mlp.up_proj" for block in (2, 3)]
    options = {"frozen": kind, "checkpoint": checkpoint}
    planned = plan(model, layers, batch_size=2, sequence_length=64, **options)
    assert planned.peak_bytes == pytest.approx(counted_step(model, batch, layers, "adamw", **options), rel=0.05)
    dense = plan(model, layers, batch_size=2, sequence_length=64, checkpoint=checkpoint).peak_bytes
    assert planned.peak_bytes < 0.85 * dense


def test_bias_adapters_and_lower_precision(kind):
    """Mlp runs c, a, b, head; under autocast the rounded weights are cast as those of a Linear."""
    torch.manual_seed(0)
    model = Mlp()
    tuned = SelectiveBackward(model, ["a"], frozen=kind)
    rounded = Mlp()
    rounded.load_state_dict(
        {**{k: v for k, v in model.state_dict().items() if "b." not in k and "c." not in k}}, strict=False
    )
    for name in "bc":
        rounded.get_submodule(name).weight.data = model.get_submodule(name).weight
        rounded.get_submodule(name).bias.data = model.get_submodule(name).bias.data.clone()
    model.b.bias.requires_grad_(True)  # an adapter: it trains too
    x = torch.randn(5, 4)
    for cast in (False, True):
        results = []
        for net in (model, rounded):
            net.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                y = net(x)
            y.float().square().sum().backward()
            results.append([y.detach(), net.a.weight.grad, net.b.bias.grad])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0.02 if cast else 1e-6, atol=1e-6)
    model.to(torch.bfloat16)
    assert model.b.scale.dtype == torch.float32 and model.b.weight.dtype == torch.bfloat16
    tuned.remove()
    assert model.b.weight.dtype == torch.bfloat16


def test_what_is_left_as_it_is():
    """The head, what shares its weight, what is replaced, and subclasses whose owners read the weight."""

    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.tied = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.tied.weight = self.b.weight
            self.attention = nn.MultiheadAttention(4, 2)
            self.replaced = nn.Linear(4, 4)
            self.replaced.forward = torch.relu
            self.plain, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    model = Several()
    SelectiveBackward(model, ["a"], head=None, frozen="int8")
    assert [n for n, m in model.named_modules() if isinstance(m, QuantisedLinear)] == ["plain"]


def conv():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        (Mlp, {"frozen": "int4"}, ValueError, "frozen='int4' is unknown; None, 'int8' or 'nf4' is needed"),
        (conv, {"layers": ["0"], "frozen": "int8"}, ValueError, r"no frozen nn\.Linear to quantise"),
        (Mlp, {"frozen": "int8", "checkpoint": "above-cut"}, ValueError, "Mlp has no repeated blocks"),
        (Mlp, {"frozen": "nf4"}, ImportError, r"pip install 'zest_fast\[quant\]'"),
    ],
)
def test_refusals_leave_the_model_untouched(make, arguments, error, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = make()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        SelectiveBackward(model, **{"layers": ["a"], **arguments})
    assert_same(before, snapshot(model))
    with pytest.raises(ValueError, match=r"no frozen nn\.Linear"):
        plan(
            "mobilenet-v2", ["mobilenet_v2.conv_stem.first_conv.convolution"], batch_size=1, image_size=64, frozen="nf4"
        )


def loaded_quantised(bits):
    """What transformers makes with a BitsAndBytesConfig, and the weights as they are rounded."""
    bnb = pytest.importorskip("bitsandbytes")
    model = language_model()
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    parent.add_module(name, _bitsandbytes_layer(bnb, linear, bits))
    return model


def _bitsandbytes_layer(bnb, linear, bits):
    sizes = linear.in_features, linear.out_features, False
    if bits == 4:
        layer = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False)
    return layer.to("cpu")


@pytest.mark.parametrize("bits", [4, 8])
def test_chosen_layers_of_a_quantised_model_are_unpacked(bits):
    model = loaded_quantised(bits)
    exact = language_model().get_submodule(LAYERS[0]).weight
    kind = type(model.model.layers[0].mlp.up_proj)
    with SelectiveBackward(model, LAYERS) as tuned:
        chosen = model.get_submodule(LAYERS[0])
        assert type(chosen) is nn.Linear and chosen.weight.dtype == torch.bfloat16
        assert type(model.model.layers[0].mlp.up_proj) is kind
        assert tuned.summary().total_parameters == sum(p.numel() for p in language_model().parameters())
        assert torch.cosine_similarity(chosen.weight.flatten().float(), exact.flatten().float(), dim=0) > 0.99
        _, found = gradients(model, tuned.parameters())
        assert all(torch.isfinite(gradient).all() and gradient.any() for gradient in found)
        torch.optim.AdamW(tuned.parameters(), lr=1e-2).step()
        tuned.verify()
    assert type(chosen) is nn.Linear


def test_a_quantised_layer_that_cannot_be_unpacked_is_named():
    model = loaded_quantised(4)
    chosen = model.get_submodule(LAYERS[0])
    chosen.forward = torch.relu
    with pytest.raises(ValueError, match=r"up_proj' is quantised, and the forward of its Linear4bit was replaced"):
        SelectiveBackward(model, LAYERS)
    del chosen.forward
    with pytest.raises(ValueError, match="is unknown"):
        SelectiveBackward(model, LAYERS, frozen="int9")
    assert not model.get_submodule(LAYERS[0]).weight.is_floating_point()


def test_a_merged_delta_loads_into_a_plain_model(kind, tmp_path):
    model = language_model()
    tuned = SelectiveBackward(model, LAYERS, frozen=kind)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.5
    wanted = model(**tokens()).loss
    tuned.save(tmp_path / "delta.safetensors")
    merge_delta(model, tmp_path / "delta.safetensors", tmp_path / "merged.safetensors")
    plain = language_model()
    load_model(plain, tmp_path / "merged.safetensors")
    assert torch.equal(plain(**tokens()).loss, wanted)


def test_other_precisions_are_about_the_unpacked_weight(kind):
    model = language_model()
    tuned = SelectiveBackward(model, LAYERS, frozen=kind)
    rounded = model.model.layers[0].mlp.up_proj.weight
    for change, dtype in (
        (model.float, torch.float32),
        (model.bfloat16, torch.bfloat16),
        (lambda: model.type(torch.float32), torch.float32),
    ):
        change()
        layer = model.model.layers[0].mlp.up_proj
        assert layer.weight.dtype == dtype and layer.scale.dtype == torch.float32
        assert torch.equal(layer.weight.to(torch.bfloat16), rounded)
        assert torch.isfinite(model(**tokens()).loss)
    tuned.remove()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_an_adapter_is_not_merged_into_what_is_packed():
    model = get_peft_model(
        language_model(torch.float32), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    tuned = SelectiveBackward(model, ["base_model.model.model.layers.1.mlp.up_proj"], frozen="int8", lean=False)
    with pytest.raises(RuntimeError, match=r"call \.remove\(\)"):
        model.merge_adapter()
    tuned.remove()
    loss = model(**tokens()).loss
    model.merge_adapter()
    assert torch.allclose(model(**tokens()).loss, loss, atol=1e-5)


def test_what_was_rounded_before_an_error_is_said(monkeypatch):
    monkeypatch.setattr(selective_backward, "apply_lean", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        SelectiveBackward(language_model(), LAYERS, frozen="int8")
    assert "load the model again" in caught.value.__notes__[0]


def test_weights_that_are_not_finite_are_named():
    model = language_model()
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("inf")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj' holds weights that are not finite"):
        SelectiveBackward(model, LAYERS, frozen="int8")
    assert_same(before, snapshot(model))


def test_verify_belongs_before_remove():
    tuned = SelectiveBackward(language_model(), LAYERS, frozen="int8")
    assert tuned.frozen_format == "int8"
    tuned.remove()
    with pytest.raises(RuntimeError, match=r"call \.verify\(\) before it"):
        tuned.verify()
    assert tuned.frozen_format is None


def test_an_optimizer_of_before_is_refused():
    model = language_model()
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if "proj" in name], lr=1e-3)
    tuned = SelectiveBackward(model, LAYERS, head=None, frozen="int8")
    with pytest.raises(ValueError, match=r"holds 19 weights that are quantised by now"):
        tuned.summary(optimizer)
    assert tuned.summary(torch.optim.SGD(tuned.parameters(), lr=1e-3)).foreign == 0
