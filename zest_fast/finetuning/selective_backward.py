"""Fine-tune a few layers in place: they and the head train, and backward ends at the lowest of them."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from zest_fast.finetuning.cut import CutFinder
from zest_fast.finetuning.delta import Delta, check_tensors, hash_tensors, read_delta, write_delta
from zest_fast.finetuning.frozen_norms import keep_frozen_norms_in_eval
from zest_fast.finetuning.summary import Summary
from zest_fast.finetuning.trainable_layers import Part, chosen_layers, head_layers

_wrapped: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # every module of every wrapped model


class SelectiveBackward:
    """Let the weight and bias of the chosen `layers` and the `head` train and freeze the rest, in place.

    Use the model as before; give `.parameters()` to the optimizer. `.remove()`, or the end of a `with` block, gives the
    model back as found, with its tuned weights.

    model: any nn.Module that is not wrapped yet; torch.compile and DistributedDataParallel come afterwards.
    layers: names as in a profile, such as `ranking.top(5)`.
    head: "auto" = the last layer of a classifier, nothing for a language model (ValueError where that cannot be told);
        a name or names of modules, each with all its parameters; None.
    lean: no effect yet. checkpoint, frozen: not built yet, NotImplementedError.

    While wrapped, batch norm whose parameters are frozen runs in eval mode, also after `model.train()`. The `.grad` of
    what is frozen is neither read nor cleared. Choosing a layer that shares its weight with an embedding makes backward
    run down to the embedding. So does `gradient_checkpointing_enable()` of transformers, which makes the embedding's
    output require a gradient, until `disable_input_require_grads()`: the first forward pass warns of it.

    Raises ValueError for a layer that does not exist or cannot train, RuntimeError for a model that is wrapped,
    compiled or in DistributedDataParallel already; the model is then untouched.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str],
        *,
        head: str | Iterable[str] | None = "auto",
        checkpoint: object = None,
        lean: bool = True,
        frozen: object = None,
    ) -> None:
        _refuse_what_is_not_built(checkpoint=checkpoint, frozen=frozen)
        _refuse_wrapped(model)
        self._layers = chosen_layers(model, layers)
        self._head = head_layers(model, head)
        if not self._layers and not self._head:
            raise ValueError("nothing would train: layers is empty and there is no head; choose layers or pass head=")
        self.model = model
        chosen = {id(parameter) for part in (*self._layers, *self._head) for parameter in part.parameters}
        self.trainable_names = tuple(name for name, parameter in model.named_parameters() if id(parameter) in chosen)
        self._found = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._buffers = {name: buffer.detach().clone() for name, buffer in _saved_buffers(model).items()}
        self._removed = False
        self._handles: list[Any] = []  # whatever has .remove()
        try:
            self._freeze(chosen)
        except BaseException:
            self.remove()
            raise

    def _freeze(self, chosen: set[int]) -> None:
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
        self._handles += keep_frozen_norms_in_eval(self.model)
        owners = {
            name: module
            for name, module in self.model.named_modules()
            if any(id(parameter) in chosen for parameter in module.parameters(recurse=False))
        }
        self._cut = CutFinder(self.model, owners)
        self._handles.append(self._cut)
        _wrapped.update(self.model.modules())

    def parameters(self) -> Iterator[nn.Parameter]:
        """What trains, for the optimizer: each parameter once, in the order of `trainable_names`."""
        parameters = dict(self.model.named_parameters())
        return (parameters[name] for name in self.trainable_names)

    @property
    def cut(self) -> str:
        """The lowest layer that trains: by registration before the first forward pass, then by the order of use."""
        return self._cut_and_tie()[0]

    def summary(self) -> Summary:
        """What trains and where backward ends; print it."""
        cut, tied = self._cut_and_tie()
        return Summary(
            trainable_parameters=sum(parameter.numel() for parameter in self.parameters()),
            total_parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            layers=_names(self._layers),
            head=_names(self._head),
            cut=cut,
            tied=tied,
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the trained parameters and the buffers that changed as a safetensors delta; returns the path.

        Hashing the frozen parameters takes about a second for each GB. An existing file is replaced at once or kept.
        """
        buffers = {
            name: buffer
            for name, buffer in _saved_buffers(self.model).items()
            if name not in self._buffers or _differ(self._buffers[name], buffer)
        }
        parameters = dict(zip(self.trainable_names, self.parameters(), strict=True))
        return write_delta(path, Delta(_names(self._layers), _names(self._head), self._base(), parameters, buffers))

    def load(self, path: str | os.PathLike[str]) -> SelectiveBackward:
        """Put a saved delta into the model, exact to the bit; returns itself.

        Raises ValueError, with the model untouched, when the file is torn or foreign, when other layers trained, or
        when the frozen parameters differ from those that the delta was made on.
        """
        delta = read_delta(path)
        parameters = dict(zip(self.trainable_names, self.parameters(), strict=True))
        buffers = _saved_buffers(self.model)
        try:
            self._check(delta, parameters, buffers)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r} does not fit: {error}") from error
        with torch.no_grad():
            for name, tensor in delta.parameters.items():
                parameters[name].copy_(tensor)
            for name, buffer in buffers.items():  # those that had not changed are as they were when wrapped
                wanted = delta.buffers.get(name, self._buffers.get(name, buffer))
                if _differ(wanted, buffer):
                    buffer.copy_(wanted)
        return self

    def remove(self) -> None:
        """Give the model back: `requires_grad` as found, no hooks, tuned weights. A second call does nothing."""
        if self._removed:
            return
        self._removed = True
        for handle in self._handles:
            handle.remove()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._found.get(name, parameter.requires_grad))
        _wrapped.difference_update(self.model.modules())

    def __enter__(self) -> SelectiveBackward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "removed; while wrapped: " if self._removed else ""
        return f"SelectiveBackward({type(self.model).__name__}): {state}{self.summary()}"

    def _base(self) -> str:
        trainable = set(self.trainable_names)
        frozen = [(name, tensor) for name, tensor in self.model.named_parameters() if name not in trainable]
        return hash_tensors([*frozen, *self._buffers.items()])

    def _check(self, delta: Delta, parameters: dict[str, nn.Parameter], buffers: dict[str, torch.Tensor]) -> None:
        for argument, saved, ours in (("layers", delta.layers, self._layers), ("head", delta.head, self._head)):
            if set(saved) != set(_names(ours)):
                raise ValueError(
                    f"it was saved with {argument}={list(saved)}, this model is wrapped with {list(_names(ours))}; "
                    f"wrap it with the same {argument}"
                )
        missing = sorted(set(parameters) - set(delta.parameters))
        if missing:
            raise ValueError(f"it lacks the parameter {missing[0]!r}")
        check_tensors("parameter", delta.parameters, parameters)
        check_tensors("buffer", delta.buffers, buffers)
        if delta.base != self._base():
            raise ValueError(
                "the frozen parameters or buffers of this model differ from those it was trained on: "
                "load the same base weights in the same dtype first"
            )

    def _cut_and_tie(self) -> tuple[str, str]:
        """The name of the cut, and of the layer that it is tied to where it was not itself chosen."""
        owner = self._cut.owner
        parts = (*self._layers, *self._head)
        for part in parts:
            if owner in part.owners:
                return part.name, ""
        own = {id(parameter) for parameter in self.model.get_submodule(owner).parameters(recurse=False)}
        return owner, next(part.name for part in parts if any(id(parameter) in own for parameter in part.parameters))


def _names(parts: tuple[Part, ...]) -> tuple[str, ...]:
    return tuple(part.name for part in parts)


def _differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    return hash_tensors([("", a)]) != hash_tensors([("", b)])


def _saved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the state of the model; the others (such as rotary tables) are computed anew."""
    computed = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in model.named_buffers() if name not in computed and not buffer.is_meta}


def _refuse_what_is_not_built(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{name}={value!r}: {name} is not built yet; leave it None")


def _refuse_wrapped(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        kind = type(model).__name__
        raise RuntimeError(
            f"the model is in a {kind}, which counts on its gradients: wrap model.module, then build {kind}"
        )
    for module in model.modules():
        if module in _wrapped:
            raise RuntimeError(
                f"{type(module).__name__} is wrapped by a SelectiveBackward already: call its .remove() "
                "(or leave its with block) before wrapping again"
            )
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise RuntimeError(
                "the model is compiled, and compiled code misses new hooks: wrap it first, then compile it"
            )
