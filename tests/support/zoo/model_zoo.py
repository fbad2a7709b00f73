"""Small models, each with something on which a profiler can trip.

`build(name)` gives a model and a closure that reseeds and returns its loss, so that every run of it is the same;
`build(name, double=True)` gives the same weights and data in float64. Entries are functions that return a model, a loss
function of the model and its data, and the data. Randomness: masks of dropout do not depend on the precision.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from zoo_registry import REFUSABLE, ZOO, Built, Entry, classify, entry, images, mean_square, own_loss, tokens


def build(name: str, *, double: bool = False) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The model of that name and its closure; both are new at each call and the same at each call."""
    model, loss, data = _made(name, double)

    def closure() -> Tensor:
        torch.manual_seed(2)
        return loss(model, *data)

    return model, closure


def entry_of(name: str) -> Entry:
    return ZOO[name] if name in ZOO else REFUSABLE[name]


def _made(name: str, double: bool) -> Built:
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old weight_norm is deprecated, and stays in use
        model, loss, data = entry_of(name).make()
    if double:
        model = model.double()
        data = tuple(x.double() if x.is_floating_point() else x for x in data)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the grouped product of experts knows no float64
    return model, loss, data


def batch_of(name: str, *, double: bool = False) -> tuple[nn.Module, dict[str, object]]:
    """The model of that name and its data in the form that `profile` takes instead of a closure.

    ValueError where the loss of the entry is not one of the three that follow.
    """
    model, loss, data = _made(name, double)
    if loss is classify:
        return model, {"batch": data}
    if loss is mean_square:
        return model, {"batch": (data, None), "loss_fn": lambda output, _: output.float_power(2).mean()}
    if isinstance(loss, own_loss):
        return model, {"batch": loss.batch(data)}
    raise ValueError(f"{name} has a loss of its own")


# Plain networks


@entry()
def mlp() -> Built:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 4))
    return model, classify, (torch.randn(5, 8), torch.randint(4, (5,)))


@entry()
def mlp_on_sequences() -> Built:
    # A Linear with bias returns a view on 3-D input, and the activation overwrites it.
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Linear(16, 4)
    )
    return model, mean_square, (torch.randn(5, 3, 8),)


@entry()
def linear_on_4d_without_bias() -> Built:
    model = nn.Sequential(nn.Linear(6, 10, bias=False), nn.GELU(), nn.Linear(10, 3, bias=False))
    return model, mean_square, (torch.randn(2, 3, 5, 6),)


@entry()
def linear_without_a_batch() -> Built:
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)), mean_square, (torch.randn(8),)


@entry()
def linear_on_transposed_input() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(5, 7)
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            mixed = self.mix(x.transpose(1, 2))  # strided input
            return self.out(torch.tanh(mixed).transpose(1, 2))

    return Model(), mean_square, (torch.randn(2, 5, 8),)


@entry()
def linear_with_expanded_gradient() -> Built:
    # The gradient of a sum has stride 0.
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)), lambda m, x: m(x).sum(), (torch.randn(4, 5, 8),)


@entry()
def tiny_weights() -> Built:
    # One element, and one output channel.
    return nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1), nn.Linear(1, 2)), mean_square, (torch.randn(6, 3),)


@entry()
def bilinear() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = nn.Bilinear(4, 5, 6)
            self.out = nn.Linear(6, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.out(torch.tanh(self.pair(a, b)))

    return Model(), mean_square, (torch.randn(3, 2, 4), torch.randn(3, 2, 5))


@entry()
def offset_weights() -> Built:
    # A mean of 1e4 deviations: single-pass sums of squares lose every digit of the deviation.
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].weight.copy_(0.1 + 1e-5 * torch.randn(16, 8))
        model[1].weight.copy_(-0.1 + 1e-5 * torch.randn(4, 16))
    return model, mean_square, (torch.randn(5, 8),)


@entry()
def offset_outputs() -> Built:
    # Weights, inputs and bias have few binary digits, so that the outputs are exact in float32, too.
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].weight.copy_((8 * torch.randn(16, 8)).round() / 64)
        model[0].bias.fill_(4096.0)
    x = (4 * torch.randn(5, 3, 8)).round() / 4
    return model, lambda m, x: m[1](m[0](x) - 4096).square().mean(), (x,)


