"""Samples for a probe from a loader: enough of them, and of one length."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zest_fast
from zest_fast.probing.collecting import collect


def tokens(count: int, length: int) -> dict[str, torch.Tensor]:
    shape = (count, length)
    return {
        "input_ids": torch.ones(shape, dtype=torch.int64),
        "attention_mask": torch.ones(shape, dtype=torch.int64),
        "labels": torch.full(shape, 3),
        "score": torch.ones(count),
    }


def test_no_more_batches_than_are_needed() -> None:
    pairs = [(torch.randn(8, 2), torch.zeros(8, dtype=torch.int64)) for _ in range(9)]
    taken = []
    found = collect(nn.Linear(2, 2), (taken.append(pair) or pair for pair in pairs), samples=20)
    assert len(found) == len(taken) == 3 and all(a is b for a, b in zip(found, pairs, strict=False))
    assert len(collect(nn.Linear(2, 2), pairs)) == 9


def test_tokens_are_padded_to_the_longest() -> None:
    transformers = pytest.importorskip("transformers")
    model = nn.Module()
    model.config = transformers.PretrainedConfig(pad_token_id=7)
    short, long = tokens(3, 4), tokens(2, 6)
    found, other = collect(model, [short, long])
    assert found["input_ids"][:, 4:].eq(7).all() and found["attention_mask"][:, 4:].eq(0).all()
    assert found["labels"][:, 4:].eq(-100).all() and found["score"] is short["score"]
    assert found["input_ids"].shape == (3, 6) and other["input_ids"] is long["input_ids"]
    assert short["input_ids"].shape == (3, 4)  # the loader's own is as it was


def test_padding_changes_no_gain_of_a_language_model() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(1, 50, (64, 5))
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    longer = tokens(1, 9)
    padded = collect(model, [plain, {**longer, "score": torch.ones(1)}])[0]
    first = zest_fast.probe(model, [plain], budget=0.1, progress=False)
    second = zest_fast.probe(model, [padded], budget=0.1, progress=False)
    assert second.gains == pytest.approx(first.gains, abs=1e-5)
