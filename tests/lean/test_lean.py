"""Lean saving: the same losses and gradients, fewer bytes, and a model that is given back as it was."""

import copy
import inspect
import pickle
from unittest import mock

import pytest
import torch
from small_models import conv_net, llama
from torch import nn
from untouched import changes, state_of

from bench.lean.run import keeping, measure_block
from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.lean import bits as lean_bits
from zest_fast.lean import head_blocks
from zest_fast.lean import loss as lean_loss
from zest_fast.lean import norm as lean_norm
from zest_fast.lean.apply import apply_lean
from zest_fast.lean.frozen_norms import keep_frozen_norms_in_eval
from zest_fast.lean.logits import DeferredLogits

TOLERANCE = 1e-6  # of losses and gradients in float32, relative to the largest entry


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Above(nn.Module):
    """A trained layer, then the module in question: as above the cut."""

    def __init__(self, module, shape, dtype=torch.float32):
        super().__init__()
        self.below = nn.Parameter(torch.randn(shape).to(dtype))
        self.module = module.to(dtype).requires_grad_(False)

    def forward(self):
        return self.module(self.below * 1.0)

    def loss(self):
        return weighted_sum(self())


def weighted_sum(y):
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()


def run(model, loss):
    """Loss and gradients by name."""
    model.zero_grad()
    torch.manual_seed(1)  # dropout
    value = loss()
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def kept_bytes(model, forward):
    with keeping(model) as kept:
        result = forward()  # noqa: F841  kept alive, so that no address is used twice
    return sum(kept.values())


def assert_equal(plain, lean, tolerance=TOLERANCE):
    torch.testing.assert_close(lean[0], plain[0], rtol=tolerance, atol=tolerance, equal_nan=True)
    assert plain[1].keys() == lean[1].keys()
    for name, gradient in plain[1].items():
        scale = float(gradient.abs().nan_to_num(0.0, 0.0, 0.0).max())
        torch.testing.assert_close(lean[1][name], gradient, rtol=0, atol=tolerance * scale, equal_nan=True, msg=name)


def transformers_class(module, name):
    pytest.importorskip("transformers")
    return getattr(__import__(f"transformers.{module}", fromlist=[name]), name)


def rms_norm(name="llama"):
    return transformers_class(f"models.{name}.modeling_{name}", f"{name.title()}RMSNorm")(16)


def gated(name="llama", **config):
    family = {"llama": "Llama", "phi3": "Phi3", "gemma": "Gemma"}[name]
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, **config}
    configuration = transformers_class(f"models.{name}", f"{family}Config")(**sizes)
    return transformers_class(f"models.{name}.modeling_{name}", f"{family}MLP")(configuration)


def batch_norm(dimensions, **options):
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1](6, **options).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def new_gelu():
    return transformers_class("activations", "NewGELUActivation")()


