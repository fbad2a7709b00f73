"""The model of a plan, without weights: from a model, a configuration of transformers, its file, or a name."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.foundation.hub_kernels import refuse_kernels
from zest_fast.foundation.nearest import nearest
from zest_fast.foundation.text_table import first_line

# What `plan` knows by name, and how it differs from the defaults of the configuration's class (which are LLaMA-7B and
# BERT-base themselves). The images' models have the 1000 classes of ImageNet, the texts' classifiers two.
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-7b": ("LlamaConfig", {}),
    "llama-13b": (
        "LlamaConfig",
        {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    ),
    "llama-3-8b": (
        "LlamaConfig",
        {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192},
    ),
    "mistral-7b": ("MistralConfig", {}),
    "gpt2": ("GPT2Config", {}),
    "bert-base": ("BertConfig", {}),
    "bert-large": (
        "BertConfig",
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    ),
    "vit-base": ("ViTConfig", {"num_labels": 1000}),
    "resnet-50": ("ResNetConfig", {"num_labels": 1000}),
    "mobilenet-v2": ("MobileNetV2Config", {"num_labels": 1000}),
    "efficientnet-b0": (
        "EfficientNetConfig",
        {"num_labels": 1000, "width_coefficient": 1.0, "depth_coefficient": 1.0, "image_size": 224}
        | {"hidden_dim": 1280, "dropout_rate": 0.2},
    ),
}


def named_model(source: Any) -> tuple[str, nn.Module]:
    """A name for people, and the model on the meta device; what the user gave is left as it is.

    source: an nn.Module; a PretrainedConfig; a key of NAMED in any spelling ("LLaMA-7B", "llama_7b"); a config.json or
    the folder that holds one; a hub id whose configuration transformers can get.
    Raises ValueError for what is none of these, and for a configuration that is neither causal LM nor classifier.
    """
    if isinstance(source, nn.Module):
        return type(source).__name__, _without_weights(source)
    config = _config(source)
    model = _from_config(config)
    name = source if isinstance(source, str) else config.model_type
    return f"{name} ({type(model).__name__})", model


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are on the meta device, strides and ties as they are."""
    tensors: Iterable[Tensor] = (*model.parameters(), *model.buffers())
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever the attributes of a stranger's module raise
        raise ValueError(
            f"the {type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and a plan works on a "
            "copy; pass its configuration"
        ) from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("a configuration needs transformers: pip install 'zest_fast[transformers]'") from error
    return transformers


def _config(source: Any) -> Any:
    transformers = _transformers()
    if isinstance(source, transformers.PretrainedConfig):
        return source
    if not isinstance(source, str | Path):
        raise TypeError(
            f"model_or_config is a {type(source).__name__}; a torch.nn.Module, a PretrainedConfig, a name or a path is "
            "needed"
        )
    key = re.sub(r"[\s_]+", "-", str(source).strip().lower())
    if key in NAMED:
        kind, changes = NAMED[key]
        return getattr(transformers, kind)(**changes)
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"model {str(source)!r}: the folder holds no config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(str(source), trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, and those of the hub's client
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"model {str(source)!r} asks to run code of its own, and code that comes with a configuration is never "
                "run here: build the model in code that you have read, and plan that (zest-fast plan: module:function)"
            ) from error
        where = f"{source} is no configuration" if path.exists() else f"model {str(source)!r} is unknown"
        why = first_line(error)
        raise ValueError(
            f"{where} ({why}); a plan takes a config.json, a PretrainedConfig, an nn.Module or a name: "
            + nearest(key, NAMED)
        ) from error
    refuse_kernels(str(source), config)
    return config


def _from_config(config: Any) -> nn.Module:
    """The causal LM or classifier of a configuration, in the class that its `architectures` names if they name one."""
    transformers = _transformers()
    kind = next((getattr(transformers, name, None) for name in config.architectures or ()), None)
    if kind is None or not re.search(r"For\w*(Causal|Classification|Generation)|LMHead", kind.__name__):
        kind = _auto_class(config, transformers)
    build = getattr(kind, "_from_config", None) or functools.partial(kind.from_config, trust_remote_code=False)
    config = copy.deepcopy(config)
    if getattr(config, "use_cache", False):  # keys and values for generation, which training has no use for
        config.use_cache = False
    with torch.device("meta"):
        return build(config)


def _auto_class(config: Any, transformers: Any) -> Any:
    """Encoders of text can be causal LMs too, but are classifiers first; so a masked LM decides."""
    from transformers.models.auto import modeling_auto as auto

    model_type = config.model_type
    if model_type in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return transformers.AutoModelForImageClassification
    if (
        model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and model_type not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    ):
        return transformers.AutoModelForCausalLM
    if model_type in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        return transformers.AutoModelForSequenceClassification
    raise ValueError(
        f"model: the configuration of a {model_type!r} stands for neither a causal LM nor a classifier; pass the model "
        "itself (built on torch.device('meta') it needs no weights)"
    )
