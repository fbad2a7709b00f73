"""Derivatives of a model within its loss: double backward, torch.func and forward mode."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from zoo_registry import Built, entry, images, noise_like

ACT = ("act_mean", "act_std", "act_abs_mean", "act_abs_std")


def field(inputs: int = 3, outputs: int = 1, width: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs)
    )


ROWS = ("0", "2", "4")


def lacking(*metrics: str, of: tuple[str, ...] = ROWS) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(of, metrics)


def derivative(y: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


@entry()
def physics_informed_by_double_backward() -> Built:
    # u_t = u_xx in the points, u = sin in the first ones.
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        u = model(x)
        du = derivative(u, x)
        u_xx = derivative(du[:, 0], x)[:, 0]
        return (du[:, 1] - 0.1 * u_xx).square().mean() + (u[:3, 0] - x[:3, 0].sin()).square().mean()

    return field(2), loss, (torch.randn(8, 2),)


@entry(optional=lacking("fisher", of=("4",)))  # no gradient arrives at the last output itself
def physics_informed_without_a_data_term() -> Built:
    # The last bias has no gradient, and no gradient of order zero arrives anywhere.
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        du = derivative(model(x), x)
        laplacian = sum(derivative(du[:, i], x)[:, i] for i in range(2))
        return (laplacian - 1).square().mean()

    return field(2), loss, (torch.randn(8, 2),)


@entry()
def force_field() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.pair, self.out = nn.Linear(1, 6), nn.Linear(6, 6), nn.Linear(6, 1)

        def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
            positions = positions.clone().requires_grad_()
            distances = (positions[:, :, None] - positions[:, None]).square().sum(-1, keepdim=True)
            energy = self.out(torch.tanh(self.pair(torch.tanh(self.embed((-distances).exp()))))).sum((1, 2))
            return energy, -derivative(energy, positions)

    def loss(model: nn.Module, positions: Tensor) -> Tensor:
        energy, forces = model(positions)
        return energy.square().mean() + (forces - 1).square().mean()

    return Model(), loss, (torch.randn(2, 4, 3),)


@entry()
def wasserstein_with_gradient_penalty() -> Built:
    def loss(model: nn.Module, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
        between = (mix * real + (1 - mix) * fake).requires_grad_()
        slope = derivative(model(between), between)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        return model(fake).mean() - model(real).mean() + 10 * penalty

    critic = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 1))
    return critic, loss, (images(2), images(2), torch.rand(2, 1, 1, 1))


@entry(optional=lacking("fisher", of=("4",)))  # no gradient arrives at the last output itself
def hamiltonian_network() -> Built:
    def loss(model: nn.Module, state: Tensor, target: Tensor) -> Tensor:
        state = state.clone().requires_grad_()
        dq, dp = derivative(model(state), state).chunk(2, -1)
        return (torch.cat([dp, -dq], -1) - target).square().mean()

    return field(4), loss, (torch.randn(6, 4), torch.randn(6, 4))


@entry()
def sliced_score_matching() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        v, score = noise_like(x), model(x)
        return ((derivative((score * v).sum(), x) * v).sum(-1) + score.square().sum(-1) / 2).mean()

    return field(3, 3), loss, (torch.randn(6, 3),)


@entry()
def flow_with_a_traced_divergence() -> Built:
    # FFJORD: a few Euler steps of the state and of its log-density.
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        z, logdensity, v = x.clone().requires_grad_(), 0.0, noise_like(x)
        for _ in range(2):
            slope = model(z)
            divergence = (torch.autograd.grad(slope, z, v, create_graph=True)[0] * v).sum(-1)
            z, logdensity = z + 0.5 * slope, logdensity - 0.5 * divergence
        return (z.square().sum(-1) / 2 - logdensity).mean()

    return field(3, 3), loss, (torch.randn(6, 3),)


@entry()
def langevin_samples() -> Built:
    # Samples of an energy model are made by gradients of the model, none of which belongs to the loss.
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        sample = noise_like(x)
        for _ in range(3):
            sample = sample.detach().requires_grad_()
            (slope,) = torch.autograd.grad(model(sample).sum(), sample)
            sample = sample - 0.1 * slope
        return model(x).mean() - model(sample.detach()).mean() + model(x).square().mean()

    return field(3), loss, (torch.randn(6, 3),)


@entry()
def deep_dream_unrolled() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x if x.requires_grad else x.clone().requires_grad_()
            x = x - 0.5 * derivative(model(x).square(), x)
        return model(x).square().mean()

    return field(3), loss, (torch.randn(6, 3),)


@entry()
def jacobian_regularised() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        y = model(x)
        v = noise_like(y)
        return y.square().mean() + 0.1 * torch.autograd.grad(y, x, v, create_graph=True)[0].square().mean()

    model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4))
    return model, loss, (torch.randn(6, 5, 3),)


@entry()
def jacobian_by_autograd_functional() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        jacobian = torch.autograd.functional.jacobian(lambda x: model(x).sum(0), x, create_graph=True)
        return jacobian.square().mean() + model(x).square().mean()

    return field(3, 2), loss, (torch.randn(4, 3),)


@entry(undefined=lacking("fisher"), optional=lacking(*ACT))
def jacobian_vector_product() -> Built:
    def loss(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
        y, dy = jvp(model, (x,), (v,))
        return y.square().mean() + dy.square().mean()

    return field(3, 2), loss, (torch.randn(6, 3), torch.randn(6, 3))


@entry(undefined=lacking("fisher"), optional=lacking(*ACT))
def vector_jacobian_product() -> Built:
    def loss(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
        y, pull = vjp(model, x)
        return y.square().mean() + pull(v)[0].square().mean()

    return field(3, 2), loss, (torch.randn(6, 3), torch.randn(6, 2))


@entry(undefined=lacking("fisher"), optional=lacking(*ACT))
def jacobians_by_vmap_of_jacrev() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return vmap(jacrev(model))(x).square().mean() + model(x).square().mean()

    return field(3, 2), loss, (torch.randn(6, 3),)


@entry(undefined=lacking("fisher"), optional=lacking(*ACT))
def jacobians_by_vmap_of_jacfwd() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return vmap(jacfwd(model))(x).square().mean() + model(x).square().mean()

    return field(3, 2), loss, (torch.randn(6, 3),)


@entry(undefined=lacking("fisher"), optional=lacking(*ACT))
def laplacian_by_hessian() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        hessians = vmap(hessian(lambda x: model(x).squeeze(-1)))(x)
        return (hessians.diagonal(dim1=-2, dim2=-1).sum(-1) - 1).square().mean() + model(x).square().mean()

    return field(2), loss, (torch.randn(4, 2),)


@entry(undefined=lacking("fisher"), optional=lacking(*ACT))
def gradients_of_each_sample() -> Built:
    # Fishr: the variance of the gradients of the samples.
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        weights = dict(model.named_parameters())

        def of_one(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
            return functional_call(model, weights, (sample[None],)).square().mean()

        each = vmap(grad(of_one), in_dims=(None, 0))(weights, x)
        return model(x).square().mean() + sum(g.var(0).sum() for g in each.values())

    return field(3, 2), loss, (torch.randn(5, 3),)


@entry(undefined=lacking("fisher"), optional=lacking(*ACT))
def vmap_over_samples() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return vmap(model)(x).square().mean()

    return field(3, 2), loss, (torch.randn(5, 4, 3),)


@entry(optional=lacking(*ACT, "fisher"))
def dual_numbers() -> Built:
    def loss(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
        with fwAD.dual_level():
            y, dy = fwAD.unpack_dual(model(fwAD.make_dual(x, v)))
        return y.square().mean() + dy.square().mean()

    return field(3, 2), loss, (torch.randn(6, 3), torch.randn(6, 3))


@entry(undefined=lacking("fisher"), optional=lacking(*ACT))
def maml_by_func_grad() -> Built:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        weights = dict(model.named_parameters())
        slopes = grad(lambda w: functional_call(model, w, (x,)).square().mean())(weights)
        fast = {n: w - 0.3 * slopes[n] for n, w in weights.items()}
        return functional_call(model, fast, (y,)).square().mean() + model(y).cos().mean()

    return field(3, 2), loss, (torch.randn(6, 3), torch.randn(6, 3))
