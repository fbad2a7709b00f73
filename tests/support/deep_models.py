"""Tiny models of 20 architectures with a dozen blocks, in which names are the beginnings of others: 1, 10 and 11."""

from __future__ import annotations

import copy
import logging
import warnings

import transformers
from torch import nn
from transformers.models.auto import configuration_auto
from transformers_builder import Tiny, runnable, tiny_config

DEPTH = 12
ARCHITECTURES = {
    "albert": "AlbertForMaskedLM",
    "bart": "BartForCausalLM",
    "bert": "BertForSequenceClassification",
    "bloom": "BloomForCausalLM",
    "convnext": "ConvNextForImageClassification",
    "deberta-v2": "DebertaV2ForSequenceClassification",
    "distilbert": "DistilBertForSequenceClassification",
    "falcon": "FalconForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForSequenceClassification",
    "opt": "OPTForCausalLM",
    "phi": "PhiForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "resnet": "ResNetForImageClassification",
    "t5": "T5ForConditionalGeneration",
    "vit": "ViTForImageClassification",
}


def deep(architecture: str) -> nn.Module:
    return getattr(transformers, ARCHITECTURES[architecture])(_config(architecture))


def deep_with_data(architecture: str) -> Tiny:
    """The same with arguments under which its loss reaches its weights."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return runnable(getattr(transformers, ARCHITECTURES[architecture]), copy.deepcopy(_config(architecture)))
    finally:
        logging.disable(logging.NOTSET)


def _config(architecture: str) -> transformers.PreTrainedConfig:
    config = tiny_config(getattr(transformers, configuration_auto.CONFIG_MAPPING_NAMES[architecture]))
    if hasattr(config, "depths"):
        config.depths = [1, 1, DEPTH, 1]
        return config
    for name in ("num_hidden_layers", "decoder_layers", "num_decoder_layers"):
        if hasattr(config, name):  # transformers maps the first to the name that the configuration has
            setattr(config, name, DEPTH)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * DEPTH
    if hasattr(config, "pad_token_id"):
        config.pad_token_id = 0  # classifiers of decoders look for it
    return config
