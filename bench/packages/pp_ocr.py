"""Two networks of PyPI's rapidocr-onnxruntime (Apache-2.0), PaddleOCR's: MobileNetV3 that tells which way up a line of
text is, and PP-LCNetV3 with two blocks of attention (SVTR) that reads it. Norms and scales are folded.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.packages.classifiers import Classifier
from bench.packages.images import IMAGE_SIZE
from bench.packages.installed import installed


class MobileNetV3(nn.Module):
    """Features [samples, 200]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        channels, blocks = 8, []
        for kernel, inside, squeeze, out, stride, hard in (
            (3, 8, 2, 8, 2, False), (3, 24, 0, 8, 2, False), (3, 32, 0, 8, 1, False), (5, 32, 8, 16, 2, True),
            (5, 88, 22, 16, 1, True), (5, 88, 22, 16, 1, True), (5, 40, 10, 16, 1, True), (5, 48, 12, 16, 1, True),
            (5, 104, 26, 32, 2, True), (5, 200, 50, 32, 1, True), (5, 200, 50, 32, 1, True),
        ):  # fmt: skip
            blocks.append(_Inverted(channels, inside, out, kernel, (stride, 1), squeeze, hard))
            channels = out
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Conv2d(channels, 200, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(functional.hardswish(self.stem(x)))
        return functional.max_pool2d(functional.hardswish(self.last(x)), 2).mean((2, 3))


class _Inverted(nn.Module):
    def __init__(
        self, channels: int, inside: int, out: int, kernel: int, stride: tuple[int, int], squeeze: int, hard: bool
    ) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, inside, 1)
        self.depthwise = nn.Conv2d(inside, inside, kernel, stride=stride, padding=kernel // 2, groups=inside)
        self.squeeze = _Squeeze(inside, squeeze, slope=0.2) if squeeze else nn.Identity()
        self.project = nn.Conv2d(inside, out, 1)
        self.activation = nn.Hardswish() if hard else nn.ReLU()
        self.skips = stride == (1, 1) and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.depthwise(self.activation(self.expand(x))))
        y = self.project(self.squeeze(y))
        return x + y if self.skips else y


