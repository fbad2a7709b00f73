"""Models whose backward differentiates: adjoints and implicit layers.

`torch.autograd.grad` inside a backward sends gradients through layers without any reaching a weight; they are not the
gradients of the loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from zoo_registry import Built, entry, mean_square

FISHER = ("fisher",)


def field_of(width: int = 6, *, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width, bias=bias), nn.Tanh(), nn.Linear(width, width, bias=bias))


class Solved(nn.Module):
    """A linear layer, a solution of `field` in the care of `solve`, and a linear layer."""

    def __init__(self, field: nn.Module, solve: Callable[[nn.Module, Tensor], Tensor], width: int = 6) -> None:
        super().__init__()
        self.front, self.field, self.out = nn.Linear(8, width), field, nn.Linear(width, 3)
        self.solve = solve

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.solve(self.field, torch.tanh(self.front(x))))


def euler(field: Callable[[Tensor], Tensor], z: Tensor, h: float) -> Tensor:
    return z + h * field(z)


def runge_kutta(field: Callable[[Tensor], Tensor], z: Tensor, h: float) -> Tensor:
    k1 = field(z)
    k2 = field(z + h / 2 * k1)
    k3 = field(z + h / 2 * k2)
    k4 = field(z + h * k3)
    return z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


class Adjoint(torch.autograd.Function):
    """As torchdiffeq's odeint_adjoint: states are computed anew in backward, and differentiated there step by step."""

    @staticmethod
    def forward(ctx, step, field: nn.Module, steps: int, z: Tensor, *weights: Tensor) -> Tensor:
        states = [z]
        with torch.no_grad():
            for _ in range(steps):
                states.append(step(field, states[-1], 1 / steps))
        ctx.step, ctx.field, ctx.steps = step, field, steps
        ctx.save_for_backward(*states[:-1], *weights)
        return states[-1]

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        states, weights = ctx.saved_tensors[: ctx.steps], ctx.saved_tensors[ctx.steps :]
        sums = [torch.zeros_like(w) for w in weights]
        for state in reversed(states):
            with torch.enable_grad():
                z = state.detach().requires_grad_()
                g, *parts = torch.autograd.grad(
                    ctx.step(ctx.field, z, 1 / ctx.steps), (z, *weights), g, allow_unused=True
                )
            sums = [s if part is None else s + part for s, part in zip(sums, parts, strict=True)]
        return None, None, None, g, *sums


def by_adjoint(step: Callable, *, of: Callable[[Tensor], bool] = lambda p: True) -> Callable:
    def solve(field: nn.Module, z: Tensor) -> Tensor:
        return Adjoint.apply(step, field, 3, z, *filter(of, field.parameters()))

    return solve


class AdjointState(torch.autograd.Function):
    """As the paper has it: the adjoint state is integrated backwards with the slope, which is scaled afterwards."""

    @staticmethod
    def forward(ctx, field: nn.Module, steps: int, lenient: bool, z: Tensor, *weights: Tensor) -> Tensor:
        for _ in range(steps):
            z = euler(field, z, 1 / steps)
        ctx.field, ctx.steps, ctx.lenient = field, steps, lenient
        ctx.save_for_backward(z, *weights)
        return z

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        z, *weights = ctx.saved_tensors
        sums, h = [torch.zeros_like(w) for w in weights], 1 / ctx.steps
        for _ in range(ctx.steps):
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                slope = ctx.field(z)
                of_z, *of_weights = torch.autograd.grad(slope, (z, *weights), g, allow_unused=ctx.lenient)
            z, g = z - h * slope.detach(), g + h * of_z
            sums = [s if part is None else s + h * part for s, part in zip(sums, of_weights, strict=True)]
        return None, None, None, g, *sums


INNER = {"field.0": FISHER, "field.2": FISHER}


@entry(undefined=INNER)
def adjoint_by_euler() -> Built:
    return Solved(field_of(bias=False), by_adjoint(euler)), mean_square, (torch.randn(5, 8),)


@entry(undefined=INNER)
def adjoint_state_integrated_backwards() -> Built:
    def solve(field: nn.Module, z: Tensor) -> Tensor:
        return AdjointState.apply(field, 3, False, z, *field.parameters())

    return Solved(field_of(bias=False), solve), mean_square, (torch.randn(5, 8),)


@entry(undefined=INNER)
def adjoint_state_of_sequences() -> Built:
    def solve(field: nn.Module, z: Tensor) -> Tensor:
        return AdjointState.apply(field, 2, True, z, field[0].weight, field[2].weight)  # the biases are left out

    return Solved(field_of(), solve), mean_square, (torch.randn(5, 3, 8),)


@entry(undefined=INNER)
def adjoint_by_runge_kutta_with_biases() -> Built:
    return Solved(field_of(), by_adjoint(runge_kutta)), mean_square, (torch.randn(5, 8),)


@entry(undefined=INNER)
def adjoint_of_what_requires_grad() -> Built:
    # torchdiffeq leaves out parameters that do not require a gradient.
    return Solved(field_of(), by_adjoint(euler, of=lambda p: p.requires_grad)), mean_square, (torch.randn(5, 4, 8),)


@entry(undefined={"field.0": FISHER, "field.2": FISHER})
def adjoint_of_convolutions() -> Built:
    field = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 2, 3, padding=1))

    def solve(field: nn.Module, z: Tensor) -> Tensor:
        z = z.view(len(z), 2, -1)
        return Adjoint.apply(euler, field, 3, z, *field.parameters()).flatten(1)

    return Solved(field, solve), mean_square, (torch.randn(5, 8),)


