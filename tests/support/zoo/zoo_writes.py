"""Forward passes that write: parameters, their data, outputs behind autograd's back, their own attributes.

Where a pass writes a weight, the table is about the weight that the backward pass found; afterwards the model is as it
was handed over.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo_registry import Built, entry, images, mean_square, noise_like, tokens


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


class Momentum(nn.Module):
    """MoCo: before each pass the second encoder moves towards the first one."""

    def __init__(self, *, through_data: bool) -> None:
        super().__init__()
        self.query, self.predictor = net(), nn.Linear(3, 3)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.through_data = through_data
        with torch.no_grad():
            for p in self.key.parameters():
                p.mul_(0.5)

    def move(self) -> None:
        for p, q in zip(self.key.parameters(), self.query.parameters(), strict=True):
            if self.through_data:
                p.data = 0.9 * p.data + 0.1 * q.data
            else:
                p.mul_(0.9).add_(q, alpha=0.1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            self.move()
            keys = self.key(y)
        return F.normalize(self.predictor(self.query(x)), dim=-1) - F.normalize(keys, dim=-1)


@entry()
def momentum_encoder() -> Built:
    return Momentum(through_data=False), mean_square, (torch.randn(5, 8), torch.randn(5, 8))


@entry()
def momentum_encoder_with_new_storage() -> Built:
    return Momentum(through_data=True), mean_square, (torch.randn(5, 8), torch.randn(5, 8))


@entry(layers=("0", "2"))
def embedding_with_a_largest_norm() -> Built:
    return (
        nn.Sequential(nn.Embedding(20, 8, max_norm=1.0), nn.Tanh(), nn.Linear(8, 3)),
        mean_square,
        (tokens(2, 5, 20),),
    )


@entry()
def embedding_with_a_largest_norm_unprofiled() -> Built:
    return (
        nn.Sequential(nn.Embedding(20, 8, max_norm=1.0), nn.Tanh(), nn.Linear(8, 3)),
        mean_square,
        (tokens(2, 5, 20),),
    )


class Clipped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.2, 0.2)
        return super().forward(x)


@entry()
def weights_clipped_before_use() -> Built:
    return nn.Sequential(Clipped(8, 6), nn.Tanh(), Clipped(6, 6), nn.Linear(6, 3)), mean_square, (torch.randn(5, 8),)


@entry()
def weights_clipped_by_a_pre_hook() -> Built:
    # As WGAN's critics and max-norm constraints do it, through .data.
    model = net()
    for layer in (model[0], model[2]):
        layer.register_forward_pre_hook(_renormalise)
    return model, mean_square, (torch.randn(5, 3, 8),)


def _renormalise(module: nn.Module, args: tuple) -> None:
    module.weight.data.renorm_(2, 0, 0.5)


@entry()
def weights_cut_in_half_after_use() -> Built:
    # The output layer's weight is not needed for the gradient of what is in front, which is a constant.
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.out = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            self.first.weight.data.mul_(0.5)
            return self.out(torch.tanh(y))

    return Model(), mean_square, (torch.randn(5, 8),)


@entry()
def sharpness_aware_loss() -> Built:
    # SAM: the weights are moved along the gradient, and back.
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        weights = [p for p in model.parameters() if p.dim() > 1]
        slopes = torch.autograd.grad(model(x).square().mean(), weights)
        for p, g in zip(weights, slopes, strict=True):
            p.data += 0.05 * g / (g.norm() + 1e-12)
        return model(x).square().mean()

    return net(), loss, (torch.randn(5, 8),)


@entry()
def noise_added_to_the_data_of_weights() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        for p in model.parameters():
            p.data = p.data + 0.05 * noise_like(p)
        return model(x).square().mean()

    return net(), loss, (torch.randn(5, 8),)


class ClampedBehind(nn.Module):
    """Changes an output behind autograd's back: the gradient is that of the unchanged function."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.front, self.layer, self.out = nn.Linear(8, 6), layer, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(torch.tanh(self.front(x)))
        y.data.clamp_(-0.3, 0.3)
        return self.out(y)


@entry()
def output_clamped_through_its_data() -> Built:
    return ClampedBehind(nn.Linear(6, 6)), mean_square, (torch.randn(5, 8),)


@entry()
def output_on_sequences_clamped_through_its_data() -> Built:
    return ClampedBehind(nn.Linear(6, 6)), mean_square, (torch.randn(5, 3, 8),)


@entry()
def output_of_a_convolution_clamped_through_its_data() -> Built:
    return ClampedBehind(nn.Conv1d(3, 3, 3, padding=1)), mean_square, (torch.randn(5, 3, 8),)


