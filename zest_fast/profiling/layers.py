"""Which layers a model has: one row for each module and weight, its name, its kind, and which rows a caller asks for.

A layer is a module that owns a parameter of two or more dimensions. Its row bears the module's name, or the
parameter's full name where the module owns several (LSTM, fused experts) or is the root.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from zest_fast.foundation.nearest import nearest
from zest_fast.kernels import DTYPES
from zest_fast.kernels.storage import has_storage, is_fake, why_no_storage
from zest_fast.profiling.processes.local import local_part

LayerSelection = str | re.Pattern[str] | Iterable[str] | Callable[[str, nn.Module], bool] | None

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(eq=False)
class Weight:
    """One parameter and every layer that owns it (several where modules are tied)."""

    parameter: nn.Parameter
    layers: list[Layer] = field(default_factory=list)


@dataclass(eq=False)
class Layer:
    """One row of the profile."""

    name: str
    module_name: str
    module: nn.Module
    parameter_name: str
    """Full name of the parameter, as in ``model.named_parameters()``."""
    weight: Weight
    kind: str
    output_module: nn.Module | None
    """The module whose output is Y of this layer; None where there is none."""
    note: str = ""
    """Why act and fisher cannot be had, where they cannot."""

    @property
    def called_module(self) -> nn.Module:
        """The module whose calls are uses of the layer (not a parametrisation, but the module around it)."""
        return self.output_module or self.module

    @property
    def is_embedding(self) -> bool:
        return isinstance(self.module, _EMBEDDINGS)


def find_layers(modules: dict[str, nn.Module]) -> list[Layer]:
    """Every layer among ``dict(model.named_modules())``, in that order, weights of any dtype included."""
    weights: dict[int, Weight] = {}
    layers = []
    for module_name, module in modules.items():
        owned = {n: p for n, p in module._parameters.items() if p is not None and p.dim() >= 2}
        for n, p in owned.items():
            full_name = f"{module_name}.{n}" if module_name else n
            weight = weights.setdefault(id(p), Weight(p))
            output_module, note = _output_module(module_name, module, len(owned), modules)
            layer = Layer(
                name=module_name if module_name and len(owned) == 1 else full_name,
                module_name=module_name,
                module=module,
                parameter_name=full_name,
                weight=weight,
                kind=layer_kind(module),
                output_module=output_module,
                note=note,
            )
            weight.layers.append(layer)
            layers.append(layer)
    return layers


def unsupported(p: Tensor) -> str:
    """Why a weight cannot be profiled; empty where it can."""
    if not (p.is_floating_point() or p.is_complex()):
        return f"quantised or integer storage ({p.dtype})"
    if p.dtype not in DTYPES:
        return f"{p.dtype} has no gradient statistics"
    p = local_part(p)
    return "" if has_storage(p) or is_fake(p) else f"its weight is {why_no_storage(p)}"


def layer_kind(module: nn.Module) -> str:
    """The field's word for a module: linear, conv2d, depthwise, embedding, lstm, ...; else "parameter"."""
    if isinstance(module, nn.Linear) or is_transformers_conv1d(module):
        return "linear"
    if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)):
        dims = module.weight.dim() - 2
        if isinstance(module, _TRANSPOSED):
            return f"conv_transpose{dims}d"
        if module.groups > 1:
            return "depthwise" if module.groups == module.in_channels else "grouped_conv"
        return f"conv{dims}d"
    if isinstance(module, _EMBEDDINGS):
        return "embedding"
    if isinstance(module, nn.RNNBase):
        return module.mode.lower().split("_")[0]
    if isinstance(module, nn.RNNCellBase):
        return type(module).__name__.lower().removesuffix("cell")
    if isinstance(module, nn.MultiheadAttention):
        return "attention"
    if isinstance(module, nn.Bilinear):
        return "bilinear"
    return "parameter"


