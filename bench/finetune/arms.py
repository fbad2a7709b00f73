"""What the arms of bench.finetune train: which layers each takes, whole or through LoRA."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.prefix.cache import PrefixCache

RANK = 8  # of LoRA, as in the paper
ADAPTERS = ("LoRA", "rsLoRA", "DoRA", "SHiRA", "MiSS")
"""Of PEFT, with as many parameters as LoRA of that rank has, or nearly: DoRA adds a length for each output."""
OF_CONVOLUTIONS = ("LoRA", "rsLoRA", "DoRA")
"""Those that PEFT has for more than linear layers."""


@dataclass(frozen=True)
class Arm:
    """layers: beside the head; none = the head alone, None = every parameter. adapter: what trains there instead."""

    name: str
    layers: tuple[str, ...] | None
    adapter: str | None = None


@dataclass(frozen=True)
class Orders:
    """Layers, best first, by what ranks them, without the head. Only "contribution" and "joint" have seen scores."""

    by: Mapping[str, tuple[str, ...]]
    used: tuple[str, ...]
    """In the order of the forward pass."""


CHOOSERS: dict[str, Callable[[Orders, int, int], tuple[str, ...]]] = {
    "ZEST": lambda orders, count, seed: orders.by["ZEST"][:count],
    "ZEST probed": lambda orders, count, seed: orders.by["ZEST probed"][:count],
    "contribution": lambda orders, count, seed: orders.by["contribution"][:count],
    "joint": lambda orders, count, seed: orders.by["joint"][:count],
    "RGN": lambda orders, count, seed: orders.by["RGN"][:count],
    "Spectrum": lambda orders, count, seed: orders.by["Spectrum"][:count],
    "largest": lambda orders, count, seed: orders.by["largest"][:count],
    "middle": lambda orders, count, seed: orders.by["middle"][:count],
    "last": lambda orders, count, seed: orders.used[-count:],
    "random": lambda orders, count, seed: tuple(random.Random(seed).sample(sorted(orders.used), count)),
}

NAMES = (
    "head only",
    "full",
    *(f"{chooser}@{count}" for chooser in ("contribution", "ZEST") for count in (3, 5, 10)),
    "joint@5",
    "ZEST probed@5",
    *(f"{chooser}@5" for chooser in ("random", "RGN", "Spectrum", "last", "largest", "middle")),
    *(f"{adapter} r{RANK}" for adapter in ADAPTERS),
    *(f"LoRA+ZEST@{count}" for count in (3, 5, 10)),
)
DRAWS = 2
"""Of random layers for each seed."""
SETS, AMONG = 24, 15
"""Of joint_sets."""


def arms(name: str, orders: Orders, model: nn.Module, seed: int) -> list[Arm]:
    """The arm of this name for this seed; of random layers, one for each draw; none where PEFT can adapt no layer so.

    LoRA and its kin adapt linear layers and dense convolutions that PEFT can build another one of, SHiRA and MiSS
    linear layers.
    """
    if name == "head only":
        return [Arm(name, ())]
    if name == "full":
        return [Arm(name, None)]
    adapter = adapter_of(name)
    if adapter and "@" not in name:
        layers = _adapted(model, orders.used, adapter)
        return [Arm(name, layers, adapter)] if layers else []
    chooser, _, count = name.removeprefix("LoRA+").partition("@")
    if chooser == "random":
        draws = [CHOOSERS["random"](orders, int(count), 1000 * seed + draw) for draw in range(DRAWS)]
        return [Arm(f"{name} draw {draw}", layers) for draw, layers in enumerate(draws)]
    if adapter:
        # The best that can be adapted: LoRA has no depthwise convolutions to offer.
        can = set(_adapted(model, orders.used, adapter))
        ranked = tuple(layer for layer in orders.by[chooser] if layer in can)
        return [Arm(name, ranked[: int(count)], adapter)]
    return [Arm(name, CHOOSERS[chooser](orders, int(count), seed))]


def joint_sets(orders: Orders) -> list[tuple[str, ...]]:
    """Layers to train together: the first five by contribution, then SETS draws of five of the AMONG first."""
    best = orders.by["contribution"]
    draw = random.Random(5)
    return [best[:5], *(tuple(draw.sample(best[:AMONG], 5)) for _ in range(SETS))]


def adapter_of(name: str) -> str | None:
    """What the arm of this name trains instead of its layers' own weights."""
    return next((adapter for adapter in ADAPTERS if name.startswith((f"{adapter} ", f"{adapter}+"))), None)


def _adapted(model: nn.Module, layers: tuple[str, ...], adapter: str) -> tuple[str, ...]:
    modules = dict(model.named_modules())
    return tuple(layer for layer in layers if _can_adapt(modules[layer], adapter))


def _can_adapt(module: nn.Module, adapter: str) -> bool:
    if isinstance(module, nn.Conv2d) and adapter in OF_CONVOLUTIONS:  # PEFT: the rank must be a multiple of the groups
        return RANK % module.groups == 0 and (type(module) is nn.Conv2d or _is_plain(module))
    return type(module) is nn.Linear


def _is_plain(module: nn.Conv2d) -> bool:
    """EfficientNet-Lite's own class where it pads as torch does."""
    padding = getattr(module, "static_padding", None)
    return padding is not None and not isinstance(padding, nn.ZeroPad2d)


class Trained:
    """A copy of the model, or itself, in which an arm trains: `.model`, and `.parameters` by name, the head's among
    them."""

    def __init__(
        self, model: nn.Module, head: str, arm: Arm, cache: PrefixCache | None = None, *, copied: bool = True
    ) -> None:
        self.model = copy.deepcopy(model) if copied else model
        if arm.adapter:
            self._adapt(head, arm)
        elif arm.layers is None:
            self.model.requires_grad_(True)
        else:
            SelectiveBackward(self.model, arm.layers, head=head, cache=cache)
        self.parameters: dict[str, Tensor] = {
            name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad
        }
        self.head_names = frozenset(name for name in self.parameters if name.startswith(f"{head}."))

    def _adapt(self, head: str, arm: Arm) -> None:
        from peft import inject_adapter_in_model

        for module in self.model.modules():
            if isinstance(module, nn.Conv2d) and _is_plain(module):
                module.__class__ = (
                    nn.Conv2d
                )  # PEFT builds adapters of the same class, and this one wants more arguments
        config = _configuration(arm, self.model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inject_adapter_in_model(config, self.model)
        for module in self.model.modules():
            base = getattr(module, "base_layer", None)
            if isinstance(base, nn.Conv2d):  # MobileNetV2 of transformers reads these to pad as TensorFlow does
                module.stride, module.kernel_size, module.dilation = base.stride, base.kernel_size, base.dilation
        self.model.get_submodule(head).requires_grad_(True)


def _configuration(arm: Arm, model: nn.Module) -> Any:
    from peft import MissConfig

    from zest_fast.integrations.peft import lora_config, shira_config

    layers = arm.layers or ()
    if arm.adapter == "SHiRA":
        return shira_config(layers, model, r=RANK, head=None)
    kinds = {"use_rslora": arm.adapter == "rsLoRA", "use_dora": arm.adapter == "DoRA"}
    lora = lora_config(layers, model, r=RANK, head=None, lora_alpha=2 * RANK, **kinds)
    if arm.adapter == "MiSS":  # one matrix [rank, outputs] where LoRA has two: of a square layer, as many parameters
        return MissConfig(r=2 * RANK, target_modules=lora.target_modules)
    return lora
