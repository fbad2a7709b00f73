"""What the models of all packages have in common: a body, a fresh linear head, pixels as the body wants them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Classifier(nn.Module):
    """A body that yields features [samples, channels], and a linear head."""

    def __init__(self, body: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(features, classes)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.head(self.body(*args, **kwargs))


class SentenceEncoder(nn.Module):
    """Mean over the tokens, of length 10."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return 10 * functional.normalize(mean, dim=-1)


def scaled(mean: float, scale: float, pixels: Tensor) -> Tensor:
    """uint8 [samples, height, width, 3] -> float32 [samples, 3, height, width], channels last in memory."""
    return ((pixels.permute(0, 3, 1, 2).float() - mean) / scale).contiguous(memory_format=torch.channels_last)
