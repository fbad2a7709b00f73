"""Modules called with weights that are not their own: functional_call, hypernetworks, ensembles, exchanged weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from zoo_registry import Built, entry, mean_square, noise_like


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def teacher_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: 0.9 * p.detach() + 0.05 for name, p in model.named_parameters()}


@entry()
def teacher_called_functionally() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        target = functional_call(model, teacher_of(model), (x,))  # a graph, but none of its leaves is a weight
        return (model(x) - target).square().mean()

    return small(), loss, (torch.randn(5, 8),)


@entry()
def teacher_without_grad() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = functional_call(model, teacher_of(model), (x + 0.1,))
        return (model(x) - target).square().mean()

    return small(), loss, (torch.randn(5, 3, 8),)


@entry()
def teacher_that_judges_what_another_layer_made() -> Built:
    # Gradients flow through the teacher's layers to the generator, and stop at none of its weights.
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator, self.judge = nn.Linear(8, 8), small()

        def forward(self, x: Tensor) -> Tensor:
            made = torch.tanh(self.generator(x))
            return functional_call(self.judge, teacher_of(self.judge), (made,)) + self.judge(made.detach()).square()

    return Model(), mean_square, (torch.randn(5, 8),)


@entry()
def judge_whose_weights_get_no_gradient() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator, self.second, self.judge = nn.Linear(8, 8), nn.Linear(8, 8), small()

        def forward(self, x: Tensor) -> Tensor:
            made = torch.tanh(self.second(torch.tanh(self.generator(x))))
            return functional_call(self.judge, teacher_of(self.judge), (made,))

    return Model(), mean_square, (torch.randn(5, 8),)


def adapted(model: nn.Module, weights: dict[str, Tensor], x: Tensor, *, second_order: bool) -> dict[str, Tensor]:
    inner = functional_call(model, weights, (x,)).square().mean()
    slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=second_order)
    return {name: w - 0.3 * g for (name, w), g in zip(weights.items(), slopes, strict=True)}


def outer(model: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    return (functional_call(model, weights, (x,)) - 1).square().mean()


@entry()
def maml_of_second_order() -> Built:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        weights = dict(model.named_parameters())
        for _ in range(2):
            weights = adapted(model, weights, x, second_order=True)
        return outer(model, weights, y)

    return small(), loss, (torch.randn(5, 8), torch.randn(5, 8))


@entry()
def maml_of_first_order() -> Built:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        weights = dict(model.named_parameters())
        for _ in range(2):
            weights = adapted(model, weights, x, second_order=False)
        return outer(model, weights, y)

    return small(), loss, (torch.randn(5, 8), torch.randn(5, 8))


@entry()
def maml_of_several_tasks() -> Built:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        weights = dict(model.named_parameters())
        tasks = [adapted(model, weights, task, second_order=True) for task in x.unbind()]
        return sum(outer(model, w, y) for w in tasks) + outer(model, weights, y)

    return small(), loss, (torch.randn(3, 5, 8), torch.randn(5, 8))


@entry()
def maml_of_the_last_layer() -> Built:
    # ANIL: the body is called as it is, only the head with other weights.
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = (
                nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh()),
                nn.Linear(6, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            features = self.body(x)
            weights = adapted(self.head, dict(self.head.named_parameters()), features, second_order=True)
            return functional_call(self.head, weights, (features,))

    return Model(), mean_square, (torch.randn(5, 8),)


@entry()
def first_order_from_detached_weights() -> Built:
    # The adapted weights are leaves of their own: the loss after adaptation gives no gradient to the model.
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        weights = adapted(model, weights, x, second_order=False)
        return outer(model, weights, y) + model(x).square().mean()

    return small(), loss, (torch.randn(5, 8), torch.randn(5, 8))


class Hypernetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front, self.target = nn.Linear(8, 6), nn.Linear(6, 4)
        self.code = nn.Parameter(torch.randn(5))
        self.hyper = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 24))
        self.out = nn.Linear(4, 3)

    def generated(self) -> Tensor:
        return self.hyper(self.code).view(4, 6) / 3


@entry()
def hypernetwork_by_functional_call() -> Built:
    class Model(Hypernetwork):
        def forward(self, x: Tensor) -> Tensor:
            y = functional_call(self.target, {"weight": self.generated()}, (torch.tanh(self.front(x)),))
            return self.out(y)

    return Model(), mean_square, (torch.randn(5, 8),)


@entry()
def hypernetwork_that_adds_to_the_weight() -> Built:
    class Model(Hypernetwork):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.target.weight + self.generated()
            return self.out(functional_call(self.target, {"weight": weight}, (torch.tanh(self.front(x)),)))

    return Model(), mean_square, (torch.randn(5, 3, 8),)


@entry()
def hypernetwork_whose_target_has_no_weight() -> Built:
    class Model(Hypernetwork):
        def __init__(self) -> None:
            super().__init__()
            del self.target.weight
            self.target.weight = torch.zeros(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            self.target.weight = self.generated()
            return self.out(self.target(torch.tanh(self.front(x))))

    return Model(), mean_square, (torch.randn(5, 8),)


@entry()
def weight_replaced_within_forward() -> Built:
    class Model(Hypernetwork):
        def forward(self, x: Tensor) -> Tensor:
            generated = self.generated()
            own = self.target._parameters.pop("weight")
            self.target.weight = 0.5 * own.detach() + generated
            try:
                y = self.target(torch.tanh(self.front(x)))
            finally:
                del self.target.weight
                self.target.weight = own
            return self.out(y + self.target(x[:, :6]))

    return Model(), mean_square, (torch.randn(5, 8),)


@entry()
def weight_of_another_module() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = functional_call(self.b, {"weight": self.a.weight}, (torch.tanh(self.a(x)),))
            return self.out(y + self.b(x))

    return Model(), mean_square, (torch.randn(5, 8),)


@entry()
def weights_of_two_modules_exchanged() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def exchange(self) -> None:
            self.a._parameters["weight"], self.b._parameters["weight"] = self.b.weight, self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            self.exchange()
            try:
                return self.out(self.b(torch.tanh(self.a(x))))
            finally:
                self.exchange()

    return Model(), mean_square, (torch.randn(5, 8),)


@entry()
def task_vectors() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = small()
            self.scales = nn.Parameter(torch.tensor([0.5, -0.3]))
            self.register_buffer("delta", 0.1 * torch.randn(2, sum(p.numel() for p in self.base.parameters())))

        def forward(self, x: Tensor) -> Tensor:
            parts = (self.scales @ self.delta).split([p.numel() for p in self.base.parameters()])
            weights = {n: p + d.view_as(p) for (n, p), d in zip(self.base.named_parameters(), parts, strict=True)}
            return functional_call(self.base, weights, (x,))

    return Model(), mean_square, (torch.randn(5, 8),)


@entry()
def noisy_weights() -> Built:
    # Bayes by backprop: a sample of the weights in each pass.
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        samples = [{n: p * (1 + 0.1 * noise_like(p)) for n, p in model.named_parameters()} for _ in range(2)]
        return sum(functional_call(model, weights, (x,)).square().mean() for weights in samples)

    return small(), loss, (torch.randn(5, 8),)


@entry()
def dropped_weights() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        weights = {n: F.dropout(p, 0.3) if p.dim() > 1 else p for n, p in model.named_parameters()}
        return functional_call(model, weights, (x,)).square().mean()

    return small(), loss, (torch.randn(5, 8),)


@entry()
def weights_rounded_straight_through() -> Built:
    # Quantisation-aware training by functional_call: the gradient passes as if nothing were rounded.
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        weights = {n: p + ((p * 16).round() / 16 - p).detach() for n, p in model.named_parameters()}
        return functional_call(model, weights, (x,)).square().mean()

    return small(), loss, (torch.randn(5, 8),)


def stacked(members: nn.ModuleList) -> dict[str, Tensor]:
    return {
        name: torch.stack([dict(m.named_parameters())[name] for m in members])
        for name, _ in members[0].named_parameters()
    }


class Ensemble(nn.Module):
    def __init__(self, call: Callable[[nn.ModuleList, Tensor], Tensor]) -> None:
        super().__init__()
        self.front, self.out = nn.Linear(8, 8), nn.Linear(3, 3)
        self.members = nn.ModuleList(small() for _ in range(3))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.call(self.members, torch.tanh(self.front(x))).mean(0))


IN_VMAP = {f"members.0.{i}": ("act_mean", "act_std", "act_abs_mean", "act_abs_std") for i in (0, 2, 4)}


@entry(undefined=dict.fromkeys(IN_VMAP, ("fisher",)), optional=IN_VMAP)
def ensemble_by_vmap() -> Built:
    def call(members: nn.ModuleList, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda weights: functional_call(members[0], weights, (x,)))(stacked(members))

    return Ensemble(call), mean_square, (torch.randn(5, 8),)


@entry()
def ensemble_by_calls() -> Built:
    def call(members: nn.ModuleList, x: Tensor) -> Tensor:
        weights = stacked(members)
        return torch.stack([functional_call(members[0], {n: w[i] for n, w in weights.items()}, (x,)) for i in range(3)])

    return Ensemble(call), mean_square, (torch.randn(5, 8),)


@entry()
def average_of_weights() -> Built:
    def call(members: nn.ModuleList, x: Tensor) -> Tensor:
        weights = {n: w.mean(0) for n, w in stacked(members).items()}
        return functional_call(members[1], weights, (x,))[None]

    return Ensemble(call), mean_square, (torch.randn(5, 8),)


@entry()
def lora_by_functional_call() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = small()
            self.down, self.up = nn.Parameter(torch.randn(2, 6) / 3), nn.Parameter(torch.randn(6, 2) / 3)

        def forward(self, x: Tensor) -> Tensor:
            return functional_call(self.base, {"2.weight": self.base[2].weight + self.up @ self.down}, (x,))

    return Model(), mean_square, (torch.randn(5, 8),)


@entry()
def reparametrised_old_style() -> Built:
    # torch.nn.utils.stateless is the ancestor of functional_call, and ties weights of one name.
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        weights = {"0.weight": model[0].weight.sin(), "2.bias": model[2].bias * 2}
        return torch.func.functional_call(model, weights, (x,), tie_weights=True, strict=False).square().mean()

    model = small()
    model[0] = nn.Linear(8, 6)
    return model, loss, (torch.randn(5, 8),)
