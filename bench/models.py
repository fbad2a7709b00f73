"""The models of `bench.profile`: architectures of transformers, and EfficientNet-Lite0, with random weights and data.

All are in train mode (batch norm uses the batch) with dropout set to zero and no tf-style padding: the cheapest plain
pass, hence the hardest denominator for a ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers.modeling_outputs import ImageClassifierOutput

Batch = dict[str, torch.Tensor]
CLASSES = 1000  # of images


@dataclass(frozen=True)
class Case:
    """A model and a batch of one size; `build` makes both from a fixed seed."""

    model: str
    shape: str
    build: Callable[[], tuple[nn.Module, Batch]]
    checkpointing: bool = False

    def __str__(self) -> str:
        return f"{self.model} {self.shape}"


def bert(batch: int, tokens: int, **config: object) -> tuple[nn.Module, Batch]:
    """BERT-base for classification into two classes; input_ids [batch, tokens]."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "use_cache": False, **config}
    model = BertForSequenceClassification(BertConfig(**config)).train()
    ids = torch.randint(model.config.vocab_size, (batch, tokens))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(2, (batch,))}


def llama(batch: int, tokens: int, **config: object) -> tuple[nn.Module, Batch]:
    """LLaMA with 6 blocks of width 1024, 16 heads on 4 key-value heads, the 32,000 tokens of LLaMA; input_ids [batch,
    tokens].
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    standard = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16}
    config = {**standard, "num_key_value_heads": 4, "vocab_size": 32000, "use_cache": False, **config}
    model = LlamaForCausalLM(LlamaConfig(**config)).train()
    ids = torch.randint(model.config.vocab_size, (batch, tokens))
    return model, {"input_ids": ids, "labels": ids.clone()}


def resnet50(batch: int, pixels: int, **config: object) -> tuple[nn.Module, Batch]:
    """ResNet-50, 1000 classes; pixel_values [batch, 3, pixels, pixels]."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    return _images(ResNetForImageClassification(ResNetConfig(num_labels=CLASSES, **config)), batch, pixels)


def mobilenetv2(batch: int, pixels: int, **config: object) -> tuple[nn.Module, Batch]:
    """MobileNetV2 of width 1, 1000 classes; pixel_values [batch, 3, pixels, pixels]."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    torch.manual_seed(0)
    plain = {"num_labels": CLASSES, "classifier_dropout_prob": 0.0, "tf_padding": False, "image_size": pixels}
    return _images(MobileNetV2ForImageClassification(MobileNetV2Config(**plain, **config)), batch, pixels)


def efficientnet_lite0(batch: int, pixels: int, **config: object) -> tuple[nn.Module, Batch]:
    """EfficientNet-Lite0 of efficientnet-lite-pytorch, 1000 classes; pixel_values [batch, 3, pixels, pixels]."""
    from efficientnet_lite_pytorch import EfficientNet

    torch.manual_seed(0)
    plain = {"image_size": pixels, "dropout_rate": 0.0, "drop_connect_rate": 0.0}
    return _images(Classifier(EfficientNet.from_name("efficientnet-lite0", **plain, **config)), batch, pixels)


class Classifier(nn.Module):
    """A network of images [N, 3, height, width] -> logits, called as those of transformers are."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> ImageClassifierOutput:
        from transformers.modeling_outputs import ImageClassifierOutput

        logits = self.network(pixel_values)
        return ImageClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def _images(model: nn.Module, batch: int, pixels: int) -> tuple[nn.Module, Batch]:
    images = torch.randn(batch, 3, pixels, pixels)
    return model.train(), {"pixel_values": images, "labels": torch.randint(CLASSES, (batch,))}


STANDARD = (
    Case("bert", "8x96", partial(bert, 8, 96), checkpointing=True),
    Case("llama", "4x96", partial(llama, 4, 96), checkpointing=True),
    Case("resnet50", "8x160²", partial(resnet50, 8, 160)),
    Case("mobilenetv2", "16x128²", partial(mobilenetv2, 16, 128)),
    Case("efficientnet_lite0", "16x128²", partial(efficientnet_lite0, 16, 128)),
)
LARGE = (
    Case("bert", "16x128", partial(bert, 16, 128), checkpointing=True),
    Case("llama", "4x256", partial(llama, 4, 256), checkpointing=True),
    Case("resnet50", "16x224²", partial(resnet50, 16, 224)),
    Case("mobilenetv2", "64x160²", partial(mobilenetv2, 64, 160)),
    Case("efficientnet_lite0", "32x160²", partial(efficientnet_lite0, 32, 160)),
)

_TINY_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_TINY_LLAMA = {**_TINY_BERT, "num_key_value_heads": 1, "vocab_size": 99}
TINY = (
    Case("bert", "2x8", partial(bert, 2, 8, vocab_size=99, **_TINY_BERT), checkpointing=True),
    Case("llama", "2x8", partial(llama, 2, 8, **_TINY_LLAMA), checkpointing=True),
    Case(
        "resnet50",
        "2x32²",
        partial(resnet50, 2, 32, embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="bottleneck"),
    ),
    Case("mobilenetv2", "2x32²", partial(mobilenetv2, 2, 32, depth_multiplier=0.25)),
    Case("efficientnet_lite0", "2x32²", partial(efficientnet_lite0, 2, 32, width_coefficient=0.25)),
)