# Convolutions


@entry()
def conv2d_in_place() -> Built:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(128, 3),
    )
    return model, classify, (images(), torch.tensor([0, 1, 2]))


@entry()
def conv_without_a_batch() -> Built:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3))
    return model, mean_square, (torch.randn(3, 8, 8),)


@entry()
def conv_groups_dilated_depthwise() -> Built:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2, stride=2),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.SiLU(),
        nn.Conv2d(8, 6, (2, 1), dilation=2),
    )
    return model, mean_square, (images(2, 12, 4),)


@entry()
def conv1d_and_3d() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.space = nn.Conv3d(2, 4, 2, padding="same")
            self.time = nn.Conv1d(4, 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.time(torch.tanh(self.space(x)).flatten(2))

    return Model(), mean_square, (torch.randn(2, 2, 3, 4, 3),)


@entry()
def conv_transposed() -> Built:
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 6, 3, stride=2, output_padding=1),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 4, 2, groups=2),
        nn.Flatten(2),
        nn.ConvTranspose1d(4, 2, 3),
    )
    return model, mean_square, (images(2, 4),)


@entry()
def conv_circular() -> Built:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(512, 3))
    return model, mean_square, (images(),)


@entry()
def conv_pads_in_forward() -> Built:
    class SamePadding(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    model = nn.Sequential(SamePadding(3, 8, 3, stride=2), nn.Flatten(), nn.Linear(128, 3))
    return model, mean_square, (images(),)


@entry()
def conv_channels_last() -> Built:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(1)
    )
    return model.to(memory_format=torch.channels_last), mean_square, (images().to(memory_format=torch.channels_last),)


@entry()
def residual_batch_norm_in_train_mode() -> Built:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.relu, self.out = nn.ReLU(inplace=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.norm1(self.conv1(x)))
            y = self.norm2(self.conv2(x))
            y += x
            return self.out(self.relu(y).mean((2, 3)))

    return Block().train(), classify, (images(), torch.tensor([0, 1, 2]))


# Weights that are not plain leaves of their module


@entry()
def weight_norm_parametrised() -> Built:
    weight_norm = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(weight_norm(nn.Linear(8, 6)), nn.Tanh(), weight_norm(nn.Linear(6, 3)))
    return model, mean_square, (torch.randn(5, 8),)


@entry()
def weight_norm_old() -> Built:
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv1d(4, 6, 3)), nn.Tanh(), nn.utils.weight_norm(nn.Conv1d(6, 3, 1)))
    return model, mean_square, (torch.randn(2, 4, 9),)


@entry()
def pruned() -> Built:
    from torch.nn.utils import prune

    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    prune.random_unstructured(model[0], "weight", amount=0.3)
    return model, mean_square, (torch.randn(5, 8),)


@entry()
def spectral_norm_old_in_train_mode() -> Built:
    # Each forward pass takes one step of the power iteration in two buffers.
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(8, 6)), nn.Tanh(), nn.Linear(6, 3))
    return model.train(), mean_square, (torch.randn(5, 8),)


@entry()
def weight_parametrised() -> Built:
    class Skew(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w.triu(1) - w.triu(1).mT

    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Conv1d(5, 4, 3), nn.Flatten(), nn.Linear(24, 3))
    parametrize.register_parametrization(model[0], "weight", Skew())
    nn.utils.parametrizations.spectral_norm(model[2]).eval()
    return model, mean_square, (torch.randn(2, 5, 8),)


@entry()
def tied_embedding() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(self.embed(ids))))

    return Model(), lambda m, i: F.cross_entropy(m(i).flatten(0, 1), i.flatten()), (tokens(2, 5, 20),)


@entry(layers=("embed", "head"))
def tied_embedding_by_name() -> Built:
    return tied_embedding()


@entry()
def tied_linears() -> Built:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    model[2].weight = model[0].weight
    return model, mean_square, (torch.randn(5, 2, 8),)


