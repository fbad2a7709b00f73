"""grasp, synflow and gradient agreement: held against their definitions, and what their passes leave behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import oracle_on_request as oracle
import pytest
import torch
from model_zoo import ZOO, batch_of, build
from oracle import REACHABLE, TOLERANCE
from small_models import conv_net, images
from torch import Tensor, nn
from torch.nn import functional as F
from untouched import bits, changes, state_of

import zest_fast
from zest_fast.kernels.agreement import agreement_sums
from zest_fast.profiling.metrics import ALL_METRIC_NAMES, METRIC_NAMES
from zest_fast.profiling.metrics import ON_REQUEST as ON_REQUEST_KINDS
from zest_fast.profiling.on_request import agreement, grasp
from zest_fast.profiling.on_request.request import MEASURES

AGREEMENT = ("agree_dot", "agree_sign", "agree_cos")
ON_REQUEST = ("grasp", "synflow", *AGREEMENT)
DOUBLE_BACKWARD = 1e-3  # relative to float64, as the definition promises
FINITE_DIFFERENCE = 1e-2
FLOAT64 = 1e-6

CASES = [
    "mlp",
    "mlp_on_sequences",
    "conv2d_in_place",
    "conv_groups_dilated_depthwise",
    "conv_channels_last",
    "residual_batch_norm_in_train_mode",
    "weight_norm_parametrised",
    "spectral_norm_old_in_train_mode",
    "tied_linears",
    "parameters_in_einsum",
    "reused_linear",
    "in_place_on_a_slice",
    "no_grad_inside",
    "custom_autograd_function",
    "frozen_layers",
    "buffer_is_replaced",
    "compiled_submodule",
    "checkpoint_conv_in_place",
    "checkpoint_reentrant",
    "checkpoint_reentrant_functional",
    "multihead_attention",
    "transformer_encoder_layer_in_train_mode",
    "lstm",
    "llama_tied",
    "llama_checkpointed_reentrant",
    "llama_lora",
    "gpt2",
    "bert_in_train_mode",
    "vit",
    "resnet",
    "efficientnet",
]
WITHOUT_CHECKPOINTS = {"llama_checkpointed_reentrant": "llama"}
BY_DIFFERENCES = {name for name in CASES if "reentrant" in name}  # reentrant checkpointing has no second derivative


@cache
def everything(name: str) -> zest_fast.LayerProfile:
    model, arguments = batch_of(name)
    torch.manual_seed(2)
    return zest_fast.profile(model, metrics="all", layers=ZOO[name].layers, **arguments)


# --- the definitions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_grasp(name: str) -> None:
    found = everything(name)
    twin = WITHOUT_CHECKPOINTS.get(name, name)
    judge = oracle.grasp_by_differences if twin in BY_DIFFERENCES else oracle.grasp
    expected = judge(*build(twin, double=True), ZOO[name].layers)
    assert set(found) == set(expected)
    for row, (value, magnitude) in expected.items():
        error = abs(found[row]["grasp"] - value)
        if name in BY_DIFFERENCES:
            assert error <= FINITE_DIFFERENCE * magnitude, row
        else:
            assert error <= DOUBLE_BACKWARD * abs(value), row
    notes = {row["note"] for row in found.info.values()}
    assert all(("finite difference" in note) == (name in BY_DIFFERENCES) for note in notes)


@pytest.mark.parametrize("name", CASES)
def test_synflow(name: str) -> None:
    found = everything(name)
    model, arguments = batch_of(name, double=True)
    expected = oracle.synflow(model, lambda model: sum_for_ones(model, arguments["batch"]), ZOO[name].layers)
    for row in found:
        assert found[row]["synflow"] == pytest.approx(expected[row], rel=FLOAT64, abs=0.0), row
    assert max(expected.values()) > 0


def sum_for_ones(model: nn.Module, batch: object) -> Tensor:
    """R: transformers' models are handed inputs_embeds of ones."""
    if not isinstance(batch, Mapping):
        inputs = batch[0] if isinstance(batch[0], tuple) else (batch[0],)
        return model(*map(torch.ones_like, inputs)).sum()
    if "input_ids" in batch:
        width = model.get_input_embeddings().embedding_dim
        ones = torch.ones(*batch["input_ids"].shape, width, dtype=torch.float64)
        return model(inputs_embeds=ones).logits.sum()
    return model(pixel_values=torch.ones_like(batch["pixel_values"])).logits.sum()


@cache
def agreement_of(name: str, *, double: bool) -> dict[str, dict[str, tuple[float, float]]]:
    halves = []
    for first in (0, 1):
        model, arguments = batch_of(name, double=double)
        halves.append(oracle.gradients(model, loss_of_half(model, first, **arguments), ZOO[name].layers))
    return oracle.agreement(*halves)


