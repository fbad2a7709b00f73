"""Losses that differentiate weights, or look at them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from zoo_registry import Built, entry, images, noise_like


def net(*, norm: bool = False) -> nn.Sequential:
    middle = nn.LayerNorm(6) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), middle, nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def grad(loss: Tensor, inputs: list[Tensor], **options: object) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, create_graph=True, **options)


@entry()
def penalty_on_the_gradient_of_every_parameter() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        value = model(x).square().mean()
        return value + 0.1 * sum(g.square().sum() for g in grad(value, list(model.parameters())))

    return net(norm=True), loss, (torch.randn(5, 8),)


@entry()
def penalty_on_the_gradient_of_the_matrices() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        value = model(x).square().mean()
        matrices = [p for p in model.parameters() if p.dim() > 1]
        return value + 0.1 * sum(g.square().sum() for g in grad(value, matrices))

    return net(), loss, (torch.randn(5, 3, 8),)


@entry()
def penalty_on_the_gradient_of_a_convolution() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        value = model(x).square().mean()
        return value + grad(value, [model[0].weight])[0].square().sum()

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    return model, loss, (images(2),)


@entry()
def gradients_of_unused_parameters() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.idle = net(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        value = model(x).square().mean()
        slopes = grad(value, list(model.parameters()), allow_unused=True)
        return value + 0.1 * sum(g.square().sum() for g in slopes if g is not None)

    return Model(), loss, (torch.randn(5, 8),)


class TwoTasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6))
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.tanh(self.shared(x))
        return self.first(features).square().mean(), self.second(features).cos().mean()


@entry()
def gradnorm() -> Built:
    class Model(TwoTasks):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.tensor([1.0, 0.7]))

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        tasks = [w * task for w, task in zip(model.weights, model(x), strict=True)]
        norms = torch.stack([grad(task, [model.shared[2].weight])[0].norm() for task in tasks])
        return sum(tasks) + (norms - norms.mean().detach()).abs().sum()

    return Model(), loss, (torch.randn(5, 8),)


@entry()
def adaptive_weight_of_vqgan() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        first, second = model(x)
        last = model.shared[2].weight
        a, b = (torch.autograd.grad(task, last, retain_graph=True)[0] for task in (first, second))
        return first + (a.norm() / (b.norm() + 1e-4)).clamp(0, 1e4).detach() * second

    return TwoTasks(), loss, (torch.randn(5, 8),)


@entry()
def adaptive_weight_of_every_shared_parameter() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        first, second = model(x)
        shared = list(model.shared.parameters())
        a, b = (torch.autograd.grad(task, shared, retain_graph=True) for task in (first, second))
        dot = sum((p * q).sum() for p, q in zip(a, b, strict=True))
        return first + (1 + dot).clamp(min=0).detach() * second  # conflicting gradients count less

    return TwoTasks(), loss, (torch.randn(5, 3, 8),)


@entry()
def agreement_of_two_gradients() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        first, second = model(x)
        weights = [model.shared[0].weight, model.shared[2].weight]
        a, b = grad(first, weights), grad(second, weights)
        return first + second - 0.1 * sum((p * q).sum() for p, q in zip(a, b, strict=True))

    return TwoTasks(), loss, (torch.randn(5, 8),)


@entry()
def decay_of_what_requires_grad() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean() + 0.1 * sum(p.square().sum() for p in model.parameters() if p.requires_grad)

    return net(norm=True), loss, (torch.randn(5, 8),)


@entry()
def loss_of_the_share_that_requires_grad() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        share = sum(p.requires_grad for p in model.parameters()) / sum(1 for _ in model.parameters())
        return share * model(x).square().mean()

    return net(), loss, (torch.randn(5, 8),)


@entry()
def elastic_weights() -> Built:
    # EWC with a Fisher information that is taken on the spot.
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        parameters = list(model.parameters())
        importance = [g.square() for g in torch.autograd.grad(model(x).cos().mean(), parameters)]
        anchored = sum((f * (p - 0.1).square()).sum() for f, p in zip(importance, parameters, strict=True))
        return model(x).square().mean() + anchored

    return net(), loss, (torch.randn(5, 8),)


@entry()
def trace_of_the_hessian() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        value = model(x).square().mean()
        weights = list(model.parameters())
        slopes = grad(value, weights)
        v = [noise_like(p).sign() for p in weights]
        products = grad(sum((g * u).sum() for g, u in zip(slopes, v, strict=True)), weights)
        return value + 0.01 * sum((h * u).sum() for h, u in zip(products, v, strict=True))

    return net(), loss, (torch.randn(5, 8),)


@entry()
def distilled_data() -> Built:
    # The gradient on learned images is to match that on real ones; the images are part of the model.
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.images, self.body = nn.Parameter(torch.randn(4, 8)), net()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).square().mean()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        weights = list(model.body.parameters())
        real = [g.detach() for g in torch.autograd.grad(model(x), weights)]
        made = grad(model(model.images), weights)
        return sum((a - b).square().sum() for a, b in zip(real, made, strict=True))

    return Model(), loss, (torch.randn(5, 8),)


@entry()
def learned_learning_rates() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()
            self.rates = nn.ParameterList(torch.full_like(p, 0.1) for p in self.body.parameters())

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        named = dict(model.body.named_parameters())
        slopes = grad(model(x).square().mean(), list(named.values()))
        fast = {n: p - r * g for (n, p), r, g in zip(named.items(), model.rates, slopes, strict=True)}
        return functional_call(model.body, fast, (y,)).square().mean()

    return Model(), loss, (torch.randn(5, 8), torch.randn(5, 8))


@entry()
def meta_weighted_samples() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.weigher = net(), nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        each = model(x).square().mean(-1, keepdim=True)
        weighted = (torch.sigmoid(model.weigher(each.detach())) * each).mean()
        named = dict(model.body.named_parameters())
        slopes = grad(weighted, list(named.values()))
        fast = {n: p - 0.3 * g for (n, p), g in zip(named.items(), slopes, strict=True)}
        return functional_call(model.body, fast, (y,)).square().mean()

    return Model(), loss, (torch.randn(5, 8), torch.randn(5, 8))


@entry()
def orthogonal_weights() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
        gram = sum((w @ w.t() - torch.eye(len(w), dtype=w.dtype)).square().sum() for w in matrices)
        return model(x).square().mean() + 0.01 * gram + 0.01 * torch.linalg.matrix_norm(matrices[0], 2)

    return net(), loss, (torch.randn(5, 8),)


@entry()
def lipschitz_product() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        bound = torch.stack([m.weight.abs().sum(1).amax() for m in model.modules() if isinstance(m, nn.Linear)])
        return F.smooth_l1_loss(model(x), x[:, :3]) + 0.01 * bound.log().sum()

    return net(), loss, (torch.randn(5, 8),)


@entry()
def gradient_taken_before_and_thrown_away() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        value = model(x).square().mean()
        norm = sum(g.square().sum() for g in torch.autograd.grad(value, list(model.parameters()), retain_graph=True))
        return value / (1 + norm.detach().sqrt())  # a normalised loss

    return net(norm=True), loss, (torch.randn(5, 3, 8),)


@entry()
def backward_within_the_loss() -> Built:
    # An inner backward() leaves gradients on the input and is otherwise thrown away.
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        model(x).square().mean().backward(inputs=[x])
        return model((x + 0.1 * x.grad).detach()).square().mean()

    return net(), loss, (torch.randn(5, 8),)