@entry(layers=("0", "2"))
def sparse_embedding() -> Built:
    model = nn.Sequential(nn.Embedding(20, 8, sparse=True), nn.Tanh(), nn.Linear(8, 3))
    return model, mean_square, (tokens(2, 5, 20),)


@entry(layers=("0",))
def embedding_bag() -> Built:
    return nn.Sequential(nn.EmbeddingBag(20, 8), nn.Linear(8, 3)), mean_square, (tokens(2, 5, 20),)


@entry()
def parameters_in_einsum() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.experts = nn.Parameter(torch.randn(4, 8, 6) / 3)
            self.mix = nn.Parameter(torch.randn(6, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("td,edf->tef", self.first(x), self.experts) @ self.mix

    return Model(), mean_square, (torch.randn(5, 8),)


@entry()
def parameter_of_a_module_with_one_output() -> Built:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.table

    return nn.Sequential(Scale(), nn.Tanh(), nn.Linear(8, 3)), mean_square, (torch.randn(4, 5, 8),)


@entry()
def parameter_list_and_layer_norm_over_two_dimensions() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factors = nn.ParameterList(torch.randn(8, 8) / 3 for _ in range(2))
            self.single = nn.ParameterDict({"mix": torch.randn(8, 4)})
            self.norm, self.out = nn.LayerNorm((5, 8)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            for factor in self.factors:
                x = torch.tanh(x @ factor)
            return self.out(self.norm(x) @ self.single["mix"])

    return Model(), lambda m, x: m(x).cos().mean(), (torch.randn(3, 5, 8),)


@entry()
def strided_weights() -> Built:
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    model[0].weight = nn.Parameter(torch.randn(8, 6).t() / 3)
    model[2].weight = nn.Parameter(torch.randn(3, 12)[:, ::2] / 3)
    return model, mean_square, (torch.randn(5, 2, 8),)


@entry()
def empty_parameter() -> Built:
    # As DINOv3 without register tokens.
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.registers, self.out = nn.Parameter(torch.zeros(1, 0, 8)), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.cat([self.registers.expand(len(x), -1, -1), x], 1))

    return Model(), mean_square, (torch.randn(2, 5, 8),)


@entry()
def zero_weights() -> Built:
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    nn.init.zeros_(model[2].weight)
    return model, mean_square, (torch.randn(5, 8),)


@entry()
def complex_parameter() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filter = nn.Parameter(torch.randn(5, 8, dtype=torch.complex64))
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.fft.ifft(torch.fft.fft(x) * self.filter).real)

    return Model(), mean_square, (torch.randn(2, 5, 8),)


@entry()
def integer_parameter() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codes = nn.Parameter(torch.randint(-8, 8, (6, 8), dtype=torch.int8), requires_grad=False)
            self.out = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x @ self.codes.to(x.dtype).t() / 16)

    return Model(), mean_square, (torch.randn(5, 8),)


# Reuse, functional use, views and in-place operations


@entry()
def reused_linear() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = torch.tanh(self.step(x))
            return self.out(x)

    return Model(), mean_square, (torch.randn(5, 8),)


@entry()
def reused_with_another_batch_size() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            prototypes = self.encode(x[:2])  # fisher is then the sum over the uses
            return self.out(torch.tanh(self.encode(x)) + prototypes.mean(0))

    return Model(), mean_square, (torch.randn(6, 8),)


@entry()
def reused_convolution() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step, self.out = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = F.silu(self.step(x), inplace=True)
            return self.out(x)

    return Model(), mean_square, (images(2, 6, 4),)


@entry()
def functional_use_of_a_linear() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.linear(torch.tanh(self.inner(x)), self.inner.weight.t()))

    return Model(), mean_square, (torch.randn(5, 8),)


@entry()
def functional_use_of_an_embedding() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body = nn.Embedding(20, 8), nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(torch.tanh(self.body(self.embed(ids))), self.embed.weight)

    return Model(), lambda m, i: F.cross_entropy(m(i).flatten(0, 1), i.flatten()), (tokens(2, 5, 20),)


