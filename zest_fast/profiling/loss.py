"""The loss of a pass: from a batch, a loss function or a closure; and what is said when it cannot be used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.foundation.nearest import some
from zest_fast.profiling.layers import find_layers
from zest_fast.profiling.processes.local import is_distributed


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
    parameters = list(model.parameters())
    devices = {p.device for p in parameters}
    meshes: list[Any] = [p for p in parameters if is_distributed(p)]  # whose parameters may be offloaded
    devices |= {torch.device(p.device_mesh.device_type) for p in meshes}
    if isinstance(batch, Mapping):
        inputs, targets = _usable(dict(batch), devices, "batch"), batch.get("labels")
        if loss_fn is None:
            return lambda: own_loss(model(**inputs), inputs)
        arguments = {k: v for k, v in inputs.items() if k != "labels"}
        return lambda: loss_fn(logits_of(model(**arguments)), inputs.get("labels", targets))
    if isinstance(batch, tuple | list) and len(batch) == 2:
        inputs = _usable(batch[0], devices, "batch[0]")
        # One target of many may be empty: an image without boxes.
        targets = _usable(batch[1], devices, "batch[1]", check_size=isinstance(batch[1], Tensor))
        criterion = loss_fn or _cross_entropy
        return lambda: criterion(logits_of(call_model(model, inputs)), targets)
    raise TypeError(
        f"batch is a {type(batch).__name__}; a mapping (model(**batch) returns a loss) or a pair (inputs, targets) is "
        "needed"
    )


def call_model(model: nn.Module, inputs: Any) -> Any:
    """The model on the inputs of a pair: one object, a tuple of arguments, or a mapping of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if type(inputs) in (tuple, list) else model(inputs)  # a PackedSequence is one input


def logits_of(output: Any) -> Any:
    """What a loss function gets: the tensor itself, or the logits of a ModelOutput."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return output if logits is None else logits


def _cross_entropy(output: Any, targets: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model returned a {type(output).__name__} without logits: pass loss_fn=, which gets it whole"
        )
    return nn.functional.cross_entropy(output, targets)


def own_loss(output: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The loss that a model computed from the labels in its inputs."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None and isinstance(output, tuple) and not hasattr(output, "_fields"):
        raise ValueError(
            "batch: the model returned a plain tuple, in which the loss has no name; let it return a mapping or a "
            "ModelOutput (return_dict=True), or pass closure="
        )
    if loss is None:
        has = "labels are in the batch, but" if "labels" in inputs else "the batch has no labels:"
        raise ValueError(
            f"batch: {has} the model returned no loss (keys: {', '.join(inputs)}); add labels that the model knows, "
            "or pass a pair (inputs, targets), loss_fn= or closure="
        )
    return loss


def _usable(value: Any, devices: set[torch.device], name: str, check_size: bool = True) -> Any:
    """The batch with tensors that can take part in a graph and get no .grad; checks size and device."""
    if isinstance(value, Tensor):
        if check_size and value.dim() and value.size(0) == 0:  # nested tensors have no shape
            raise ValueError(f"{name} has shape {tuple(value.shape)}: an empty batch has no gradient")
        lengths = value.device.type == "cpu" and value.dim() == 1 and not value.is_floating_point()  # of sequences
        if value.device.type not in {device.type for device in devices} and devices and not lengths:
            raise ValueError(
                f"{name} is on {value.device}, the model on {' and '.join(sorted(map(str, devices)))}; move it there"
            )
        return value.clone() if value.is_inference() else value.detach()
    if isinstance(value, Mapping):
        return {k: _usable(v, devices, f"{name}[{k!r}]", check_size) for k, v in value.items()}
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return type(value)(_usable(v, devices, f"{name}[{i}]", check_size) for i, v in enumerate(value))
    return value


def check_loss(loss: Any) -> None:
    """Raises an error that names what was found unless the loss is a floating-point scalar with a graph."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss is a {type(loss).__name__}; a scalar tensor is needed")
    if loss.numel() != 1:
        raise ValueError(f"the loss has shape {tuple(loss.shape)}; a scalar is needed (take its mean)")
    if not loss.is_floating_point():
        raise TypeError(f"the loss is {loss.dtype}; a floating-point scalar is needed")
    if not loss.requires_grad:
        raise ValueError(
            "the loss does not depend on the model's layers: it has no graph (was it detached, or computed under "
            "no_grad or from numbers?)"
        )


class NotRepeatable(RuntimeError):
    """A pass that was run again had another loss."""


class RepeatedLoss:
    """Compares the losses of one pass that is run several times: all from the same state, they must be the same.

    Routes of another run may add in another order, and a GPU's atomics add in any: relative differences up to
    ``_ALIKE`` (on a GPU a hundred times that) of the coarsest type that takes part are taken for rounding.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._types = {p.dtype for p in parameters if p.is_floating_point()}
        self._first: dict[Any, Tensor] = {}

    def check(self, loss: Tensor, of: Any = None) -> None:
        """Raises NotRepeatable, a RuntimeError, where a loss differs from the first one that was handed over.

        of: what may change the loss of a run by itself, such as which parameters take part; runs are compared where it
        is the same.
        """
        first = self._first.setdefault(of, loss.detach().clone())
        a, b = float(first), float(loss.detach())
        if a == b or (math.isnan(a) and math.isnan(b)):
            return
        if abs(a - b) > self._tolerance(loss) * max(abs(a), abs(b)):
            raise NotRepeatable(
                f"the loss was {a:.9g} in the first run of this pass and {b:.9g} in the next, though the model, its "
                "buffers and plain attributes, and the random state of torch, NumPy, Python and of generators that "
                "were found had been rewound: model or closure keeps something else (a data iterator, a counter in a "
                "closure or in an object, a generator of its own). A pass is run again where its first run could not "
                "see all uses of a weight. Let the closure compute the same loss every time"
            )

    def _tolerance(self, loss: Tensor) -> float:
        kind = loss.device.type
        types = {loss.dtype, *self._types}
        if torch.is_autocast_enabled(kind):
            types.add(torch.get_autocast_dtype(kind))
        alike = max(_ALIKE.get(dtype, _ALIKE[torch.float16]) for dtype in types)
        return alike if kind == "cpu" else min(100 * alike, 0.05)


_ALIKE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class NotFinite(ValueError):
    """A loss that is not finite."""


def require_finite(loss: Tensor, model: nn.Module, compute_loss: Callable[[], Tensor]) -> None:
    """Raises NotFinite, which names the layers at fault, where the loss is not; waits for the device."""
    if not bool(torch.isfinite(loss)):
        raise NotFinite(f"the loss is {float(loss.detach())}: {_why_not_finite(model, compute_loss)}")


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
        compute_loss()
    except Exception:  # it ran once; a closure that cannot run again tells nothing more
        return "all weights are finite, and the loss cannot be computed again to see which outputs are not"
    finally:
        for handle in handles:
            handle.remove()
    if outputs:
        return "layers whose outputs are not finite, first ones first: " + some(list(dict.fromkeys(outputs)))
    return "all weights and all outputs of layers are finite, so it arises in the loss itself or in the inputs"


def _all_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x.detach()).all())
