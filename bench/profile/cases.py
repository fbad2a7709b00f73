"""The models of `bench.profile`: those of `zest-fast bench` and EfficientNet-Lite0, with random weights and data."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zest_fast.benchmarking import models
from zest_fast.benchmarking.models import Batch, Case

if TYPE_CHECKING:
    from transformers.modeling_outputs import ImageClassifierOutput

CLASSES = 1000


def efficientnet_lite0(batch: int, pixels: int, **config: Any) -> tuple[nn.Module, Batch]:
    """EfficientNet-Lite0 of efficientnet-lite-pytorch, 1000 classes; pixel_values [batch, 3, pixels, pixels]."""
    from efficientnet_lite_pytorch import EfficientNet

    torch.manual_seed(0)
    plain = {"image_size": pixels, "dropout_rate": 0.0, "drop_connect_rate": 0.0}
    model = Classifier(EfficientNet.from_name("efficientnet-lite0", **plain, **config))
    images = torch.randn(batch, 3, pixels, pixels)
    return model.train(), {"pixel_values": images, "labels": torch.randint(CLASSES, (batch,))}


class Classifier(nn.Module):
    """A network of images [N, 3, height, width] -> logits, called as those of transformers are."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> ImageClassifierOutput:
        from transformers.modeling_outputs import ImageClassifierOutput

        logits = self.network(pixel_values)
        return ImageClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


STANDARD = (*models.STANDARD, Case("efficientnet_lite0", "16x128²", partial(efficientnet_lite0, 16, 128)))
LARGE = (*models.LARGE, Case("efficientnet_lite0", "32x160²", partial(efficientnet_lite0, 32, 160)))
TINY = (
    *models.TINY,
    Case("efficientnet_lite0", "2x32²", partial(efficientnet_lite0, 2, 32, width_coefficient=0.25)),
)
