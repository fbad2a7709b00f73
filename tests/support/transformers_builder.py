"""Tiny models of every architecture that transformers knows: no weights, no downloads, sizes by name.

`architectures()` lists the model types, `build(model_type)` gives a model with a closure that returns its loss. The
default configuration of a type is shrunk by a table of the names that configurations use; inputs follow from the
signature of forward. What cannot be built that way raises `NotBuilt` with the reason.
"""

from __future__ import annotations

import copy
import inspect
import logging
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import configuration_auto, modeling_auto

SAMPLES, LENGTH, VOCABULARY = 2, 7, 128
LARGEST = 8_000_000  # parameters; beyond, the table below has missed a name

WIDTH, HEADS, HEAD_WIDTH, DEPTH = 32, 4, 8, 2
SPREAD = 0.15  # of fresh weights: the usual 0.02 lets the signal of narrow layers die
SIZES = (
    (
        WIDTH,
        """
        hidden_size d_model n_embd embed_dim dim emb_dim hidden_dim encoder_hidden_size decoder_hidden_size
        projection_dim embedding_size out_hidden_size output_hidden_size embedding_dim text_hidden_size qk_head_dim
        pooler_hidden_size pooler_output_size image_text_hidden_size decoder_embed_dim hidden_channels d_embed
        fusion_hidden_size encoder_hidden_dim fpn_hidden_size d_latents auxiliary_channels feature_size latent_dim
        hidden_size_per_layer_input mask_feature_size feature_projection_input_dim codevector_dim
        proj_codevector_dim memory_attention_hidden_size memory_encoder_hidden_size classifier_proj_size
        xvector_output_dim lm_head_dim attention_hidden_size width lru_width codebook_dim
        vector_quantization_hidden_dimension mamba_d_state projector_hidden_size adapter_hidden_size
        multimodal_projector_hidden_size vision_hidden_size abstractor_dim
        """,
    ),
    (
        2 * WIDTH,
        """
        intermediate_size moe_intermediate_size encoder_ffn_dim decoder_ffn_dim d_ff ffn_dim mlp_dim n_inner
        ffn_hidden_size shared_expert_intermediate_size d_inner decoder_intermediate_size ffn_intermediate_size
        shared_intermediate_size memory_fuser_intermediate_dim memory_attention_feed_forward_hidden_size
        dim_feedforward encoder_intermediate_size moe_shared_expert_intermediate_size block_ff_dim mlp_hidden_size
        intermediate_size_mlp dense_intermediate_size expert_ffn_hidden_size ffn_dim_encoder ffn_dim_decoder
        """,
    ),
    (
        HEADS,
        """
        num_attention_heads n_head num_heads encoder_attention_heads decoder_attention_heads n_heads
        num_key_value_heads swa_num_attention_heads swa_num_key_value_heads decoder_num_attention_heads
        attention_heads linear_num_key_heads linear_num_value_heads linear_num_heads index_n_heads
        num_cross_attention_heads encoder_num_attention_heads num_decoder_heads n_head_kv decoder_num_heads
        num_self_attention_heads encoder_num_key_value_heads decoder_num_key_value_heads num_kv_heads
        """,
    ),
    (
        HEAD_WIDTH,
        """
        head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim swa_head_dim rotary_dim linear_key_head_dim d_kv
        d_head linear_value_head_dim linear_head_dim index_head_dim kv_channels global_head_dim attention_head_dim
        """,
    ),
    (2 * HEAD_WIDTH, "kv_lora_rank q_lora_rank o_lora_rank"),
    (
        DEPTH,
        """
        num_hidden_layers n_layer num_layers encoder_layers decoder_layers n_layers num_encoder_layers depth
        num_decoder_layers decoder_num_hidden_layers encoder_num_hidden_layers decoder_num_layers num_blocks
        decoder_depth num_encoder_hidden_layers memory_attention_num_layers num_blocks_per_stage x_layers l_layers
        r_layers encoder_num_layers speech_decoder_prenet_layers num_detection_layers
        """,
    ),
    (4, "n_routed_experts num_experts num_local_experts moe_num_experts n_group num_expert_group"),
    (
        2,
        """
        num_experts_per_tok num_experts_per_token moe_k moe_topk topk_group experts_per_token top_k
        n_experts_per_tok
        """,
    ),
    (
        VOCABULARY,
        """
        vocab_size codebook_size vocab_size_per_layer_input unpadded_vocab_size entity_vocab_size head_out_channels
        """,
    ),
    (
        64,
        """
        max_position_embeddings n_positions max_source_positions max_target_positions model_max_length max_seq_len
        """,
    ),
    (8, "patch_size"),
    (32, "image_size pretrain_image_size"),
    (10, "num_queries num_denoising num_query_tokens"),
)
SIZE_OF = {name: size for size, names in SIZES for name in names.split()}
WIDTHS = {"hidden_sizes", "embed_dims", "encoder_hidden_sizes", "conv_dim", "decoder_hidden_sizes", "embed_dim"}
DEPTHS = {"depths", "layer_depths", "num_blocks", "encoder_depths"}
# What the names above cannot say: options that default to None, or that have to agree with each other.
OVERRIDES: dict[str, dict[str, object]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "attn_layer_indices": [1]},
    "bit": {"num_groups": 8},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320, "initializer_range": 0.5},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16},
    "hunyuan_v1_dense": {"head_dim": HEAD_WIDTH},
    "ministral": {"head_dim": HEAD_WIDTH},
    "mistral4": {"qk_head_dim": 2 * HEAD_WIDTH},
    "roc_bert": {"pronunciation_vocab_size": VOCABULARY, "shape_vocab_size": VOCABULARY, "shape_embed_dim": WIDTH},
    "xmod": {"default_language": "en_XX"},
}
TASKS = (
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "IMAGE_CLASSIFICATION",
    "SEQUENCE_CLASSIFICATION",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "SPEECH_SEQ_2_SEQ",
    "SEMANTIC_SEGMENTATION",
    "IMAGE_TEXT_TO_TEXT",
    "OBJECT_DETECTION",
    "DEPTH_ESTIMATION",
    "MASKED_IMAGE_MODELING",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "PRETRAINING",
    "BACKBONE",
)


