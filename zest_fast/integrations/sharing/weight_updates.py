"""What of a model has changed since an inference server was told: whole tensors, by their names in the checkpoint.

For loops of reinforcement learning: a server holds the base, and takes `(name, tensor)` pairs between steps, as
`load_weights` of vLLM and `update_weights_from_tensor` of SGLang do. Only what trains is looked at.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.finetuning.delta_files import Delta, read_delta
from zest_fast.finetuning.digests import digest, saved_buffers
from zest_fast.finetuning.quantised_weights import QuantisedLinear
from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.finetuning.sharding import whole
from zest_fast.finetuning.trainable_layers import chosen_layers
from zest_fast.foundation.nearest import nearest
from zest_fast.integrations.merging import settings_of
from zest_fast.streaming.checkpoints import plain_checkpoint

# What wrappers put into names: DistributedDataParallel is unwrapped as a module, the others are within names.
_WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "base_layer"}
_OF_PEFT = "base_model.model."


def weight_updates(
    source: SelectiveBackward | nn.Module | str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> WeightUpdates:
    """What trains, to be told to an inference server that holds the base: see `WeightUpdates`.

    Args:
        source: a wrapper; a model (also in DistributedDataParallel, `fully_shard`, torch.compile or PEFT), of which
            what requires a gradient is watched; or the file of a delta.
        base: the folder that the server loaded; names are held against it, and the first call gives only what differs
            from it. None = the first call gives all that trains, and names are those that `save_pretrained` writes.
        dtype: that the server computes in: tensors are rounded to it, and one whose rounded entries are all as they
            were is not sent. None = as they are.

    Returns:
        The updates.

    Raises:
        ValueError: quantised or packed weights, sharded by other means than `fully_shard`, a name that the base does
            not have, or a delta whose base was quantised.
        TypeError: something else as `source`.

    Examples:
        >>> import torch, zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> tuned = zest_fast.SelectiveBackward(model, ["0"], head=None)
        >>> updates = zest_fast.weight_updates(tuned)
        >>> sorted(updates.changed())
        ['0.bias', '0.weight']
        >>> with torch.no_grad():
        ...     _ = model[0].bias.add_(1)
        >>> sorted(updates.changed())
        ['0.bias']
    """
    if isinstance(source, SelectiveBackward | nn.Module):
        return WeightUpdates(source, base, dtype=dtype)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source must be a SelectiveBackward, a model or the file of a delta: {type(source).__name__}")
    return WeightUpdates(read_delta(source), base, dtype=dtype)


class WeightUpdates:
    """Which trained tensors have changed since they were last asked for, by the names of the base's checkpoint.

    Beside what trains, the buffers that a model saves are watched (of batch norm), and layers that trained before an
    exchange. What was sent is remembered by a digest of each tensor (a second for each GB and core), not by a copy.

    Args:
        source: a wrapper, a model, or what `read_delta` gives.
        base: the folder that the server loaded, as for `weight_updates`.
        dtype: that the server computes in.

    Raises:
        ValueError: as `weight_updates`.

    Examples:
        >>> import torch, zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> updates = zest_fast.WeightUpdates(model, dtype=torch.bfloat16)
        >>> [name for name, tensor in updates.changed().items() if tensor.dtype == torch.bfloat16]
        ['0.weight', '0.bias', '2.weight', '2.bias']
        >>> updates.changed()
        {}
    """

    def __init__(
        self,
        source: SelectiveBackward | nn.Module | Delta,
        base: str | os.PathLike[str] | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._source, self._dtype = source, dtype
        self._seen: set[str] = set()  # parameters and buffers that were watched before
        self._sent: dict[str, str] = {}  # digests of what the server has, by its names
        self._base = None if base is None else plain_checkpoint(Path(base))
        _refuse_packed(source)
        buffers = {} if isinstance(source, Delta) else saved_buffers(_model(source))
        self._buffers = {name: digest(self._rounded(buffer)) for name, buffer in buffers.items()}

    def changed(self) -> dict[str, Tensor]:
        """What changed since the last call; the first gives what trains, or differs from the base where it is known.

        With `fully_shard` every process has to call it, and gets whole tensors. Elsewhere tensors share the memory of
        the model (unless `dtype` makes others): send them before the next step. What was returned counts as sent.

        Returns:
            Name -> tensor, detached.

        Raises:
            ValueError: an adapter trains and is not merged, or a name that the base does not have.
        """
        fresh, found = {}, {}
        for name, tensor in self._served().items():
            now = digest(tensor)
            if now != (self._sent.get(name) or self._in_base(name, tensor)):
                fresh[name], found[name] = tensor, now
        self._sent |= found
        return fresh

    def reset(self) -> None:
        """The server has the base again (it was started anew, or an update did not arrive): all is to be sent."""
        self._sent.clear()

    def _served(self) -> dict[str, Tensor]:
        """All that is watched, as the server has it: names of the checkpoint, its dtype."""
        watched = _as_saved(self._source, {name: self._rounded(one) for name, one in self._watched().items()})
        if self._base is None:
            return watched
        aliases = _aliases(self._source)
        served: dict[str, Tensor] = {}
        for name, tensor in watched.items():
            names = [alias for alias in (name, *aliases.get(name, ())) if alias in self._base]
            if not names:
                folder = os.fspath(self._base.folder)
                raise ValueError(f"{folder!r} has no tensor {name!r}, which was trained; {nearest(name, self._base)}")
            served |= dict.fromkeys(names, tensor)
        return served

    def _in_base(self, name: str, tensor: Tensor) -> str | None:
        """The digest of what the base has for a tensor that was not sent yet; None where no base is known."""
        if self._base is None:
            return None
        shape = self._base.shape_and_dtype(name)[0]
        if shape != tuple(tensor.shape):
            folder = os.fspath(self._base.folder)
            raise ValueError(f"{name!r} is {list(tensor.shape)}, and {list(shape)} in {folder!r}: it is another base")
        return digest(self._base.parameter(name).detach().to(tensor.dtype))

    def _watched(self) -> dict[str, Tensor]:
        """By their names in the plain model."""
        if isinstance(self._source, Delta):
            return {**self._source.parameters, **self._source.buffers}
        model = _model(self._source)
        self._seen |= _trained(self._source, model) | _in_merged_adapters(model)
        for name, buffer in saved_buffers(model).items():
            if digest(self._rounded(buffer)) != self._buffers.get(name):
                self._seen.add(name)
        there = {**dict(model.named_parameters()), **saved_buffers(model)}
        return {_plain_name(name): tensor for name, tensor in there.items() if name in self._seen}

    def _rounded(self, tensor: Tensor) -> Tensor:
        gathered = whole(tensor)
        return gathered.to(self._dtype) if self._dtype is not None and gathered.is_floating_point() else gathered


def _trained(source: SelectiveBackward | nn.Module, model: nn.Module) -> set[str]:
    """Names of what trains, and of what did before an exchange of layers; not those of adapters."""
    if isinstance(source, SelectiveBackward):
        left = {id(one) for part in chosen_layers(model, source.former_layers) for one in part.parameters}
        trained = {*source.trainable_names, *(name for name, one in model.named_parameters() if id(one) in left)}
    else:
        trained = {name for name, one in model.named_parameters() if one.requires_grad}
    foreign = [name for name in sorted(trained) if _is_beside_base(name, model)]
    if foreign:
        raise ValueError(f"{foreign[0]!r} trains, which PEFT has put beside the base: a server of the base has none")
    return {name for name in trained if "original_module" not in name.split(".")} - _of_adapters(model)


def _model(source: SelectiveBackward | nn.Module) -> nn.Module:
    model = source.model if isinstance(source, SelectiveBackward) else source
    while isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    return model


def _refuse_packed(source: SelectiveBackward | nn.Module | Delta) -> None:
    """ValueError where a server with the plain base would compute something else, or tensors are not whole."""
    if isinstance(source, Delta):
        frozen = settings_of(source).frozen
        if frozen is not None:
            raise ValueError(
                f"the delta was trained on a base whose frozen weights were rounded to {frozen}, which a server with "
                "the plain base does not have: merge it, and serve that"
            )
        return
    for name, module in _model(source).named_modules():
        if isinstance(module, QuantisedLinear):
            raise ValueError(
                f"{name!r} is kept in {module.format} while it is frozen, and a server with the plain base would "
                "compute something else: train without frozen=, or merge the delta and serve that"
            )
    for name, parameter in _model(source).named_parameters():
        if not (parameter.is_floating_point() or parameter.is_complex()):
            raise ValueError(
                f"{name!r} is quantised ({type(parameter).__name__}, {parameter.dtype}): what a server with plain "
                "weights computes is something else; load the model without quantisation"
            )
        if hasattr(parameter, "ds_id") or "_flat_param" in name:
            raise ValueError(
                f"{name!r} is sharded by DeepSpeed or FSDP1, whose shards are not gathered here: use fully_shard, or "
                "gather them and pass the whole model"
            )


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules that PEFT has put around a layer, with their names."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            yield name, module


def _of_adapters(model: nn.Module) -> set[str]:
    return {
        f"{name}.{key}"
        for name, module in _adapted(model)
        for key, _ in module.named_parameters()
        if not key.startswith("base_layer.")
    }


def _in_merged_adapters(model: nn.Module) -> set[str]:
    """Weights into which an adapter that trains is merged at the moment. Raises ValueError where one is not."""
    found: set[str] = set()
    for name, module in _adapted(model):
        if not any(p.requires_grad for key, p in module.named_parameters() if not key.startswith("base_layer.")):
            continue
        if not getattr(module, "merged", False):
            raise ValueError(
                f"{name!r} has an adapter that trains, and the base has no such tensors: call merge_adapter() before "
                "and unmerge_adapter() after, or give the server the adapter"
            )
        found |= {f"{name}.base_layer.{key}" for key, _ in module.base_layer.named_parameters()}
    return found


def _is_beside_base(name: str, model: nn.Module) -> bool:
    """Of a PeftModel: whether a parameter is in no module of the base, as prompts are."""
    inner = getattr(model, "_orig_mod", model)
    plain = name.removeprefix("_orig_mod.")
    return hasattr(inner, "peft_config") and hasattr(inner, "get_base_model") and not plain.startswith(_OF_PEFT)


def _plain_name(name: str) -> str:
    """Without what wrappers and PEFT put into it."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS).removeprefix(_OF_PEFT)
    before, found, after = name.partition(".modules_to_save.")
    return f"{before}.{after.partition('.')[2]}" if found else name


def _aliases(source: SelectiveBackward | nn.Module | Delta) -> dict[str, tuple[str, ...]]:
    """The other names of each parameter of the model, where it is tied."""
    if isinstance(source, Delta):
        return {}
    names: dict[int, list[str]] = {}
    for name, parameter in _model(source).named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(_plain_name(name))
    return {first: tuple(rest) for first, *rest in names.values()}


def _as_saved(source: SelectiveBackward | nn.Module | Delta, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of files, where transformers renames or splits what it loaded (as it does for experts)."""
    if isinstance(source, Delta) or "transformers" not in sys.modules:
        return tensors
    model: Any = getattr(_model(source), "_orig_mod", _model(source))  # of torch.compile
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT
    if not isinstance(model, sys.modules["transformers"].PreTrainedModel):
        return tensors
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before 5.0 nothing was renamed
        return tensors
    return dict(revert_weight_conversion(model, tensors))