# kind, module, shape of its input, bytes that it may keep (beside parameters)
MODULES = {
    "conv1d": ("convolution", lambda: nn.Conv1d(6, 4, 5, stride=3, padding=1), (2, 6, 21), 0),
    "conv2d": ("convolution", lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=False), (2, 6, 8, 9), 0),
    "depthwise": ("convolution", lambda: nn.Conv2d(6, 12, 3, padding=(2, 1), dilation=2, groups=6), (2, 6, 8, 8), 0),
    "same": ("convolution", lambda: nn.Conv2d(6, 4, (3, 5), padding="same"), (2, 6, 8, 8), 0),
    "valid": ("convolution", lambda: nn.Conv2d(6, 4, 2, padding="valid"), (2, 6, 8, 8), 0),
    "pointwise": ("convolution", lambda: nn.Conv2d(6, 4, 1), (2, 6, 8, 8), 0),
    "conv3d": ("convolution", lambda: nn.Conv3d(6, 4, 3, stride=2, padding=1), (2, 6, 5, 6, 7), 0),
    "batchnorm1d": ("batch norm", lambda: batch_norm(1), (4, 6), 6 * 4),
    "batchnorm2d": ("batch norm", lambda: batch_norm(2), (4, 6, 5, 5), 6 * 4),
    "batchnorm3d without affine": ("batch norm", lambda: batch_norm(3, affine=False), (2, 6, 3, 3, 3), 6 * 4),
    "relu": ("activation", nn.ReLU, (3, 7, 5), 14),
    "relu in place": ("activation", lambda: nn.ReLU(inplace=True), (3, 7, 5), 14),
    "relu6": ("activation", nn.ReLU6, (64, 64), 512),
    "hardtanh": ("activation", lambda: nn.Hardtanh(-0.5, 0.25), (64, 63), 504),
    "leaky relu": ("activation", lambda: nn.LeakyReLU(0.1), (64, 63), 504),
    "dropout": ("dropout", lambda: nn.Dropout(0.3), (64, 63), 504),
    "new gelu": ("activation of several operations", lambda: new_gelu(), (3, 64), 768),
    "gated": ("gated block", gated, (5, 16), 5 * 2 * 24 * 4),
    "gated and fused": ("gated block", lambda: gated("phi3"), (5, 16), 5 * 2 * 24 * 4),
    "gated with gelu": ("gated block", lambda: gated("gemma"), (5, 16), 5 * 2 * 24 * 4),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_module_yields_the_same_and_keeps_less(name):
    kind, make, shape, allowed = MODULES[name]
    model = Above(make(), shape)
    plain, keeps = run(model, model.loss), kept_bytes(model, model)
    with apply_lean(model) as handle:
        assert handle.applied[kind] == ("module",)
        torch.manual_seed(1)
        lean_keeps = kept_bytes(model, model)
        assert_equal(plain, run(model, model.loss))
    assert lean_keeps <= allowed < keeps


@pytest.mark.parametrize("name", ["llama", "gemma", "qwen2"])
def test_rms_norms_keep_their_input_in_its_own_type(name):
    model = Above(rms_norm(name) if name != "qwen2" else qwen2_norm(), (5, 16), torch.bfloat16)
    nn.init.normal_(model.module.weight)
    plain, keeps = run(model, model.loss), kept_bytes(model, model)
    with apply_lean(model) as handle:
        assert handle.applied == {"norm": ("module",)}
        lean = run(model, model.loss)
        assert kept_bytes(model, model) == 5 * 16 * 2 < keeps
    assert torch.equal(plain[0], lean[0]) and torch.equal(plain[1]["below"], lean[1]["below"])  # bit for bit


