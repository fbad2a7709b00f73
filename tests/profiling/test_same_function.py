"""One function written as several kinds of layers: each goes its own route through taps and rules, to one row.

A Linear's gradient is formed in tiles, a convolution's comes from autograd, one of a weight that is used twice is added
up first, an attention's output layer never fires a hook.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from metamorphic_models import BOTH_SIDES, CLASSES, SAMPLES, Probed, assert_row
from oracle import METRICS
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import zest_fast

OF_THE_WEIGHT = [metric for metric in METRICS if metric.split("_")[0] not in ("act", "fisher")]


class Moved(nn.Module):
    """A layer between two changes of shape."""

    def __init__(self, layer: nn.Module, into: Callable[[Tensor], Tensor], out: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.into, self.out = layer, into, out

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(self.into(x)))


def same(x: Tensor) -> Tensor:
    return x


def swapped(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def weighing(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer.weight = nn.Parameter(weight.detach().clone())
    layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return layer


Pair = tuple[nn.Module, nn.Module, Tensor]


def linear_and_convolution_of_one_tap() -> Pair:
    a = nn.Linear(5, 7)
    b = weighing(nn.Conv1d(5, 7, 1), a.weight[..., None], a.bias)
    return a, Moved(b, swapped, swapped), torch.randn(SAMPLES, 4, 5)


def linear_and_the_library_s_conv1d() -> Pair:
    a = nn.Linear(5, 7)
    return a, weighing(Conv1D(7, 5), a.weight.t(), a.bias), torch.randn(SAMPLES, 4, 5)


def linear_and_patches() -> Pair:
    """A convolution whose kernels do not overlap reads each place once."""
    a = nn.Conv2d(3, 5, 2, stride=2)
    b = weighing(nn.Linear(12, 5), a.weight.flatten(1), a.bias)
    into = lambda x: F.unfold(x, 2, stride=2).transpose(1, 2)  # noqa: E731
    return a, Moved(b, into, lambda y: y.transpose(1, 2).unflatten(2, (3, 3))), torch.randn(SAMPLES, 3, 6, 6)


def convolutions_of_one_and_two_dimensions() -> Pair:
    a = nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2)
    b = nn.Conv2d(4, 6, (1, 3), stride=(1, 2), padding=(0, 2), dilation=(1, 2), groups=2)
    into, out = (lambda x: x.unsqueeze(2)), (lambda y: y.squeeze(2))
    return a, Moved(weighing(b, a.weight[:, :, None], a.bias), into, out), torch.randn(SAMPLES, 4, 9)


def convolution_and_a_transposed_one() -> Pair:
    """Of stride 1: the same taps from the other end, on a wider border."""
    a = nn.ConvTranspose1d(3, 4, 3)
    b = weighing(nn.Conv1d(3, 4, 3, padding=2), a.weight.flip(2).transpose(0, 1), a.bias)
    return a, b, torch.randn(SAMPLES, 3, 6)


def embedding_and_one_hot_rows() -> Pair:
    a = nn.Embedding(9, 4)
    b = weighing(nn.Linear(9, 4, bias=False), a.weight.t(), None)
    return a, Moved(b, lambda ids: F.one_hot(ids, 9).float(), same), torch.randint(9, (SAMPLES, 5))


def bilinear_and_a_linear_of_products() -> Pair:
    a = nn.Bilinear(3, 3, 5)
    b = weighing(nn.Linear(9, 5), a.weight.flatten(1), a.bias)
    return a, Moved(b, lambda x: torch.einsum("ni,nj->nij", x, x).flatten(1), same), torch.randn(SAMPLES, 3)


def plain_and_in_place_behind_it() -> Pair:
    a = nn.Linear(5, 7)
    b = weighing(nn.Linear(5, 7), a.weight, a.bias)
    return Moved(a, same, torch.sigmoid), Moved(b, same, torch.sigmoid_), torch.randn(SAMPLES, 4, 5)


def called_once_and_for_every_position() -> Pair:
    """S of several uses is added up before it is squared."""
    a = nn.Linear(5, 7)
    b = weighing(nn.Linear(5, 7), a.weight, a.bias)

    class EachByItself(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = b

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.layer(x[:, i]) for i in range(x.shape[1])], 1)

    return a, EachByItself(), torch.randn(SAMPLES, 4, 5)


PAIRS = [
    linear_and_convolution_of_one_tap,
    linear_and_the_library_s_conv1d,
    linear_and_patches,
    convolutions_of_one_and_two_dimensions,
    convolution_and_a_transposed_one,
    embedding_and_one_hot_rows,
    bilinear_and_a_linear_of_products,
    plain_and_in_place_behind_it,
    called_once_and_for_every_position,
]


def profiles(a: nn.Module, b: nn.Module, x: Tensor) -> tuple[zest_fast.LayerProfile, zest_fast.LayerProfile]:
    first, second = Probed(a, x), Probed(b, x)
    second.head.load_state_dict(first.head.state_dict())
    torch.testing.assert_close(first(x), second(x))
    batch = x, torch.randint(CLASSES, (SAMPLES,))
    return zest_fast.profile(first, batch, layers=".*"), zest_fast.profile(second, batch, layers=".*")


@pytest.mark.parametrize("pair", PAIRS)
def test_rows_are_the_same(pair: Callable[[], Pair]) -> None:
    torch.manual_seed(1)
    one, other = profiles(*pair())
    for row, of_other in zip(one.names, other.names, strict=True):
        assert_row(other[of_other], one[row], one.info[row]["numel"], METRICS)


class Cells(nn.Module):
    """An LSTM step by step: each weight is used once for every position."""

    def __init__(self, whole: nn.LSTM) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(whole.input_size, whole.hidden_size)
        self.cell.load_state_dict({name.removesuffix("_l0"): p for name, p in whole.state_dict().items()})

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for position in x.unbind(1):
            state = self.cell(position, state)
            outputs.append(state[0])
        return torch.stack(outputs, 1)


def test_a_recurrent_layer_and_its_cells() -> None:
    torch.manual_seed(1)
    whole = nn.LSTM(3, 5, batch_first=True)
    one, other = profiles(whole, Cells(whole), torch.randn(SAMPLES, 4, 3))
    for name in ("weight_ih", "weight_hh"):
        row = f"layer.{name}_l0"
        assert_row(other[f"layer.cell.{name}"], one[row], one.info[row]["numel"], OF_THE_WEIGHT)


class ByHand(nn.Module):
    """Attention of a Linear for each of query, key and value."""

    def __init__(self, whole: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, width = whole.num_heads, whole.embed_dim
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        with torch.no_grad():
            weights, biases = whole.in_proj_weight.chunk(3), whole.in_proj_bias.chunk(3)
            for layer, weight, bias in zip((self.query, self.key, self.value), weights, biases, strict=True):
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)
        self.out.load_state_dict(whole.out_proj.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_attention_and_its_linear_layers() -> None:
    torch.manual_seed(1)
    whole = nn.MultiheadAttention(6, 2, batch_first=True)
    one, other = profiles(whole, ByHand(whole), torch.randn(SAMPLES, 4, 6))
    parts = [other[f"layer.{name}"] for name in ("query", "key", "value")]
    packed = one["layer"]
    assert packed["snip"] == pytest.approx(sum(part["snip"] for part in parts), rel=BOTH_SIDES)
    assert packed["grad_norm"] ** 2 == pytest.approx(sum(part["grad_norm"] ** 2 for part in parts), rel=2 * BOTH_SIDES)
    for mean in ("weight_mean", "grad_abs_mean"):
        assert packed[mean] == pytest.approx(sum(part[mean] for part in parts) / 3, rel=BOTH_SIDES)
    assert_row(other["layer.out"], one["layer.out_proj"], 36, OF_THE_WEIGHT)


# --- normalisation --------------------------------------------------------------------------------------------------

NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm1d(6, eps=1e-12),
    "layer": lambda: nn.LayerNorm([6, 8], eps=1e-12),
    "group": lambda: nn.GroupNorm(2, 6, eps=1e-12),
    "instance": lambda: nn.InstanceNorm1d(6, eps=1e-12),
    "rms": lambda: nn.RMSNorm([6, 8], eps=1e-12),
}


@pytest.mark.parametrize("norm", NORMS)
def test_behind_a_norm_a_weight_has_no_scale(norm: str) -> None:
    """So that ΣW⊙dW is 0, and c W has a c-th of the gradient."""
    torch.manual_seed(1)
    x, c = torch.randn(SAMPLES, 4, 8), 4.0
    model = Probed(nn.Sequential(nn.Conv1d(4, 6, 3, padding=1, bias=False), NORMS[norm]()), x)
    batch = x, torch.randint(CLASSES, (SAMPLES,))
    before = zest_fast.profile(model, batch)
    assert abs(before["layer.0"]["plain"]) <= BOTH_SIDES * before["layer.0"]["snip"] / model.layer[0].weight.numel()
    with torch.no_grad():
        model.layer[0].weight *= c
    after = zest_fast.profile(model, batch)
    powers = {"weight": 1, "act": 1, "grad": -1, "plain": 0, "snip": 0, "fisher": 0, "rgn": -2}
    scaled = {metric: before["layer.0"][metric] * c ** powers[metric.split("_")[0]] for metric in METRICS}
    assert_row(after["layer.0"], scaled, model.layer[0].weight.numel(), METRICS)
    assert_row(after["head"], before["head"], model.head.weight.numel(), METRICS)
