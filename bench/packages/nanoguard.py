"""A small transformer that was trained to tell prompt injections: of PyPI's metatronnanoguard (MIT).

No biases, rotary positions, squared ReLU, norms without parameters, and the embeddings added again before each block.
"""

from __future__ import annotations

import io
import pickle
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.packages.classifiers import Classifier
from bench.packages.installed import installed, pinned
from bench.packages.language import TOKENS

_WIDTH = 512
_HEADS = 4


class NanoGuard(nn.Module):
    """Features [samples, 512]: the mean over the tokens, normalised."""

    def __init__(self, tokens: int = TOKENS) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8192, _WIDTH)
        self.blocks = nn.ModuleList(_Block() for _ in range(4))
        self.norm = nn.LayerNorm(_WIDTH)
        self.keep = nn.Parameter(torch.ones(4))
        self.again = nn.Parameter(torch.zeros(4))
        half = _WIDTH // _HEADS // 2
        angles = torch.arange(tokens)[:, None] / 10000 ** (torch.arange(half) / half)
        # The file's model was trained with bfloat16 tables.
        self.register_buffer("cos", angles.cos().bfloat16().float(), persistent=False)
        self.register_buffer("sin", angles.sin().bfloat16().float(), persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = first = _normed(self.embedding(input_ids))
        for keep, again, block in zip(self.keep, self.again, self.blocks, strict=True):
            x = block(keep * x + again * first, self.cos, self.sin)
        mask = attention_mask[:, :, None].to(x.dtype)
        return self.norm((_normed(x) * mask).sum(1) / mask.sum(1))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(4)
        )  # fmt: skip
        self.up_proj = nn.Linear(_WIDTH, 4 * _WIDTH, bias=False)
        self.down_proj = nn.Linear(4 * _WIDTH, _WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = _normed(x)
        q, k, v = (_in_heads(projection(y)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        q, k = _normed(_rotated(q, cos, sin)), _normed(_rotated(k, cos, sin))
        # Padding is attended to, as in training.
        x = x + self.o_proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down_proj(functional.relu(self.up_proj(_normed(x))).square())


def _normed(x: Tensor) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],))


def _in_heads(x: Tensor) -> Tensor:
    """[samples, tokens, width] -> [samples, heads, tokens, width / heads]."""
    return x.unflatten(2, (_HEADS, -1)).transpose(1, 2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x.chunk(2, dim=-1)
    cos, sin = cos[: x.shape[2]], sin[: x.shape[2]]
    return torch.cat([one * cos + two * sin, two * cos - one * sin], dim=-1)


def nanoguard(classes: int) -> nn.Module:
    return Classifier(nanoguard_body(), _WIDTH, classes)


def nanoguard_body(tokens: int = TOKENS) -> NanoGuard:
    path = installed("nanoguard", "metatronnanoguard", "0.1.0") / "assets/model.pt"
    state = torch.load(path, map_location="cpu", weights_only=True)["model_state_dict"]
    names = {
        "transformer.wte": "embedding", "transformer.h": "blocks", "cls_norm": "norm", "resid_lambdas": "keep",
        "x0_lambdas": "again", "attn.c_q": "q_proj", "attn.c_k": "k_proj", "attn.c_v": "v_proj",
        "attn.c_proj": "o_proj", "mlp.c_fc": "up_proj", "mlp.c_proj": "down_proj",
    }  # fmt: skip
    renamed = {}
    for name, value in state.items():
        if name.startswith("cls_head"):
            continue
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        renamed[name] = value.float()
    model = NanoGuard(tokens)
    model.load_state_dict(renamed)
    return model


class _OnlyAnEncoding(pickle.Unpickler):
    """Of a pickle of tiktoken's Encoding: what it would be made from. Raises UnpicklingError for anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise pickle.UnpicklingError(f"{module}.{name} is not loaded")
        return _Encoding


class _Encoding:
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.parts = state


@cache
def _tokenizer() -> Any:
    path = installed("nanoguard", "metatronnanoguard", "0.1.0") / "assets/tokenizer.pkl"
    try:
        import tiktoken
    except ImportError:
        raise RuntimeError("tiktoken is not installed; run: pip install tiktoken") from None
    content = pinned(path, "e81fa2a4d6202a18d05a50dfe8eb101042512056b2d0492c929e8fea4fa02246")
    return tiktoken.Encoding(**_OnlyAnEncoding(io.BytesIO(content)).load().parts)


def nanoguard_tokens(texts: list[str]) -> dict[str, Tensor]:
    tokenizer = _tokenizer()
    begin, padding = (tokenizer.encode_single_token(f"<|reserved_{number}|>") for number in (0, 1))
    ids = torch.full((len(texts), TOKENS), padding)
    mask = torch.zeros(len(texts), TOKENS, dtype=torch.long)
    for row, text in enumerate(texts):
        tokens = [begin, *tokenizer.encode_ordinary(text)][:TOKENS]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask}