def loss_of_half(model: nn.Module, first: int, batch: object, loss_fn: Callable | None = None) -> Callable[[], Tensor]:
    def half(x: Tensor) -> Tensor:
        return x[first::2].contiguous()

    def loss() -> Tensor:
        torch.manual_seed(2)
        if isinstance(batch, Mapping):
            return model(**{key: half(x) for key, x in batch.items()}).loss
        if loss_fn is not None:
            return loss_fn(model(*map(half, batch[0])), None)
        return F.cross_entropy(model(half(batch[0])), half(batch[1]))

    return loss


def off(value: float, expected: tuple[float, float]) -> float:
    """The error relative to the magnitude of what is added up, which may cancel (as for `plain`)."""
    return abs(value - expected[0]) / expected[1]


@pytest.mark.parametrize("name", CASES)
def test_agreement(name: str) -> None:
    found, expected, own = everything(name), agreement_of(name, double=True), agreement_of(name, double=False)
    wrong = [
        (row, metric, found[row][metric], expected[row][metric])
        for row in found
        for metric in AGREEMENT
        if not off(found[row][metric], expected[row][metric]) <= TOLERANCE
        and off(own[row][metric][0], expected[row][metric]) <= REACHABLE
    ]
    assert not wrong


def test_few_agreements_are_beyond_plain_autograd() -> None:
    cells = [
        off(agreement_of(name, double=False)[row][metric][0], expected[metric])
        for name in CASES
        for row, expected in agreement_of(name, double=True).items()
        for metric in AGREEMENT
    ]
    assert sum(error > REACHABLE for error in cells) <= 0.02 * len(cells)


@pytest.mark.parametrize("name", ["mlp", "conv2d_in_place", "reused_linear", "llama_tied"])
def test_double_backward_and_finite_difference_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("derivative of something is not implemented")

    monkeypatch.setattr(grasp, "_by_double_backward", fails)
    model, closure = build(name)
    found = zest_fast.profile(model, closure=closure, metrics=["grasp"])
    assert found.values == pytest.approx(everything(name).column("grasp")[:, None], rel=FINITE_DIFFERENCE)
    assert all("derivative of something is not implemented" in row["note"] for row in found.info.values())


class Cube(torch.autograd.Function):
    """Its backward looks right and hides x² from autograd."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.square = x.detach().square()
        return ctx.square * x

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return 3 * ctx.square * g


class OnlyOnce(torch.autograd.Function):
    """Refuses a second derivative."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.pow(3)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x.square() * g


@pytest.mark.parametrize("function", [Cube, OnlyOnce])
def test_functions_without_a_second_derivative_are_found_out(function: type[torch.autograd.Function]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out, self.cube = nn.Linear(8, 8), nn.Linear(8, 3), function.apply

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.cube(self.inner(x)))

    torch.manual_seed(0)
    model, data = Model(), (torch.randn(6, 8), torch.randint(3, (6,)))
    found = zest_fast.profile(model, data, metrics=["grasp"])
    assert all("finite difference" in row["note"] for row in found.info.values())
    model = model.double()
    model.cube = lambda x: x.pow(3)
    expected = oracle.grasp(model, lambda: F.cross_entropy(model(data[0].double()), data[1]))
    for row, (value, _) in expected.items():
        assert found[row]["grasp"] == pytest.approx(value, rel=FINITE_DIFFERENCE)


# --- properties -------------------------------------------------------------------------------------------------------


def test_grasp_of_a_scale_invariant_layer_is_its_squared_gradient() -> None:
    """Batch norm in train mode makes L(cW) = L(W), so HW = -g: exact for a single profiled layer without bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(96, 3))
    data = (torch.randn(8, 3, 6, 6), torch.randint(3, (8,)))
    row = zest_fast.profile(model, data, layers=["0"], metrics=["grasp", "grad_norm"])["0"]
    assert row["grasp"] == pytest.approx(row["grad_norm"] ** 2, rel=1e-4)


def test_synflow_is_the_same_for_every_layer_of_a_chain() -> None:
    """A homogeneous R gives every layer of a chain without bias the same sum, namely R (Tanaka et al. 2020)."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(60)))
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(40)
    found = zest_fast.profile(model, (torch.zeros(2, 8), torch.zeros(2, dtype=torch.long)), metrics=["synflow"])
    total = torch.ones(2, 8, dtype=torch.float64)
    for layer in model:
        total = total @ layer.weight.detach().double().abs().t()
    assert found.values == pytest.approx(np.full((60, 1), float(total.sum())), rel=1e-12)
    assert found.values.min() > 1e61


