import copy
import pickle

import numpy as np
import pytest
import torch
from profiles import make_profile
from small_models import SIZES, Mlp, Recurrent, assert_same, conv_net, images, llama, snapshot, step
from torch import nn

from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.profiling.layers import find_layers
from zest_fast.profiling.profile import profile
from zest_fast.ranking.ranking import rank


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def record_outputs(model, *names):
    """name -> output of that module in the latest forward pass."""
    outputs = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, output, name=name: outputs.update({name: output})
        )
    return outputs


def graph_size(tensor):
    seen, pending = set(), [tensor.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [parent for parent, _ in node.next_functions]
    return len(seen)


def test_only_the_chosen_layers_and_the_head_move():
    model = Mlp()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = SelectiveBackward(model, ["a"])
    assert tuned.trainable_names == ("a.weight", "a.bias", "head.weight", "head.bias")
    assert [id(p) for p in tuned.parameters()] == [id(model.get_parameter(name)) for name in tuned.trainable_names]
    step(tuned.parameters(), model(torch.randn(8, 4)).square().sum())
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(tuned.trainable_names)
    assert all(p.grad is None for name, p in model.named_parameters() if name not in tuned.trainable_names)


def test_gradients_are_those_of_full_fine_tuning():
    model, x = Mlp(), torch.randn(8, 4)
    full = copy.deepcopy(model)
    full(x).square().sum().backward()
    tuned = SelectiveBackward(model, ["a"])
    model(x).square().sum().backward()
    for name, parameter in zip(tuned.trainable_names, tuned.parameters(), strict=True):
        assert torch.equal(parameter.grad, full.get_parameter(name).grad), name


def test_backward_ends_at_the_lowest_layer():
    model, ids = llama(), torch.arange(12).reshape(2, 6)
    full = graph_size(model(input_ids=ids, labels=ids).loss)
    outputs = record_outputs(model, "model.layers.1", "model.layers.2.self_attn.o_proj", "model.layers.2.mlp.up_proj")
    tuned = SelectiveBackward(model, ["model.layers.2.mlp.up_proj"])
    loss = model(input_ids=ids, labels=ids).loss
    for below in ("model.layers.1", "model.layers.2.self_attn.o_proj"):
        assert outputs[below].grad_fn is None and not outputs[below].requires_grad
    assert outputs["model.layers.2.mlp.up_proj"].grad_fn is not None
    assert graph_size(loss) < full / 4
    loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(tuned.trainable_names)
    assert tuned.cut == "model.layers.2.mlp.up_proj"


def test_cut_is_refined_by_the_first_forward_pass_and_its_hooks_above_go():
    model = Mlp()
    tuned = SelectiveBackward(model, ["a", "c"])
    assert tuned.cut == "a"  # registered first
    model(torch.randn(2, 4))
    assert tuned.cut == "c"  # used first
    assert [name for name, module in model.named_modules() if module._forward_pre_hooks] == ["c"]


def test_a_forward_pass_that_raises_does_not_confuse_the_cut():
    model = Mlp()
    tuned = SelectiveBackward(model, ["a", "b"])
    handle = model.b.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(torch.randn(2, 4))
    with pytest.raises(ZeroDivisionError):  # b alone, out of turn
        model.b(torch.randn(2, 4))
    handle.remove()
    model(torch.randn(2, 4))
    assert tuned.cut == "a"


def test_cut_of_a_module_that_is_never_called():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.MultiheadAttention(4, 2, batch_first=True) for _ in range(2))
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            x = self.first(x, x, x)[0]
            return self.head(self.second(x, x, x)[0])

    model = Attention()
    tuned = SelectiveBackward(model, ["second", "first.out_proj"])
    assert tuned.trainable_names[:4] == (
        *("first.out_proj.weight", "first.out_proj.bias"),
        *("second.in_proj_weight", "second.in_proj_bias"),
    )
    model(torch.randn(2, 3, 4))
    assert tuned.cut == "first.out_proj"


