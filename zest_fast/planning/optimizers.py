"""The optimizers that a plan knows by name, as far as they hold memory: their states and their temporaries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from zest_fast.foundation.nearest import nearest
from zest_fast.lean.master_weights import MasterWeights

Build = Callable[[Sequence[nn.Parameter]], Optimizer]

IN_BACKWARD = "-in-backward"
MASTERS = "-masters"  #: float32 ones of what trains in bfloat16 or float16


class EightBitAdamW(Optimizer):
    """The memory of bitsandbytes' 8-bit AdamW: two bytes for each weight, two float32 scales for each block of 256
    weights, no temporaries; tensors below 4096 weights keep two float32 states. A step changes no weight.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter] = _eight_bit_states(parameter)


def _eight_bit_states(parameter: Tensor) -> dict[str, Tensor]:
    if parameter.numel() < 4096:
        return {name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("state1", "state2")}
    states = {name: torch.zeros_like(parameter, dtype=torch.uint8) for name in ("state1", "state2")}
    blocks = -(-parameter.numel() // 256)
    return states | {name: torch.zeros(blocks, dtype=torch.float32) for name in ("absmax1", "absmax2")}


OPTIMIZERS: dict[str, Build] = {
    "adamw": partial(AdamW, foreach=False),
    "adamw-foreach": partial(AdamW, foreach=True),  # what torch takes on CUDA when it is not told
    "adamw-fused": partial(AdamW, fused=True),
    "adamw-8bit": EightBitAdamW,
    "adam": partial(Adam, foreach=False),
    "sgd": partial(SGD, lr=1e-3, foreach=False),
    "sgd-momentum": partial(SGD, lr=1e-3, momentum=0.9, foreach=False),
}


def check_optimizer(name: object) -> None:
    """Raises ValueError unless it is a name of OPTIMIZERS, with "-masters" and "-in-backward" behind it or not, or a
    function."""
    if callable(name):
        return
    known = [f"{known}{masters}{how}" for how in ("", IN_BACKWARD) for masters in ("", MASTERS) for known in OPTIMIZERS]
    if name not in known:
        raise ValueError(
            f"optimizer={name!r} is unknown; {nearest(name, known)}; or pass a function of the parameters that returns "
            "a torch.optim.Optimizer"
        )


def is_in_backward(optimizer: str | Build) -> bool:
    """Whether each parameter is updated as soon as its gradient is there, which is then dropped."""
    return isinstance(optimizer, str) and optimizer.endswith(IN_BACKWARD)


def build_optimizer(optimizer: str | Build, parameters: Sequence[nn.Parameter]) -> Optimizer:
    if isinstance(optimizer, str):
        name = optimizer.removesuffix(IN_BACKWARD)
        optimizer = OPTIMIZERS[name.removesuffix(MASTERS)]
        if name.endswith(MASTERS):
            return MasterWeights(parameters, optimizer)
    return optimizer(parameters)