@entry()
def in_place_after_select() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 12), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            q = self.qkv(x).view(*x.shape[:-1], 3, 4).select(-2, 0)
            return self.out(q.mul_(0.5))

    return Model(), mean_square, (torch.randn(2, 5, 8),)


@entry()
def in_place_on_a_slice() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(8, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            y[..., :4].mul_(0.5)
            return self.out(y.add_(1))

    return Model(), mean_square, (torch.randn(2, 5, 8),)


@entry()
def linear_that_flattens_itself() -> Built:
    class Flat(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x.flatten(0, 1), self.weight, self.bias).view(*x.shape[:-1], -1)

    model = nn.Sequential(nn.Linear(8, 16), Flat(16, 16), nn.ReLU(inplace=True), nn.Linear(16, 4))
    return model, mean_square, (torch.randn(5, 3, 8),)


# Autograd used in unusual ways


@entry()
def no_grad_inside() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.body, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.frozen(x)
            return self.out(self.body(x))

    return Model(), mean_square, (torch.randn(5, 8),)


@entry()
def no_grad_for_one_of_two_uses() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                teacher = self.body(2 * x)
            return self.out(torch.tanh(self.body(x)) - teacher)

    return Model(), mean_square, (torch.randn(5, 8),)


@entry()
def detached_output() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.body, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.body(x) * torch.sigmoid(self.gate(x)).detach())

    return Model(), mean_square, (torch.randn(5, 8),)


@entry()
def unused_outputs() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.idle, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.idle(x)
            used = self.out(self.body(x))
            self.body(2 * x)  # counts for act, and has no gradient
            return used

    return Model(), mean_square, (torch.randn(5, 8),)


@entry()
def outputs_that_do_not_depend_on_the_weight() -> Built:
    class Skipped(nn.Module):
        def __init__(self, *, scale: float | None) -> None:
            super().__init__()
            self.weight, self.scale = nn.Parameter(torch.randn(8, 8)), scale

        def forward(self, x: Tensor) -> Tensor:
            return x if self.scale is None else self.scale * x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out = nn.Linear(8, 8), nn.Linear(8, 3)
            self.skipped, self.scaled = Skipped(scale=None), Skipped(scale=0.5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return self.out(self.skipped(y) * self.scaled(y))

    return Model(), mean_square, (torch.randn(5, 8),)


@entry()
def output_is_a_part_of_what_was_computed() -> Built:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 8))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weight)[:, 1:4].transpose(1, 2)

    model = nn.Sequential(Narrow(), nn.ReLU(inplace=True), nn.Linear(3, 3))
    return model, mean_square, (torch.randn(4, 5, 8),)


@entry()
def output_is_the_weight_itself() -> Built:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 8))

        def forward(self) -> Tensor:
            return self.weight

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.constant, self.out = Constant(), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x * self.constant())

    return Model(), mean_square, (torch.randn(4, 5, 8),)


@entry()
def custom_autograd_function() -> Built:
    class Multiply(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return F.linear(x, w)

        @staticmethod
        def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor | None]:
            x, w = ctx.saved_tensors
            return g @ w, g.t() @ x if ctx.needs_input_grad[1] else None

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(8, 8, bias=False), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(Multiply.apply(x, self.inner.weight))

    return Model(), mean_square, (torch.randn(5, 8),)


def penalised(model: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    output = model(x).square().mean()
    (slope,) = torch.autograd.grad(output, x, create_graph=True)
    return output + slope.square().sum()


@entry()
def gradient_penalty() -> Built:
    # Gradients flow through the layers before backward() is called, and through their derivatives within it.
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)), penalised, (torch.randn(5, 8),)


@entry()
def gradient_penalty_with_convolution() -> Built:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(144, 3))
    return model, penalised, (images(2),)


@entry()
def forward_hook_changes_output() -> Built:
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    model[0].register_forward_hook(lambda module, args, y: 2 * y + 1)
    return model, mean_square, (torch.randn(5, 2, 8),)


@entry()
def forward_hook_overwrites_output() -> Built:
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    model[0].register_forward_hook(lambda module, args, y: y.mul_(2).add_(1))
    return model, mean_square, (torch.randn(5, 2, 8),)