def test_synflow_looks_at_no_data() -> None:
    torch.manual_seed(0)
    model = conv_net()
    tables = [
        zest_fast.profile(model, (images(), torch.randint(3, (5,))), metrics=["synflow"]).values for _ in range(2)
    ]
    assert (tables[0] == tables[1]).all()


def test_synflow_beyond_float64_is_nan_and_says_so() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(9)))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.full((4, 4), 1e37)).mul_(torch.randn(4, 4).sign())
    found = zest_fast.profile(model, (torch.zeros(2, 4), torch.zeros(2, dtype=torch.long)), metrics=["synflow"])
    assert np.isnan(found.values).all()
    assert all("exceeds float64" in row["note"] for row in found.info.values())


def test_halves_that_are_equal_agree_fully() -> None:
    torch.manual_seed(0)
    model = conv_net().eval()
    x, y = images(2), torch.randint(3, (2,))
    data = (x.repeat_interleave(2, 0), y.repeat_interleave(2, 0))
    found = zest_fast.profile(
        model, data, metrics=["agree_dot", "agree_sign", "agree_cos", "grad_norm", "grad_abs_mean"]
    )
    assert found.column("agree_cos") == pytest.approx(1.0)
    assert found.column("agree_dot") == pytest.approx(found.column("grad_norm") ** 2, rel=1e-5)
    numel = np.array([row["numel"] for row in found.info.values()])
    assert found.column("agree_sign") == pytest.approx(found.column("grad_abs_mean") * numel, rel=1e-5)


def test_a_linear_of_few_samples_is_compared_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 30)), (torch.randn(5, 40), torch.arange(5))
    monkeypatch.setattr(agreement, "_TILE_ENTRIES", 90)  # two rows of one, one row of the other
    monkeypatch.setattr(agreement, "_Whole", lambda *_: pytest.fail("a gradient was formed as a whole"))
    found = zest_fast.profile(model, data, metrics=AGREEMENT)
    halves = []
    for first in (0, 1):
        loss = F.cross_entropy(model(data[0][first::2]), data[1][first::2])
        halves.append(torch.autograd.grad(loss, [model[0].weight, model[2].weight]))
    expected = [float((a * b).sum()) for a, b in zip(*halves, strict=True)]
    assert found.column("agree_dot") == pytest.approx(expected, rel=1e-4)


def test_each_half_has_its_own_mean() -> None:
    """Tokens that are ignored weigh nothing: the even samples have four, the odd ones one."""
    torch.manual_seed(0)
    model, x = nn.Linear(5, 3, bias=False), torch.randn(2, 4, 5)
    targets = torch.tensor([[0, 1, 2, 0], [-100, -100, 1, -100]])

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), y.flatten(), ignore_index=-100)

    found = zest_fast.profile(model, (x, targets), loss_fn=loss, metrics=["agree_dot"])
    halves = [torch.autograd.grad(loss(model(x[i : i + 1]), targets[i : i + 1]), model.weight)[0] for i in (0, 1)]
    (row,) = found
    assert found[row]["agree_dot"] == pytest.approx(float((halves[0] * halves[1]).sum()), rel=1e-5)


def test_loss_scale_is_taken_out() -> None:
    torch.manual_seed(0)
    model, data = conv_net().eval(), (images(), torch.randint(3, (5,)))
    plain = zest_fast.profile(model, data, metrics=ON_REQUEST)
    scaled = zest_fast.profile(
        model, data, loss_fn=lambda output, y: 512 * F.cross_entropy(output, y), metrics=ON_REQUEST, loss_scale=512
    )
    assert scaled.values == pytest.approx(plain.values, rel=1e-4)


def test_the_sums_of_two_gradients_in_blocks_of_any_layout() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(700, 900).t(), torch.randn(900, 700)
    a[0, :3] = 0.0
    x, y = a.double(), b.double()
    expected = [(x * y).sum(), (x.sign() * y).sum(), (x * y.sign()).sum(), (x * x).sum(), (y * y).sum()]
    assert agreement_sums(a, b).tolist() == pytest.approx([float(value) for value in expected], rel=1e-10)


# --- what is asked for ------------------------------------------------------------------------------------------------


def test_all_means_every_metric_and_none_those_of_one_pass() -> None:
    found = everything("mlp")
    assert found.metrics == list(ALL_METRIC_NAMES) == [*METRIC_NAMES, *ON_REQUEST]
    model, arguments = batch_of("mlp")
    assert zest_fast.profile(model, **arguments).metrics == list(METRIC_NAMES)
    assert zest_fast.profile(model, metrics=METRIC_NAMES, **arguments).values == pytest.approx(found.values[:, :15])


