"""A forward pass on fake tensors: the user's own model and batch, counted instead of computed.

Fake tensors have shapes, dtypes and devices and no contents, so a pass of a 7B model takes seconds and no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from zest_fast.lean.frozen_norms import keep_frozen_norms_in_eval
from zest_fast.planning.fake_mode import FakeMode, masks_as_in_a_real_step
from zest_fast.planning.flop_formulas import OWN
from zest_fast.profiling.heads import is_language_model
from zest_fast.profiling.loss import loss_of


@contextmanager
def faked(model: nn.Module, batch: Any) -> Iterator[Callable[[], Tensor]]:
    """A function that computes the loss of `batch` on fake copies of parameters, buffers and inputs.

    The model, in train mode meanwhile, has its own tensors, modes and random state back afterwards.
    """
    modes = [(module, module.training) for module in model.modules()]
    real = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    mode = FakeMode()
    fakes: dict[int, Tensor] = {}  # one for each tensor, so that tied weights stay tied

    def fake(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        if id(tensor) not in fakes:
            copy = mode.from_tensor(tensor.detach())
            fakes[id(tensor)] = nn.Parameter(copy, False) if isinstance(tensor, nn.Parameter) else copy
        return fakes[id(tensor)]

    handles: list[Any] = []
    with torch.random.fork_rng(devices=[]):
        try:
            for module, parameters, buffers in real:
                module._parameters.update({name: fake(tensor) for name, tensor in parameters.items()})
                module._buffers.update({name: fake(tensor) for name, tensor in buffers.items()})
            handles += keep_frozen_norms_in_eval(model)
            model.train()
            with masks_as_in_a_real_step(batch), mode:
                yield loss_of(model, tree_map_only(Tensor, fake, batch), None, None)
        finally:
            for handle in handles:
                handle.remove()
            for module, parameters, buffers in real:
                _put_back(module._parameters, parameters)
                _put_back(module._buffers, buffers)
            for module, training in modes:
                module.training = training


def _put_back(there: dict[str, Any], found: dict[str, Any]) -> None:
    there.clear()
    there.update(found)


def flop_counter() -> FlopCounterMode:
    """torch's counter with our formulas where its own lack something."""
    return FlopCounterMode(display=False, custom_mapping=OWN)


def stand_in_batch(model: nn.Module) -> dict[str, Tensor]:
    """A batch of the paper's size for a model of transformers: 1 x 512 tokens, or 32 images.

    Raises ValueError for any other model.
    """
    config: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    device = next((parameter.device for parameter in model.parameters()), None)
    if config is not None and name == "input_ids":
        length = min(512, getattr(config, "max_position_embeddings", None) or 512)
        tokens = torch.zeros(1, length, dtype=torch.long, device=device)
        return {name: tokens, "labels": tokens if is_language_model(model) else tokens[:, 0]}
    if config is not None and name == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else size
        images = torch.zeros(32, getattr(config, "num_channels", 3), height, width, device=device)
        return {name: images, "labels": torch.zeros(32, dtype=torch.long, device=device)}
    raise ValueError(f"what {type(model).__name__} takes is not known; pass batch=")
