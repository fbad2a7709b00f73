"""The contract of profile(): arguments, selection, work that is not done, and errors that leave the model untouched.

That the numbers are right is test_metrics_against_autograd.py's matter.
"""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from small_models import Recurrent, assert_same, conv_net, images, llama, snapshot
from torch import nn
from torch.nn import functional as F

import zest_fast
from zest_fast.profiling import layer_rules
from zest_fast.profiling.metrics import METRIC_NAMES, METRICS


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def batch(n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 8), torch.randint(3, (n,))


def equal(a: zest_fast.LayerProfile, b: zest_fast.LayerProfile, rel: float = 1e-5) -> None:
    assert a.names == b.names and a.metrics == b.metrics
    assert a.values == pytest.approx(b.values, rel=rel, abs=1e-12, nan_ok=True)


# --- what may be handed in ------------------------------------------------------------------------------------------


def test_pair_closure_loss_fn_and_mapping_agree() -> None:
    model, (x, y) = mlp(), batch()
    pair = zest_fast.profile(model, (x, y))
    assert pair.loss == pytest.approx(F.cross_entropy(model(x), y).item())
    equal(pair, zest_fast.profile(model, [x, y]))  # as a DataLoader's default collate gives it
    equal(pair, zest_fast.profile(model, ((x,), y)))
    equal(pair, zest_fast.profile(model, ({"input": x}, y)))
    equal(pair, zest_fast.profile(model, (x, y), loss_fn=F.cross_entropy))
    equal(pair, zest_fast.profile(model, closure=lambda: F.cross_entropy(model(x), y)))
    equal(pair, zest_fast.profile(model, {"input": x, "labels": y}, loss_fn=F.cross_entropy))


def test_transformers_mapping_takes_the_models_own_loss() -> None:
    model = llama().eval()
    ids = torch.randint(40, (2, 7))
    found = zest_fast.profile(model, {"input_ids": ids, "labels": ids})
    assert found.loss == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-6)
    assert found.info["lm_head"]["head"] and sum(row["head"] for row in found.info.values()) == 1
    assert "model.embed_tokens.weight" in found.uncovered
    logits = zest_fast.profile(model, (ids, ids[:, 0]), loss_fn=lambda out, y: F.cross_entropy(out[:, -1], y))
    assert logits.names == found.names


def test_works_under_no_grad_and_with_frozen_models() -> None:
    model, data = mlp(), batch()
    free = zest_fast.profile(model, data)
    model.requires_grad_(False)
    with torch.no_grad():
        equal(free, zest_fast.profile(model, data))
    assert not any(p.requires_grad for p in model.parameters())
    found = zest_fast.profile(model, data)
    assert not any(row["trainable"] for row in found.info.values())


def test_batches_made_in_inference_mode_and_inputs_that_require_gradients() -> None:
    model = mlp()
    with torch.inference_mode():
        data = batch()
    zest_fast.profile(model, data)
    x, y = batch()
    x.requires_grad_(True)
    zest_fast.profile(model, (x, y))
    assert x.grad is None


def test_gradients_that_are_there_stay_the_models_own_and_those_of_others() -> None:
    model, other, (x, y) = mlp(), nn.Linear(8, 8), batch()
    x.requires_grad_(True)
    F.cross_entropy(model(other(x)), y).backward()
    tensors = [*model.parameters(), *other.parameters(), x]
    grads = [p.grad for p in tensors]
    copies = [g.clone() for g in grads]
    zest_fast.profile(model, closure=lambda: F.cross_entropy(model(other(x)), y))
    assert all(p.grad is g and torch.equal(g, c) for p, g, c in zip(tensors, grads, copies, strict=True))


def test_loss_scale_divides_what_the_loss_already_carries() -> None:
    model, (x, y) = mlp(), batch()
    plain = zest_fast.profile(model, (x, y))
    scaled = zest_fast.profile(model, closure=lambda: F.cross_entropy(model(x), y) * 1024, loss_scale=1024.0)
    equal(plain, scaled)
    assert scaled.loss == pytest.approx(plain.loss)