def test_language_model_trains_no_head_unless_named():
    model = llama()
    layer = "model.layers.0.self_attn.q_proj"
    with SelectiveBackward(model, [layer]) as tuned:
        assert tuned.trainable_names == (f"{layer}.weight",)
        assert tuned.summary().head == ()
    with SelectiveBackward(model, [layer], head="lm_head") as tuned:
        assert set(tuned.trainable_names) == {f"{layer}.weight", "lm_head.weight"}


def test_head_of_a_transformers_classifier_is_found():
    transformers = pytest.importorskip("transformers")
    sizes = {**SIZES, "num_hidden_layers": 1}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    tuned = SelectiveBackward(model, ["bert.encoder.layer.0.output.dense"])
    assert tuned.summary().head == ("classifier",)
    tuned.remove()
    with pytest.raises(ValueError, match=r"cannot tell .*; pass head="):
        SelectiveBackward(model.bert, ["encoder.layer.0.output.dense"])


def test_head_none_and_head_alone_and_a_head_of_several_layers():
    model = Mlp()
    with SelectiveBackward(model, ["a"], head=None) as tuned:
        assert tuned.trainable_names == ("a.weight", "a.bias")
    with SelectiveBackward(model, []) as tuned:
        assert tuned.trainable_names == ("head.weight", "head.bias") and tuned.cut == "head"
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)))
    tuned = SelectiveBackward(model, ["0"], head="1")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(dict(model.named_parameters()))
    model(torch.randn(2, 4))
    assert tuned.cut == "0" and tuned.summary().head == ("1",)


def test_model_that_is_one_linear():
    model = nn.Linear(2, 2)
    with SelectiveBackward(model, []) as tuned:
        assert tuned.trainable_names == ("weight", "bias") and tuned.cut == "weight"
        model(torch.randn(1, 2))
        assert tuned.cut == "weight"


def test_tied_embedding_becomes_the_cut():
    model, ids = llama(tie_word_embeddings=True), torch.arange(12).reshape(2, 6)
    tuned = SelectiveBackward(model, ["lm_head"])
    assert tuned.trainable_names == ("model.embed_tokens.weight",)
    model(input_ids=ids, labels=ids).loss.backward()
    assert tuned.cut == "model.embed_tokens" and tuned.summary().tied == "lm_head"
    assert "ends at model.embed_tokens, which shares its weight with lm_head" in str(tuned.summary())


def test_lstm_rows_train_a_weight_and_its_bias():
    model = Recurrent()
    tuned = SelectiveBackward(model, ["rnn.weight_hh_l1"])
    assert tuned.trainable_names[:2] == ("rnn.weight_hh_l1", "rnn.bias_hh_l1")
    step(tuned.parameters(), model(torch.randn(2, 5, 3)).square().sum())
    assert model.rnn.weight_ih_l0.grad is None and model.rnn.bias_hh_l1.grad is not None
    assert tuned.cut == "rnn.weight_hh_l1"
    tuned.remove()
    with pytest.raises(ValueError, match=r"'rnn' has several weights.*nearest: 'rnn.weight_ih_l0'"):
        SelectiveBackward(model, ["rnn"])


def test_parametrised_weight_trains_with_the_bias_of_its_module():
    model = nn.Sequential(nn.Linear(3, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2))
    tuned = SelectiveBackward(model, ["1.parametrizations.weight.original1"])
    assert tuned.trainable_names[:2] == ("1.bias", "1.parametrizations.weight.original1")
    model(torch.randn(2, 3))
    assert tuned.cut == "1.parametrizations.weight.original1"