class NotBuilt(Exception):
    """Why a tiny model of an architecture does not exist."""


@dataclass
class Tiny:
    """A model in train mode, the arguments of its forward, and how to make the same model again."""

    make: Callable[[], nn.Module]
    model: nn.Module
    arguments: dict[str, object]

    def closure(self) -> Tensor:
        for reseed in (torch.manual_seed, random.seed, np.random.seed):
            reseed(2)
        return loss_of(self.model(**self.arguments))

    def again(self) -> Tiny:
        """The same model anew, with the same data."""
        return Tiny(self.make, self.make(), self.arguments)

    def in_double(self) -> Tiny:
        """The same model anew, and its data, in float64."""
        model = self.make().double()
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the grouped product of experts knows no float64
        return Tiny(self.make, model, {name: doubled(value) for name, value in self.arguments.items()})


def doubled(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def loss_of(output: object) -> Tensor:
    """The loss of the model, else the mean squared distance of its first floating output from a ramp.

    Not from zero: outputs of a normalisation all have the same mean square, whose gradient is nothing but rounding.
    """
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss.sum()
    first = next(floating(output), None)
    if first is None:
        raise NotBuilt("forward returns no floating tensor that depends on the weights")
    ramp = torch.linspace(-1, 1, first.numel(), dtype=first.dtype).view_as(first)
    return (first - ramp).square().mean()


def floating(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.requires_grad:
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from floating(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from floating(value)


def architectures() -> list[str]:
    """The model types that have a configuration and a model."""
    return sorted(name for name in configuration_auto.CONFIG_MAPPING_NAMES if classes_of(name))


def classes_of(model_type: str) -> list[str]:
    """Names of the classes of that type, those with a loss of their own first."""
    names = []
    for mapping in [f"MODEL_FOR_{task}_MAPPING_NAMES" for task in TASKS] + ["MODEL_MAPPING_NAMES"]:
        found = getattr(modeling_auto, mapping).get(model_type, ())
        names += [found] if isinstance(found, str) else list(found)
    return list(dict.fromkeys(names))


def build(model_type: str) -> Tiny:
    """A tiny model of that type, the first of its classes that runs forward and backward."""
    logging.disable(logging.WARNING)
    reasons = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = tiny_config(getattr(transformers, configuration_auto.CONFIG_MAPPING_NAMES[model_type]))
            for name in classes_of(model_type):
                try:
                    return runnable(getattr(transformers, name), copy.deepcopy(config))
                except Exception as error:
                    reasons.append(f"{name}: {described(error)}")
    except Exception as error:
        raise NotBuilt(f"configuration: {described(error)}") from error
    finally:
        logging.disable(logging.NOTSET)
    raise NotBuilt("; ".join(reasons))


def described(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"


def tiny_config(config_class: type) -> transformers.PreTrainedConfig:
    """The default configuration of the class with every known size made small."""
    default = config_class()
    changed: dict[str, object] = {}
    for name, value in vars(default).items():
        if isinstance(value, transformers.PreTrainedConfig):
            changed[name] = tiny_config(type(value))
        else:
            small = shrunk(name, value)
            if small != value:
                changed[name] = small
    changed.pop("layer_types", None)
    config = config_class(**changed | OVERRIDES.get(config_class.model_type, {}))
    for name, value in (("use_cache", False), ("num_labels", 3)):
        if hasattr(config, name):
            setattr(config, name, value)
    return config


def shrunk(name: str, value: object) -> object:
    """The small value of an option, or `value` itself where nothing is known of it."""
    if isinstance(value, bool) or value is None:
        return value
    if name.startswith("drop_path"):  # draws in the model's own precision: other masks in float64
        return [0.0] * len(value) if isinstance(value, list | tuple) else 0.0
    if isinstance(value, int) and name.endswith(("token_id", "token_index", "_index")) and value >= VOCABULARY:
        return 64 + value % 64
    if isinstance(value, float) and name in ("initializer_range", "init_std") and 0 < value < SPREAD:
        return SPREAD
    if isinstance(value, int) and name in SIZE_OF:
        return min(value, SIZE_OF[name])
    if isinstance(value, list | tuple) and value and all(isinstance(each, int) for each in value):
        return type(value)(shrunk_list(name, value))
    if isinstance(value, dict) and "mrope_section" in value:
        return value | {"mrope_section": [HEAD_WIDTH // 4, HEAD_WIDTH // 8, HEAD_WIDTH // 8]}
    return value


def shrunk_list(name: str, values: list[int]) -> list[int]:
    """Widths, depths and heads of the stages of a hierarchical model."""
    if name in WIDTHS:
        return [max(min(value, 16), value // 8 // 8 * 8) for value in values]
    if name in DEPTHS:
        return [1] * len(values)
    if SIZE_OF.get(name) == HEADS:
        return [min(value, 2) for value in values]
    return list(values)


def runnable(model_class: type, config: transformers.PreTrainedConfig) -> Tiny:
    """A model of that class with the first set of arguments under which the loss reaches a weight."""
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise NotBuilt(f"still {size:,} parameters when shrunk")

    def make() -> nn.Module:
        torch.manual_seed(1)
        model = model_class(copy.deepcopy(config)).float().train()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()  # normalised over two samples, a feature is hardly more than its sign
        return model

    model = make()
    reasons = []
    for arguments in candidate_arguments(model):
        tiny = Tiny(make, model, arguments)
        try:
            loss = tiny.closure()
            loss.backward()
            if not torch.isfinite(loss):
                raise NotBuilt("the loss is not finite")
        except Exception as error:
            reasons.append(described(error))
        else:
            return tiny.again()
    raise NotBuilt(" | ".join(dict.fromkeys(reasons)))


def candidate_arguments(model: nn.Module) -> Iterator[dict[str, object]]:
    """Arguments to try, those with labels first."""
    accepted = inspect.signature(model.forward).parameters
    torch.manual_seed(3)
    for inputs in candidate_inputs(model, set(accepted)):
        for labels in candidate_labels(inputs) if "labels" in accepted else ():
            yield inputs | {"labels": labels}
        yield inputs


def candidate_inputs(model: nn.Module, accepted: set[str]) -> Iterator[dict[str, object]]:
    config = model.config
    main = getattr(model, "main_input_name", "input_ids")
    extra = {}
    if "decoder_input_ids" in accepted:
        extra["decoder_input_ids"] = text()
    if "bbox" in accepted:
        extra["bbox"] = torch.zeros(SAMPLES, LENGTH, 4, dtype=torch.long)
    for value in MAIN_INPUTS.get(main, lambda config: [])(config):
        yield {main: value}
        if extra:
            yield {main: value} | extra
        if main == "input_ids" and "pixel_values" in accepted:
            yield from ({main: value, "pixel_values": picture} | extra for picture in pictures(config))
        if main != "input_ids" and "input_ids" in accepted:
            yield {main: value, "input_ids": text()} | extra
    if main != "input_ids" and "input_ids" in accepted:
        yield {"input_ids": text()} | extra


def candidate_labels(inputs: dict[str, object]) -> Iterator[Tensor]:
    if "input_ids" in inputs:
        yield inputs["input_ids"]
    yield torch.tensor([0, 1])
    yield torch.randint(1, 3, (SAMPLES, LENGTH))


def text() -> Tensor:
    return torch.randint(5, 60, (SAMPLES, LENGTH))


def option(config: object, names: str, default: int) -> int:
    """The first of the named options that the configuration, or one inside it, has as a number."""
    nested = [value for value in vars(config).values() if isinstance(value, transformers.PreTrainedConfig)]
    for name in names.split():
        for each in [config, *nested]:
            value = getattr(each, name, None)
            if isinstance(value, list | tuple) and value:
                value = value[0]
            if isinstance(value, int):
                return value
    return default


def pictures(config: object) -> Iterator[Tensor]:
    channels = option(config, "num_channels in_channels in_chans", 3)
    frames = option(config, "num_frames", 0)
    for size in dict.fromkeys((option(config, "image_size", 32), 32, 64, 224)):
        yield torch.randn(SAMPLES, channels, size, size)
        if frames:
            yield torch.randn(SAMPLES, frames, channels, size, size)


def spectra(config: object) -> Iterator[Tensor]:
    bins = option(config, "num_mel_bins input_feat_per_channel feature_size input_dim", 80)
    for length in dict.fromkeys((2 * option(config, "max_source_positions", 32), 64)):
        yield torch.randn(SAMPLES, bins, length)
        yield torch.randn(SAMPLES, length, bins)


def waves(config: object) -> Iterator[Tensor]:
    yield torch.randn(SAMPLES, 4000)
    yield torch.randn(SAMPLES, 1, 4000)
    yield torch.randn(SAMPLES, option(config, "max_length", 64), option(config, "num_mel_bins", 128))


MAIN_INPUTS: dict[str, Callable[[object], Iterator[Tensor]]] = {
    "input_ids": lambda config: iter([text()]),
    "pixel_values": pictures,
    "pixel_values_videos": pictures,
    "input_features": spectra,
    "input_values": waves,
}
