"""Objectives: contrastive pairs, generative models, discrete codes, rankings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_registry import Built, entry, images, mean_square, noise_like


def encoder(width: int = 8, out: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, out))


@entry()
def two_towers() -> Built:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text, self.image = encoder(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4))
            self.temperature = nn.Parameter(torch.tensor(1.0))

        def forward(self, text: Tensor, image: Tensor) -> Tensor:
            a, b = F.normalize(self.text(text), dim=-1), F.normalize(self.image(image), dim=-1)
            logits, pairs = self.temperature.exp() * a @ b.mT, torch.arange(len(a))
            return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.mT, pairs)) / 2

    return Towers(), lambda m, t, i: m(t, i), (torch.randn(3, 8), images())


@entry()
def contrastive_views_through_one_encoder() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        a, b = (F.normalize(model(x + 0.1 * noise_like(x)), dim=-1) for _ in range(2))
        z = torch.cat([a, b])
        similar = (z @ z.mT / 0.5).fill_diagonal_(-1e9)
        return F.cross_entropy(similar, torch.arange(len(z)).roll(len(x)))

    return encoder(), loss, (torch.randn(5, 8),)


@entry()
def siamese_with_stopped_gradient() -> Built:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Linear(6, 4))
            self.predictor = nn.Linear(4, 4)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            za, zb = self.encoder(a), self.encoder(b)
            pa, pb = self.predictor(za), self.predictor(zb)
            return -(F.cosine_similarity(pa, zb.detach()) + F.cosine_similarity(pb, za.detach())).mean() / 2

    return Siamese().train(), lambda m, a, b: m(a, b), (torch.randn(6, 8), torch.randn(6, 8))


@entry()
def redundancy_reduced() -> Built:
    # Barlow twins: the loss ties all samples of the batch together.
    def loss(model: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        za, zb = ((z - z.mean(0)) / (z.std(0) + 1e-3) for z in (model(a), model(b)))
        c = za.mT @ zb / len(a)
        return (c - torch.eye(len(c), dtype=c.dtype)).square().sum()

    return encoder(), loss, (torch.randn(6, 8), torch.randn(6, 8))


@entry()
def triplets() -> Built:
    def loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        z = F.normalize(model(x), dim=-1)
        apart = torch.cdist(z, z)
        same = labels[:, None] == labels
        hardest = (apart * same).amax(1) - (apart + 10 * same).amin(1)
        return F.relu(hardest + 0.5).mean()

    return encoder(), loss, (torch.randn(6, 8), torch.tensor([0, 0, 1, 1, 2, 2]))


@entry()
def variational_autoencoder() -> Built:
    class Variational(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.mean, self.logvar = nn.Linear(8, 6), nn.Linear(6, 3), nn.Linear(6, 3)
            self.decoder = nn.Sequential(nn.Linear(3, 6), nn.ReLU(inplace=True), nn.Linear(6, 8))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.body(x))
            mean, logvar = self.mean(h), self.logvar(h)
            z = mean + (logvar / 2).exp() * noise_like(mean)
            divergence = (mean.square() + logvar.exp() - 1 - logvar).sum(-1).mean() / 2
            return F.mse_loss(self.decoder(z), x) + 0.1 * divergence

    return Variational(), lambda m, x: m(x), (torch.randn(5, 8),)


@entry()
def affine_couplings() -> Built:
    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.couplings = nn.ModuleList(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6)) for _ in range(3))
            self.mix = nn.Parameter(torch.linalg.qr(torch.randn(6, 6))[0] + 0.1 * torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            logdet = torch.zeros(len(x), dtype=x.dtype)
            for net in self.couplings:
                x = x @ self.mix
                a, b = x.chunk(2, -1)
                scale, shift = net(a).chunk(2, -1)
                scale = torch.tanh(scale)
                x = torch.cat([b * scale.exp() + shift, a], -1)
                logdet = logdet + scale.sum(-1) + torch.linalg.slogdet(self.mix)[1]
            return x.square().sum(-1, keepdim=True) / 2 - logdet[:, None]

    return Flow(), lambda m, x: m(x).mean(), (torch.randn(5, 6),)


@entry(layers=("encoder", "codes", "decoder"))
def quantised_codes_straight_through() -> Built:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.codes, self.decoder = nn.Linear(8, 4), nn.Embedding(6, 4), nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            z = self.encoder(x)
            nearest = torch.cdist(z.detach(), self.codes.weight.detach()[None]).argmin(-1)
            code = self.codes(nearest)
            commitment = F.mse_loss(z, code.detach()) * 0.25 + F.mse_loss(code, z.detach())
            return F.mse_loss(self.decoder(z + (code - z).detach()), x) + commitment

    return Quantised(), lambda m, x: m(x), (torch.randn(3, 5, 8),)


@entry()
def gumbel_softmax_choices() -> Built:
    class Choices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score, self.values, self.out = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 6)), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits = self.score(x)
            gumbel = -(-torch.rand(logits.shape).clamp(1e-6, 1 - 1e-6).log()).log().to(x.dtype)
            soft = ((logits + gumbel) / 0.7).softmax(-1)
            hard = F.one_hot(soft.argmax(-1), 4).to(x.dtype)
            return self.out((hard - soft.detach() + soft) @ self.values)

    return Choices(), mean_square, (torch.randn(5, 8),)


@entry()
def generator_and_discriminator() -> Built:
    class Adversaries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = nn.Sequential(nn.Linear(3, 6), nn.LeakyReLU(0.2, inplace=True), nn.Linear(6, 8))
            self.critic = nn.Sequential(nn.Linear(8, 6), nn.LeakyReLU(0.2, inplace=True), nn.Linear(6, 1))

        def forward(self, z: Tensor, real: Tensor) -> Tensor:
            fake = self.generator(z)
            self.critic.requires_grad_(False)  # as many training loops do it, in the midst of the pass
            fools = F.softplus(-self.critic(fake)).mean()
            self.critic.requires_grad_(True)
            return fools + F.softplus(self.critic(fake.detach())).mean() + F.softplus(-self.critic(real)).mean()

    return Adversaries(), lambda m, z, r: m(z, r), (torch.randn(5, 3), torch.randn(5, 8))


@entry()
def slots_by_iterated_attention() -> Built:
    class Slots(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Parameter(torch.randn(1, 3, 6))
            self.q, self.k, self.v = (nn.Linear(6, 6, bias=False) for _ in range(3))
            self.update, self.out = nn.GRUCell(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            slots, k, v = self.start.expand(len(x), -1, -1), self.k(x), self.v(x)
            for _ in range(3):
                attention = (self.q(slots) @ k.mT).softmax(1) + 1e-6
                updates = attention / attention.sum(-1, keepdim=True) @ v
                slots = self.update(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            return self.out(slots)

    return Slots(), mean_square, (torch.randn(2, 5, 6),)


@entry()
def capsules_with_routing() -> Built:
    class Capsules(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.primary, self.votes = nn.Linear(8, 12), nn.Parameter(torch.randn(3, 2, 4, 5) / 2)

        def forward(self, x: Tensor) -> Tensor:
            votes = torch.einsum("nic,ijcd->nijd", self.primary(x).view(-1, 3, 4), self.votes)
            logits = torch.zeros(votes.shape[:3], dtype=x.dtype)
            for last in (False, False, True):
                given = votes if last else votes.detach()
                s = (logits.softmax(2)[..., None] * given).sum(1)
                norm = s.square().sum(-1, keepdim=True)
                v = s * norm.sqrt() / (1 + norm)
                logits = logits + (given * v[:, None]).sum(-1)
            return v.norm(dim=-1)

    return Capsules(), mean_square, (torch.randn(5, 8),)


@entry()
def policy_gradient_with_a_value_head() -> Built:
    class Actor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.policy, self.value = nn.Linear(8, 6), nn.Linear(6, 3), nn.Linear(6, 1)

        def forward(self, x: Tensor, actions: Tensor, rewards: Tensor) -> Tensor:
            h = torch.tanh(self.body(x))
            logs, value = self.policy(h).log_softmax(-1), self.value(h).squeeze(-1)
            advantage = rewards - value.detach()
            chosen = logs.gather(-1, actions[:, None]).squeeze(-1)
            entropy = -(logs.exp() * logs).sum(-1).mean()
            return -(chosen * advantage).mean() + F.smooth_l1_loss(value, rewards) - 0.01 * entropy

    return Actor(), lambda m, *data: m(*data), (torch.randn(6, 8), torch.randint(3, (6,)), torch.randn(6))


@entry()
def distillation_with_a_teacher_in_the_model() -> Built:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher, self.adapter = encoder(), encoder(), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            seen: list[Tensor] = []
            middles = (self.teacher[1], self.student[1])
            handles = [middle.register_forward_hook(lambda m, a, y: seen.append(y)) for middle in middles]
            try:
                with torch.no_grad():
                    target = self.teacher(x)
                logits = self.student(x)
            finally:
                for handle in handles:
                    handle.remove()
            features = F.mse_loss(self.adapter(seen[1]), seen[0])
            return F.kl_div(logits.log_softmax(-1), target.softmax(-1), reduction="batchmean") + features

    return Pair(), lambda m, x: m(x), (torch.randn(5, 8),)


@entry()
def earliest_of_several_exits() -> Built:
    class Exits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.exits = nn.ModuleList(nn.Linear(8, 3) for _ in range(3))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            losses = []
            for block, leave in zip(self.blocks, self.exits, strict=True):
                x = torch.tanh(block(x))
                losses.append(F.cross_entropy(leave(x), y, reduction="none"))
            return torch.stack(losses).amin(0).mean()  # only the best exit of each sample counts

    return Exits(), lambda m, x, y: m(x, y), (torch.randn(6, 8), torch.randint(3, (6,)))


@entry()
def sinkhorn_ranking() -> Built:
    def loss(model: nn.Module, x: Tensor, order: Tensor) -> Tensor:
        logits = -(model(x).squeeze(-1)[:, None] - order[None].to(x.dtype) / 5).abs() / 0.3
        for _ in range(4):
            logits = logits - logits.logsumexp(1, keepdim=True)
            logits = logits - logits.logsumexp(0, keepdim=True)
        return F.nll_loss(logits, order)

    return encoder(out=1), loss, (torch.randn(5, 8), torch.randperm(5))
