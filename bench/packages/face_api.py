"""Two networks of npm's @vladmandic/face-api (MIT): dlib's face recognition ResNet and its detector's MobileNetV1.

The files hold bytes with a scale and a minimum for each tensor. Scales and norms are folded into the convolutions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.packages.classifiers import Classifier
from bench.packages.installed import installed_by_npm


class MobileNetV1(nn.Module):
    """Features [samples, 1024] of pixels in -1..1, whose sides are multiples of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2)
        channels, blocks = 32, []
        for wide, stride in (
            (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1),
        ):  # fmt: skip
            blocks.append(_Separable(channels, wide, stride))
            channels = wide
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self.stem(functional.pad(x, (0, 1, 0, 1))))
        return self.blocks(x).mean((2, 3))


class _Separable(nn.Module):
    def __init__(self, channels: int, wide: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            channels, channels, 3, stride=stride, padding=1 if stride == 1 else 0, groups=channels
        )
        self.pointwise = nn.Conv2d(channels, wide, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.depthwise.stride[0] == 2:
            x = functional.pad(x, (0, 1, 0, 1))  # as TensorFlow pads even sides
        return functional.relu6(self.pointwise(functional.relu6(self.depthwise(x))))


class FaceResNet(nn.Module):
    """Features [samples, 256] of pixels around zero.

    whole: with the last block, which needs the 150 pixels that the network was made for; without it 64 are enough.
    """

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 7, stride=2)
        self.blocks = nn.ModuleDict({name: _Residual(*_channels_of(name)) for name in _FACE_BLOCKS})
        if whole:
            self.blocks["256_down_out"] = _Residual(256, 256, down=True)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.stem(x)), 3, stride=2)
        for block in self.blocks.values():
            x = block(x)
        return x.mean((2, 3))


_FACE_BLOCKS = tuple(
    f"{wide}_{number}"
    for wide, numbers in ((32, "123"), (64, ("down", *"123")), (128, ("down", *"12")), (256, ("down", *"12")))
    for number in numbers
)


def _channels_of(block: str) -> tuple[int, int, bool]:
    wide, _, number = block.partition("_")
    down = number == "down"
    return int(wide) // 2 if down else int(wide), int(wide), down


class _Residual(nn.Module):
    def __init__(self, channels: int, wide: int, down: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, wide, 3, stride=2) if down else nn.Conv2d(channels, wide, 3, padding=1)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1)
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(functional.relu(self.conv1(x)))
        if self.down:
            x = functional.avg_pool2d(x, 2)
            y = functional.pad(y, (0, x.shape[3] - y.shape[3], 0, x.shape[2] - y.shape[2]))
            x = functional.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
        return functional.relu(x + y)


def mobilenet_v1(classes: int) -> nn.Module:
    found = arrays("ssd_mobilenetv1_model")
    model = MobileNetV1()
    fill(model.stem, found["MobilenetV1/Conv2d_0_pointwise/weights"],
          bias=found["MobilenetV1/Conv2d_0_pointwise/convolution_bn_offset"])  # fmt: skip
    for number, block in enumerate(model.blocks, start=1):
        depthwise, pointwise = (f"MobilenetV1/Conv2d_{number}_{part}" for part in ("depthwise", "pointwise"))
        norm = {part: found[f"{depthwise}/BatchNorm/{part}"] for part in
                ("gamma", "beta", "moving_mean", "moving_variance")}  # fmt: skip
        scale = norm["gamma"] / np.sqrt(norm["moving_variance"] + 1e-3)
        weight = found[f"{depthwise}/depthwise_weights"].transpose(0, 1, 3, 2)  # the multiplier, one, comes last
        fill(block.depthwise, weight * scale, bias=norm["beta"] - norm["moving_mean"] * scale)
        fill(block.pointwise, found[f"{pointwise}/weights"], bias=found[f"{pointwise}/convolution_bn_offset"])
    return Classifier(model, 1024, classes).to(memory_format=torch.channels_last)


def face_resnet(classes: int) -> nn.Module:
    return Classifier(face_resnet_body(), 256, classes).to(memory_format=torch.channels_last)


def face_resnet_body(whole: bool = False) -> FaceResNet:
    found = arrays("face_recognition_model")
    model = FaceResNet(whole)
    for convolution, name in (
        (model.stem, "conv32_down"),
        *((getattr(block, part), f"conv{name}/{part}") for name, block in model.blocks.items() for part in _PARTS),
    ):
        scale = found[f"{name}/scale/weights"]
        fill(convolution, found[f"{name}/conv/filters"] * scale,
              bias=found[f"{name}/conv/bias"] * scale + found[f"{name}/scale/biases"])  # fmt: skip
    return model


_PARTS = ("conv1", "conv2")


def face_pixels(pixels: Tensor) -> Tensor:
    rgb = pixels.permute(0, 3, 1, 2).float() - torch.tensor([122.782, 117.001, 104.298])[:, None, None]
    return (rgb / 255).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def fill(convolution: nn.Conv2d, weight: np.ndarray, *, bias: np.ndarray | None) -> None:
    """weight: [height, width, inputs, outputs]."""
    convolution.weight.copy_(torch.from_numpy(weight.transpose(3, 2, 0, 1).copy()))
    if bias is not None:
        assert convolution.bias is not None
        convolution.bias.copy_(torch.from_numpy(bias))


def arrays(network: str) -> dict[str, np.ndarray]:
    """By name, as TensorFlow lays them out."""
    folder = installed_by_npm("@vladmandic/face-api", "1.7.15") / "model"
    manifest = json.loads((folder / f"{network}-weights_manifest.json").read_text())
    return dict(tensors_of(manifest, (folder / f"{network}.bin").read_bytes()))


def tensors_of(manifest: list[dict], content: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """Names and float32 arrays of TensorFlow.js' weights: those kept as bytes are byte x scale + minimum."""
    start = 0
    for entry in (entry for group in manifest for entry in group["weights"]):
        packed = entry.get("quantization")
        kind = np.dtype(packed["dtype"] if packed else entry["dtype"])
        count = int(np.prod(entry["shape"], dtype=np.int64))
        values = np.frombuffer(content, dtype=kind, count=count, offset=start).astype(np.float32)
        if packed:
            values = values * np.float32(packed["scale"]) + np.float32(packed["min"])
        start += count * kind.itemsize
        yield entry["name"], values.reshape(entry["shape"])
