"""SynFlow (Tanaka et al. 2020): Σ |W⊙∂R/∂W| of each weight, with R the sum of what the model makes of an input of ones.

All parameters are replaced by their absolute values, normalisation layers by the identity, dropout is off, and
everything is float64, since R is a product over the depth of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.rnn import PackedSequence

from zest_fast.kernels import Collector
from zest_fast.profiling.layer_rules import weight_gradient_moments
from zest_fast.profiling.layers import Weight
from zest_fast.profiling.loss import call_model, logits_of
from zest_fast.profiling.metrics import NAN, LayerStatistics
from zest_fast.profiling.on_request.gradient_pass import GradientPass
from zest_fast.profiling.on_request.measure import Asked
from zest_fast.profiling.taps import first_input

_NORMALISATIONS = (
    nn.modules.batchnorm._NormBase,  # batch and instance normalisation of any dimension
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
)
_TOO_LARGE = "synflow is NaN where it exceeds float64"


class Synflow:
    """The statistic ``synflow`` of every weight (see ``measure.Measure``)."""

    def __init__(self, asked: Asked) -> None:
        batch = asked.batch_for("replaces the inputs")
        if not isinstance(batch, Mapping):
            self._inputs = batch[0]
        else:
            keeps_labels = asked.loss_fn is None
            self._inputs = batch if keeps_labels else {key: x for key, x in batch.items() if key != "labels"}
        self._model = asked.model
        self._found: dict[Weight, float] = {}

    def measure(self, passes: GradientPass, collector: Collector) -> str:
        self._found, note = synflow(passes, self._model, self._inputs, collector)
        return note

    def add_to(self, statistics: LayerStatistics, weight: Weight, loss_scale: float) -> None:
        if weight in self._found:
            statistics.synflow = self._found[weight]


def synflow(
    passes: GradientPass, model: nn.Module, inputs: Any, collector: Collector
) -> tuple[dict[Weight, float], str]:
    """synflow of each weight, and a note where one exceeds float64 (it is NaN then).

    Holds a float64 copy of every parameter and buffer; their own storage is set aside and comes back untouched.

    Raises RuntimeError on a device without float64, and whatever the model raises.
    """
    modules = list(model.modules())
    parameters = list(model.parameters())
    moments: dict[Weight, Any] = {}

    def compute() -> Tensor:
        for module in modules:
            module.training = False
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    module._buffers[name] = buffer.double()
        total = _sum_of_outputs(model, inputs, parameters[0].device)
        if not total.requires_grad:
            raise ValueError("synflow: what the model returns for an input of ones depends on no profiled layer")
        if not bool(total.isfinite()):
            raise OverflowError
        return total

    def reduce(weight: Weight, dw: Tensor) -> None:
        moments[weight] = weight_gradient_moments(collector, dw, weight.parameter)

    with (
        passes.replaced(parameters, lambda _, p: _positive(p)),
        _replaced_outputs(modules, _looks_up_input(model, inputs)),
    ):
        try:
            passes.run(compute, reduce)
        except OverflowError:  # deep models with gates square their signal block by block
            return dict.fromkeys(passes.weights, NAN), _TOO_LARGE
        collector.fetch()
    sums = {weight: moments[weight]().product_abs_sum if weight in moments else 0.0 for weight in passes.weights}
    found = {weight: value if math.isfinite(value) else NAN for weight, value in sums.items()}
    return found, _TOO_LARGE if any(map(math.isnan, found.values())) else ""


def _sum_of_outputs(model: nn.Module, inputs: Any, device: torch.device) -> Tensor:
    try:
        with torch.autocast(device.type, enabled=False):
            return _sum(logits_of(call_model(model, ones_like(inputs))))
    except RuntimeError as error:
        raise RuntimeError(f"synflow runs the model in float64 on an input of ones, which failed: {error}") from error


def is_normalisation(module: nn.Module) -> bool:
    """Whether a module normalises, hence is the identity here.

    torch's own layers and what is derived from them; else a module without submodules and without a matrix whose class
    has "norm" in its name, such as LlamaRMSNorm, T5LayerNorm or FrozenBatchNorm2d.
    """
    if isinstance(module, _NORMALISATIONS):
        return True
    leaf = not any(True for _ in module.children()) and all(p.dim() < 2 for p in module.parameters())
    return leaf and "norm" in type(module).__name__.lower()


def ones_like(value: Any) -> Any:
    """Inputs with ones of float64 in place of real numbers; what counts or selects (integers, bool) stays as it is."""
    if isinstance(value, PackedSequence):
        return PackedSequence(ones_like(value.data), value.batch_sizes, value.sorted_indices, value.unsorted_indices)
    if isinstance(value, Tensor):
        if value.is_complex():
            return torch.ones_like(value, dtype=torch.complex128)
        return torch.ones_like(value, dtype=torch.float64) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: ones_like(entry) for key, entry in value.items()}
    if type(value) in (tuple, list):
        return type(value)(ones_like(entry) for entry in value)
    return value


def _positive(values: Tensor) -> Tensor:
    if values.is_complex():
        return values.abs().to(torch.complex128)
    if values.is_floating_point():
        return values.abs().double()
    return values.abs() if values.dtype.is_signed else values  # quantised storage


def _sum(output: Any) -> Tensor:
    """Of every real number in what a model returns."""
    return sum((part.double().sum() for part in _reals(output)), torch.zeros((), dtype=torch.float64))


def _reals(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping | tuple | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _reals(part)


def _looks_up_input(model: nn.Module, inputs: Any) -> Callable[[nn.Module, Any], bool]:
    """Whether a call of an embedding looks up the model's input: the one that transformers calls its input embedding,
    in other models any that is handed an integer tensor of the inputs."""
    named = None
    if callable(getattr(model, "get_input_embeddings", None)):
        try:
            named = model.get_input_embeddings()  # type: ignore[operator]
        except NotImplementedError:
            named = None
    if isinstance(named, nn.Embedding):
        return lambda module, _: module is named
    storages = {t.untyped_storage().data_ptr() for t in _integers(inputs)}
    return lambda _, x: isinstance(x, Tensor) and x.untyped_storage().data_ptr() in storages


def _integers(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            yield value
    elif isinstance(value, Mapping | tuple | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _integers(part)


@contextmanager
def _replaced_outputs(modules: list[nn.Module], looks_up_input: Callable[[nn.Module, Any], bool]) -> Iterator[None]:
    """Normalisation layers return their input, and embeddings of the input ones."""

    def identity(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        x = first_input(args, kwargs)
        if not (isinstance(x, Tensor) and isinstance(output, Tensor) and x.shape == output.shape):
            return None
        x = x.clone()  # what follows may overwrite it in place
        for child in module.children():  # timm's BatchNormAct2d drops and activates what it normalised
            x = child(x)
        return x

    def ones(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        return torch.ones_like(output) if looks_up_input(module, first_input(args, kwargs)) else None

    handles = []
    of_weights = {part for module in modules if isinstance(module, ParametrizationList) for part in module.modules()}
    for module in modules:
        if is_normalisation(module) and module not in of_weights:  # spectral norm makes a weight, it is no layer
            handles.append(module.register_forward_hook(identity, with_kwargs=True))
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            handles.append(module.register_forward_hook(ones, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