def is_transformers_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D: a linear layer whose weight is stored as [in, out]."""
    library = sys.modules.get("transformers.pytorch_utils")  # a model cannot hold one without it
    return library is not None and isinstance(module, library.Conv1D)


def channel_dim(layer: Layer, y: Tensor) -> int:
    """The dimension of the output channels in an output of the layer, counted from the end."""
    spatial = 0
    if isinstance(layer.output_module, (*_CONVOLUTIONS, *_TRANSPOSED)):
        spatial = len(layer.output_module.kernel_size)
    elif (
        layer.kind == "parameter"
        and y.dim() == layer.weight.parameter.dim() > 3
        and y.shape[1] == layer.weight.parameter.shape[0] > 1
    ):  # a convolution that someone wrote, [out, in, height, width]; not a table of positions [1, ...]
        spatial = y.dim() - 2
    return -1 - spatial


def _output_module(
    name: str, module: nn.Module, weights: int, modules: dict[str, nn.Module]
) -> tuple[nn.Module | None, str]:
    if isinstance(module, ParametrizationList):  # its own output is the weight; the layer is the module around it
        module = modules[name.rsplit(".parametrizations.", 1)[0]] if ".parametrizations." in name else modules[""]
        weights = 1
    known = (nn.Linear, nn.Bilinear, *_CONVOLUTIONS, *_TRANSPOSED, *_EMBEDDINGS)
    if isinstance(module, known) or is_transformers_conv1d(module) or weights == 1:
        return module, ""
    return None, f"act and fisher are undefined: {type(module).__name__} owns {weights} weights and has one output"


def select_layers(layers: list[Layer], selection: LayerSelection) -> list[Layer]:
    """The rows that ``selection`` (the argument ``layers`` of ``profile``) asks for, in model order.

    Raises:
        TypeError: not one of the forms of a selection.
        ValueError: a name or pattern that matches nothing, or a named layer whose storage has no gradient.
    """
    by_name = {layer.name: layer for layer in layers}
    if selection is None:
        chosen = [layer for layer in layers if not layer.is_embedding]
        if layers and not chosen:
            raise ValueError(
                "the model has no layers but embeddings, which layers=None leaves out; name them, as in "
                f"layers={[layer.name for layer in layers][:3]}"
            )
    elif isinstance(selection, str | re.Pattern):
        pattern = _compiled(selection)
        chosen = [layer for layer in layers if pattern.fullmatch(layer.name) or pattern.fullmatch(layer.module_name)]
        if not chosen:
            raise ValueError(
                f"layers={pattern.pattern!r} matches no layer (the whole name must match); "
                + nearest(pattern.pattern, by_name)
            )
    elif callable(selection):
        chosen = [layer for layer in layers if selection(layer.module_name, layer.module)]
        if not chosen:
            raise ValueError("layers: the predicate chose no layer")
    else:
        chosen = _named(layers, by_name, selection)
    supported = [layer for layer in chosen if not unsupported(layer.weight.parameter)]
    if not supported:
        reasons = {unsupported(layer.weight.parameter) for layer in chosen} - {""}
        raise ValueError(
            "the model has no weight of two or more dimensions to profile"
            + (f": {'; '.join(sorted(reasons))}" if reasons else "")
        )
    return supported


def _compiled(selection: str | re.Pattern[str]) -> re.Pattern[str]:
    try:
        return re.compile(selection)
    except re.error as error:
        raise ValueError(f"layers={selection!r} is no regular expression: {error}") from error


def _named(layers: list[Layer], by_name: dict[str, Layer], names: Iterable[str]) -> list[Layer]:
    try:
        names = list(names)
    except TypeError:
        raise TypeError(
            f"layers is a {type(names).__name__}; a pattern, an iterable of names, a predicate or None is needed"
        ) from None
    if not names:
        raise ValueError("layers is empty; pass None for every layer")
    wanted: set[int] = set()
    for name in names:
        rows = [by_name[name]] if name in by_name else [layer for layer in layers if name and layer.module_name == name]
        if not rows:
            raise ValueError(f"layers: no layer is named {name!r}; {nearest(name, by_name)}")
        for layer in rows:
            if reason := unsupported(layer.weight.parameter):
                raise ValueError(f"layer {name!r} cannot be profiled: {reason}; leave it out")
        wanted.update(id(layer) for layer in rows)
    return [layer for layer in layers if id(layer) in wanted]