@entry()
def pre_hook_changes_input() -> Built:
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    model[2].register_forward_pre_hook(lambda module, args: (args[0].square(),))
    return model, mean_square, (torch.randn(5, 2, 8),)


@entry()
def keyword_arguments() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(input=torch.tanh(self.inner(input=x)))

    return Model(), mean_square, (torch.randn(5, 2, 8),)


@entry()
def two_passes_through_the_model() -> Built:
    def loss(model: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            target = model(b)
        return (model(a) - model(b)).square().mean() + (model(a + b) - target).square().mean()

    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    return model, loss, (torch.randn(5, 8), torch.randn(5, 8))


@entry()
def input_requires_grad() -> Built:
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    return model, lambda m, x: m(x.clone().requires_grad_()).square().mean(), (torch.randn(5, 2, 8),)


@entry()
def backward_hooks_of_the_user() -> Built:
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    model[2].register_full_backward_pre_hook(lambda module, grad_output: (2 * grad_output[0],))
    model[4].register_full_backward_hook(lambda module, grad_input, grad_output: None)
    return model, mean_square, (torch.randn(5, 2, 8),)


@entry()
def tensor_hook_of_the_user() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            y.register_hook(lambda g: 2 * g)
            return self.out(torch.tanh(y))

    return Model(), mean_square, (torch.randn(5, 2, 8),)


@entry()
def parameter_hook_of_the_user() -> Built:
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    model[0].weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    return model, mean_square, (torch.randn(5, 2, 8),)


@entry()
def adversarial_input() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().mean(), x)
        return model((x + 0.1 * slope.sign()).detach()).square().mean()

    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)), loss, (torch.randn(5, 2, 8),)


@entry()
def regularised_loss() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        penalty = sum(p.square().sum() for p in model.parameters() if p.dim() > 1)
        return model(x).square().mean() + 0.01 * penalty

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once, self.twice, self.never = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.twice(torch.tanh(self.twice(self.once(x))))

    return Model(), loss, (torch.randn(5, 2, 8),)


@entry()
def functional_call_with_changed_weights() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        weights = {name: 1.5 * p for name, p in model.named_parameters()}
        return torch.func.functional_call(model, weights, (x,)).square().mean()

    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)), loss, (torch.randn(5, 2, 8),)


@entry()
def inference_mode_inside() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                teacher = self.body(2 * x)
            return self.out(torch.tanh(self.body(x)) - teacher.clone())

    return Model(), mean_square, (torch.randn(5, 2, 8),)


@entry()
def forward_called_directly() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.inner.forward(x)))  # no hook fires

    return Model(), mean_square, (torch.randn(5, 2, 8),)


@entry()
def activations_kept_on_the_host() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return model(x).square().mean()

    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    return model, loss, (torch.randn(5, 2, 8),)


@entry()
def buffer_is_replaced() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(8, 3)
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.steps = self.steps + 1
            return self.out(x) * self.steps

    return Model(), mean_square, (torch.randn(5, 8),)


@entry()
def frozen_layers() -> Built:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    return model, mean_square, (torch.randn(5, 8),)


@entry()
def instance_level_forward() -> Built:
    # As accelerate does it: the forward of one module is replaced on the instance.
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    original = model[0].forward
    model[0].forward = lambda x: original(x) * 2
    # A deep copy would keep calling the original; the zoo builds each model anew instead.
    return model, mean_square, (torch.randn(5, 8),)


@entry()
def compiled_submodule() -> Built:
    inner = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    return nn.Sequential(torch.compile(inner, backend="eager"), nn.Linear(8, 3)), mean_square, (torch.randn(5, 8),)


# Gradient checkpointing


class Checkpointed(nn.Module):
    """Blocks that are recomputed in the backward pass, and an output layer."""

    def __init__(
        self, blocks: list[nn.Module], out: nn.Module, *, reentrant: bool, front: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.front = nn.Identity() if front is None else front
        self.blocks, self.out, self.reentrant = nn.ModuleList(blocks), out, reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.out(x)


def in_place_blocks() -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Dropout(0.2)) for _ in range(2)]