@entry(undefined={"field.rate": FISHER, "field.inner.0": FISHER, "field.inner.2": FISHER})
def adjoint_within_adjoint() -> Built:
    # The field is itself a solution: its backward, which runs in a backward, differentiates once more.
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate, self.inner = nn.Linear(6, 6), field_of(bias=False)

        def forward(self, z: Tensor) -> Tensor:
            return torch.tanh(self.rate(Adjoint.apply(euler, self.inner, 2, z, *self.inner.parameters())))

    return Solved(Nested(), by_adjoint(euler)), mean_square, (torch.randn(5, 8),)


@entry(undefined=INNER)
def adjoint_by_vjp() -> Built:
    class ByVjp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, field: nn.Module, z: Tensor, *weights: Tensor) -> Tensor:
            ctx.field = field
            ctx.save_for_backward(z, *weights)
            return field(z)

        @staticmethod
        def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
            z, *weights = ctx.saved_tensors
            names = [name for name, _ in ctx.field.named_parameters()]

            def run(z: Tensor, *weights: Tensor) -> Tensor:
                return torch.func.functional_call(ctx.field, dict(zip(names, weights, strict=True)), (z,))

            _, vjp = torch.func.vjp(run, z, *weights)
            return None, *vjp(g)

    return (
        Solved(field_of(), lambda field, z: ByVjp.apply(field, z, *field.parameters())),
        mean_square,
        (torch.randn(5, 8),),
    )


class Contraction(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        for layer in (self.a, self.b):
            nn.init.orthogonal_(layer.weight, gain=0.6)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.b(torch.tanh(self.a(z)) + x))


class Equilibrium(nn.Module):
    """A deep-equilibrium model as in the tutorial: the gradient at the fixed point is a fixed point as well."""

    def __init__(self, *, refine: bool = False) -> None:
        super().__init__()
        self.front, self.step, self.out = nn.Linear(8, 6), Contraction(), nn.Linear(6, 3)
        self.refine = refine

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(12):
                z = self.step(z, x)
        z = self.step(z, x)
        z0 = z.clone().detach().requires_grad_()
        again = self.step(z0, x)

        def implicit(grad: Tensor) -> Tensor:
            g = grad
            for _ in range(12):
                g = torch.autograd.grad(again, z0, g, retain_graph=True)[0] + grad
            return g

        z.register_hook(implicit)
        return self.out(self.step(z, x) if self.refine else z)


@entry(undefined={"step.a": FISHER, "step.b": FISHER})
def equilibrium_with_an_implicit_hook() -> Built:
    return Equilibrium(), mean_square, (torch.randn(5, 8),)


@entry(undefined={"step.a": FISHER, "step.b": FISHER})
def equilibrium_on_sequences_with_one_more_step() -> Built:
    return Equilibrium(refine=True), mean_square, (torch.randn(5, 3, 8),)


@entry(undefined={"step.a": FISHER, "step.b": FISHER})
def equilibrium_with_a_neumann_series() -> Built:
    # The hook is on the graph node, not on the tensor.
    class Model(Equilibrium):
        def forward(self, x: Tensor) -> Tensor:
            x = self.front(x)
            z = torch.zeros_like(x)
            with torch.no_grad():
                for _ in range(12):
                    z = self.step(z, x)
            z = z.requires_grad_()
            new = self.step(z, x)
            end = new.clone()

            def series(grads: tuple[Tensor]) -> tuple[Tensor]:
                term = total = grads[0]
                for _ in range(6):
                    (term,) = torch.autograd.grad(new, z, term, retain_graph=True)
                    total = total + term
                return (total,)

            end.grad_fn.register_prehook(series)
            return self.out(end)

    return Model(), mean_square, (torch.randn(5, 8),)


@entry(undefined={"energy.0": FISHER, "energy.2": FISHER})
def minimum_by_the_implicit_function_theorem() -> Built:
    # z minimises energy(z) + |z - x|^2; its gradient comes from Hessian products taken in backward.
    class Minimum(torch.autograd.Function):
        @staticmethod
        def slope(energy: nn.Module, z: Tensor, x: Tensor, **options: object) -> Tensor:
            return torch.autograd.grad(energy(z).sum() + (z - x).square().sum(), z, **options)[0]

        @staticmethod
        def forward(ctx, energy: nn.Module, x: Tensor, *weights: Tensor) -> Tensor:
            z = x.detach()
            for _ in range(20):
                with torch.enable_grad():
                    slope = Minimum.slope(energy, z.requires_grad_(), x.detach())
                z = (z - 0.3 * slope).detach()
            ctx.energy = energy
            ctx.save_for_backward(z, x, *weights)
            return z

        @staticmethod
        def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
            z, x, *weights = ctx.saved_tensors
            with torch.enable_grad():
                z, x = z.detach().requires_grad_(), x.detach().requires_grad_()
                slope = Minimum.slope(ctx.energy, z, x, create_graph=True)
                v = g
                for _ in range(20):
                    v = v - 0.3 * (torch.autograd.grad(slope, z, v, retain_graph=True)[0] - g)
                return None, *torch.autograd.grad(slope, (x, *weights), -v)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.out = nn.Linear(8, 6), nn.Linear(6, 3)
            self.energy = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Softplus(), nn.Linear(6, 1, bias=False))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(Minimum.apply(self.energy, self.front(x), *self.energy.parameters()))

    return Model(), mean_square, (torch.randn(5, 8),)