def qwen2_norm():
    return transformers_class("models.qwen2.modeling_qwen2", "Qwen2RMSNorm")(16)


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("relu in place", "dropout")])
def test_first_and_second_derivatives(name):
    _, make, shape, _ = MODULES[name]
    module = make().double().requires_grad_(False)
    x = torch.randn([min(size, 6) if name in ("relu6", "hardtanh", "leaky relu") else size for size in shape]).double()
    x = x[:1, ..., : max(4, shape[-1] // 2)] if name == "new gelu" else x
    x.requires_grad_(True)
    with apply_lean(module) as handle:
        if not handle.applied:
            pytest.fail(str(handle))

        def forward(x):
            return module(x * 1.0).flatten()[:20]

        assert torch.autograd.gradcheck(forward, (x,), fast_mode=True)
        assert torch.autograd.gradgradcheck(forward, (x,), fast_mode=True)


@pytest.mark.parametrize("layout", ["channels last", "transposed", "view", "not a number"])
@pytest.mark.parametrize("name", ["conv2d", "pointwise", "batchnorm2d", "relu", "leaky relu", "dropout"])
def test_layouts_of_the_input(name, layout):
    module = MODULES[name][1]().requires_grad_(False)
    below = torch.randn(4, 6, 5, 5)
    if layout == "not a number":
        below[0, 0, 0, :2] = torch.tensor([float("nan"), float("inf")])
    arrange = {
        "channels last": lambda x: x.to(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(2, 3),
        "view": lambda x: x[::2, :, 1:],
        "not a number": lambda x: x * 1.0,
    }[layout]
    model = nn.Module()
    model.below, model.module = nn.Parameter(below), module
    loss = lambda: weighted_sum(module(arrange(model.below)))  # noqa: E731
    plain = run(model, loss)
    with apply_lean(model):
        assert_equal(plain, run(model, loss))


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 2**18 + 3])
def test_bits_are_those_that_were_packed(count):
    mask = torch.rand(count) < 0.5
    bits = lean_bits.empty_bits(count, mask.device)
    assert bits.numel() == -(-count // 8)
    for elements, packed in lean_bits.blocks(count, mask.device):
        lean_bits.pack(mask[elements], bits[packed])
        assert torch.equal(lean_bits.unpack(bits[packed], elements.stop - elements.start) != 0, mask[elements])


def test_unbatched_convolution_and_views_written_in_place():
    conv = nn.Conv2d(3, 4, 3).requires_grad_(False)
    x = torch.randn(3, 5, 5, requires_grad=True)
    with apply_lean(nn.Sequential(conv, nn.ReLU(inplace=True))) as handle:
        assert set(handle.applied) == {"convolution", "activation"}
        conv(x).sum().backward()
        relu = nn.ReLU(inplace=True)
        with apply_lean(relu):
            y = x * 1.0
            relu(y[1:]).sum().backward()
    assert torch.equal(x.grad[0], conv_gradient(conv, x)[0]) and torch.equal(y[1:], x.detach()[1:].relu())


def conv_gradient(conv, x):
    return torch.autograd.grad(conv(x).sum(), x)[0]


# Whole models of transformers, with a trained layer in their middle


def image_batch():
    return {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 2])}


def text_batch(labels=True):
    ids = torch.arange(24).reshape(2, 12)
    return {"input_ids": ids, "labels": ids if labels else torch.tensor([0, 1])}


def resnet():
    config = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "num_labels": 3}
    model = transformers_class("models.resnet", "ResNetForImageClassification")
    return model(transformers_class("models.resnet", "ResNetConfig")(**config)), "convolution", image_batch()


def mobilenet():
    config = {"depth_multiplier": 0.25, "num_labels": 3, "image_size": 32}
    model = transformers_class("models.mobilenet_v2", "MobileNetV2ForImageClassification")
    return model(transformers_class("models.mobilenet_v2", "MobileNetV2Config")(**config)), "conv", image_batch()


def efficientnet():
    config = {
        "width_coefficient": 0.25,
        "depth_coefficient": 0.25,
        "hidden_dim": 320,
        "num_labels": 3,
        "image_size": 32,
        "dropout_rate": 0.2,
    }
    model = transformers_class("models.efficientnet", "EfficientNetForImageClassification")
    return model(transformers_class("models.efficientnet", "EfficientNetConfig")(**config)), "conv", image_batch()


def bert():
    config = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = transformers_class("models.bert", "BertForSequenceClassification")
    model = model(transformers_class("models.bert", "BertConfig")(vocab_size=40, **config))
    return model, "query", text_batch(labels=False)


def tiny_llama():
    return llama(), "q_proj", text_batch()


MODELS = {
    "resnet": (resnet, {"convolution", "batch norm", "activation"}),
    "mobilenet": (mobilenet, {"convolution", "batch norm", "activation"}),
    "efficientnet": (efficientnet, {"convolution", "batch norm", "dropout"}),
    "bert": (bert, {"dropout"}),
    "llama": (tiny_llama, {"norm", "gated block", "loss over chunks"}),
}


def tuned(name):
    """The model in training mode with its lowest such layer and its head trained; and the loss of a batch."""
    model, part, batch = MODELS[name][0]()
    layers = [n for n, m in model.named_modules() if part in n and getattr(m, "weight", None) is not None]
    layer = next(n for n in layers if model.get_submodule(n).weight.dim() > 1)
    return frozen_but_for(model.train(), layer), lambda: model(**batch).loss


