"""Small models for the tests of selective fine-tuning."""

from __future__ import annotations

import pytest
import torch
from torch import nn


class Mlp(nn.Module):
    """Linear classifier whose blocks run in another order than they are registered: c, a, b, head."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.b(self.a(self.c(x).relu()).relu()).relu())


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4, num_layers=2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def conv_net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    )


def images(count=5):
    return 3 + 2 * torch.randn(count, 1, 6, 6)


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
}  # of a model of transformers


def llama(**config):
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **config}))


def step(parameters, loss):
    """One optimizer step with momentum-free SGD on freshly computed gradients."""
    optimizer = torch.optim.SGD(list(parameters), lr=0.1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def snapshot(model):
    """All that wrapping may touch: parameters and buffers, flags, modes and hooks."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        {
            n: (dict(m._forward_hooks), dict(m._forward_pre_hooks), dict(m._backward_hooks))
            for n, m in model.named_modules()
        },
    )


def assert_same(before, after):
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    for name, tensor in before[0].items():
        assert torch.equal(tensor, after[0][name]), name