def test_modes_and_random_state_are_the_callers() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 3))
    data = batch()
    torch.manual_seed(3)
    train = zest_fast.profile(model, data)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(state, torch.get_rng_state())
    loss = F.cross_entropy(model(data[0]), data[1])
    assert train.loss == pytest.approx(loss.item())
    assert zest_fast.profile(model.eval(), data).loss != train.loss


def test_equal_calls_give_equal_bits() -> None:
    model, data = conv_net().train(), (images(), torch.randint(3, (5,)))
    first, second = zest_fast.profile(model, data), zest_fast.profile(model, data)
    assert first.values.tobytes() == second.values.tobytes()


# --- rows -----------------------------------------------------------------------------------------------------------


def test_rows_are_in_the_order_of_first_use() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.attention, self.first = nn.Linear(8, 3), nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(self.first(x))[None]
            return self.last(self.attention(x, x, x, need_weights=False)[0][0])

    found = zest_fast.profile(Backwards(), batch())
    assert found.names == ["first", "attention", "attention.out_proj", "last"]
    assert [found.info[name]["depth"] for name in found.names] == [0, 1, 2, 3]
    assert [found.info[name]["uses"] for name in found.names] == [2, 1, 1, 1]
    assert found.info["attention"]["kind"] == "attention" and math.isnan(found["attention"]["fisher"])
    assert "out_proj" in found.info["attention.out_proj"]["note"]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("2", ["2"]),
        (re.compile("[02]"), ["0", "2"]),
        (["4", "0"], ["0", "4"]),
        (lambda name, module: isinstance(module, nn.Linear) and module.out_features == 16, ["0", "2"]),
        (None, ["0", "2", "4"]),
    ],
)
def test_selection(selection: object, expected: list[str]) -> None:
    found = zest_fast.profile(mlp(), batch(), layers=selection)
    assert found.names == expected
    left_out = {f"{i}.weight" for i in (0, 2, 4)} - {f"{name}.weight" for name in expected}
    assert found.uncovered == dict.fromkeys(left_out, "not selected by layers=")


def test_a_selection_gives_the_same_numbers_and_ends_the_backward_pass_early() -> None:
    model, data = mlp(), batch()
    reached = []
    model[1].register_forward_hook(lambda module, args, out: reached.append(out.requires_grad))
    every, some = zest_fast.profile(model, data), zest_fast.profile(model, data, layers=["4"])
    assert reached == [True, False]
    assert some["4"] == pytest.approx(dict(every["4"]), rel=1e-5)


def test_rows_of_modules_with_several_weights_and_of_the_root() -> None:
    found = zest_fast.profile(Recurrent(), (torch.randn(3, 5, 3), torch.randint(2, (3,))))
    assert found.names[0] == "rnn.weight_ih_l0" and found.info["rnn.weight_ih_l0"]["kind"] == "lstm"
    assert zest_fast.profile(Recurrent(), (torch.randn(3, 5, 3), torch.randint(2, (3,))), layers=["rnn"]).names == [
        name for name in found.names if name.startswith("rnn")
    ]

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(8, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.table

    assert zest_fast.profile(Root(), batch()).names == ["table"]


def test_embeddings_have_a_row_only_when_named_and_tied_layers_name_each_other() -> None:
    model = llama(tie_word_embeddings=True)
    ids = torch.randint(40, (2, 7))
    found = zest_fast.profile(model, {"input_ids": ids, "labels": ids})
    assert found.info["lm_head"]["shared_with"] == ["model.embed_tokens"] and not found.uncovered
    named = zest_fast.profile(model, {"input_ids": ids, "labels": ids}, layers=["model.embed_tokens", "lm_head"])
    assert named["model.embed_tokens"]["snip"] == named["lm_head"]["snip"]
    assert named.info["model.embed_tokens"]["kind"] == "embedding"


def test_integer_weights_are_uncovered_unless_named() -> None:
    model = mlp()
    model.register_parameter("codes", nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False))
    assert "int8" in zest_fast.profile(model, batch()).uncovered["codes"]
    with pytest.raises(ValueError, match=r"'codes'.*int8"):
        zest_fast.profile(model, batch(), layers=["codes"])