@entry()
def checkpoint_linear_in_place() -> Built:
    model = Checkpointed(in_place_blocks(), nn.Linear(8, 3), reentrant=False)
    return model, mean_square, (torch.randn(5, 4, 8),)


@entry()
def checkpoint_conv_in_place() -> Built:
    blocks = [
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU6(inplace=True), nn.Conv2d(4, 2, 1)),
    ]
    out = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))
    return Checkpointed(blocks, out, reentrant=False), mean_square, (images(2, 6, 4),)


@entry()
def checkpoint_reentrant() -> Built:
    model = Checkpointed(in_place_blocks(), nn.Linear(8, 3), reentrant=True, front=nn.Linear(6, 8))
    return model, mean_square, (torch.randn(5, 4, 6),)


@entry()
def checkpoint_reentrant_behind_a_frozen_embedding() -> Built:
    # Nothing in front of the first block requires a gradient once the embedding is frozen.
    front = nn.Embedding(20, 8)
    front.weight.requires_grad_(False)
    model = Checkpointed(in_place_blocks(), nn.Linear(8, 3), reentrant=True, front=front)
    return model, mean_square, (tokens(2, 5, 20),)


@entry()
def checkpoint_within_checkpoint() -> Built:
    inner = Checkpointed(in_place_blocks(), nn.ReLU(inplace=True), reentrant=False)
    model = Checkpointed([inner, nn.Linear(8, 8)], nn.Linear(8, 3), reentrant=False, front=nn.Linear(6, 8))
    return model, mean_square, (torch.randn(5, 4, 6),)


@entry()
def checkpoint_selective() -> Built:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts as contexts

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Dropout(0.2))
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            kept = [torch.ops.aten.addmm.default]
            x = checkpoint(self.block, x, use_reentrant=False, context_fn=lambda: contexts(kept))
            return self.out(x)

    return Model(), mean_square, (torch.randn(5, 4, 8),)


@entry()
def checkpoint_reused_layer() -> Built:
    step = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    model = Checkpointed([step, step, step], nn.Linear(8, 3), reentrant=False, front=nn.Linear(6, 8))
    return model, mean_square, (torch.randn(5, 6),)


@entry()
def checkpoint_reentrant_reused_layer() -> Built:
    step = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    model = Checkpointed([step, step, step], nn.Linear(8, 3), reentrant=True, front=nn.Linear(6, 8))
    return model, mean_square, (torch.randn(5, 6),)


@entry()
def checkpoint_reentrant_functional() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.out = nn.Linear(8, 8), nn.Linear(8, 3)
            self.step = nn.Parameter(torch.randn(8, 8) / 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.front(x)
            for _ in range(3):
                x = checkpoint(lambda z: torch.tanh(F.linear(z, self.step)), x, use_reentrant=True)
            return self.out(x)

    return Model(), mean_square, (torch.randn(5, 8),)


# torch.nn's compound modules


@entry()
def multihead_attention() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.attention(x, x, x, need_weights=False)[0])

    return Model(), mean_square, (torch.randn(2, 5, 16),)


@entry()
def cross_attention_with_separate_projections() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(16, 4, kdim=8, vdim=6, batch_first=True), nn.Linear(16, 3)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.out(self.attention(q, k, v)[0])

    return Model(), mean_square, (torch.randn(2, 5, 16), torch.randn(2, 4, 8), torch.randn(2, 4, 6))


@entry()
def transformer_encoder_layer_in_train_mode() -> Built:
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), nn.Linear(16, 3))
    return model.train(), mean_square, (torch.randn(2, 5, 16),)


@entry()
def transformer_encoder_layer_in_eval_mode() -> Built:
    # Without gradients, this module would take a fused path around its submodules.
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), nn.Linear(16, 3))
    return model.eval().requires_grad_(False), mean_square, (torch.randn(2, 5, 16),)


class Recurrent(nn.Module):
    def __init__(self, cell: nn.Module, width: int) -> None:
        super().__init__()
        self.cell, self.out = cell, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x)[0])