def test_peft_wrapped_model():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
    before = snapshot(model)
    layer = "base_model.model.model.layers.1.self_attn.q_proj.base_layer"
    tuned = SelectiveBackward(model, [layer])
    assert tuned.trainable_names == (f"{layer}.weight",)
    ids = torch.arange(12).reshape(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [f"{layer}.weight"]
    assert tuned.cut == layer
    tuned.remove()
    assert_same(before, snapshot(model))
    with pytest.raises(ValueError, match=f"nearest: '{layer.removesuffix('.base_layer')}"):
        SelectiveBackward(model, [layer.removesuffix(".base_layer")])


def test_frozen_batch_norm_stays_in_eval():
    model, x = conv_net(), images()
    expected = copy.deepcopy(model).eval()(x)
    mean = model[1].running_mean.clone()
    tuned = SelectiveBackward(model, ["3"])
    model.train()
    output = model(x)
    assert torch.equal(output, expected)
    step(tuned.parameters(), output.square().sum())
    assert torch.equal(model[1].running_mean, mean) and model[1].num_batches_tracked == 0
    assert model[1].training  # what the user asked for, between forward passes
    tuned.remove()
    model(x)
    assert not torch.equal(model[1].running_mean, mean)


@pytest.mark.parametrize("last_call", ["train", "eval", None])
def test_modes_are_what_the_user_last_asked_for(last_call):
    model = conv_net()
    model[1].eval()  # the user's own choice
    modes = snapshot(model)[2]
    with SelectiveBackward(model, ["3"]):
        if last_call:
            getattr(model, last_call)()
        model(images())
    if last_call is None:
        assert snapshot(model)[2] == modes
    else:
        assert set(snapshot(model)[2].values()) == {last_call == "train"}


def test_batch_norm_returns_to_its_mode_when_forward_raises():
    model = conv_net()
    with SelectiveBackward(model, ["3"]), pytest.raises(ValueError, match="expected 4D"):
        model[1](torch.randn(2, 4))
    assert model[1].training


def test_batch_norm_that_trains_with_the_head_keeps_its_mode():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)))
    with SelectiveBackward(model, ["0"], head="1"):
        model(torch.randn(6, 4))
    assert model[1][0].num_batches_tracked == 1


@pytest.mark.parametrize("raises", [False, True])
def test_leaving_restores_everything_but_the_tuned_weights(raises):
    model = conv_net()
    model[0].weight.requires_grad_(False)
    model[5].bias.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    model[0].bias.grad = torch.full((4,), 7.0)  # stale: neither read nor cleared
    before = snapshot(model)
    try:
        with SelectiveBackward(model, ["3"]) as tuned:
            step(tuned.parameters(), model(images()).square().sum())
            if raises:
                raise RuntimeError("from the user's loop")
    except RuntimeError:
        assert raises
    after = snapshot(model)
    assert before[1:] == after[1:]
    assert not torch.equal(before[0]["3.weight"], after[0]["3.weight"])
    assert torch.equal(model[0].bias.grad, torch.full((4,), 7.0))
    tuned.remove()  # a second time
    assert before[1:] == snapshot(model)[1:]


def quantised():
    model = Mlp()
    model.b.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        (Mlp, {"layers": ["aa"]}, ValueError, "layers: the model has no layer 'aa'; nearest: 'a'"),
        (Mlp, {"layers": ["a.weight"]}, ValueError, "no layer 'a.weight'; nearest: 'a'"),
        (conv_net, {"layers": ["3", "1"]}, ValueError, r"'1' \(BatchNorm2d\) has no weight of two or more dimensions"),
        (quantised, {"layers": ["a", "b"]}, ValueError, r"layers: 'b' is stored as torch\.uint8"),
        (quantised, {"layers": ["a"], "head": ["b"]}, ValueError, r"head: 'b' is stored as torch\.uint8"),
        (Mlp, {"layers": ["a"], "head": "haed"}, ValueError, "head: the model has no layer 'haed'; nearest: 'head'"),
        (Mlp, {"layers": [], "head": None}, ValueError, "nothing would train"),
        (nn.ReLU, {"layers": []}, ValueError, "no layer with a weight"),
        (Mlp, {"layers": "a"}, TypeError, r"layers must be an iterable of layer names, such as \['a'\]"),
        (Mlp, {"layers": 5}, TypeError, "layers must be an iterable"),
        (Mlp, {"layers": [5]}, TypeError, "layers must hold layer names, not int 5"),
        (Mlp, {"layers": ["a"], "checkpoint": True}, ValueError, "checkpoint must be None or 'above-cut', not True"),
        (Mlp, {"layers": ["a"], "checkpoint": "above-cut"}, ValueError, "Mlp has no repeated blocks"),
        (lambda: Mlp().to("meta"), {"layers": ["a"]}, ValueError, "'a' is on the meta device"),
        (lambda: torch.compile(Mlp()), {"layers": ["a"]}, RuntimeError, "wrap it first, then compile"),
        (lambda: nn.DataParallel(Mlp()), {"layers": ["a"]}, RuntimeError, r"in a DataParallel.*wrap model\.module"),
    ],
)
def test_refusals_leave_the_model_untouched(make, arguments, error, message):
    model = make()
    model.requires_grad_(False)
    before = snapshot(model)[1:]
    with pytest.raises(error, match=message):
        SelectiveBackward(model, **arguments)
    assert snapshot(model)[1:] == before


