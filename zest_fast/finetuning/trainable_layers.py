"""From names to the parameters that are to train: the chosen layers and the head.

A layer bears the name of its row in a profile. Nothing here changes a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from zest_fast.finetuning.quantised_models import can_be_unpacked
from zest_fast.foundation.nearest import nearest
from zest_fast.profiling.heads import find_head, is_classifier, is_language_model, unwrap
from zest_fast.profiling.layer_profile import LayerProfile
from zest_fast.profiling.layers import Layer, find_layers
from zest_fast.ranking.ranking import Ranking


@dataclass(frozen=True)
class Part:
    """What trains under one name: parameters (the weight first), and the modules that own them, by name."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    owners: tuple[str, ...]


def chosen_layers(model: nn.Module, layers: Iterable[str]) -> tuple[Part, ...]:
    """The layers of these names, each once, in the order given. Raises ValueError for a name that cannot train."""
    names = layer_names(layers, takes_n=False)
    rows = _rows(model)
    for name in names:
        if name not in rows:
            raise ValueError(f"layers: {_why_not(model, name)}; {nearest(name, rows)}")
        _check_trainable("layers", rows[name])
    return tuple(rows[name] for name in names)


def head_layers(model: nn.Module, head: str | Iterable[str] | None) -> tuple[Part, ...]:
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
    for name in layer_names([head] if isinstance(head, str) else head, argument="head", takes_n=False):
        part = _whole_module(model, name) or rows.get(name)
        if part is None:
            raise ValueError(f"head: {_why_not(model, name)}; {nearest(name, rows)}")
        _check_trainable("head", part)
        selected.append(part)
    return tuple(selected)


def layers_that_can_train(model: nn.Module, head: Iterable[str]) -> frozenset[str]:
    """Rows that could train beside the `head` (names of its modules) as they are in memory now: not those whose weight
    is the head's too, quantised, on the meta device or on disk."""
    taken = {id(parameter) for part in head_layers(model, head) for parameter in part.parameters}
    return frozenset(
        name for name, part in _rows(model).items() if _is_plain(part) and id(part.parameters[0]) not in taken
    )


def _is_plain(part: Part) -> bool:
    return all(
        (p.is_floating_point() or p.is_complex()) and not p.is_meta and getattr(p, "pages", None) is None
        for p in part.parameters
    )


def layer_names(
    layers: Any, n: int | None = None, *, argument: str = "layers", takes_n: bool = True
) -> tuple[str, ...]:
    """The names: given, each once; or the `n` best of a Ranking, which holds every layer of the model.

    Every function that takes layers asks here. takes_n: whether it has an `n` that could be given.
    Raises TypeError for what holds no names, ValueError for a Ranking without n or an n without a Ranking.
    """
    if isinstance(layers, Ranking) and takes_n:
        if n is None:
            raise ValueError(
                f"{argument} is a Ranking of every layer: say how many to take with n=, or pass its .top(5)"
            )
        return layers.top(n)
    if n is not None:
        raise ValueError(f"n is for a Ranking; {argument} holds names already")
    if isinstance(layers, Ranking | LayerProfile):
        raise TypeError(f"{argument} is a {type(layers).__name__} with every layer of the model; pass ranking.top(n)")
    if isinstance(layers, str | bytes | Mapping) or not isinstance(layers, Iterable):
        raise TypeError(f"{argument} must be an iterable of layer names, such as [{layers!r:.80}]")
    names = list(layers)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{argument} must hold layer names, not {type(name).__name__} {name!r}")
    return tuple(dict.fromkeys(names))


def reusable_head(head: str | Iterable[str] | None) -> str | tuple[str, ...] | None:
    """A head to be asked for more than once, of an iterator too. Raises TypeError for what holds no names."""
    return head if head is None or isinstance(head, str) else layer_names(head, argument="head", takes_n=False)


def head_modules(model: nn.Module, head: str | Iterable[str] | None) -> tuple[str, ...]:
    """Names of the modules that another trainer has to train whole.

    "auto" = all that a classifier of transformers has beside its base model, which is new in it (`classifier`, whatever
    it holds; `pre_classifier`); the last layer of another classifier; nothing for a language model.
    Raises as `head_layers`.
    """
    names = [part.name for part in head_layers(model, head)]
    inner = unwrap(model)
    base = getattr(inner, str(getattr(inner, "base_model_prefix", "")) or "base_model", None)
    if head != "auto" or not names or not is_classifier(inner) or not isinstance(base, nn.Module) or base is inner:
        return tuple(names)
    inside = set(base.modules())
    beside = {
        child
        for child in inner.children()
        if child not in inside and any(True for _ in child.parameters()) and base not in set(child.modules())
    }
    whole = [name for name, module in model.named_modules() if module in beside]
    return tuple(whole + [name for name in names if not any(f"{name}.".startswith(f"{one}.") for one in whole)])


def _rows(model: nn.Module) -> dict[str, Part]:
    return {layer.name: _part(model, layer) for layer in find_layers(dict(model.named_modules()))}


def _part(model: nn.Module, layer: Layer) -> Part:
    weight = layer.parameter_name.rpartition(".")[2]
    owners = [layer.module_name]
    biases = _biases(layer.module, weight)
    if isinstance(
        layer.module, ParametrizationList
    ):  # torch keeps the parameters of conv.weight in a module of its own
        outer, _, parametrised = layer.module_name.rpartition("parametrizations.")
        biases = _biases(model.get_submodule(outer.rstrip(".")), parametrised)
        owners += [outer.rstrip(".")] if biases else []
    return Part(layer.name, (layer.weight.parameter, *biases), tuple(owners))


def _biases(module: nn.Module, weight: str) -> list[nn.Parameter]:
    """The biases of a weight: what is named after it, and vectors that are named after no weight of the module."""
    parameters = dict(module.named_parameters(recurse=False))
    named = {bias: name for name in parameters for bias in _bias_names(name) if bias != name}
    return [
        parameter
        for name, parameter in parameters.items()
        if "bias" in name and (named.get(name) == weight or (name not in named and parameter.dim() < 2))
    ]


def _bias_names(weight: str) -> tuple[str, str]:
    """LSTM has weight_ih_l0 and bias_ih_l0, fused experts have down_proj and down_proj_bias."""
    return weight.replace("weight", "bias"), f"{weight}_bias"


def _whole_module(model: nn.Module, name: str) -> Part | None:
    below = {owner: module for owner, module in model.named_modules() if f"{owner}.".startswith(f"{name}.")}
    if name not in below or not (parameters := tuple(below[name].parameters())):
        return None
    return Part(name, parameters, tuple(below))


def _why_not(model: nn.Module, name: str) -> str:
    module = dict(model.named_modules()).get(name)
    if module is None:
        return f"the model has no layer {name!r}"
    if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
        return f"{name!r} has several weights, which are layers of their own"
    return f"{name!r} ({type(module).__name__}) has no weight of two or more dimensions that could train"


def _check_trainable(argument: str, part: Part) -> None:
    for parameter in part.parameters:
        if not (parameter.is_floating_point() or parameter.is_complex() or can_be_unpacked(parameter)):
            raise ValueError(
                f"{argument}: {part.name!r} is stored as {parameter.dtype}, and only floating-point weights have "
                "gradients; choose another layer or load the model without quantisation"
            )
        if parameter.is_meta:
            raise ValueError(
                f"{argument}: {part.name!r} is on the meta device (offloaded or not loaded); load it first"
            )
