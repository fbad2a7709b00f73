"""Multiple choice by likelihood: which continuation of the context is the most probable one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.paper.tasks import Item
from zest_fast.integrations.data.tokens import IGNORED


@dataclass(frozen=True)
class Tokens:
    """Token ids, of which those from `start` on are scored."""

    ids: list[int]
    start: int


def encode(tokenizer: Any, context: str, choice: str, longest: int) -> Tokens:
    """Context and choice as one text, cut on the left where it is too long; the choice is what the context's own tokens
    leave.
    """
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    before = first + tokenizer(context, add_special_tokens=False)["input_ids"]
    ids = first + tokenizer(f"{context} {choice}", add_special_tokens=False)["input_ids"]
    start = min(len(before), len(ids) - 1)
    cut = max(0, len(ids) - longest)
    return Tokens(ids[cut:], max(1, start - cut))


def training_batch(sequences: Sequence[Tokens], pad: int) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels [samples, tokens], padded on the right; only what is scored has a label."""
    length = max(len(sequence.ids) for sequence in sequences)
    ids = torch.full((len(sequences), length), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, sequence in enumerate(sequences):
        end = len(sequence.ids)
        ids[row, :end] = torch.tensor(sequence.ids)
        mask[row, :end] = 1
        labels[row, sequence.start : end] = ids[row, sequence.start : end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def log_likelihoods(model: Any, sequences: Sequence[Tokens], batch_size: int, pad: int) -> Tensor:
    """float64 [sequences]: log-probability of the scored tokens of each, given all before them.

    Sequences of like length share a batch; what stands beside one does not change its value.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(sequences)), key=lambda place: len(sequences[place].ids))
    found = torch.zeros(len(sequences), dtype=torch.float64)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = {k: v.to(device) for k, v in training_batch([sequences[row] for row in rows], pad).items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        tokens = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        found[rows] = (tokens.double() * (labels != IGNORED)).sum(1).cpu()
    return found


def accuracy(items: Sequence[Item], likelihoods: Tensor) -> dict[str, float]:
    """accuracy: the most probable choice is right. accuracy_norm: the most probable per byte is (as acc_norm)."""
    right = normed = 0
    parts = likelihoods.split([len(item.choices) for item in items])
    for item, scores in zip(items, parts, strict=True):
        sizes = torch.tensor([len(choice.encode()) for choice in item.choices], dtype=scores.dtype)
        right += int(scores.argmax()) == item.answer
        normed += int((scores / sizes).argmax()) == item.answer
    return {"accuracy": right / len(items), "accuracy_norm": normed / len(items)}
