"""From names to the parameters that are to train: the chosen layers and the head.

A layer bears the name of its row in a profile: the module's own name, or the parameter's full name where a module has
several parameters of two or more dimensions (LSTM, fused experts) and in the root module. Nothing here changes a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from zest_fast.profiling.heads import find_head, is_language_model
from zest_fast.profiling.layer_profile import LayerProfile
from zest_fast.profiling.nearest import nearest
from zest_fast.ranking.ranking import Ranking

PARAMETRISED = ".parametrizations."  # torch keeps the parameters behind `conv.weight` in conv.parametrizations.weight


@dataclass(frozen=True)
class Layer:
    """What trains under one name: parameters (the weight first), and the modules that own them, by name."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    owners: tuple[str, ...]


def select_layers(model: nn.Module, layers: Iterable[str]) -> tuple[Layer, ...]:
    """The layers of these names, each once, in the order given. Raises ValueError for a name that cannot train."""
    names = _names("layers", layers)
    rows = _rows(model)
    for name in names:
        if name not in rows:
            raise ValueError(f"layers: {_why_not(model, name)}; {nearest(name, rows)}")
        _check_trainable("layers", rows[name])
    return tuple(rows[name] for name in names)


def select_head(model: nn.Module, head: str | Iterable[str] | None) -> tuple[Layer, ...]:
    """The head: "auto" = the classifier, nothing for a language model; or names of layers, or of modules with all of
    their parameters.

    Raises ValueError where "auto" cannot tell, and for a name that cannot train.
    """
    if head is None or (head == "auto" and is_language_model(model)):
        return ()
    rows = _rows(model)
    if head == "auto":
        found = find_head(model)
        if found is None:
            raise ValueError("head='auto': the model has no layer with a weight; pass head=")
        head = found or next(iter(rows))  # the root module is the head: its row goes by the parameter's name
    selected = []
    for name in _names("head", [head] if isinstance(head, str) else head):
        part = _whole_module(model, name) or rows.get(name)
        if part is None:
            raise ValueError(f"head: {_why_not(model, name)}; {nearest(name, rows)}")
        _check_trainable("head", part)
        selected.append(part)
    return tuple(selected)


def _names(argument: str, names: Iterable[str]) -> list[str]:
    if isinstance(names, Ranking | LayerProfile):
        raise TypeError(f"{argument} is a {type(names).__name__} with every layer of the model; pass ranking.top(n)")
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"{argument} must be an iterable of layer names, such as [{names!r}]")
    names = list(dict.fromkeys(names))
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{argument} must hold layer names, not {type(name).__name__} {name!r}")
    return names


def _rows(model: nn.Module) -> dict[str, Layer]:
    rows = {}
    for owner, module in model.named_modules():
        weights = [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() > 1]
        for weight in weights:
            name = owner if owner and len(weights) == 1 else _join(owner, weight)
            rows[name] = _layer(model, name, owner, module, weight)
    return rows


def _layer(model: nn.Module, name: str, owner: str, module: nn.Module, weight: str) -> Layer:
    owners = [owner]
    biases = _biases(module, weight)
    if PARAMETRISED in owner:
        outer, _, parametrised = owner.partition(PARAMETRISED)
        biases = _biases(model.get_submodule(outer), parametrised)
        owners += [outer] if biases else []
    return Layer(name, (module.get_parameter(weight), *biases), tuple(owners))


def _biases(module: nn.Module, weight: str) -> list[nn.Parameter]:
    """The biases of a weight: those named after it, and those that are named after no weight of the module."""
    parameters = dict(module.named_parameters(recurse=False))
    biases = {name: parameter for name, parameter in parameters.items() if "bias" in name and name != weight}
    return [
        parameter
        for name, parameter in biases.items()
        if name in _bias_names(weight) or not any(name in _bias_names(other) for other in parameters if other != name)
    ]


def _bias_names(weight: str) -> tuple[str, str]:
    """LSTM has weight_ih_l0 and bias_ih_l0, fused experts have down_proj and down_proj_bias."""
    return weight.replace("weight", "bias"), f"{weight}_bias"


def _whole_module(model: nn.Module, name: str) -> Layer | None:
    below = {owner: module for owner, module in model.named_modules() if f"{owner}.".startswith(f"{name}.")}
    if name not in below or not (parameters := tuple(below[name].parameters())):
        return None
    return Layer(name, parameters, tuple(below))


def _why_not(model: nn.Module, name: str) -> str:
    module = dict(model.named_modules()).get(name)
    if module is None:
        return f"the model has no layer {name!r}"
    if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
        return f"{name!r} has several weights, which are layers of their own"
    return f"{name!r} ({type(module).__name__}) has no weight of two or more dimensions that could train"


def _check_trainable(argument: str, layer: Layer) -> None:
    for parameter in layer.parameters:
        if not (parameter.is_floating_point() or parameter.is_complex()):
            raise ValueError(
                f"{argument}: {layer.name!r} is stored as {parameter.dtype}, and only floating-point weights have "
                "gradients; choose another layer or load the model without quantisation"
            )
        if parameter.is_meta:
            raise ValueError(
                f"{argument}: {layer.name!r} is on the meta device (offloaded or not loaded); load it first"
            )


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
