"""A training step on fake tensors: the user's own model and batch, counted instead of computed.

Fake tensors have shapes, dtypes and devices and no contents, so a step of a 7B model takes seconds and no memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from zest_fast.finetuning.frozen_norms import keep_frozen_norms_in_eval
from zest_fast.profiling.heads import is_language_model
from zest_fast.profiling.loss import loss_of

_ALLOCATION = 512  # bytes: what torch's allocators round up to
_ADAM_STATES = 2  # tensors of the size of each trained parameter


@contextmanager
def faked(
    model: nn.Module, batch: Any, trainable: Iterable[str] = ()
) -> Iterator[tuple[Callable[[], Tensor], list[Tensor]]]:
    """A function that computes the loss of `batch` on fake copies of parameters, buffers and inputs; and these copies.

    trainable: full names of the parameters that require a gradient, tied ones under any of their names. The model has
    its own tensors, flags, modes and random state back afterwards.
    """
    chosen = {id(dict(model.named_parameters(remove_duplicate=False))[name]) for name in trainable}
    modes = [(module, module.training) for module in model.modules()]
    real = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[int, Tensor] = {}  # one for each tensor, so that tied weights stay tied

    def fake(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        if id(tensor) not in fakes:
            copy = mode.from_tensor(tensor.detach())
            is_parameter = isinstance(tensor, nn.Parameter)
            fakes[id(tensor)] = nn.Parameter(copy, id(tensor) in chosen) if is_parameter else copy
        return fakes[id(tensor)]

    handles: list[Any] = []
    with torch.random.fork_rng(devices=[]):
        try:
            for module, parameters, buffers in real:
                module._parameters.update({name: fake(tensor) for name, tensor in parameters.items()})
                module._buffers.update({name: fake(tensor) for name, tensor in buffers.items()})
            handles += keep_frozen_norms_in_eval(model)
            model.train()
            with mode:
                yield loss_of(model, tree_map_only(Tensor, fake, batch), None, None), list(fakes.values())
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
    """torch's counter, which does not know the attention of the CPU by itself."""
    aten = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=attention)


def peak_bytes(model: nn.Module, batch: Any, trainable: Iterable[str]) -> int:
    """The most that one step of AdamW (not foreach) holds: weights, gradients, states, activations, temporaries.

    Counted on tensors: what the CUDA context, fragmentation and workspaces of kernels take comes on top.
    """
    trainable = list(trainable)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained = [_size(tensor) for tensor in {id(parameters[n]): parameters[n] for n in trainable}.values()]
    with faked(model, batch, trainable) as (compute_loss, tensors), _Allocations() as allocations:
        for tensor in tensors:
            allocations.add(tensor)
        held = allocations.now
        compute_loss().backward()
    states = _ADAM_STATES * sum(trained)
    in_the_update = held + sum(trained) + 2 * max(trained, default=0)
    return states + max(allocations.peak, in_the_update)


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


class _Allocations(TorchDispatchMode):
    """Bytes of the storages that operators made and that are alive: now, and at the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self.add(tensor)
        return result

    def add(self, tensor: Any) -> None:
        if not isinstance(tensor, Tensor) or (storage := tensor.untyped_storage()) in self._seen:
            return
        self._seen.add(storage)
        size = _rounded(storage.nbytes())
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


def _size(tensor: Tensor) -> int:
    return _rounded(tensor.numel() * tensor.element_size())


def _rounded(size: int) -> int:
    return -(-size // _ALLOCATION) * _ALLOCATION