@entry()
def input_overwritten_through_its_data() -> Built:
    # What the layer was given is not what the backward pass finds; autograd takes what it finds.
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.out = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = torch.tanh(self.layer(x))
            x.data.mul_(0.5)
            return self.out(y)

    return Model(), mean_square, (torch.randn(5, 8),)


@entry()
def transposed_convolution_then_in_place() -> Built:
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 4, 2), nn.ReLU(inplace=True), nn.ConvTranspose2d(4, 4, 2), nn.LeakyReLU(0.1, inplace=True)
    )
    return model.append(nn.Flatten()).append(nn.Linear(400, 3)), mean_square, (images(),)


@entry()
def bilinear_then_in_place() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.out = nn.Bilinear(4, 5, 6), nn.Linear(6, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.out(self.pair(a, b).mul_(0.5).relu_())

    return Model(), mean_square, (torch.randn(3, 2, 4), torch.randn(3, 2, 5))


@entry()
def output_normalised_in_place() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            y -= y.mean(-1, keepdim=True)
            y /= y.detach().norm(dim=-1, keepdim=True) + 1
            y[:, 0] = 0
            return self.out(y)

    return Model(), mean_square, (torch.randn(5, 3, 8),)


@entry()
def outputs_written_into_one_tensor() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            states = torch.zeros(4, *x.shape, dtype=x.dtype)
            for t in range(4):
                x = torch.tanh(self.step(x))
                states[t] = x
            states[1:].mul_(0.5)
            return self.out(states)

    return Model(), mean_square, (torch.randn(5, 8),)


@entry()
def zero_grad_and_modes_within_forward() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.dropout, self.out = nn.Linear(8, 6), nn.Dropout(0.5), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.eval()
            calm = self.dropout(self.body(x))
            self.train()
            return self.out(torch.tanh(calm + self.dropout(self.body(x))))

    return Model(), mean_square, (torch.randn(5, 8),)


@entry()
def zero_or_several_calls_with_and_without_grad() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            _never, once, mixed, thrice = self.layers
            with torch.no_grad():
                x = x + mixed(x)
                thrice(x)
            y = once(x)
            with torch.set_grad_enabled(False):
                gate = torch.sigmoid(mixed(y))
                with torch.enable_grad():
                    y = torch.tanh(mixed(y)) * gate
            for _ in range(2):
                y = torch.tanh(thrice(y))
            return self.out(y + thrice(x[:0]).sum())

    return Model(), mean_square, (torch.randn(5, 8),)


@entry()
def checkpoints_three_deep_with_dropout() -> Built:
    class Deep(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.layer, self.dropout = nn.Linear(8, 8), nn.Dropout(0.3)
            self.inner = Deep(depth - 1) if depth else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            x = self.dropout(self.layer(x)).relu_()
            return checkpoint(self.inner, x, use_reentrant=False) if not isinstance(self.inner, nn.Identity) else x

    return nn.Sequential(Deep(3), nn.Linear(8, 3)).train(), mean_square, (torch.randn(5, 4, 8),)


@entry()
def checkpoints_of_both_kinds_within_each_other() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.a, self.b, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def inner(self, x: Tensor) -> Tensor:
            return F.dropout(self.b(x), 0.2).relu_()

        def middle(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, torch.tanh(self.a(x)), use_reentrant=False) + x

        def forward(self, x: Tensor) -> Tensor:
            return self.out(checkpoint(self.middle, self.front(x), use_reentrant=True))

    return Model(), mean_square, (torch.randn(5, 4, 8),)


@entry(refusal="thread")
def one_linear_in_several_threads() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.shared, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            parts = torch.tanh(self.front(x)).chunk(6)
            with ThreadPoolExecutor(3) as pool:
                return self.out(torch.cat([y.relu_() for y in pool.map(self.shared, parts)]))

    return Model(), mean_square, (torch.randn(30, 8),)


@entry(refusal="thread")
def a_layer_for_each_thread() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.out = nn.Linear(8, 8), nn.Linear(8, 3)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.front(x))
            with ThreadPoolExecutor(3) as pool:
                futures = [pool.submit(expert, x) for expert in self.experts]
            return self.out(torch.tanh(sum(future.result() for future in futures)))

    return Model(), mean_square, (torch.randn(5, 8),)


@entry(refusal="thread")
def layers_in_forked_tasks() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            tasks = [torch.jit.fork(layer, x) for layer in (self.left, self.right, self.left)]
            return self.out(torch.tanh(sum(torch.jit.wait(task) for task in tasks)))

    return Model(), mean_square, (torch.randn(5, 8),)