def test_what_the_loss_does_not_use_is_uncovered_with_its_reason() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 3), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.b(x)
            return self.a(x)

    found = zest_fast.profile(Branch(), batch())
    assert found.uncovered == {
        "b.weight": "no gradient reached it",
        "c.weight": "no gradient reached it: its module was not called",
    }
    forward_only = zest_fast.profile(Branch(), batch(), metrics=["act_std"])
    assert forward_only.names == found.names and forward_only.uncovered == found.uncovered


# --- work that is not done --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METRIC_NAMES)
def test_one_metric_alone_equals_its_column(name: str) -> None:
    for model, data in ((mlp(), batch()), (conv_net(), (images(), torch.randint(3, (5,))))):
        every, one = zest_fast.profile(model, data), zest_fast.profile(model, data, metrics=[name])
        scale = float(abs(every.column(name)).max())
        assert one.metrics == [name]
        assert one.column(name) == pytest.approx(every.column(name), rel=2e-5, abs=1e-6 * scale)


def test_forward_metrics_run_no_backward_and_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: pytest.fail("a backward pass ran"))
    model, data = mlp(), batch()

    def loss() -> torch.Tensor:
        value = F.cross_entropy(model(data[0]), data[1])
        with pytest.raises(RuntimeError, match="forward-only metrics"):
            value.grad_fn._saved_self  # noqa: B018  what the loss would keep for a backward pass
        return value

    zest_fast.profile(model, closure=loss, metrics=["weight_std", "act_std"])
    found = zest_fast.profile(model, data, metrics=["weight_std", "act_std"])
    assert found["0"]["weight_std"] == pytest.approx(model[0].weight.std(correction=0).item(), rel=1e-6)
    assert found["0"]["act_std"] == pytest.approx(model[0](data[0]).std(correction=0).item(), rel=1e-5)


def test_a_linear_forms_tiles_only_for_absolute_values(monkeypatch: pytest.MonkeyPatch) -> None:
    formed = []
    original = layer_rules.linear_gradient_moments
    monkeypatch.setattr(layer_rules, "linear_gradient_moments", lambda *a: formed.append(1) or original(*a))
    monkeypatch.setattr(layer_rules, "weight_gradient_moments", lambda *a: pytest.fail("a gradient was stored"))
    without = ["grad_mean", "grad_std", "grad_norm", "rgn", "plain", "fisher", "act_std", "weight_mean"]
    zest_fast.profile(mlp(), batch(), metrics=without)
    assert not formed
    zest_fast.profile(mlp(), batch(), metrics=["snip"])
    assert len(formed) == 3


def test_fisher_alone_forms_no_weight_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    for rule in ("weight_gradient_moments", "linear_gradient_moments", "linear_gradient_moments_without_tiles"):
        monkeypatch.setattr(layer_rules, rule, lambda *a: pytest.fail("a gradient was formed"))
    found = zest_fast.profile(conv_net(), (images(), torch.randint(3, (5,))), metrics=["fisher"])
    assert (found.values > 0).all()


def test_every_metric_says_what_it_needs() -> None:
    assert all(metric.needs for metric in METRICS.values())


# --- models that need care --------------------------------------------------------------------------------------------


def test_compiled_models_are_profiled_through_their_original() -> None:
    model, data = mlp(), batch()
    plain = zest_fast.profile(model, data)
    equal(plain, zest_fast.profile(torch.compile(model, backend="eager"), data))
    compiled = torch.compile(model, backend="eager")
    equal(plain, zest_fast.profile(compiled, closure=lambda: F.cross_entropy(compiled(data[0]), data[1])))
    model.compile(backend="eager")
    model(data[0])
    equal(plain, zest_fast.profile(model, data))
    assert model._compiled_call_impl is not None
    inner = mlp()
    inner.load_state_dict(model.state_dict())
    inner[2] = torch.compile(inner[2], backend="eager")
    inner(data[0])
    assert zest_fast.profile(inner, data).values == pytest.approx(plain.values, rel=1e-5)


def test_an_optimizer_in_the_backward_pass_does_not_step() -> None:
    model, data = mlp(), batch()

    def step(p: torch.Tensor) -> None:
        with torch.no_grad():
            p -= p.grad
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    before = snapshot(model)
    zest_fast.profile(model, data)
    assert_same(before, snapshot(model))
    F.cross_entropy(model(data[0]), data[1]).backward()  # the user's hooks are back
    assert not torch.equal(before[0]["0.weight"], model[0].weight)


