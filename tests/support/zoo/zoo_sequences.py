"""Sequence models: scans, recurrences, unusual attention, decoders, structured losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_registry import Built, classify, entry, mean_square, tokens


@entry()
def selective_scan() -> Built:
    class Mamba(nn.Module):
        def __init__(self, width: int = 6, state: int = 4) -> None:
            super().__init__()
            self.state = state
            self.in_proj = nn.Linear(width, 2 * width, bias=False)
            self.conv1d = nn.Conv1d(width, width, 3, groups=width, padding=2)
            self.x_proj, self.dt_proj = nn.Linear(width, 2 + 2 * state, bias=False), nn.Linear(2, width)
            self.A_log = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(width, 1))
            self.D = nn.Parameter(torch.ones(width))
            self.out_proj = nn.Linear(width, width, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x, z = self.in_proj(x).chunk(2, -1)
            x = F.silu(self.conv1d(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
            dt, b, c = self.x_proj(x).split([2, self.state, self.state], -1)
            dt, a = F.softplus(self.dt_proj(dt)), -self.A_log.exp()
            h, outputs = x.new_zeros(len(x), x.shape[2], self.state), []
            for t in range(x.shape[1]):
                h = (dt[:, t, :, None] * a).exp() * h + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
                outputs.append((h * c[:, t, None]).sum(-1))
            return self.out_proj((torch.stack(outputs, 1) + self.D * x) * F.silu(z))

    return nn.Sequential(nn.Linear(5, 6), Mamba(), nn.Linear(6, 3)), mean_square, (torch.randn(2, 5, 5),)


@entry()
def rwkv() -> Built:
    class TimeMix(nn.Module):
        def __init__(self, width: int = 6) -> None:
            super().__init__()
            self.decay, self.first = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
            self.mix = nn.Parameter(torch.rand(3, 1, 1, width))
            self.key, self.value = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
            self.receptance, self.output = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            mixed = x * self.mix + F.pad(x, (0, 0, 1, -1)) * (1 - self.mix)
            k, v, r = self.key(mixed[0]), self.value(mixed[1]), torch.sigmoid(self.receptance(mixed[2]))
            above = below = torch.zeros_like(x[:, 0])
            outputs = []
            for t in range(x.shape[1]):
                now = (self.first + k[:, t]).exp()
                outputs.append((above + now * v[:, t]) / (below + now))
                decay, weight = (-self.decay.exp()).exp(), k[:, t].exp()
                above, below = decay * above + weight * v[:, t], decay * below + weight
            return self.output(r * torch.stack(outputs, 1))

    return nn.Sequential(nn.Linear(5, 6), TimeMix(), nn.Linear(6, 3)), mean_square, (torch.randn(2, 5, 5),)


class Heads(nn.Module):
    """Attention of 2 heads whose weights `mixing` decides; x [n, t, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        packed = self.qkv(x).view(n, t, 3, 2, 4).permute(2, 0, 3, 1, 4)
        q, k, v = (packed[i] for i in range(3))
        return self.out(self.mixing(q, k, v).transpose(1, 2).reshape(n, t, 8))

    def mixing(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


def with_heads(kind: type[Heads]) -> Built:
    model = nn.Sequential(nn.Linear(5, 8), kind(), nn.GELU(), kind(), nn.Linear(8, 3))
    return model, mean_square, (torch.randn(2, 6, 5),)


def distances(t: int) -> Tensor:
    return torch.arange(t)[:, None] - torch.arange(t)


@entry()
def attention_with_linear_biases() -> Built:
    class Alibi(Heads):
        def mixing(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            away = distances(q.shape[2]).to(q.dtype)
            scores = q @ k.mT / 2 - torch.tensor([0.5, 0.25], dtype=q.dtype)[:, None, None] * away
            return scores.masked_fill_(away < 0, -torch.inf).softmax(-1) @ v

    return with_heads(Alibi)


@entry()
def linear_attention() -> Built:
    class Linear(Heads):
        def mixing(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = F.elu(q) + 1, F.elu(k) + 1
            states = torch.einsum("nhtd,nhte->nhtde", k, v).cumsum(2)
            return torch.einsum("nhtd,nhtde->nhte", q, states) / (q * k.cumsum(2)).sum(-1, keepdim=True)

    return with_heads(Linear)


@entry()
def retention() -> Built:
    class Retention(Heads):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(2, 2)

        def mixing(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            away = distances(q.shape[2]).to(q.dtype)
            decay = torch.where(away >= 0, 0.9 ** away.clamp(min=0), 0)
            return self.norm((q @ k.mT * decay) @ v)

    return with_heads(Retention)


@entry()
def rotated_attention_with_rope_in_place() -> Built:
    class Rope(Heads):
        def mixing(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            angle = torch.arange(q.shape[2], dtype=q.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=q.dtype)
            for x in (q, k):
                even, odd = x[..., ::2].clone(), x[..., 1::2].clone()
                x[..., ::2] = even * angle.cos() - odd * angle.sin()
                x[..., 1::2] = even * angle.sin() + odd * angle.cos()
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return with_heads(Rope)


@entry()
def convolution_by_fft() -> Built:
    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.kernel, self.out = nn.Linear(6, 8), nn.Parameter(torch.randn(8, 7) / 3), nn.Linear(8, 3)
            self.gate = nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            spectrum = torch.fft.rfft(self.mix(x).mT, n=14) * torch.fft.rfft(self.kernel, n=14)
            return self.out(torch.fft.irfft(spectrum, n=14)[..., :7].mT * self.gate(x))

    return Long(), mean_square, (torch.randn(2, 7, 6),)


@entry()
def complex_state_space() -> Built:
    class Diagonal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.rates = nn.Linear(6, 8), nn.Parameter(torch.rand(4, 2))
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            u = torch.view_as_complex(self.into(x).unflatten(-1, (4, 2)))
            pole = torch.polar(torch.sigmoid(self.rates[:, 0]), self.rates[:, 1])
            h, states = torch.zeros_like(u[:, 0]), []
            for step in u.unbind(1):
                h = pole * h + step
                states.append(h)
            return self.out(torch.view_as_real(torch.stack(states, 1)).flatten(-2))

    return Diagonal(), mean_square, (torch.randn(2, 5, 6),)


@entry()
def decoder_with_teacher_forcing() -> Built:
    class Translate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.encoder = nn.Embedding(20, 6), nn.GRU(6, 8, batch_first=True)
            self.cell, self.score = nn.LSTMCell(14, 8), nn.Linear(16, 1)
            self.out = nn.Linear(16, 20)

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            memory, last = self.encoder(self.embed(source))
            h, c, logits = last[0], torch.zeros_like(last[0]), []
            word = torch.zeros_like(target[:, 0])
            for t in range(target.shape[1]):
                paired = torch.cat([memory, h[:, None].expand_as(memory)], -1)
                context = (self.score(paired).softmax(1) * memory).sum(1)
                h, c = self.cell(torch.cat([self.embed(word), context], -1), (h, c))
                logits.append(self.out(torch.cat([h, context], -1)))
                word = target[:, t] if t % 2 else logits[-1].argmax(-1)
            return torch.stack(logits, 1)

    def loss(model: nn.Module, source: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(model(source, target).flatten(0, 1), target.flatten())

    return Translate(), loss, (tokens(2, 5, 20), tokens(2, 4, 20))


@entry()
def pointer_network() -> Built:
    class Pointer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.cell = nn.Linear(2, 8), nn.GRUCell(8, 8)
            self.keys, self.query, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1, bias=False)

        def forward(self, x: Tensor, order: Tensor) -> Tensor:
            memory = torch.tanh(self.encode(x))
            keys, h, taken = self.keys(memory), memory.mean(1), torch.zeros(x.shape[:2], dtype=torch.bool)
            loss = 0.0
            for t in range(order.shape[1]):
                scores = self.v(torch.tanh(keys + self.query(h)[:, None])).squeeze(-1).masked_fill(taken, -1e9)
                loss = loss + F.cross_entropy(scores, order[:, t])
                taken = taken.scatter(1, order[:, t, None], True)
                h = self.cell(memory[torch.arange(len(x)), order[:, t]], h)
            return loss

    order = torch.stack([torch.randperm(4) for _ in range(3)])
    return Pointer(), lambda m, x, o: m(x, o), (torch.randn(3, 4, 2), order)


@entry()
def temporal_classification() -> Built:
    class Speech(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.rnn = nn.Conv1d(4, 8, 3, stride=2), nn.GRU(8, 4, bidirectional=True)
            self.out = nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            features = F.relu(self.conv(x), inplace=True).permute(2, 0, 1)
            return self.out(self.rnn(features)[0]).log_softmax(-1)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logs = model(x)
        lengths = torch.full((len(y),), len(logs))
        return F.ctc_loss(logs, y, lengths, torch.tensor([3, 2]))

    return Speech(), loss, (torch.randn(2, 4, 19), torch.randint(1, 6, (2, 3)))


@entry()
def conditional_random_field() -> Built:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.emit = nn.Linear(6, 8), nn.Linear(8, 4)
            self.transitions = nn.Parameter(torch.randn(4, 4) / 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.emit(torch.tanh(self.body(x)))

    def loss(model: nn.Module, x: Tensor, tags: Tensor) -> Tensor:
        scores, transitions = model(x), model.transitions
        alpha = scores[:, 0]
        for t in range(1, x.shape[1]):
            alpha = (alpha[:, :, None] + transitions).logsumexp(1) + scores[:, t]
        gold = scores.gather(-1, tags[..., None]).sum((1, 2)) + transitions[tags[:, :-1], tags[:, 1:]].sum(1)
        return (alpha.logsumexp(1) - gold).mean()

    return Tagger(), loss, (torch.randn(3, 5, 6), torch.randint(4, (3, 5)))


@entry()
def tree_recursion() -> Built:
    class Tree(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.leaf, self.join, self.out = nn.Linear(5, 6), nn.Linear(12, 6), nn.Linear(6, 3)

        def encode(self, leaves: Tensor) -> Tensor:
            if len(leaves) == 1:
                return torch.tanh(self.leaf(leaves[0]))
            cut = len(leaves) // 3 + 1
            return torch.tanh(self.join(torch.cat([self.encode(leaves[:cut]), self.encode(leaves[cut:])])))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.stack([self.encode(x[0]), self.encode(x[1][:3])]))

    return Tree(), classify, (torch.randn(2, 5, 5), torch.tensor([0, 2]))


@entry()
def adaptive_computation_time() -> Built:
    # Tokens leave the recurrence when their halting probability is used up: batches shrink from step to step.
    class Ponder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step, self.halt, self.out = nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            total, spent = torch.zeros_like(x), torch.zeros(len(x), dtype=x.dtype)
            active = torch.arange(len(x))
            for _ in range(4):
                x = torch.tanh(self.step(x))
                p = torch.sigmoid(self.halt(x) + 0.5).squeeze(-1)
                p = torch.minimum(p, 1 - spent[active])
                total = total.index_add(0, active, p[:, None] * x)
                spent = spent.index_add(0, active, p)
                stay = spent[active] < 0.99
                active, x = active[stay], x[stay]
            return self.out(total)

    return Ponder(), mean_square, (torch.randn(7, 8),)


@entry()
def packed_sequences_through_a_linear() -> Built:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.LSTM(5, 6, bidirectional=True, num_layers=2), nn.Linear(12, 3)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.out(self.rnn(packed)[0].data)

    return Packed(), mean_square, (torch.randn(3, 5, 5), torch.tensor([2, 5, 3]))


@entry()
def memory_across_segments() -> Built:
    # Transformer-XL: keys of the segment before, without gradients; truncated backpropagation through a state.
    class Segments(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = nn.RNNCell(6, 8), nn.Linear(8, 3)
            self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h, memory, outputs = torch.zeros(len(x), 8, dtype=x.dtype), None, []
            for segment in x.chunk(3, 1):
                h, states = h.detach(), []
                for step in segment.unbind(1):
                    h = self.cell(step, h)
                    states.append(h)
                states = torch.stack(states, 1)
                seen = states if memory is None else torch.cat([memory, states], 1)
                outputs.append((self.query(states) @ self.key(seen).mT).softmax(-1) @ seen)
                memory = states.detach()
            return self.out(torch.cat(outputs, 1))

    return Segments(), mean_square, (torch.randn(2, 6, 6),)
