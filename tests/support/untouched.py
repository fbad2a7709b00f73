"""What a model, its hooks and the random state look like: a test can then name everything that a call changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals


def state_of(model: nn.Module) -> dict[str, object]:
    """Label -> something comparable: bits of tensors, identities of objects, flags."""
    state: dict[str, object] = {
        "random state": bits(torch.get_rng_state()),
        "grad mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "hooks of all modules": sorted(k for k, v in vars(module_globals).items() if k.startswith("_global_") and v),
    }
    for name, module in model.named_modules(remove_duplicate=False):
        attributes = vars(module)
        state[f"mode of {name!r}"] = module.training
        state[f"attributes of {name!r}"] = sorted(attributes)
        for key, value in attributes.items():
            if "hooks" in key and isinstance(value, Mapping):
                state[f"{key} of {name!r}"] = [(number, id(hook)) for number, hook in value.items()]
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                state |= {f"{what} of {name}.{key}": value for what, value in tensor_state(tensor).items()}
    return state


def tensor_state(tensor: Tensor) -> dict[str, object]:
    return {
        "identity": id(tensor),
        "bits": bits(tensor),
        "storage": tensor.data_ptr(),
        "requires_grad": tensor.requires_grad,
        "identity of the gradient": id(tensor.grad),
        "bits of the gradient": None if tensor.grad is None else bits(tensor.grad),
        "hooks": list(tensor._backward_hooks or ()),
        "post-accumulate hooks": list(tensor._post_accumulate_grad_hooks or ()),
        "attributes": sorted(vars(tensor)),
    }


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().flatten().contiguous().view(torch.uint8).numpy().tobytes()


def changes(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """The labels under which the two states differ."""
    return [label for label in {**before, **after} if before.get(label) != after.get(label)]
