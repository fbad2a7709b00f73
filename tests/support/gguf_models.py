"""GGUF files of tiny models as llama.cpp's converter writes them, by a definition of its own: index by index."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from torch import nn

TYPES = {"f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16}
TYPES |= {"bf16": gguf.GGMLQuantizationType.BF16, "q8_0": gguf.GGMLQuantizationType.Q8_0}

_LLAMA = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GPT2 = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_BERT = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
_BLOCKS = {"gpt2": _GPT2, "bert": _BERT}
_OUTSIDE = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}


def rotated(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row i of the first half of a head goes to 2 i, row i of the second to 2 i + 1."""
    size = len(rows) // heads
    out = np.empty_like(rows)
    for head in range(heads):
        for place in range(size // 2):
            out[head * size + 2 * place] = rows[head * size + place]
            out[head * size + 2 * place + 1] = rows[head * size + size // 2 + place]
    return out


def tensors(model: nn.Module) -> dict[str, np.ndarray]:
    """As llama.cpp lays them out, in float32."""
    kind, config, found = model.config.model_type, model.config, {}
    for name, parameter in model.named_parameters():
        owner, _, own = name.rpartition(".")
        values = parameter.detach().float().numpy()
        if owner in _OUTSIDE:
            found[f"{_OUTSIDE[owner]}.{own}"] = values
            continue
        _, _, block, inner = owner.split(".", 3)
        if kind in ("llama", "mistral") and inner.endswith(("q_proj", "k_proj")):
            values = rotated(values, config.num_attention_heads if "q_proj" in inner else config.num_key_value_heads)
        if kind == "gpt2" and values.ndim == 2:
            values = np.ascontiguousarray(values.T)
        found[f"blk.{block}.{_BLOCKS.get(kind, _LLAMA)[inner]}.{own}"] = values
    return found


def save_gguf(model: nn.Module, path: Path, kind: str = "f32") -> Path:
    config, name = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, {"mistral": "llama"}.get(name, name))
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if name == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    elif name == "bert":
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    for home, values in tensors(model).items():
        kept = TYPES[kind] if values.ndim == 2 else TYPES["f32"]
        writer.add_tensor(home, gguf.quantize(values, kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path: Path) -> dict[str, torch.Tensor]:
    return {
        one.name: torch.from_numpy(np.array(gguf.dequantize(one.data, one.tensor_type)))
        for one in gguf.GGUFReader(path).tensors
    }
