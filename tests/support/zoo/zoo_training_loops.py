"""Losses as training loops write them: copies of the model, inner steps, hooks on the fly, flags that are looked at."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_registry import Built, entry, images, mean_square


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


@entry()
def target_network_as_a_copy() -> Built:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        target = copy.deepcopy(model)
        with torch.no_grad():
            goal = target(y).amax(-1, keepdim=True)
        return F.smooth_l1_loss(model(x), 0.9 * goal.expand(-1, 3))

    return net(), loss, (torch.randn(5, 8), torch.randn(5, 8))


@entry()
def copy_that_is_trained_for_a_step() -> Built:
    # FOMAML by copies: the copy has gradients and an optimizer of its own.
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        fast = copy.deepcopy(model)
        optimizer = torch.optim.SGD(fast.parameters(), lr=0.5)
        fast(x).square().mean().backward()
        optimizer.step()
        return (model(y) - fast(y).detach()).square().mean()

    return net(), loss, (torch.randn(5, 8), torch.randn(5, 8))


@entry()
def copies_whose_gradients_weigh_the_loss() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        fast = copy.deepcopy(model)
        fast(2 * x).square().mean().backward()
        steepness = sum(p.grad.square().sum() for p in fast.parameters())
        return model(x).square().mean() * (1 + steepness)

    return net(), loss, (torch.randn(5, 3, 8),)


@entry()
def copy_of_a_convolutional_net() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = copy.deepcopy(model).eval()(x)
        return F.mse_loss(model(x.flip(-1)), target)

    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 3))
    return nn.Sequential(*layers).train(), loss, (images(),)


@entry()
def gradients_cleared_within_the_loss() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        model.zero_grad()
        for p in model.parameters():
            p.grad = None
        return model(x).square().mean()

    return net(), loss, (torch.randn(5, 8),)


@entry()
def micro_batches() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return sum(model(part).square().mean() for part in x.split([2, 3, 1])) / 3

    layers = (nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    return nn.Sequential(*layers), loss, (torch.randn(6, 8),)


@entry()
def hook_on_the_accumulator() -> Built:
    # As gradient scaling and communication libraries do it: a hook where the gradient is added to .grad.
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.out = nn.Linear(8, 6), nn.Linear(6, 3)
            self.accumulator = self.handle = None

        def forward(self, x: Tensor) -> Tensor:
            if self.handle is not None:
                self.handle.remove()
            weight = self.layer.weight
            self.accumulator = weight.view_as(weight).grad_fn.next_functions[0][0]
            self.handle = self.accumulator.register_prehook(lambda grads: (2 * grads[0],))
            return self.out(torch.tanh(self.layer(x)))

    return Model(), mean_square, (torch.randn(5, 8),)


class LooksAtFlags(nn.Module):
    def __init__(self, flag: str) -> None:
        super().__init__()
        self.layer, self.norm, self.out = nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.flag = flag

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.norm(self.layer(x)))
        return self.out(2 * y if self.get_parameter(self.flag).requires_grad else y)


@entry()
def forward_that_looks_at_a_bias() -> Built:
    return LooksAtFlags("layer.bias"), mean_square, (torch.randn(5, 8),)


@entry()
def forward_that_looks_at_a_norm() -> Built:
    return LooksAtFlags("norm.weight"), mean_square, (torch.randn(5, 8),)


@entry()
def hook_that_looks_at_the_weight_of_its_layer() -> Built:
    model = net()
    model[2].register_forward_hook(lambda module, args, y: 2 * y if module.weight.requires_grad else y)
    model[4].register_forward_pre_hook(lambda module, args: (args[0] * 2,) if module.weight.requires_grad else None)
    return model, mean_square, (torch.randn(5, 8),)


@entry()
def hook_of_the_user_in_front_of_every_other() -> Built:
    # It comes late and goes first, and puts another tensor in the place of the output.
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        handle = model[2].register_forward_hook(lambda module, args, y: 1.5 * y.clone(), prepend=True)
        try:
            return model(x).square().mean()
        finally:
            handle.remove()

    return net(), loss, (torch.randn(5, 8),)


@entry()
def requires_grad_of_layers_by_turns() -> Built:
    # Cyclic freezing within the pass: only the second of two uses of a layer counts.
    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            for on, off in ((self.a, self.b), (self.b, self.a)):
                on.requires_grad_(True)
                off.requires_grad_(False)
                x = torch.tanh(self.b(torch.tanh(self.a(x))))
            self.requires_grad_(True)
            return self.out(x)

    return Turns(), mean_square, (torch.randn(5, 8),)