def frozen_but_for(model, layer):
    """The model as SelectiveBackward freezes it, without the cut, which takes the place of its forward."""
    with SelectiveBackward(model, [layer], lean=False) as selective:
        chosen = set(selective.trainable_names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    keep_frozen_norms_in_eval(model)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_model_yields_the_same_and_keeps_less(name, monkeypatch):
    monkeypatch.setattr(lean_loss, "FEWEST_TOKENS", 4)
    model, loss = tuned(name)
    plain, keeps = run(model, loss), kept_bytes(model, loss)
    before, signature = state_of(model), inspect.signature(model.forward)
    handle = apply_lean(model)
    assert inspect.signature(model.forward) == signature  # Trainer chooses the columns of a data set by it
    assert MODELS[name][1] <= set(handle.applied)
    lean, lean_keeps = run(model, loss), kept_bytes(model, loss)
    model.zero_grad()
    assert_equal(plain, lean)
    assert lean_keeps < 0.9 * keeps
    assert [*model.state_dict()] == [*copy.deepcopy(model).state_dict()]
    handle.remove()
    handle.remove()
    again = run(model, loss)
    assert torch.equal(plain[0], again[0]) and all(torch.equal(g, again[1][n]) for n, g in plain[1].items())
    model.zero_grad()
    for _, p in model.named_parameters():
        p.grad = None
    left = changes(before, state_of(model))
    assert not [label for label in left if "gradient" not in label and label != "random state"], left


# How the model is run


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    blocks = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Conv2d(4, 4, 3))
    blocks[3:].requires_grad_(not reentrant)
    model = Above(nn.Identity(), (2, 3, 9, 9))
    model.module = blocks[:3].requires_grad_(False)
    loss = lambda: checkpoint(model.module, model.below * 1.0, use_reentrant=reentrant).square().sum()  # noqa: E731
    plain = run(model, loss)
    with apply_lean(model):
        assert_equal(plain, run(model, loss))


def test_under_autocast():
    model = Above(nn.Sequential(nn.Linear(8, 12), rms_norm_of(12), nn.ReLU(), nn.Linear(12, 4)), (5, 8))

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return model.loss().float()

    plain, keeps = run(model, loss), kept_bytes(model, loss)
    with apply_lean(model) as handle:
        assert set(handle.applied) == {"linear under autocast", "norm", "activation"}
        lean = run(model, loss)
        assert kept_bytes(model, loss) <= keeps - 2 * 8 * 12  # at least the copy of the first weight
    assert torch.equal(plain[0], lean[0]) and torch.equal(plain[1]["below"], lean[1]["below"])


def rms_norm_of(width):
    return transformers_class("models.llama.modeling_llama", "LlamaRMSNorm")(width)


@pytest.mark.parametrize("blocks", [1, 5])
def test_bfloat16_is_no_worse_than_plain(blocks, monkeypatch):
    """Errors of plain and lean gradients against float64."""
    in_blocks(monkeypatch, blocks)
    monkeypatch.setattr(lean_loss, "FEWEST_TOKENS", 4)
    model, loss = tuned("llama")
    exact = run(model.double(), loss)[1]
    model.bfloat16()
    with apply_lean(model):
        lean = run(model, loss)[1]
    plain = run(model, loss)[1]
    for name, gradient in exact.items():
        errors = [float((found[name].double() - gradient).norm() / gradient.norm()) for found in (plain, lean)]
        assert errors[1] <= 1.25 * errors[0] < 0.1, (name, errors)


def test_compiled_model_is_plain(monkeypatch):
    model = Above(nn.Sequential(nn.Conv2d(3, 4, 3), batch_norm(2).__class__(4).eval(), nn.ReLU()), (2, 3, 7, 7))
    plain = run(model, model.loss)
    with apply_lean(model):
        monkeypatch.setattr("zest_fast.lean.convolution._FrozenConvolution.apply", lambda *_: 1 / 0)
        compiled = torch.compile(model, backend="eager")
        assert_equal(plain, run(model, lambda: weighted_sum(compiled())))