class _Squeeze(nn.Module):
    """Squeeze and excite."""

    def __init__(self, channels: int, inside: int, slope: float) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, inside, 1)
        self.expand = nn.Conv2d(inside, channels, 1)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(functional.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * (self.slope * gate + 0.5).clamp(0, 1)


class LCNetSVTR(nn.Module):
    """Features [samples, 120], the mean over the places of a line that is 48 pixels high."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        channels, blocks = 16, []
        for kernel, out, stride, squeeze in (
            (3, 32, (1, 1), 0), (3, 64, (1, 1), 0), (3, 64, (1, 1), 0), (3, 128, (2, 1), 0), (3, 128, (1, 1), 0),
            (3, 240, (1, 2), 0), *[(5, 240, (1, 1), 0)] * 4, (5, 480, (2, 1), 60), (5, 480, (1, 1), 120),
            (5, 480, (2, 1), 0), (5, 480, (1, 1), 0),
        ):  # fmt: skip
            blocks.append(_LCBlock(channels, out, kernel, stride, squeeze))
            channels = out
        self.blocks = nn.Sequential(*blocks)
        self.narrow = nn.Conv2d(480, 60, (1, 3), padding=(0, 1))
        self.enter = nn.Conv2d(60, 120, 1)
        self.mixers = nn.Sequential(_Mixer(120), _Mixer(120))
        self.norm = nn.LayerNorm(120, eps=1e-6)
        self.leave = nn.Conv2d(120, 480, 1)
        self.join = nn.Conv2d(960, 60, (1, 3), padding=(0, 1))
        self.last = nn.Conv2d(60, 120, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.places(x).mean(1)

    def places(self, x: Tensor) -> Tensor:
        """[samples, 3, 48, width] -> [samples, width / 8, 120]."""
        seen = functional.avg_pool2d(self.blocks(self.stem(x)), (3, 2))
        y = functional.silu(self.enter(functional.silu(self.narrow(seen))))
        tokens = self.norm(self.mixers(y.flatten(2).transpose(1, 2)))
        y = functional.silu(self.leave(tokens.transpose(1, 2).unflatten(2, y.shape[2:])))
        y = functional.silu(self.join(torch.cat([seen, y], 1)))
        return functional.silu(self.last(y)).flatten(2).transpose(1, 2)


class _LCBlock(nn.Module):
    """Depthwise and pointwise convolution, each with a hard swish that is scaled and shifted afterwards."""

    def __init__(self, channels: int, out: int, kernel: int, stride: tuple[int, int], squeeze: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel, stride=stride, padding=kernel // 2, groups=channels)
        self.after_depthwise = _ScaledSwish()
        self.squeeze = _Squeeze(channels, squeeze, slope=1 / 6) if squeeze else nn.Identity()
        self.pointwise = nn.Conv2d(channels, out, 1)
        self.after_pointwise = _ScaledSwish()

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(self.after_depthwise(self.depthwise(x)))
        return self.after_pointwise(self.pointwise(x))


class _ScaledSwish(nn.Module):
    scale: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * functional.hardswish(x) + self.shift


class _Mixer(nn.Module):
    """A transformer block of eight heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, 8, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(functional.silu(self.up(self.norm2(x))))


def mobilenet_v3(classes: int) -> nn.Module:
    model = MobileNetV3()
    arrays = _arrays("ch_ppocr_mobile_v2.0_cls_infer.onnx")

    def fill(convolution: nn.Conv2d, name: str) -> None:
        norm = [arrays[f"{name}_bn_{part}"] for part in ("scale", "offset", "mean", "variance")]
        _fill(convolution, *_folded(arrays[f"{name}_weights"], *norm))

    fill(model.stem, "conv1")
    for number, block in enumerate(model.blocks, start=2):
        fill(block.expand, f"conv{number}_expand")
        fill(block.depthwise, f"conv{number}_depthwise")
        fill(block.project, f"conv{number}_linear")
        if isinstance(block.squeeze, _Squeeze):
            for convolution, name in ((block.squeeze.reduce, "se_1"), (block.squeeze.expand, "se_2")):
                _fill(convolution, *(arrays[f"conv{number}_{name}_{part}"] for part in ("weights", "offset")))
    fill(model.last, "conv_last")
    return Classifier(model, 200, classes).to(memory_format=torch.channels_last)


def lcnet_svtr(classes: int) -> nn.Module:
    return Classifier(lcnet_svtr_body(), 120, classes).to(memory_format=torch.channels_last)


def lcnet_svtr_body() -> LCNetSVTR:
    model = LCNetSVTR()
    arrays = _arrays("ch_PP-OCRv4_rec_infer.onnx")

    def fill_normed(convolution: nn.Conv2d, name: str, norm: str) -> None:
        parts = [arrays[f"{norm}.{part}"] for part in ("w_0", "b_0", "w_1", "w_2")]
        _fill(convolution, *_folded(arrays[f"{name}.w_0"], *parts))

    fill_normed(model.stem, "conv2d_10", "batch_norm2d_2")
    rest = [(block, part) for block in model.blocks for part in ("depthwise", "pointwise")]
    for number, (block, part) in enumerate(rest):
        weight, bias = (arrays[f"conv2d_{157 + number}.{kind}"] for kind in ("w_0", "b_0"))
        scale, shift = (arrays[f"mobile_one_block_{number}.{kind}"] for kind in ("w_0", "w_1"))
        _fill(getattr(block, part), weight * scale, bias * scale + shift)
        swish = getattr(block, f"after_{part}")
        swish.scale.fill_(float(arrays[f"whswish_b_{number + 1}.w_0"].item()))
        swish.shift.fill_(float(arrays[f"whswish_b_{number + 1}.w_1"].item()))
    for block, first in ((model.blocks[10], 106), (model.blocks[11], 117)):
        for number, convolution in enumerate((block.squeeze.reduce, block.squeeze.expand), start=first):
            _fill(convolution, arrays[f"conv2d_{number}.w_0"], arrays[f"conv2d_{number}.b_0"])
    convolutions = (model.narrow, model.enter, model.leave, model.join, model.last)
    for number, convolution in enumerate(convolutions):
        fill_normed(convolution, f"conv2d_{142 + number}", f"batch_norm2d_{148 + number}")
    linears = [layer for mixer in model.mixers for layer in (mixer.qkv, mixer.out, mixer.up, mixer.down)]
    for number, linear in enumerate(linears, start=77):
        _fill(linear, arrays[f"linear_{number}.w_0"].T, arrays[f"linear_{number}.b_0"])
    norms = [norm for mixer in model.mixers for norm in (mixer.norm1, mixer.norm2)]
    for number, norm in enumerate((*norms, model.norm), start=43):
        _fill(norm, arrays[f"layer_norm_{number}.w_0"], arrays[f"layer_norm_{number}.b_0"])
    return model


def ocr_pixels(pixels: Tensor, size: int = IMAGE_SIZE) -> Tensor:
    """Blue first, -1..1, size x size."""
    bgr = (pixels.permute(0, 3, 1, 2).float().flip(1) - 127.5) / 127.5
    if size != IMAGE_SIZE:
        bgr = functional.interpolate(bgr, size=size, mode="bilinear", antialias=True)
    return bgr.contiguous(memory_format=torch.channels_last)


def _folded(
    weight: np.ndarray, scale: np.ndarray, offset: np.ndarray, mean: np.ndarray, variance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias of a convolution without bias and the norm after it."""
    scale = scale / np.sqrt(variance + 1e-5)
    return weight * scale[:, None, None, None], offset - mean * scale


@torch.no_grad()
def _fill(layer: nn.Conv2d | nn.Linear | nn.LayerNorm, weight: np.ndarray, bias: np.ndarray) -> None:
    layer.weight.copy_(torch.from_numpy(weight.copy()))
    assert layer.bias is not None
    layer.bias.copy_(torch.from_numpy(bias.copy()))


def _arrays(file: str) -> dict[str, np.ndarray]:
    """What the nodes called "Constant" hold, by name."""
    folder = installed("rapidocr_onnxruntime", "rapidocr-onnxruntime", "1.4.4") / "models"
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise RuntimeError("onnx is not installed; run: pip install onnx") from None
    graph = onnx.load(folder / file).graph
    return {
        node.output[0]: numpy_helper.to_array(node.attribute[0].t) for node in graph.node if node.op_type == "Constant"
    }
