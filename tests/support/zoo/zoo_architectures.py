"""Images, graphs, mixtures of experts and generative models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from zoo_registry import Built, classify, entry, images, mean_square, noise_like


@entry()
def diffusion_unet() -> Built:
    class Block(nn.Module):
        def __init__(self, inside: int, outside: int) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(inside, outside, 3, padding=1), nn.Conv2d(outside, outside, 3, padding=1)
            self.time, self.norm = nn.Linear(6, outside), nn.GroupNorm(2, outside)
            self.skip = nn.Conv2d(inside, outside, 1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            h = self.conv1(x) + self.time(F.silu(t))[:, :, None, None]
            return self.skip(x).add_(self.conv2(F.silu(self.norm(h), inplace=True)))

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(6, 6)
            self.down, self.middle, self.up = Block(3, 4), Block(4, 4), Block(8, 4)
            self.pool, self.grow = nn.Conv2d(4, 4, 2, stride=2), nn.ConvTranspose2d(4, 4, 2, stride=2)
            self.out = nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            angles = t[:, None] * torch.tensor([1.0, 0.3, 0.1], dtype=x.dtype)
            t = self.embed(torch.cat([angles.sin(), angles.cos()], -1))
            skip = self.down(x, t)
            middle = self.middle(self.pool(skip), t)
            return self.out(self.up(torch.cat([self.grow(middle), skip], 1), t))

    def loss(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        noise = noise_like(x)
        share = (0.1 + 0.2 * t)[:, None, None, None]
        return F.mse_loss(model((1 - share).sqrt() * x + share.sqrt() * noise, t), noise)

    return UNet(), loss, (images(2), torch.tensor([1.0, 3.0]))


@entry()
def detector() -> Built:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.deep = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Conv2d(6, 6, 3, stride=2, padding=1)
            self.lateral, self.smooth = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
            self.classes, self.boxes = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            fine = F.relu(self.stem(x), inplace=True)
            coarse = F.relu_(self.deep(fine))
            merged = self.smooth(self.lateral(fine) + F.interpolate(coarse, scale_factor=2.0))
            levels = [merged, coarse]  # the same heads on every level
            logits = torch.cat([self.classes(level).flatten(2) for level in levels], 2)
            return logits, torch.cat([self.boxes(level).flatten(2) for level in levels], 2).exp()

    def loss(model: nn.Module, x: Tensor, targets: Tensor, true: Tensor) -> Tensor:
        logits, boxes = model(x)
        p = torch.sigmoid(logits)
        focal = F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * (targets - p).square()
        found = targets.amax(1) > 0
        a, b = boxes.mT[found], true.mT[found]  # distances to left, top, right and bottom
        common = (torch.minimum(a, b)[:, :2] + torch.minimum(a, b)[:, 2:]).prod(-1)
        hull = (torch.maximum(a, b)[:, :2] + torch.maximum(a, b)[:, 2:]).prod(-1)
        union = (a[:, :2] + a[:, 2:]).prod(-1) + (b[:, :2] + b[:, 2:]).prod(-1) - common
        giou = common / union - (hull - union) / hull
        return focal.sum() / found.sum() + (1 - giou).mean()

    targets = (torch.rand(2, 4, 20) > 0.9).float()
    return Detector(), loss, (images(2), targets, 0.5 + torch.rand(2, 4, 20))


@entry()
def vision_transformer_of_its_own() -> Built:
    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 4, stride=4)
            self.class_token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
            self.norm, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
            self.scale, self.head = nn.Parameter(torch.full((8,), 0.1)), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).mT
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions
            q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            x = x + self.scale * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return self.head(x[:, 0])

    return Transformer(), classify, (images(2), torch.tensor([0, 1]))


@entry()
def chain_of_convolutions_of_every_kind() -> Built:
    model = nn.Sequential(
        nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1, groups=1),
        nn.Hardswish(inplace=True),
        nn.Conv1d(4, 8, 3, dilation=2, padding="same"),
        nn.ELU(inplace=True),
        nn.Conv1d(8, 8, 3, groups=8, padding=1, padding_mode="reflect"),
        nn.Conv1d(8, 8, 1, groups=4, bias=False),
        nn.SiLU(inplace=True),
        nn.ConvTranspose1d(8, 6, 2, dilation=3, groups=2),
    )
    return model, mean_square, (torch.randn(2, 3, 5),)


@entry()
def standardised_weights() -> Built:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return self._conv_forward(x, w / (w.flatten(1).std(1)[:, None, None, None] + 1e-5), self.bias)

    model = nn.Sequential(
        Standardised(3, 4, 3),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        Standardised(4, 4, 3),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    return model, mean_square, (images(2),)


@entry()
def spectral_norm_in_train_mode() -> Built:
    norm = nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(
        norm(nn.Linear(8, 6)), nn.LeakyReLU(0.2, inplace=True), norm(nn.Linear(6, 6)), nn.Linear(6, 3)
    )
    return model.train(), mean_square, (torch.randn(5, 3, 8),)


@entry()
def low_rank_weights() -> Built:
    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 6))

        def forward(self, w: Tensor) -> Tensor:
            return w + self.left @ self.right

    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    parametrize.register_parametrization(model[2], "weight", LowRank())
    return model, mean_square, (torch.randn(5, 8),)


@entry()
def cached_parametrisation() -> Built:
    class Symmetric(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w.triu() + w.triu(1).mT

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with parametrize.cached():
            return (model(x) - model(2 * x)).square().mean()

    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    return model, loss, (torch.randn(5, 6),)


@entry()
def tied_autoencoder() -> Built:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.middle, self.bias = nn.Linear(8, 6), nn.Linear(6, 6), nn.Parameter(torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.tanh(self.middle(torch.tanh(self.encode(x)))), self.encode.weight.t(), self.bias) - x

    return Tied(), mean_square, (torch.randn(5, 8),)


@entry()
def tied_convolutional_autoencoder() -> Built:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.middle = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            z = self.middle(F.relu(self.encode(x), inplace=True))
            return F.conv_transpose2d(z, self.encode.weight, stride=2, output_padding=1) - x

    return Tied(), mean_square, (images(2),)


@entry()
def inputs_expanded_sliced_and_flipped() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.out = nn.Linear(8, 6), nn.Linear(4, 6), nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:  # [4, 5, 8]
            expanded = self.a(x[:, :1].expand(-1, 5, -1))
            sliced = self.b(x[..., ::2])
            turned = self.c(x.flip(1).mT)
            return self.out(torch.tanh(expanded + sliced + turned[:, :5].relu_()))

    return Model(), mean_square, (torch.randn(4, 5, 8),)


def graph(n: int = 6) -> Tensor:
    """[2, edges] of a ring with chords."""
    i = torch.arange(n)
    return torch.cat([torch.stack([i, (i + 1) % n]), torch.stack([i, (i * 2) % n])], 1)


@entry()
def graph_convolution_with_a_sparse_adjacency() -> Built:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.out = nn.Linear(5, 6, bias=False), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            weights = torch.ones(edges.shape[1], dtype=x.dtype) / 2
            adjacency = torch.sparse_coo_tensor(edges, weights, (len(x), len(x)))
            x = torch.sparse.mm(adjacency, self.first(x)).relu()
            return self.out(torch.sparse.mm(adjacency, self.second(x)).tanh())

    return Graph(), mean_square, (torch.randn(6, 5), graph())


@entry()
def graph_attention() -> Built:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.att = nn.Linear(5, 8, bias=False), nn.Parameter(torch.randn(2, 2, 4))
            self.edge, self.update, self.out = nn.Linear(16, 8), nn.GRUCell(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            source, target = edges
            z = self.project(x).unflatten(-1, (2, 4))
            scores = F.leaky_relu((z[source] * self.att[0] + z[target] * self.att[1]).sum(-1), 0.2).exp()
            total = torch.zeros(len(x), 2, dtype=x.dtype).index_add_(0, target, scores)
            messages = z[source] * (scores / total[target])[..., None]
            z = torch.zeros_like(z).index_add_(0, target, messages).flatten(1)
            for _ in range(2):
                m = self.edge(torch.cat([z[source], z[target]], -1)).relu_()
                z = self.update(torch.zeros_like(z).scatter_reduce(0, target[:, None].expand_as(m), m, "mean"), z)
            return self.out(z)

    return Attention(), mean_square, (torch.randn(6, 5), graph())


@entry()
def filters_made_from_edges() -> Built:
    # Edge-conditioned convolution: each edge has a matrix of its own, made by a Linear.
    class Edges(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filter, self.root, self.out = nn.Linear(3, 30), nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor, edges: Tensor, features: Tensor) -> Tensor:
            matrices = self.filter(features).view(-1, 5, 6)
            messages = torch.bmm(x[edges[0], None], matrices).squeeze(1)
            return self.out(torch.tanh(self.root(x).index_add_(0, edges[1], messages)))

    return Edges(), mean_square, (torch.randn(6, 5), graph(), torch.randn(12, 3))


class Mixture(nn.Module):
    """Tokens go to their two best experts, each of which takes `capacity` of them; the router has losses of its own."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.front, self.router = nn.Linear(8, 8), nn.Linear(8, 3, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 8)) for _ in range(3))
        self.out, self.capacity = nn.Linear(8, 3), capacity

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.front(x)
        logits = self.router(x)
        probabilities = logits.softmax(-1)
        weights, chosen = probabilities.topk(2)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            token, place = token[: self.capacity], place[: self.capacity]
            y.index_add_(0, token, expert(x[token]) * weights[token, place, None])
        share = F.one_hot(chosen[:, 0], 3).to(x.dtype).mean(0)
        balance = 3 * (share * probabilities.mean(0)).sum()
        return self.out(x + y), 0.1 * balance + 0.01 * logits.logsumexp(-1).square().mean()


def with_router_losses(model: nn.Module, x: Tensor) -> Tensor:
    y, of_router = model(x)
    return y.square().mean() + of_router


@entry()
def experts_with_router_losses() -> Built:
    return Mixture(100), with_router_losses, (torch.randn(9, 8),)


@entry()
def experts_that_drop_tokens() -> Built:
    return Mixture(3), with_router_losses, (torch.randn(9, 8),)


@entry()
def experts_that_drop_every_token() -> Built:
    return Mixture(0), with_router_losses, (torch.randn(9, 8),)


@entry()
def soft_experts_by_einsum_and_linears() -> Built:
    class Soft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slots, self.up = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(4, 8, 6) / 3)
            self.down, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits = x @ self.slots
            inputs = logits.softmax(1).mT @ x
            hidden = F.gelu(torch.einsum("nsd,sdf->nsf", inputs, self.up))
            return self.out(logits.softmax(-1) @ self.down(hidden))

    return Soft(), mean_square, (torch.randn(2, 5, 8),)
