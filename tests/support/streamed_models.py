"""Small models in folders of shards, the same resident and streamed, and what of them is resident."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import transformers

LAYERS = ["model.layers.2.mlp.up_proj", "model.layers.3.self_attn.q_proj"]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 500,
    "use_cache": False,
}


def save_shards(folder: Path, model: torch.nn.Module, dtype: torch.dtype = torch.float32, size: str = "100KB") -> Path:
    model.to(dtype).save_pretrained(folder, max_shard_size=size)
    return folder


def save_llama(folder: Path, dtype: torch.dtype = torch.float32, size: str = "100KB", **settings) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, **settings})
    return save_shards(folder, transformers.LlamaForCausalLM(config), dtype, size)


def resident(folder: Path) -> torch.nn.Module:
    kind = getattr(transformers, transformers.AutoConfig.from_pretrained(folder).architectures[0])
    return kind.from_pretrained(folder).eval()


def tokens(seed: int = 1, length: int = 12) -> dict[str, torch.Tensor]:
    ids = torch.randint(SIZES["vocab_size"], (2, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def losses_and_gradients(model, tuned, *batches):
    losses = [model(**batch).loss for batch in batches]  # all graphs are alive before the first backward pass
    for loss in losses:
        loss.backward()
    found = [loss.detach() for loss in losses] + [parameter.grad.clone() for parameter in tuned.parameters()]
    for parameter in tuned.parameters():
        parameter.grad = None
    return found


def assert_bits(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
        assert torch.isfinite(a).all()


def mapped_bytes(folder: Path) -> int:
    """Resident pages of this process that are mapped from files of the folder."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = str(folder) in line
        elif inside and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found