@pytest.mark.parametrize("name", ON_REQUEST)
def test_one_alone_equals_its_column(name: str) -> None:
    model, arguments = batch_of("conv2d_in_place")
    one = zest_fast.profile(model, metrics=[name], **arguments)
    assert one.metrics == [name]
    assert one.values[:, 0] == pytest.approx(everything("conv2d_in_place").column(name), rel=1e-6)


def test_rankings_and_files_take_them(tmp_path) -> None:
    found = everything("conv2d_in_place")
    found.save(tmp_path / "profile.json")
    loaded = zest_fast.LayerProfile.load(tmp_path / "profile.json")
    for metric in ON_REQUEST:
        ranking = zest_fast.rank(loaded, by=metric)
        assert list(ranking.scores) == sorted(found.column(metric), reverse=True)


def test_what_cannot_be_had_of_all_is_nan_with_the_reason() -> None:
    model, closure = build("mlp")
    found = zest_fast.profile(model, closure=closure, metrics="all")
    missing = [metric for metric in found.metrics if np.isnan(found.column(metric)).all()]
    assert missing == ["synflow", *AGREEMENT]
    for row in found.info.values():
        assert "synflow undefined" in row["note"] and "agree_dot, agree_sign, agree_cos undefined" in row["note"]


X, Y = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
REFUSED = {
    "one sample": ((X[:1], Y[:1]), ValueError, "one sample; at least two"),
    "targets of other samples": ((X, Y[:3]), ValueError, r"batch\[1\] has shape \(3,\), but the batch has 4 samples"),
    "no samples": (((), Y), TypeError, r"batch\[0\] holds no tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_batches_without_halves_are_refused(case: str) -> None:
    batch, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        zest_fast.profile(nn.Linear(8, 3), batch, metrics=["agree_cos"])


def test_a_half_without_a_loss_is_an_error() -> None:
    x, y = torch.randn(2, 8), torch.tensor([0, -100])
    with pytest.raises(ValueError, match="odd samples is nan"):
        zest_fast.profile(nn.Linear(8, 3), (x, y), metrics=["agree_cos"])


# --- what the passes leave behind -------------------------------------------------------------------------------------


class Boom(Exception):
    """What a user's own code may raise."""


def in_the_midst_of_its_life(name: str) -> tuple[nn.Module, dict[str, object]]:
    model, arguments = batch_of(name)
    for parameter in list(model.parameters())[::2]:
        if parameter.is_floating_point():
            parameter.grad = torch.full_like(parameter, 0.5)
            parameter.detach().flatten()[:1].fill_(-0.0)
    torch.manual_seed(3)
    return model, arguments


@pytest.mark.parametrize("name", CASES)
def test_model_is_bit_for_bit_as_before(name: str) -> None:
    model, arguments = in_the_midst_of_its_life(name)
    before = state_of(model)
    zest_fast.profile(model, metrics=ON_REQUEST, layers=ZOO[name].layers, **arguments)
    assert changes(before, state_of(model)) == []


@pytest.mark.parametrize("metric", ["grasp", "synflow", "agree_dot"])
@pytest.mark.parametrize("name", ["residual_batch_norm_in_train_mode", "checkpoint_reentrant", "bert_in_train_mode"])
def test_model_is_as_before_after_an_exception_in_any_pass(name: str, metric: str) -> None:
    """Every call of the model may be the one that fails, and so may every backward pass."""
    calls = 0
    while True:
        model, arguments = in_the_midst_of_its_life(name)
        failing = FailsAt(calls)
        model.register_forward_hook(lambda *_, failing=failing: failing.count())
        before = state_of(model)
        try:
            zest_fast.profile(model, metrics=[metric], layers=ZOO[name].layers, **arguments)
        except Boom:
            assert changes(before, state_of(model)) == []
            calls += 1
            continue
        break
    assert calls >= 2


class FailsAt:
    def __init__(self, number: int) -> None:
        self._left = number

    def count(self) -> None:
        if self._left == 0:
            raise Boom
        self._left -= 1


def test_every_pass_draws_the_masks_of_a_plain_forward() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.5), nn.Linear(32, 3))
    masks = []
    model[1].register_forward_hook(lambda module, args, output: masks.append(bits(output.detach() == 0)))
    torch.manual_seed(4)
    zest_fast.profile(model, (torch.randn(6, 8), torch.randint(3, (6,))), metrics=["grasp", "snip"])
    assert len(masks) == 2 and masks[0] == masks[1]


def test_every_kind_on_request_has_one_object_that_measures_it() -> None:
    assert set(MEASURES) == ON_REQUEST_KINDS