@entry()
def lstm() -> Built:
    return (
        Recurrent(nn.LSTM(8, 6, num_layers=2, batch_first=True, proj_size=4), 4),
        mean_square,
        (torch.randn(2, 5, 8),),
    )


@entry()
def gru_bidirectional() -> Built:
    return Recurrent(nn.GRU(8, 6, bidirectional=True), 12), mean_square, (torch.randn(5, 2, 8),)


@entry()
def lstm_cell() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = nn.LSTMCell(8, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for step in x.unbind(1):
                state = self.cell(step, state)
            return self.out(state[0])

    return Model(), mean_square, (torch.randn(2, 4, 8),)


# Precisions


@entry(rounded=True)
def autocast_bfloat16() -> Built:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(x).to(x.dtype), y)

    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4))
    return model, loss, (torch.randn(50, 8), torch.randint(4, (50,)))


@entry(rounded=True)
def autocast_in_place() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float_power(2).mean()

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    return model, loss, (torch.randn(5, 4, 8),)


@entry(rounded=True)
def autocast_convolution_in_place() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float_power(2).mean()

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True))
    return model, loss, (images(),)


@entry(rounded=True)
def autocast_with_checkpoint() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).to(x.dtype).square().mean()

    return Checkpointed(in_place_blocks(), nn.Linear(8, 3), reentrant=False), loss, (torch.randn(5, 4, 8),)


@entry(rounded=True)
def autocast_reused_linear() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):  # keeps the rounded weight from one call to the next
            for _ in range(3):
                x = torch.tanh(model[0](x))
            return model[1](x).float_power(2).mean()

    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), loss, (torch.randn(20, 8),)


def in_precision(dtype: torch.dtype) -> Built:
    model = nn.Sequential(nn.Conv1d(5, 5, 3), nn.GELU(), nn.Linear(10, 16), nn.ReLU(inplace=True), nn.Linear(16, 4))
    return model.to(dtype), mean_square, (torch.randn(6, 5, 12).to(dtype),)


@entry(rounded=True)
def bfloat16_model() -> Built:
    return in_precision(torch.bfloat16)


@entry(rounded=True)
def float16_model() -> Built:
    return in_precision(torch.float16)


@entry()
def float64_model() -> Built:
    return in_precision(torch.float64)


@entry(rounded=True)
def mixed_precision_model() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out = nn.Linear(8, 16).bfloat16(), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.body(x.to(self.body.weight.dtype))).to(x.dtype))

    return Model(), mean_square, (torch.randn(5, 8),)


# transformers


def causal_lm(config_class: type, **options: object) -> nn.Module:
    model = transformers.AutoModelForCausalLM.from_config(config_class(vocab_size=100, use_cache=False, **options))
    return model.train()


def llama_model(**options: object) -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    return causal_lm(transformers.LlamaConfig, num_attention_heads=4, num_key_value_heads=2, **sizes, **options)


language_model = own_loss(input_ids=0, labels=0)


@entry()
def llama() -> Built:
    return llama_model(), language_model, (tokens(),)


@entry()
def llama_tied() -> Built:
    return llama_model(tie_word_embeddings=True), language_model, (tokens(),)


@entry()
def llama_checkpointed() -> Built:
    model = llama_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, language_model, (tokens(),)


@entry()
def llama_checkpointed_reentrant() -> Built:
    model = llama_model()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    return model, language_model, (tokens(),)


@entry()
def llama_with_padding() -> Built:
    def loss(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss

    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return llama_model(), loss, (tokens(), mask)


@entry()
def llama_lora() -> Built:
    import peft

    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, lora_dropout=0.1, init_lora_weights=False)
    return peft.get_peft_model(llama_model(), config), language_model, (tokens(),)


@entry()
def llama_fresh_lora() -> Built:
    # Half of a fresh adapter is zero: a gradient without a weight to measure it by, and none at all for its partner.
    import peft

    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2)
    return peft.get_peft_model(llama_model(), config), language_model, (tokens(),)