def test_failure_half_way_is_undone():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0] = nn.Linear(2, 2)
    model[1].requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="inference"):
        SelectiveBackward(model, ["1"], head=None)
    assert_same(before, snapshot(model))
    SelectiveBackward(model, ["0"], head=None).remove()  # it does not count as wrapped


def test_a_ranking_is_no_list_of_layers():
    ranking = rank(make_profile({"a": 1.0, "b": 2.0, "head": 3.0}, heads=("head",)), by="snip")
    with pytest.raises(TypeError, match=r"layers is a Ranking.*pass ranking\.top\(n\)"):
        SelectiveBackward(Mlp(), ranking)
    assert SelectiveBackward(Mlp(), ranking.top(1)).summary().layers == ("b",)


def test_wrapping_twice_is_refused():
    model = Mlp()
    tuned = SelectiveBackward(model, ["a"])
    for again in (model, nn.Sequential(model), model.head):
        with pytest.raises(RuntimeError, match=r"wrapped by a SelectiveBackward already: call its \.remove\(\)"):
            SelectiveBackward(again, [])
    assert model.a.weight.requires_grad
    tuned.remove()
    with SelectiveBackward(model, ["b"]) as tuned:
        assert "b.weight" in tuned.trainable_names


def test_summary():
    model = Mlp()
    summary = SelectiveBackward(model, ["b", "a", "b"], lean=False).summary()
    assert (summary.trainable_parameters, summary.total_parameters) == (2 * 20 + 15, 3 * 20 + 15)
    assert summary.share == pytest.approx(55 / 75)
    assert (summary.layers, summary.head, summary.cut, summary.tied) == (("b", "a"), ("head",), "a", "")
    assert str(summary).splitlines() == [
        "55 of 75 parameters train (73.33%)",
        "  layers    b",
        "            a",
        "  head      head",
        "  backward  ends at a",
    ]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_wrapped_model_works(duplicate):
    model = conv_net()
    tuned = SelectiveBackward(model, ["3"])
    twin, x = duplicate(model), images()
    assert torch.equal(twin(x), model(x))
    assert tuned.cut == "3"


def test_compiling_after_wrapping():
    model = conv_net()
    x = images()
    tuned = SelectiveBackward(model, ["3"])
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(x), model(x))
    assert model[1].num_batches_tracked == 0 and tuned.cut == "3"


def gpt_oss():
    transformers = pytest.importorskip("transformers")
    sizes = {**SIZES, "num_hidden_layers": 1}
    config = transformers.GptOssConfig(**sizes, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1)
    return transformers.GptOssForCausalLM(config)


@pytest.mark.parametrize("make", [Recurrent, conv_net, gpt_oss, lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=2)])
def test_every_layer_that_profile_knows_can_be_chosen(make):
    model = make()
    for layer in find_layers(dict(model.named_modules())):
        with SelectiveBackward(model, [layer.name], head=None) as tuned:
            biases = [name for name in tuned.trainable_names if name != layer.parameter_name]
            assert len(biases) < len(tuned.trainable_names) <= 2
            assert all("bias" in name and name.startswith(layer.module_name) for name in biases)


def test_fused_experts_train_with_the_bias_of_the_same_name():
    experts = "model.layers.0.mlp.experts"
    tuned = SelectiveBackward(gpt_oss(), [f"{experts}.down_proj"])
    assert tuned.trainable_names == (f"{experts}.down_proj", f"{experts}.down_proj_bias")


