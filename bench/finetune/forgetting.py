"""What a text model still does of what it could before it was fine-tuned, on sentences of other data.

MiniLM was trained to tell how similar two sentences are: Spearman's correlation between the cosine similarities of all
pairs of sentences before and after (1 = nothing is forgotten). SmolLM2 was trained to go on with a text: the perplexity
of its tied language head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

from bench.data import DATASETS, MODELS

SENTENCES = 300
OTHERS = ("trec", "sms-spam", "movie-sentiment", "amazon-sentiment")
"""The sentences are those of these data sets that are of another family, equally many of each."""


def score_of(model_name: str, dataset: str) -> tuple[str, Callable[[nn.Module, nn.Module], float]] | None:
    """Its name, and a function (model before, model after) -> score; None where the model's first task is not known."""
    if model_name not in _SCORES:
        return None
    name, score = _SCORES[model_name]
    tokens = MODELS[model_name].prepare(_sentences(dataset))
    return name, lambda before, after: score(before, after, tokens)


def _sentences(dataset: str) -> list[str]:
    others = [DATASETS[name] for name in OTHERS if DATASETS[name].family != DATASETS[dataset].family]
    each = SENTENCES // len(others)
    found = []
    for data in others:
        loaded: Any = data.load()
        order = torch.randperm(len(loaded.texts), generator=torch.Generator().manual_seed(17))
        found += [loaded.texts[place] for place in order[:each].tolist()]
    return found


@torch.no_grad()
def similarity(before: nn.Module, after: nn.Module, tokens: dict[str, Tensor]) -> float:
    """Rank correlation of the similarities of all pairs of sentences; `.body` encodes them, all of one length."""
    pairs = torch.ones(len(tokens["input_ids"]), len(tokens["input_ids"])).triu(1).bool()
    one, other = ((sentences := model.body(**tokens)) @ sentences.T for model in (before, after))
    return float(spearmanr(one[pairs].numpy(), other[pairs].numpy()).statistic)


@torch.no_grad()
def perplexity(before: nn.Module, after: nn.Module, tokens: dict[str, Tensor]) -> float:
    """Of the sentences, by `.body.encoder` and its embeddings as the head."""
    decoder: Any = after.body.encoder  # type: ignore[union-attr]
    losses = []
    for ids, mask in zip(tokens["input_ids"].split(50), tokens["attention_mask"].split(50), strict=True):
        hidden = decoder(input_ids=ids, attention_mask=mask).last_hidden_state
        logits = hidden[:, :-1] @ decoder.get_input_embeddings().weight.T
        losses.append(
            functional.cross_entropy(logits[mask[:, 1:] == 1], ids[:, 1:][mask[:, 1:] == 1], reduction="none")
        )
    return math.exp(torch.cat(losses).mean().item())


_SCORES = {"minilm": ("similarity", similarity), "smollm2": ("perplexity", perplexity)}