@entry()
def gpt2() -> Built:
    model = causal_lm(transformers.GPT2Config, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    return model, language_model, (tokens(),)


@entry()
def mixtral() -> Built:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "num_local_experts": 4}
    model = causal_lm(transformers.MixtralConfig, num_attention_heads=4, num_key_value_heads=2, **sizes)
    return model, language_model, (tokens(),)


@entry()
def experts_of_which_one_gets_no_token() -> Built:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(8, 3)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.out = nn.Linear(8, 3)
            with torch.no_grad():
                self.router.bias[1] = -100.0

        def forward(self, x: Tensor) -> Tensor:
            weights, chosen = self.router(x).softmax(-1).max(-1)
            y = torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                rows = (chosen == number).nonzero().squeeze(-1)
                if len(rows):
                    y = y.index_add(0, rows, torch.tanh(expert(x[rows])) * weights[rows, None])
            return self.out(y)

    return Mixture(), mean_square, (torch.randn(9, 8),)


@entry()
def expert_called_without_tokens() -> Built:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.out = nn.ModuleList(nn.Linear(8, 8) for _ in range(2)), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.cat([torch.tanh(self.experts[0](x)), self.experts[1](x[:0])]))

    return Mixture(), mean_square, (torch.randn(9, 8),)


@entry()
def t5() -> Built:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=100, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).train(), own_loss(input_ids=0, labels=0), (tokens(),)


def encoder_sizes() -> dict[str, int]:
    return {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "num_labels": 3,
    }


text_classes = own_loss(input_ids=0, labels=1)
image_classes = own_loss(pixel_values=0, labels=1)


@entry()
def bert_in_eval_mode() -> Built:
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=100, **encoder_sizes()))
    return model.eval(), text_classes, (tokens(), torch.tensor([0, 1, 2]))


@entry()
def bert_in_train_mode() -> Built:
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=100, **encoder_sizes()))
    return model.train(), text_classes, (tokens(), torch.tensor([0, 1, 2]))


@entry()
def albert() -> Built:
    config = transformers.AlbertConfig(vocab_size=100, embedding_size=16, **encoder_sizes())
    model = transformers.AlbertForSequenceClassification(config)
    return model.train(), text_classes, (tokens(), torch.tensor([0, 1, 2]))


@entry()
def vit() -> Built:
    config = transformers.ViTConfig(image_size=16, patch_size=8, **encoder_sizes())
    return transformers.ViTForImageClassification(config).train(), image_classes, (images(2, 16), torch.tensor([0, 1]))


@entry()
def resnet() -> Built:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_labels=3)
    return (
        transformers.ResNetForImageClassification(config).train(),
        image_classes,
        (images(2, 32), torch.tensor([0, 1])),
    )


def awakened(model: nn.Module) -> nn.Module:
    """`model` with weights that keep the signal alive: the default ones of transformers let it die in a few blocks."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return model


@entry()
def mobilenet_v2() -> Built:
    config = transformers.MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=3)
    model = awakened(transformers.MobileNetV2ForImageClassification(config)).eval()
    return model, image_classes, (images(2, 32), torch.tensor([0, 1]))


@entry()
def efficientnet() -> Built:
    config = transformers.EfficientNetConfig(
        width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320, image_size=64, num_labels=3
    )
    model = awakened(transformers.EfficientNetForImageClassification(config)).train()
    return model, image_classes, (images(4, 64), torch.tensor([0, 1, 2, 0]))


# The other kinds of trap are in modules of their own, which register themselves.
import zoo_architectures  # noqa: E402, F401
import zoo_foreign_weights  # noqa: E402, F401
import zoo_implicit  # noqa: E402, F401
import zoo_objectives  # noqa: E402, F401
import zoo_patched  # noqa: E402, F401
import zoo_physics  # noqa: E402, F401
import zoo_recomputation  # noqa: E402, F401
import zoo_saved_tensors  # noqa: E402, F401
import zoo_sequences  # noqa: E402, F401
import zoo_training_loops  # noqa: E402, F401
import zoo_weight_losses  # noqa: E402, F401
import zoo_writes  # noqa: E402, F401