def test_from_profile_to_delta(tmp_path):
    model, ids = llama(), torch.arange(12).reshape(2, 6)
    fresh, batch = copy.deepcopy(model), {"input_ids": ids, "labels": ids}
    layers = rank(profile(model, batch, backend="reference"), by="snip").top(3)
    with SelectiveBackward(model, layers) as tuned:
        losses = []
        for _ in range(3):
            losses.append(model(**batch).loss)
            step(tuned.parameters(), losses[-1])
        path = tuned.save(tmp_path / "delta.safetensors")
    assert "lm_head" not in layers and losses[-1] < losses[0]
    with SelectiveBackward(fresh, layers) as tuned:
        tuned.load(path)
    assert torch.equal(fresh(**batch).loss, model(**batch).loss)


def test_numpy_strings_are_names():
    assert SelectiveBackward(Mlp(), np.array(["a"])).summary().layers == ("a",)


def train(model, tuned, x):
    step(tuned.parameters(), model(x).square().sum())


def test_verify_after_training():
    model, x = conv_net(), images()
    with SelectiveBackward(model, ["3"]) as tuned:
        with pytest.raises(RuntimeError, match=r"did not move .*'3\.weight', '5\.weight'"):
            tuned.verify()
        model.train()
        train(model, tuned, x)
        tuned.verify()
    tuned.verify()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: model[0].weight.data.flatten()[3:4].add_(1e-6), r"frozen, but changed: '0\.weight'"),
        (lambda model: model[1].running_var.neg_(), r"frozen, but changed: '1\.running_var'"),
        (lambda model: model[3].weight.data.fill_(torch.nan), r"not finite any more .*: '3\.weight'"),
        (lambda model: model.add_module("6", nn.Linear(3, 3)), r"not there when .*: '6\.weight', '6\.bias'"),
        (lambda model: setattr(model[0], "bias", None), r"gone since .*: '0\.bias'"),
        (lambda model: model[5].weight.data.copy_(model.before), r"did not move .*: '5\.weight'"),
    ],
)
def test_verify_names_what_is_wrong(spoil, message):
    model, x = conv_net(), images()
    object.__setattr__(model, "before", model[5].weight.detach().clone())
    tuned = SelectiveBackward(model, ["3"])
    train(model, tuned, x)
    spoil(model)
    with pytest.raises(RuntimeError, match=f"^verify: [^;]*{message}"):
        tuned.verify()


def test_verify_lets_statistics_of_a_trained_batch_norm_move():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)))
    tuned = SelectiveBackward(model, ["0"], head="1")
    train(model, tuned, torch.randn(6, 4))
    assert model[1][0].num_batches_tracked == 1
    tuned.verify()


def test_summary_checks_the_optimizer():
    model = Mlp()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    tuned = SelectiveBackward(model, ["a"])
    with pytest.raises(ValueError, match=r"holds 'b\.weight', .* which are frozen: it was built before the model was"):
        tuned.summary(early)
    with pytest.raises(ValueError, match=r"lacks 'a\.weight', 'a\.bias', which train; build it from \.parameters\(\)"):
        tuned.summary(torch.optim.SGD(model.head.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"lacks .*\(it holds 4 parameters of something else: was the model copied"):
        tuned.summary(torch.optim.SGD([p for p in copy.deepcopy(model).parameters() if p.requires_grad], lr=0.1))
    with pytest.raises(TypeError, match="optimizer must be a torch optimizer"):
        tuned.summary(0.1)
    other = nn.Linear(2, 2)
    summary = tuned.summary(torch.optim.SGD([*tuned.parameters(), *other.parameters()], lr=0.1))
    assert summary.foreign == 2 and "also holds 2 parameters" in str(summary)


def test_summary_says_what_is_skipped():
    model = Mlp()
    tuned = SelectiveBackward(model, ["b"])
    assert tuned.summary().skipped_parameters == 0
    model(torch.randn(2, 4))
    assert tuned.summary().skipped_parameters == 40  # c and a
    assert str(tuned.summary()).endswith("skipped   40 parameters below (53.33%) ran without a graph")
