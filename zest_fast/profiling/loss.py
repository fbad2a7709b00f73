"""The loss of a pass: from a batch, a loss function or a closure; and what is said when it cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.profiling.layers import find_layers
from zest_fast.profiling.nearest import some


def loss_of(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[Any, Any], Tensor] | None,
    closure: Callable[[], Tensor] | None,
) -> Callable[[], Tensor]:
    """A function without arguments that runs the model on the batch and returns the loss."""
    if closure is not None:
        if batch is not None or loss_fn is not None:
            raise ValueError("closure was given together with batch or loss_fn; a closure computes the loss by itself")
        if not callable(closure):
            raise TypeError(f"closure is a {type(closure).__name__}; a function without arguments is needed")
        return closure
    if batch is None:
        raise ValueError("neither batch nor closure was given; pass one of them")
    devices = {p.device for p in model.parameters()}
    if isinstance(batch, Mapping):
        inputs, targets = _usable(dict(batch), devices, "batch"), batch.get("labels")
        if loss_fn is None:
            return lambda: _own_loss(model(**inputs), inputs)
        arguments = {k: v for k, v in inputs.items() if k != "labels"}
        return lambda: loss_fn(_logits(model(**arguments)), inputs.get("labels", targets))
    if isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, targets = _usable(batch[0], devices, "batch[0]"), _usable(batch[1], devices, "batch[1]")
        criterion = loss_fn or nn.functional.cross_entropy
        return lambda: criterion(_logits(_call(model, inputs)), targets)
    raise TypeError(
        f"batch is a {type(batch).__name__}; a mapping (model(**batch) returns a loss) or a pair (inputs, targets) is "
        "needed"
    )


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def _logits(output: Any) -> Any:
    """What a loss function gets: the tensor itself, or the logits of a ModelOutput."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return output if logits is None else logits


def _own_loss(output: Any, inputs: Mapping[str, Any]) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        has = "labels are in the batch, but" if "labels" in inputs else "the batch has no labels:"
        raise ValueError(
            f"batch: {has} the model returned no loss (keys: {', '.join(inputs)}); add labels that the model knows, "
            "or pass a pair (inputs, targets), loss_fn= or closure="
        )
    return loss


def _usable(value: Any, devices: set[torch.device], name: str) -> Any:
    """The batch with tensors that can take part in a graph and get no .grad; checks size and device."""
    if isinstance(value, Tensor):
        if value.dim() and value.shape[0] == 0:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: an empty batch has no gradient")
        if value.device.type not in {device.type for device in devices} and devices:
            raise ValueError(
                f"{name} is on {value.device}, the model on {' and '.join(sorted(map(str, devices)))}; move it there"
            )
        return value.clone() if value.is_inference() else value.detach()
    if isinstance(value, Mapping):
        return {k: _usable(v, devices, f"{name}[{k!r}]") for k, v in value.items()}
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return type(value)(_usable(v, devices, f"{name}[{i}]") for i, v in enumerate(value))
    return value


def check_loss(loss: Any, model: nn.Module, compute_loss: Callable[[], Tensor]) -> None:
    """Raises an error that names the cause unless the loss is a finite floating-point scalar with a graph."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss is a {type(loss).__name__}; a scalar tensor is needed")
    if loss.numel() != 1:
        raise ValueError(f"the loss has shape {tuple(loss.shape)}; a scalar is needed (take its mean)")
    if not loss.is_floating_point():
        raise TypeError(f"the loss is {loss.dtype}; a floating-point scalar is needed")
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"the loss is {float(loss.detach())}: {_why_not_finite(model, compute_loss)}")
    if not loss.requires_grad:
        raise ValueError(
            "the loss does not depend on the model's layers: it has no graph (was it detached, or computed under "
            "no_grad or from numbers?)"
        )


def _why_not_finite(model: nn.Module, compute_loss: Callable[[], Tensor]) -> str:
    weights = [n for n, p in model.named_parameters() if p.is_floating_point() and not _all_finite(p)]
    if weights:
        return "weights that are not finite: " + some(weights)
    outputs: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not _all_finite(output):
                outputs.append(name)

        return hook

    handles = [
        layer.module.register_forward_hook(note(layer.name)) for layer in find_layers(dict(model.named_modules()))
    ]
    try:
        with torch.no_grad():
            compute_loss()
    finally:
        for handle in handles:
            handle.remove()
    if outputs:
        return "layers whose outputs are not finite, first ones first: " + some(list(dict.fromkeys(outputs)))
    return "all weights and all outputs of layers are finite, so it arises in the loss itself or in the inputs"


def _all_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x.detach()).all())
