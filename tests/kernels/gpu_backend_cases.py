"""Whole models through `zest_fast.profile` on the kernels of a GPU. test_gpu_backends.py runs it in a process.

On a machine with a GPU the models live there, under every GPU backend that runs. Elsewhere Triton's interpreter runs
the kernels on CPU tensors, which has to be chosen before Triton is imported: hence the process
(`TRITON_INTERPRET=1 pytest tests/kernels/gpu_backend_cases.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import pytest
import torch
from model_zoo import ZOO, build, mean_square
from oracle import METRICS, Measurement, compare, compare_rounded, measure
from torch import Tensor, nn
from triton_cases import widened_dot  # noqa: F401  (a fixture: bfloat16 in Triton's interpreter)

import zest_fast
from zest_fast import kernels
from zest_fast.kernels import collector, cuda, reference, triton_kernels

pytestmark = pytest.mark.skipif(not triton_kernels.availability(), reason=triton_kernels.availability().reason)

ON_GPU = not triton_kernels.interpreted()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
BACKENDS = ["triton"] + (["cuda"] if ON_GPU and cuda.availability() else [])
on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")

MODELS = [
    "mlp",
    "mlp_on_sequences",
    "linear_without_a_batch",
    "linear_on_transposed_input",
    "linear_with_expanded_gradient",
    "tiny_weights",
    "offset_weights",
    "offset_outputs",
    "conv2d_in_place",
    "conv_groups_dilated_depthwise",
    "conv1d_and_3d",
    "conv_channels_last",
    "residual_batch_norm_in_train_mode",
    "tied_embedding",
    "tied_linears",
    "sparse_embedding",
    "parameters_in_einsum",
    "strided_weights",
    "zero_weights",
    "reused_linear",
    "reused_with_another_batch_size",
    "reused_convolution",
    "in_place_on_a_slice",
    "checkpoint_linear_in_place",
    "checkpoint_conv_in_place",
    "checkpoint_reentrant",
    "checkpoint_reused_layer",
    "multihead_attention",
    "lstm",
    "gru_bidirectional",
    "autocast_bfloat16",
    "autocast_in_place",
    "autocast_with_checkpoint",
    "bfloat16_model",
    "float16_model",
    "float64_model",
    "mixed_precision_model",
    "llama",
    "llama_tied",
    "llama_checkpointed",
    "gpt2",
    "mixtral",
    "bert_in_eval_mode",
    "resnet",
    "mobilenet_v2",
]
"""Of the zoo: each kind of layer, each route that a gradient takes, each precision."""


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN multiplies float32 as TF32 by default, and chooses another algorithm from run to run."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def built(name: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """As `model_zoo.build`, on DEVICE."""
    if not ON_GPU:
        return build(name)
    torch.manual_seed(1)
    model, loss, data = ZOO[name].make()
    model, data = model.to(DEVICE), tuple(x.to(DEVICE) for x in data)

    def closure() -> Tensor:
        torch.manual_seed(2)
        return loss(model, *data)

    return model, closure


def profiled(name: str, backend: str, **options: object) -> zest_fast.LayerProfile:
    model, closure = built(name)
    return zest_fast.profile(model, closure=closure, layers=ZOO[name].layers, backend=backend, **options)


def as_table(profile: zest_fast.LayerProfile) -> dict[str, dict[str, float]]:
    return {name: {metric: float(profile[name][metric]) for metric in profile.metrics} for name in profile.names}


@cache
def by_reference(name: str) -> zest_fast.LayerProfile:
    """The same pass, its tensors reduced by the definitions in float64."""
    return profiled(name, "reference")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_every_metric_is_that_of_the_reference_backend(name: str, backend: str) -> None:
    """Both reduce the same tensors, so 2e-5 is what the kernels may cost in every precision."""
    profile, expected = profiled(name, backend), by_reference(name)
    numel = {row: info["numel"] for row, info in expected.info.items()}
    specification = Measurement(as_table(expected), numel, {}, set(), expected.loss)
    assert compare(as_table(profile), specification, specification).misses == []
    assert profile.metrics == list(METRICS)
    assert profile.uncovered == expected.uncovered
    assert backend in profile.backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["mlp_on_sequences", "conv_channels_last", "llama", "autocast_bfloat16", "float16_model"]
)
def test_every_metric_is_that_of_plain_autograd_in_float64(name: str, backend: str) -> None:
    model, closure = built(name)
    own = measure(model, closure, ZOO[name].layers)
    specification = measure(*build(name, double=True), ZOO[name].layers)
    judgement = compare_rounded if ZOO[name].rounded else compare
    verdict = judgement(as_table(profiled(name, backend)), specification, own)
    assert verdict.misses == []
    assert len(verdict.left_out) <= 0.02 * verdict.cells


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["mlp", "conv_channels_last", "llama", "autocast_bfloat16"])
def test_the_same_pass_gives_the_same_bits(name: str, backend: str) -> None:
    first, second = profiled(name, backend), profiled(name, backend)
    assert first.values.tobytes() == second.values.tobytes()
    assert first.loss == second.loss


def test_the_profile_says_that_triton_ran() -> None:
    assert profiled("mlp", "triton").backend == "triton"
    assert profiled("float64_model", "triton").backend == "triton"


SELECTIONS = [
    ["weight_mean"],
    ["act_abs_std"],
    ["weight_std", "act_mean"],
    ["grad_norm"],
    ["grad_norm", "plain"],
    ["snip"],
    ["fisher"],
    ["fisher", "rgn", "grad_abs_mean"],
]


@pytest.mark.parametrize("metrics", SELECTIONS, ids=" ".join)
@pytest.mark.parametrize("name", ["mlp_on_sequences", "conv2d_in_place", "bfloat16_model"])
def test_metrics_that_were_chosen_are_those_of_the_reference(name: str, metrics: list[str]) -> None:
    profile, expected = profiled(name, "triton", metrics=metrics), profiled(name, "reference", metrics=metrics)
    whole = by_reference(name)
    assert profile.metrics == [metric for metric in METRICS if metric in metrics]
    for row in profile.names:
        spread = dict(zip(whole.metrics, whole.values[whole.names.index(row)], strict=True))
        for metric in profile.metrics:
            unit = spread["snip"] / whole.info[row]["numel"] if metric == "plain" else abs(expected[row][metric])
            unit = spread[metric.replace("_mean", "_std")] if metric.endswith("_mean") else unit
            off = abs(profile[row][metric] - expected[row][metric])
            assert off <= 2e-5 * unit, (row, metric, profile[row][metric], expected[row][metric])


def test_of_a_loss_that_was_scaled_the_scale_is_taken_out() -> None:
    model, closure = built("mlp")
    scaled = zest_fast.profile(model, closure=lambda: closure() * 1024, backend="triton", loss_scale=1024)
    plain = profiled("mlp", "triton")
    assert as_table(scaled) == {row: pytest.approx(cells, rel=1e-6) for row, cells in as_table(plain).items()}


def test_entries_that_are_not_finite_are_counted_and_their_metrics_are_nan() -> None:
    model, closure = built("mlp")
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
    hidden = torch.zeros_like(layer.weight)
    hidden[0, 0] = float("nan")

    class Hides(nn.Linear):
        """A weight that no output sees, and whose gradient is 0."""

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.nan_to_num(), self.bias)

    layer.__class__ = Hides
    with torch.no_grad():
        layer.weight.add_(hidden)
    found = zest_fast.profile(model, closure=closure, backend="triton")
    expected = zest_fast.profile(model, closure=closure, backend="reference")
    counts = {row: info["nonfinite"] for row, info in expected.info.items()}
    assert {row: info["nonfinite"] for row, info in found.info.items()} == counts and sum(counts.values()) == 1
    row = next(row for row, count in counts.items() if count)
    nan = [metric for metric in METRICS if expected[row][metric] != expected[row][metric]]
    assert [metric for metric in METRICS if found[row][metric] != found[row][metric]] == nan and "snip" in nan


def test_many_tensors_of_one_device_take_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    launch = triton_kernels.moments_into

    def counting(tensors, out) -> None:
        calls.append(len(tensors))
        launch(tensors, out)

    monkeypatch.setattr(triton_kernels, "moments_into", counting)
    tensors = [torch.randn(n, device=DEVICE).to(dtype) for n in (1, 700, 5000) for dtype in kernels.DTYPES]
    found = kernels.moments(tensors, backend="triton")
    assert calls == [len(tensors)]
    assert [m.std for m in found] == pytest.approx([reference.moments(x).std for x in tensors], rel=1e-5)

    calls.clear()
    profile = profiled("mlp", "triton", metrics=["weight_std"])
    assert calls == [len(profile.names)]  # all weights of the model together


def test_moments_launch_two_kernels_whatever_the_number_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from zest_fast.kernels import triton_moments

    launched: list[str] = []

    class Counting:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(triton_moments, name)

        def __getitem__(self, grid: tuple) -> object:
            launched.append(self.name)
            return self.kernel[grid]

    for name in ("moments_of_chunks", "merge_moments"):
        monkeypatch.setattr(triton_moments, name, Counting(name))
    kernels.moments([torch.randn(n, device=DEVICE) for n in (10, 9000, 20_000)], backend="triton")
    assert launched == ["moments_of_chunks", "merge_moments"]


def test_rows_leave_the_device_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[tuple[int, ...]] = []
    to_list = Tensor.tolist

    def counting(x: Tensor) -> list:
        if x.dtype == torch.float64 and x.dim():
            copies.append(tuple(x.shape))
        return to_list(x)

    monkeypatch.setattr(Tensor, "tolist", counting)
    # On a CPU the interpreter's fisher is a number at once: it waits for nothing there.
    metrics = None if ON_GPU else [metric for metric in METRICS if metric != "fisher"]
    profile = profiled("llama", "triton", metrics=metrics)
    assert len(profile.names) > 10
    assert len(copies) == 1


def test_more_results_than_a_buffer_holds_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "_BUFFER", 20)  # three rows of moments
    tensors = [torch.full((5,), float(i), device=DEVICE) for i in range(11)]
    results = collector.Collector("triton")
    later = [results.moments([x])[0] for x in tensors] + results.moments(tensors)
    results.fetch()
    assert [found().mean for found in later] == [float(i) for i in range(11)] * 2


def test_float64_goes_to_the_next_route() -> None:
    x, g, w = (torch.randn(*shape, dtype=torch.float64, device=DEVICE) for shape in ((9, 5), (9, 7), (7, 5)))
    results = collector.Collector("triton")
    later = results.linear_gradient_moments(x, g, w)
    results.fetch()
    expected = reference.linear_gradient_moments(x, g, w)
    assert later().product_abs_sum == pytest.approx(expected.product_abs_sum, rel=1e-13)
    assert later().gradient.std == pytest.approx(expected.gradient.std, rel=1e-13)
    assert results.used == {"triton"}


@pytest.mark.parametrize(
    ("kernel", "model"),
    [
        ("moments_into", "mlp"),
        ("linear_gradient_moments_into", "mlp"),
        ("gradient_moments_into", "conv2d_in_place"),
        ("channel_products", "conv2d_in_place"),
    ],
)
def test_what_a_kernel_refuses_names_the_layer(kernel: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*tensors: Tensor) -> None:
        raise ValueError("w is on another planet")

    monkeypatch.setattr(triton_kernels, kernel, refuses)
    with pytest.raises(ValueError, match=r"layer '.+': w is on another planet"):
        profiled(model, "triton")


def test_no_metric_of_a_layer_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("moments", "gradient_moments", "linear_gradient_moments", "channel_products"):
        monkeypatch.setattr(reference, name, None)
    assert profiled("bert_in_eval_mode", "triton").backend == "triton"


# On a GPU only


@on_gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_waits_for_the_gpu_but_the_loss_check_and_the_end(backend: str) -> None:
    """check_loss looks at the loss once between forward and backward, `finish` fetches, the loss is reported."""
    model, closure = built("llama")
    zest_fast.profile(model, closure=closure, backend=backend)  # compiles
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            closure().backward()
            of_the_model = len([w for w in caught if "synchronizing" in str(w.message)])
            caught.clear()
            zest_fast.profile(model, closure=closure, backend=backend)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)]
    assert len(found) - of_the_model <= 3, found


@on_gpu
def test_a_side_stream_is_the_stream_of_the_kernels() -> None:
    model, closure = built("mlp_on_sequences")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what ran on another stream would read too early
        model_on_stream, closure_on_stream = built("mlp_on_sequences")
        found = zest_fast.profile(model_on_stream, closure=closure_on_stream, backend="triton")
    expected = zest_fast.profile(model, closure=closure, backend="triton")
    assert found.values.tobytes() == expected.values.tobytes()


class OnTwoDevices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, 40).to("cuda:0")
        self.second = nn.Linear(40, 6).to("cuda:1")

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.to("cuda:0")).relu().to("cuda:1"))


@pytest.mark.skipif(torch.cuda.device_count() < 2 or not ON_GPU, reason="needs two GPUs")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_on_two_gpus(backend: str) -> None:
    model, x = OnTwoDevices(), torch.randn(9, 12)
    found = zest_fast.profile(model, closure=lambda: mean_square(model, x), backend=backend)
    expected = zest_fast.profile(model, closure=lambda: mean_square(model, x), backend="reference")
    torch.testing.assert_close(torch.from_numpy(found.values), torch.from_numpy(expected.values), rtol=2e-5, atol=1e-9)