def test_hooks_on_a_gradient_act_as_in_plain_autograd() -> None:
    model, data = mlp(), batch()
    plain = zest_fast.profile(model, data)
    model[0].weight.register_hook(lambda g: g * 3)
    assert zest_fast.profile(model, data)["0"]["snip"] == pytest.approx(3 * plain["0"]["snip"], rel=1e-5)


def test_batch_norm_in_train_mode_makes_plain_vanish() -> None:
    """A weight right before batch norm has no scale, so ΣW⊙dW = 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    found = zest_fast.profile(model.train(), (images(), torch.randint(3, (5,))))
    assert abs(found["0"]["plain"]) * 36 < 1e-5 * found["0"]["snip"]
    assert abs(found["4"]["plain"]) * 192 > 1e-4 * found["4"]["snip"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_that_are_not_finite_under_a_finite_loss_are_counted(value: float) -> None:
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            g = g.clone()
            g[0, 0] = value
            return g

    model, (x, y) = mlp(), batch()
    found = zest_fast.profile(model, closure=lambda: F.cross_entropy(model[4](Bad.apply(model[2](model[0](x)))), y))
    assert found.info["2"]["nonfinite"] == 16 and found.info["4"]["nonfinite"] == 0
    assert math.isnan(found["2"]["snip"]) and math.isnan(found["2"]["grad_std"]) and math.isnan(found["2"]["fisher"])
    assert math.isfinite(found["2"]["act_std"]) and math.isfinite(found["4"]["snip"])


def test_buffers_that_come_or_repeat_themselves_are_as_before() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not hasattr(self, "table"):
                self.register_buffer("table", torch.ones(8))
            return self.a(x * self.table)

    model = Lazy()
    zest_fast.profile(model, batch())
    assert set(model.state_dict()) == {"a.weight", "a.bias"}
    model = mlp()
    model.register_buffer("repeated", torch.zeros(1, 5).expand(4, 5))
    zest_fast.profile(model, batch())


def test_a_profile_leaves_the_cut_of_a_wrapped_model_alone() -> None:
    model, (x, y) = mlp(), batch()
    plain = zest_fast.profile(model, (x, y))
    with zest_fast.SelectiveBackward(model, ["2"]) as tuned:
        table = zest_fast.profile(model, (x, y))
        assert table.names == plain.names and np.array_equal(table.values, plain.values)  # layers below the cut, too
        assert tuned.summary().skipped_parameters == 0  # the first forward pass of the user is still to come
        model(x).sum().backward()
        assert tuned.summary().skipped_parameters == sum(p.numel() for p in model[0].parameters())


def test_channels_of_a_convolution_that_someone_wrote() -> None:
    class Own(nn.Module):
        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            self.kernel = nn.Parameter(weight.clone())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.conv2d(x, self.kernel)

    torch.manual_seed(0)
    conv, head = nn.Conv2d(1, 4, 3, bias=False), nn.Linear(64, 3)
    data = images(), torch.randint(3, (5,))
    plain = zest_fast.profile(nn.Sequential(conv, nn.Flatten(), head), data)
    own = zest_fast.profile(nn.Sequential(Own(conv.weight.detach()), nn.Flatten(), head), data)
    assert own["0"]["fisher"] == pytest.approx(plain["0"]["fisher"], rel=1e-5)


def test_inputs_that_are_tuples_by_class_and_targets_of_which_one_is_empty() -> None:
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(3, 5, 3), torch.tensor([5, 3, 2]), batch_first=True)

    class Packed(Recurrent):
        def forward(self, x: object) -> torch.Tensor:
            return self.head(self.rnn(x)[1][0][-1])

    assert "head" in zest_fast.profile(Packed(), (packed, torch.randint(2, (3,))))
    boxes = [torch.ones(2, 4), torch.zeros(0, 4)]
    zest_fast.profile(mlp(), (batch()[0], boxes), loss_fn=lambda out, targets: out.square().mean())


def test_plain_in_half_precision_is_as_good_without_snip() -> None:
    model, (x, y) = mlp().to(torch.bfloat16), batch()
    every = zest_fast.profile(model, (x.bfloat16(), y))
    alone = zest_fast.profile(model, (x.bfloat16(), y), metrics=["plain", "grad_norm"])
    assert alone.column("plain") == pytest.approx(every.column("plain"), rel=1e-6)


# --- errors -----------------------------------------------------------------------------------------------------------


X, Y = batch()


def broken(change) -> nn.Module:
    model = mlp()
    with torch.no_grad():
        change(model)
    return model


class Picky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"logits": self.a(x)}


class Tuple(Picky):
    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a(x).sum(), self.a(x)


def once():
    """A closure that takes its one batch from an iterator."""
    batches = iter([X * math.nan])
    model = mlp()
    return lambda: model(next(batches)).sum()


def offloaded() -> nn.Module:
    model = mlp()
    model[2] = nn.Linear(16, 16, device="meta")
    model[2]._hf_hook = object()
    return model


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(3))


def traced() -> nn.Module:
    model = mlp()
    model[0] = torch.jit.trace(model[0], X)
    return model


def overflowing() -> nn.Module:
    return broken(lambda m: m[2].weight.fill_(1e38))


ERRORS = {
    "no labels": (Picky, {"batch": {"x": X}}, ValueError, "no labels"),
    "labels the model ignores": (Picky, {"batch": {"x": X, "labels": Y}}, ValueError, "returned no loss"),
    "both": (mlp, {"batch": (X, Y), "closure": lambda: X.sum()}, ValueError, "closure"),
    "neither": (mlp, {}, ValueError, "neither"),
    "a tensor as batch": (mlp, {"batch": X}, TypeError, "batch is a Tensor"),
    "a closure that is none": (mlp, {"closure": 3}, TypeError, "closure"),
    "vector loss": (mlp, {"batch": (X, Y), "loss_fn": lambda o, y: o.sum(1)}, ValueError, r"\(6,\)"),
    "number as loss": (mlp, {"batch": (X, Y), "loss_fn": lambda o, y: 3.0}, TypeError, "float"),
    "integer loss": (mlp, {"batch": (X, Y), "loss_fn": lambda o, y: y.sum()}, TypeError, "int64"),
    "independent loss": (mlp, {"batch": (X, Y), "loss_fn": lambda o, y: X.sum()}, ValueError, "does not depend"),
    "loss of something else": (
        mlp,
        {"batch": (X, Y), "loss_fn": lambda o, y: torch.ones(2, requires_grad=True).sum()},
        ValueError,
        "does not depend.*0, 2, 4",
    ),
    "unknown name": (mlp, {"batch": (X, Y), "layers": ["0", "44"]}, ValueError, "'44'.*nearest|'44'.*there are"),
    "unknown pattern": (mlp, {"batch": (X, Y), "layers": "encoder.*"}, ValueError, "encoder"),
    "no expression": (mlp, {"batch": (X, Y), "layers": "["}, ValueError, "regular expression"),
    "tuple output": (Tuple, {"batch": (X, Y)}, TypeError, "tuple without logits: pass loss_fn="),
    "tuple with a loss": (Tuple, {"batch": {"x": X, "labels": Y}}, ValueError, "plain tuple"),
    "a closure that runs once": (mlp, {"closure": once()}, ValueError, "the loss is nan"),
    "empty predicate": (mlp, {"batch": (X, Y), "layers": lambda n, m: False}, ValueError, "predicate"),
    "empty names": (mlp, {"batch": (X, Y), "layers": []}, ValueError, "layers is empty"),
    "number as layers": (mlp, {"batch": (X, Y), "layers": 3}, TypeError, "layers is a int"),
    "unknown metric": (mlp, {"batch": (X, Y), "metrics": ["snipp"]}, ValueError, "snipp.*snip"),
    "metric as string": (mlp, {"batch": (X, Y), "metrics": "snip"}, TypeError, "pass a list"),
    "synflow of a closure": (
        mlp,
        {"closure": lambda: None, "metrics": ["synflow"]},
        ValueError,
        "synflow.*pass batch=",
    ),
    "halves of a closure": (mlp, {"closure": lambda: None, "metrics": ["agree_cos"]}, ValueError, "agree_cos.*closure"),
    "halves of one sample": (mlp, {"batch": (X[:1], Y[:1]), "metrics": ["agree_dot"]}, ValueError, "one sample"),
    "unknown backend": (mlp, {"batch": (X, Y), "backend": "gpu"}, ValueError, "gpu"),
    "GPU backend": (mlp, {"batch": (X, Y), "backend": "triton"}, ValueError, "Triton runs on a GPU"),
    "loss scale": (mlp, {"batch": (X, Y), "loss_scale": 0.0}, ValueError, "loss_scale"),
    "meta model": (lambda: mlp().to("meta"), {"batch": (X, Y)}, ValueError, "'0.weight' is on the meta device"),
    "offloaded": (offloaded, {"batch": (X, Y)}, ValueError, "'2.weight' is offloaded"),
    "lazy": (lazy, {"batch": (X, Y)}, ValueError, "not initialised"),
    "batch elsewhere": (mlp, {"batch": (X.to("meta"), Y)}, ValueError, r"batch\[0\] is on meta"),
    "empty batch": (mlp, {"batch": (X[:0], Y[:0])}, ValueError, r"batch\[0\] has shape \(0, 8\)"),
    "NaN weight": (
        lambda: broken(lambda m: m[2].weight[3].fill_(math.nan)),
        {"batch": (X, Y)},
        ValueError,
        r"2\.weight",
    ),
    "overflowing output": (overflowing, {"batch": (X * 100, Y)}, ValueError, "outputs are not finite.*: 2"),
    "NaN input": (mlp, {"batch": (X * math.nan, Y)}, ValueError, "outputs are not finite.*: 0"),
    "NaN loss": (mlp, {"batch": (X, Y), "loss_fn": lambda o, y: o.sum() * math.nan}, ValueError, "in the loss itself"),
    "no weights": (lambda: nn.ReLU(), {"batch": (X, Y)}, ValueError, "no weight"),
    "scripted": (lambda: torch.jit.script(mlp()), {"batch": (X, Y)}, NotImplementedError, "the model is TorchScript"),
    "traced inside": (traced, {"batch": (X, Y)}, NotImplementedError, "module '0' is TorchScript"),
    "not a module": (lambda: "model", {"batch": (X, Y)}, TypeError, "model is a str"),
    "the user's own error": (mlp, {"batch": (X[:, :3], Y)}, RuntimeError, "mat1 and mat2"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_culprit_and_leave_the_model_untouched(case: str) -> None:
    make, arguments, error, message = ERRORS[case]
    torch.manual_seed(0)
    model = make()
    usable = isinstance(model, nn.Module) and case not in ("meta model", "offloaded", "lazy", "NaN weight")
    before = snapshot(model) if usable else None
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        zest_fast.profile(model, **arguments)
    assert torch.equal(state, torch.get_rng_state())
    if usable:
        assert_same(before, snapshot(model))
        assert all(p.grad is None for p in model.parameters())


def test_inference_mode_is_refused_by_name() -> None:
    model = mlp()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        zest_fast.profile(model, (X, Y))
    with torch.inference_mode():
        model = mlp()
    with pytest.raises(ValueError, match=r"'0\.weight' was made under torch\.inference_mode"):
        zest_fast.profile(model, (X, Y))


def test_a_profile_inside_a_profile_of_the_same_model_is_refused() -> None:
    model, other = mlp(), mlp()

    def nested() -> torch.Tensor:
        zest_fast.profile(other, (X, Y))  # another model is fine
        zest_fast.profile(model[2:], (X.repeat(1, 2), Y))
        return F.cross_entropy(model(X), Y)

    before = snapshot(model)
    with pytest.raises(RuntimeError, match="inside a profile of the same model"):
        zest_fast.profile(model, closure=nested)
    assert_same(before, snapshot(model))
    zest_fast.profile(model, (X, Y))


def test_data_parallel_is_profiled_through_its_module() -> None:
    model = mlp()
    equal(zest_fast.profile(model, (X, Y)), zest_fast.profile(nn.DataParallel(model), (X, Y)))
    with pytest.raises(ValueError, match=r"model\.module"):
        zest_fast.profile(nn.DataParallel(model), closure=lambda: model(X).sum())
