"""Models whose backward computes parts of the forward pass again: own checkpoints and reversible blocks.

`torch.autograd.backward` inside a backward is how reentrant checkpointing works: gradients that pass through layers
there are those of the loss, other than with `torch.autograd.grad`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from zoo_implicit import FISHER, INNER, Adjoint, Solved, euler, field_of
from zoo_registry import Built, entry, mean_square


class Reentrant(torch.autograd.Function):
    """Reentrant checkpointing in a few lines: weights are not among the inputs, a nested backward reaches them."""

    @staticmethod
    def forward(ctx, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = ctx.run(x)
        torch.autograd.backward(y, g)
        return None, x.grad


@entry()
def nested_backward() -> Built:
    return Solved(field_of(), Reentrant.apply), mean_square, (torch.randn(5, 3, 8),)


@entry()
def nested_backward_two_deep() -> Built:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, z: Tensor) -> Tensor:
            return self.third(Reentrant.apply(lambda u: torch.tanh(self.second(u)), torch.tanh(self.first(z))))

    return Solved(Twice(), Reentrant.apply), mean_square, (torch.randn(5, 8),)


@entry(undefined=INNER)
def adjoint_within_a_nested_backward() -> Built:
    def solve(field: nn.Module, z: Tensor) -> Tensor:
        return Reentrant.apply(lambda u: Adjoint.apply(euler, field, 2, u, *field.parameters()), z)

    return Solved(field_of(bias=False), solve), mean_square, (torch.randn(5, 8),)


class Reversible(torch.autograd.Function):
    """y1 = x1 + f(x2), y2 = x2 + g(y1): inputs are had again from outputs, so that none is kept."""

    @staticmethod
    def forward(ctx, f: nn.Module, g: nn.Module, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        ctx.f, ctx.g = f, g
        with torch.no_grad():
            y1 = x1 + f(x2)
            y2 = x2 + g(y1)
        ctx.save_for_backward(y1, y2)
        return y1, y2

    @staticmethod
    def backward(ctx, d1: Tensor, d2: Tensor) -> tuple[None, None, Tensor, Tensor]:
        y1, y2 = (y.detach() for y in ctx.saved_tensors)
        with torch.enable_grad():
            y1.requires_grad_()
            of_g = ctx.g(y1)
            torch.autograd.backward(of_g, d2)
            x2 = (y2 - of_g).detach().requires_grad_()
            d1 = d1 + y1.grad
            torch.autograd.backward(ctx.f(x2), d1)
        return None, None, d1, d2 + x2.grad


class ReversibleNet(nn.Module):
    def __init__(self, apply: Callable) -> None:
        super().__init__()
        self.front, self.out = nn.Linear(8, 12), nn.Linear(12, 3)
        self.blocks = nn.ModuleList(field_of() for _ in range(4))
        self.apply_block = apply

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.front(x).chunk(2, -1)
        for f, g in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            a, b = self.apply_block(f, g, a, b)
        return self.out(torch.cat([a, b], -1))


@entry()
def reversible_blocks() -> Built:
    return ReversibleNet(Reversible.apply), mean_square, (torch.randn(5, 8),)


@entry(undefined={f"blocks.{i}.{j}": FISHER for i in range(4) for j in (0, 2)})
def reversible_blocks_that_return_the_gradients() -> Built:
    class Returning(torch.autograd.Function):
        @staticmethod
        def forward(ctx, f: nn.Module, g: nn.Module, x1: Tensor, x2: Tensor, *weights: Tensor) -> tuple:
            return Reversible.forward(ctx, f, g, x1, x2)

        @staticmethod
        def backward(ctx, d1: Tensor, d2: Tensor) -> tuple:
            y1, y2 = (y.detach() for y in ctx.saved_tensors)
            with torch.enable_grad():
                y1.requires_grad_()
                of_g = ctx.g(y1)
                part, *of_weights_g = torch.autograd.grad(of_g, (y1, *ctx.g.parameters()), d2)
                x2 = (y2 - of_g).detach().requires_grad_()
                d1 = d1 + part
                part, *of_weights_f = torch.autograd.grad(ctx.f(x2), (x2, *ctx.f.parameters()), d1)
            return None, None, d1, d2 + part, *of_weights_f, *of_weights_g

    def apply(f: nn.Module, g: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return Returning.apply(f, g, a, b, *f.parameters(), *g.parameters())

    return ReversibleNet(apply), mean_square, (torch.randn(5, 8),)
