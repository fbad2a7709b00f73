"""Two more networks of npm's @vladmandic/face-api (MIT), of separable convolutions: the one that places landmarks on
faces, densely connected, and the small Xception that guesses ages.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.packages.classifiers import Classifier
from bench.packages.face_api import arrays, fill


class Separable(nn.Module):
    """Depthwise and pointwise convolution without anything between; a stride of 2 is for even sides."""

    def __init__(self, channels: int, wide: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            channels, channels, 3, stride=stride, padding=1 if stride == 1 else 0, groups=channels, bias=False
        )
        self.pointwise = nn.Conv2d(channels, wide, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.depthwise.stride[0] == 2:
            x = functional.pad(x, (0, 1, 0, 1))
        return self.pointwise(self.depthwise(x))


class DenseLandmarks(nn.Module):
    """Features [samples, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.dense0 = _DenseBlock(nn.Conv2d(3, 32, 3, stride=2), 32)
        self.dense1 = _DenseBlock(Separable(32, 64, stride=2), 64)
        self.dense2 = _DenseBlock(Separable(64, 128, stride=2), 128)
        self.dense3 = _DenseBlock(Separable(128, 256, stride=2), 256)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dense0(functional.pad(x, (0, 1, 0, 1)))
        return self.dense3(self.dense2(self.dense1(x))).mean((2, 3))


class _DenseBlock(nn.Module):
    """Each convolution gets the sum of all before it."""

    def __init__(self, first: nn.Module, channels: int) -> None:
        super().__init__()
        self.conv0 = first
        self.conv1, self.conv2, self.conv3 = (Separable(channels, channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        total = first = functional.relu(self.conv0(x))
        for number, conv in enumerate((self.conv1, self.conv2, self.conv3)):
            total = total + conv(functional.relu(total) if number else first)
        return functional.relu(total)


class TinyXception(nn.Module):
    """Features [samples, 512]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2)
        self.enter0 = _Reduction(32, 64, activates=False)
        self.enter1 = _Reduction(64, 128)
        self.middle = nn.Sequential(_Main(128), _Main(128))
        self.leave = _Reduction(128, 256)
        self.last = Separable(256, 512)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(functional.pad(x, (0, 1, 0, 1))))
        x = self.leave(self.middle(self.enter1(self.enter0(x))))
        return functional.relu(self.last(x)).mean((2, 3))


class _Reduction(nn.Module):
    def __init__(self, channels: int, wide: int, *, activates: bool = True) -> None:
        super().__init__()
        self.first = Separable(channels, wide)
        self.second = Separable(wide, wide)
        self.expand = nn.Conv2d(channels, wide, 1, stride=2)
        self.activates = activates

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(functional.relu(x) if self.activates else x)
        y = functional.pad(self.second(functional.relu(y)), (0, 1, 0, 1), value=-torch.inf)
        return functional.max_pool2d(y, 3, stride=2) + self.expand(x)


class _Main(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second, self.third = (Separable(channels, channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in (self.first, self.second, self.third):
            y = conv(functional.relu(y))
        return x + y


def dense_landmarks(classes: int) -> nn.Module:
    return Classifier(dense_landmarks_body(), 256, classes).to(memory_format=torch.channels_last)


def dense_landmarks_body() -> DenseLandmarks:
    found = arrays("face_landmark_68_model")
    model = DenseLandmarks()
    fill(model.dense0.conv0, found["dense0/conv0/filters"], bias=found["dense0/conv0/bias"])
    for name, module in model.named_modules():
        if isinstance(module, Separable):
            _fill_separable(module, found, name.replace(".", "/"))
    return model


def tiny_xception(classes: int) -> nn.Module:
    return Classifier(tiny_xception_body(), 512, classes).to(memory_format=torch.channels_last)


def tiny_xception_body() -> TinyXception:
    found = arrays("age_gender_model")
    model = TinyXception()
    fill(model.stem, found["entry_flow/conv_in/filters"], bias=found["entry_flow/conv_in/bias"])
    for block, name in (
        (model.enter0, "entry_flow/reduction_block_0"),
        (model.enter1, "entry_flow/reduction_block_1"),
        (model.leave, "exit_flow/reduction_block"),
    ):
        _fill_separable(block.first, found, f"{name}/separable_conv0")
        _fill_separable(block.second, found, f"{name}/separable_conv1")
        fill(block.expand, found[f"{name}/expansion_conv/filters"], bias=found[f"{name}/expansion_conv/bias"])
    for number, block in enumerate(model.middle):
        for place, conv in enumerate((block.first, block.second, block.third)):
            _fill_separable(conv, found, f"middle_flow/main_block_{number}/separable_conv{place}")
    _fill_separable(model.last, found, "exit_flow/separable_conv")
    return model


def _fill_separable(module: Separable, found: Mapping[str, np.ndarray], name: str) -> None:
    fill(module.depthwise, found[f"{name}/depthwise_filter"].transpose(0, 1, 3, 2), bias=None)
    fill(module.pointwise, found[f"{name}/pointwise_filter"], bias=found[f"{name}/bias"])
