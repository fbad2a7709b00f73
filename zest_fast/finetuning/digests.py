"""What a model holds, as digests: whether it is the base of a delta, and what changed since."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from zest_fast.finetuning.sharding import whole
from zest_fast.foundation.torch_private import FakeTensor
from zest_fast.profiling.processes.local import is_distributed

_AT_ONCE = 1 << 23  # bytes of a mapped weight that are resident while it is hashed
UNHASHED = ""  # the digest of what is not there to be read


class Base:
    """The parameters and saved buffers of a model as they are now.

    Takes a second for each GB and core (`python -m bench.selective` measures it); on a GPU the weights are copied to
    the host one by one.
    digests: name -> digest of dtype, shape and bytes. buffers: copies, for those that training may change.
    """

    def __init__(self, model: nn.Module) -> None:
        buffers = saved_buffers(model)
        self.buffers = {name: buffer.detach().clone() for name, buffer in buffers.items()}
        self.digests = digests({**dict(model.named_parameters()), **buffers})

    def hash(self, without: Collection[str]) -> str:
        """One hash of everything but the tensors of these names: a delta that replaces those fits what has this hash.

        Raises ValueError where a tensor could not be read.
        """
        return hash_of(self.digests, without)


def hash_of(digests: Mapping[str, str], without: Collection[str]) -> str:
    """As Base.hash, of digests by name."""
    state = hashlib.blake2b(digest_size=32)
    for name in sorted(set(digests) - set(without)):
        if digests[name] == UNHASHED:
            raise ValueError(
                f"{name!r} is on the meta device (offloaded) or of a kind without plain bytes: a delta cannot "
                "vouch for its base; load it first"
            )
        state.update(f"{name}|{digests[name]}\n".encode())
    return state.hexdigest()


def digest_of_modules(model: nn.Module, modules: Iterable[str], single: Iterable[str] = ()) -> str:
    """One digest of all parameters and buffers of these modules, computed ones among them, and of single tensors;
    UNHASHED where one cannot be read."""
    held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    tensors = {name: held[name] for name in single}
    for name in modules:
        module = model.get_submodule(name)
        tensors |= {f"{name}.{key}": t for key, t in (*module.named_parameters(), *module.named_buffers())}
    found = digests(tensors)
    if UNHASHED in found.values():
        return UNHASHED
    return hashlib.blake2b("\n".join(f"{n}|{d}" for n, d in sorted(found.items())).encode(), digest_size=16).hexdigest()


def digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Digests of tensors, on as many threads as there are cores (hashlib lets go of the interpreter).

    Sharded ones are gathered one by one, by every process in the same order.
    """
    if any(map(is_distributed, tensors.values())):
        return {name: digest(whole(tensor)) for name, tensor in tensors.items()}
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return dict(zip(tensors, threads.map(digest, tensors.values()), strict=True))


def digest(tensor: torch.Tensor) -> str:
    """blake2b of dtype, shape and bytes; UNHASHED for a tensor without contents or without plain bytes."""
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        return UNHASHED
    state = hashlib.blake2b(digest_size=16)
    try:
        add_tensor(state, tensor)
    except (RuntimeError, NotImplementedError, TypeError):  # what subclasses of other libraries say
        return UNHASHED
    return state.hexdigest()


def hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """blake2b over names, dtypes, shapes and bytes: about a second for each GB."""
    state = hashlib.blake2b(digest_size=32)
    for name, tensor in tensors:
        if tensor.is_meta:
            raise ValueError(
                f"{name!r} is on the meta device (offloaded): a delta cannot vouch for its base; load it first"
            )
        add_tensor(state, tensor, f"{name}|")
    return state.hexdigest()


def add_tensor(state: Any, tensor: torch.Tensor, name: str = "") -> None:
    """Add a tensor to a state of hashlib: the name, dtype, shape and bytes, which is all of it wherever it is hashed.

    Raises what a kind without plain bytes raises.
    """
    state.update(f"{name}{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    if tensor.numel():
        contents, pages = _plain_bytes(tensor), getattr(tensor, "pages", None)
        if pages is None:
            state.update(contents)
            return
        pages.will_need()  # of a weight that stays on disk: read ahead, and given back as it is hashed
        for start in range(0, len(contents), _AT_ONCE):
            state.update(contents[start : start + _AT_ONCE])
            pages.drop()


def _plain_bytes(tensor: torch.Tensor) -> memoryview:
    """The entries in order, whatever the strides or the device."""
    dense = tensor.detach().cpu().to_dense().resolve_conj().resolve_neg().contiguous()
    return dense.view(-1).view(torch.uint8).numpy().data


def saved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the state of the model; the others (such as rotary tables) are computed anew."""
    computed = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in model.named_buffers() if name not in computed and not buffer.is_meta}