@pytest.mark.parametrize("name", ["resnet", "llama"])
def test_evaluation_is_plain(name):
    model, batch = tuned(name)[0].eval(), MODELS[name][0]()[2]
    with torch.no_grad():
        plain = model(**batch)
        with apply_lean(model):
            lean = model(**batch)
    assert torch.equal(plain.loss, lean.loss) and torch.equal(plain.logits, lean.logits)


def test_functional_transforms_run_plainly():
    model = conv_net().eval().requires_grad_(False)
    x = torch.randn(2, 1, 6, 6)
    plain = torch.func.jacrev(model)(x)
    with apply_lean(model):
        assert torch.equal(torch.func.jacrev(model)(x), plain)
        torch.testing.assert_close(torch.func.jacfwd(model)(x), plain)


def test_what_trains_or_changes_its_mode_later_is_plain():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval().requires_grad_(False)
    x = torch.randn(3, 1, 5, 5, requires_grad=True)
    with apply_lean(model):
        model.requires_grad_(True).train()
        model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters()) and model[1].num_batches_tracked == 1


def test_copies_and_pickles_are_lean_and_stand_alone():
    model = conv_net().eval().requires_grad_(False)
    model[0].weight.requires_grad_(True)
    x, names = torch.randn(2, 1, 6, 6), [*model.state_dict()]
    loss = lambda m: lambda: m(x).square().sum()  # noqa: E731
    plain, keeps = run(model, loss(model)), kept_bytes(model, lambda: model(x))
    handle = apply_lean(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    handle.remove()
    for other in copies:
        assert [*other.state_dict()] == names and other[3].forward.module is other[3]
        assert_equal(plain, run(other, loss(other)))
        assert kept_bytes(other, lambda other=other: other(x)) < keeps
        with torch.no_grad():
            other[3].weight.zero_()
    assert_equal(plain, run(model, loss(model)))


# What is left plain, and why


class OwnConvolution(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


class NoGate(nn.Module):
    """The children of a gated block, and something else in forward."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


def replaced():
    module = nn.Conv2d(1, 1, 1)
    module.forward = lambda x: x
    return module


def hooked_gate():
    module = gated()
    module.act_fn.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: OwnConvolution(1, 1, 1), "its class OwnConvolution has a forward of its own"),
        (replaced, "its forward was replaced by <function"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 1, 1)), "its weight is no parameter but computed"),
        (lambda: nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (lambda: nn.Conv2d(1, 1, 2, padding="same"), "padding='same' is wider on one side"),
        (lambda: nn.BatchNorm2d(3), "it is in training mode"),
        (lambda: nn.BatchNorm2d(3, track_running_stats=False), "it has no running statistics"),
        (lambda: nn.Dropout(0.1, inplace=True), "it drops in place"),
        (lambda: nn.LayerNorm(4), "torch keeps no more than its input"),
        (nn.GELU, "torch keeps no more than its input"),
        (nn.RReLU, "two runs of it differ"),
        (NoGate, "its class computes something else"),
        (hooked_gate, "there are hooks on its act_fn"),
    ],
)
def test_reasons_for_leaving_a_module_plain(make, reason):
    model = nn.Sequential(make()).requires_grad_(False)
    before = state_of(model)  # with the random state
    handle = apply_lean(model)
    assert reason in handle.skipped["0"] and reason in str(handle)
    handle.remove()
    assert not changes(before, state_of(model))


def test_what_trains_is_left_plain():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1))
    for trainable in ([model[1].bias], ["1.bias"]):
        with apply_lean(model, trainable) as handle:
            assert handle.applied == {"convolution": ("0", "2")} and handle.skipped == {"1": "it trains"}
    with apply_lean(model) as handle:
        assert not handle.applied


def test_batch_norm_that_a_wrapper_keeps_in_eval_is_lean():
    model = conv_net().train()
    with SelectiveBackward(model, ["0"], lean=False), apply_lean(model) as handle:
        assert handle.applied["batch norm"] == ("1",)
        assert kept_bytes(model, lambda: model(torch.randn(2, 1, 6, 6))) < 2 * 1 * 36 * 4 + 4 * 4 + 200
        assert model[1].num_batches_tracked == 0


def test_a_forward_that_was_wrapped_in_the_meantime_stays_and_turns_plain():
    conv = nn.Conv2d(1, 1, 1).requires_grad_(False)
    handle = apply_lean(conv)
    ours = conv.forward
    conv.forward = lambda x: ours(x) + 1  # as accelerate does
    handle.remove()
    x = torch.randn(1, 1, 2, 2, requires_grad=True)
    assert kept_bytes(conv, lambda: conv(x)) == 16 and torch.equal(conv(x), type(conv).forward(conv, x) + 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((conv_net, ["0.wieght"]), ValueError, "no parameter '0.wieght'; nearest: '0.weight'"),
        ((lambda: torch.zeros(1),), TypeError, "model must be an nn.Module, not Tensor"),
        ((lambda: apply_lean(net := conv_net().requires_grad_(False)) and net,), RuntimeError, "'0' is lean already"),
    ],
)
def test_refusals(arguments, error, message):
    make, *rest = arguments
    with pytest.raises(error, match=message):
        apply_lean(make(), *rest)


# The loss of a causal language model


@pytest.fixture
def few_tokens(monkeypatch):
    monkeypatch.setattr(lean_loss, "FEWEST_TOKENS", 4)


@pytest.mark.parametrize("blocks", [1, 5])
@pytest.mark.parametrize("arguments", ["plain", "ignored", "items", "shifted", "all ignored"])
def test_loss_over_chunks(few_tokens, arguments, blocks, monkeypatch):
    in_blocks(monkeypatch, blocks)
    model, batch = tuned("llama")[0], text_batch()
    if "ignored" in arguments:
        batch["labels"] = batch["labels"].clone()
        batch["labels"][:, 5 if arguments == "ignored" else 0 :] = -100
    more = {"items": {"num_items_in_batch": torch.tensor(7)}, "shifted": {"shift_labels": batch["input_ids"] + 1}}
    batch |= more.get(arguments, {})
    loss = lambda: model(**batch).loss  # noqa: E731
    plain = run(model, loss)
    with apply_lean(model):
        lean = run(model, loss)
    assert_equal(plain, lean)
    assert torch.isnan(lean[0]) == (arguments == "all ignored")


def in_blocks(monkeypatch, count):
    """The head of 40 rows, a multiple of 8 at a time."""
    monkeypatch.setattr(head_blocks, "_MULTIPLE", 40 // count)
    monkeypatch.setattr(head_blocks, "BLOCK", 1)


def test_blocks_of_a_head():
    width, rows = 4096, 32_000
    blocks = head_blocks.row_blocks(torch.empty(rows, width, dtype=torch.bfloat16, device="meta"))
    assert blocks[0] == slice(0, 4096) and len(blocks) == 8 and blocks[-1].stop == rows
    (whole,) = head_blocks.weight_blocks(torch.ones(3, 2))
    assert whole[0] == slice(0, 3)
    x, weight, bias = torch.randn(5, 64).double(), torch.randn(300, 64).double(), torch.randn(300).double()
    with mock.patch.object(head_blocks, "BLOCK", 1):
        assert len(head_blocks.row_blocks(weight)) == 5
        y, g = head_blocks.linear_by_blocks(x, weight, bias), head_blocks.times_by_blocks(x @ weight.T, weight)
    torch.testing.assert_close(y, nn.functional.linear(x, weight, bias))
    torch.testing.assert_close(g, x @ weight.T @ weight)


def test_logits_are_computed_when_they_are_read(few_tokens):
    model, batch = tuned("llama")[0], text_batch()
    plain = model(**batch)
    with apply_lean(model):
        lean = model(**batch)
        assert type(lean.logits) is DeferredLogits and lean.logits.shape == (2, 12, 40)
        assert lean.logits.dtype == torch.float32 and lean.logits.computed is None
        assert type(lean.logits.float()) is DeferredLogits and lean.logits.computed is None
        assert torch.equal(lean.logits.argmax(-1), plain.logits.argmax(-1))
        torch.testing.assert_close(lean.logits + 0, plain.logits)
        without = model(input_ids=batch["input_ids"])  # no labels: nobody knows what they are for
        assert type(without.logits) is torch.Tensor


def test_logits_that_the_model_changes_are_computed(few_tokens):
    config = transformers_class("models.gemma2", "Gemma2Config")(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=24, vocab_size=40, final_logit_softcapping=2.0, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers_class("models.gemma2", "Gemma2ForCausalLM")(config).train()
    frozen_but_for(model, "model.layers.0.self_attn.v_proj")
    loss = lambda: model(**text_batch()).loss  # noqa: E731
    plain = run(model, loss)
    with apply_lean(model) as handle:
        assert "loss over chunks" in handle.applied and len(handle.applied["norm"]) == 9
        assert_equal(plain, run(model, loss))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.lm_head.requires_grad_(True), "its head trains"),
        (lambda model: model.lm_head.register_forward_hook(lambda *_: None), "there are hooks on its head"),
        (lambda model: setattr(model, "loss_function", lambda **_: 0), "its loss function was replaced"),
    ],
)
def test_reasons_for_a_plain_loss(change, reason):
    model = llama().requires_grad_(False)
    change(model)
    assert reason in apply_lean(model).skipped[""]


def test_peft_model(few_tokens):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["gate_proj"], r=2))
    nn.init.normal_(model.base_model.model.model.layers[0].mlp.gate_proj.lora_B.default.weight)
    loss = lambda: model(**text_batch()).loss  # noqa: E731
    plain, keeps = run(model, loss), kept_bytes(model, loss)
    with apply_lean(model) as handle:
        assert handle.applied["loss over chunks"] == ("base_model.model",) and len(handle.applied["gated block"]) == 3
        assert_equal(plain, run(model, loss))
        assert kept_bytes(model, loss) < keeps


def test_a_llama_block_keeps_what_the_formula_says():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}
    result = measure_block(sizes, tokens=32)
    small = 4 * 2 + 2 * 4 + 1  # log-sum-exp of 2 heads, reciprocal deviations of 2 norms, in float32
    for name, formula in (("plain", 16 * 64 + 6 * 96), ("lean", 12 * 64 + 4 * 96)):
        assert formula <= result["bytes_per_token"][name] <= formula + small


def as_ligers(function_or_class):
    """A stand-in for what liger_kernel defines: lean knows it by where it is from."""
    function_or_class.__module__ = "liger_kernel.transformers.stand_in"
    return function_or_class


@pytest.mark.parametrize("how", ["class", "forward of the class", "instance"])
def test_what_liger_replaced_is_left_alone_and_named(how):
    norm = rms_norm()
    plain = type(norm).forward
    forward = as_ligers(lambda self, x: plain(self, x))
    if how == "instance":
        norm.forward = forward.__get__(norm)
    else:
        kind = type("LigerStandIn", (type(norm),), {"forward": plain if how == "class" else forward})
        norm.__class__ = as_ligers(kind) if how == "class" else kind
    bare = as_ligers(type("LigerBlock", (nn.Module,), {"forward": lambda self, x: x}))()  # of no kind that lean knows
    model = nn.Sequential(norm, bare).requires_grad_(False)
    before = dict(vars(norm))
    with apply_lean(model) as handle:
        assert not handle.applied and set(handle.skipped) == {"0", "1"}
        assert all("Liger" in reason for reason in handle.skipped.values())
        assert vars(norm) == before


@pytest.mark.parametrize(("family", "offset"), [("llama", 0.0), ("gemma", 1.0)])
def test_norms_that_the_kernel_computes_are_known_by_a_trial(family, offset):
    norm = rms_norm(family)
    form = lean_norm.form_of(norm)
    assert (form.offset, form.centred) == (offset, False)
    norm.__class__ = type("OutsideTheRoot", (type(norm),), {"forward": epsilon_outside_the_root})
    assert lean_norm.form_of(norm) is None


def epsilon_outside_the_root(self, x):
    return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + form_epsilon(self))


def form_epsilon(norm):
    return norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
