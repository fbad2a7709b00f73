"""The planned memory of a probe against the counted one, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zest_fast
from zest_fast.planning.counted_memory import peak_bytes
from zest_fast.probing import budget as budgets

transformers = pytest.importorskip("transformers")


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=192, intermediate_size=768, num_hidden_layers=1, num_attention_heads=4, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=192, intermediate_size=768, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("build", [bert, llama])
@pytest.mark.parametrize("memory", [1 << 30, 8 << 20])
def test_the_planned_peak_is_that_of_a_probe(build, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, and where the weights come in groups."""
    monkeypatch.setattr(budgets, "MEMORY", memory)
    model, tokens = build(), torch.randint(60, (64, 16))
    labels = torch.arange(64) % 3 if build is bert else tokens
    batches = [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}]
    counted = peak_bytes(lambda: zest_fast.probe(model, batches, budget=0.5, progress=False))
    planned = zest_fast.plan_probe(model, budget=0.5, samples=64, sequence_length=16, dtype=None)
    beside_weights = planned.peak_bytes - planned.breakdown["weights"]
    copied = sum(4 * parameter.numel() for parameter in model.parameters())  # as a profile does of small models
    assert 0.94 * beside_weights < counted < 1.06 * beside_weights + copied
    assert planned.purpose == "probe" and planned.notes[0].startswith("one pass") == (memory == 1 << 30)


def test_a_large_model_takes_many_passes_over_few_samples() -> None:
    planned = zest_fast.plan_probe("llama-7b", sequence_length=64)
    assert "1 directions" in planned.notes[0] or "2 directions" in planned.notes[0]
    with pytest.raises(ValueError, match="too small for one probe of these 224 layers; at least"):
        zest_fast.plan_probe("llama-7b", sequence_length=64, budget=0.02)
