"""The one pass: a forward and a backward over one mini-batch, and out comes every metric of every layer."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zest_fast import kernels
from zest_fast.kernels import GradientMoments, Moments
from zest_fast.profiling import layer_rules
from zest_fast.profiling.heads import find_head
from zest_fast.profiling.layer_profile import LayerProfile
from zest_fast.profiling.layers import Layer, LayerSelection, Weight, find_layers, select_layers, unsupported
from zest_fast.profiling.metrics import (
    BACKWARD,
    FISHER,
    GRADIENT,
    GRADIENT_ABS,
    METRICS,
    NEEDS_TILES,
    OUTPUT,
    PRODUCT,
    PRODUCT_ABS,
    WEIGHT,
    LayerStatistics,
    select_metrics,
    statistics_needed,
)
from zest_fast.profiling.model_state import ModelState
from zest_fast.profiling.taps import Routes, Taps

_in_progress: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def profile(
    model: nn.Module,
    batch: Any = None,
    *,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    closure: Callable[[], Tensor] | None = None,
    layers: LayerSelection = None,
    metrics: Iterable[str] | None = None,
    backend: str = "auto",
    loss_scale: float = 1.0,
) -> LayerProfile:
    """Every metric of every layer from one forward and one backward pass over one mini-batch.

    No gradient is kept: a Linear's exists only tile by tile, any other layer's one at a time. The model runs in the
    mode that it is in (train or eval) and is bit for bit as it was afterwards, also when forward, loss or backward
    raises: weights, buffers, ``requires_grad``, ``.grad``, hooks, modes and random state. Gradients are taken of every
    profiled weight, also of those that are frozen. A pass may be run again where counting shows that the first could
    not see all uses of a weight (a parameter used outside of its module under reentrant checkpointing, say).

    Args:
        model: any module; weights of float32, float64, bfloat16 or float16.
        batch: a mapping (called as ``model(**batch)``; the loss is ``output.loss``) or a pair (inputs, targets), inputs
            being one tensor, a tuple of arguments or a mapping.
        loss_fn: ``loss_fn(output, targets)`` -> scalar mean loss; cross-entropy by default for a pair. Of a
            ModelOutput it gets the logits; for a mapping the targets are ``batch.get("labels")``.
        closure: instead of a batch, a function without arguments that runs the model and returns the scalar loss.
        layers: which rows: a regular expression (the whole name must match), an iterable of names, a predicate
            (module name, module) -> bool, or None = every layer but embeddings.
        metrics: names (see ``zest_fast.profiling.metrics.METRICS``); None = all that one pass yields. What only other
            metrics need is not computed: without backward metrics there is no backward pass.
        backend: "auto", "reference" (float64, slow), "cpu"; "triton" and "cuda" are not built yet.
        loss_scale: the factor that the loss already carries (as under a GradScaler); the statistics and the reported
            loss are divided by it.

    Returns:
        A LayerProfile: layers x metrics in float64. ``.uncovered`` names every parameter of two or more dimensions
        that has no row, with the reason.

    Raises:
        TypeError, ValueError: an argument that does not fit, a model on the meta device, a loss that is not a finite
            scalar or does not depend on the model. The message names the argument or layer.
        RuntimeError: inside ``torch.inference_mode``, or inside another profile of the same model.
        NotImplementedError: metrics or backends that are not built yet.
        Whatever model, loss_fn or closure raise passes through unchanged.
    """
    names = select_metrics(metrics)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; a torch.nn.Module is needed")
    if not (isinstance(loss_scale, int | float) and math.isfinite(loss_scale) and loss_scale > 0):
        raise ValueError(f"loss_scale is {loss_scale!r}; a positive number is needed")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("profile needs gradients and cannot run inside torch.inference_mode(); leave it first")
    model = _without_wrappers(model, closure)
    _require_own_data(model)
    kernels.pick_backend(backend, _first_device(model))
    every_layer = find_layers(model)
    chosen = select_layers(every_layer, layers)
    compute_loss = _loss_of(model, batch, loss_fn, closure)

    if any(module in _in_progress for module in model.modules()):
        raise RuntimeError(
            "this model is being profiled already: profile was called inside a profile of the same model"
        )
    entered = list(model.modules())
    _in_progress.update(entered)
    try:
        job = _Pass(model, every_layer, chosen, names, backend, float(loss_scale))
        return job.run(compute_loss)
    finally:
        _in_progress.difference_update(entered)


class _Statistics:
    """The observer of one pass: reduces what the taps hand over and keeps numbers only."""

    def __init__(self, needed: frozenset[str], backend: str) -> None:
        self._needed = needed
        self._backend = backend
        self._products: dict[Layer, list[Tensor]] = {}
        self.outputs: dict[Layer, Moments] = {}
        self.gradients: dict[Weight, GradientMoments] = {}
        self.fisher: dict[Layer, float] = {}

    def output(self, layer: Layer, y: Tensor) -> None:
        found = kernels.moments([y], backend=self._backend)[0]
        before = self.outputs.get(layer)
        self.outputs[layer] = found if before is None else before.merge(found)

    def linear(self, layer: Layer, x: Tensor, g: Tensor, y: Callable[[], Tensor]) -> None:
        if NEEDS_TILES & self._needed or x.dtype != g.dtype:
            found = layer_rules.linear_gradient_moments(layer.module, x, g, self._backend)
        else:
            found = layer_rules.linear_gradient_moments_without_tiles(
                layer.module, x, g, y() if PRODUCT in self._needed else None
            )
        self.gradients[layer.weight] = found

    def weight_gradient(self, weight: Weight, dw: Tensor) -> None:
        self.gradients[weight] = layer_rules.weight_gradient_moments(dw, weight.parameter, self._backend)

    def output_gradient(self, layer: Layer, y: Callable[[], Tensor], g: Tensor, only_use: bool) -> None:
        if only_use:
            self.fisher[layer] = layer_rules.fisher_of_one_use(layer, y(), g, self._backend)
        else:
            self._products.setdefault(layer, []).append(layer_rules.output_products(layer, y(), g, self._backend))

    def finish(self) -> None:
        """S of several uses is summed first; where uses differ in the number of samples, fisher is the sum over them."""
        for layer, products in self._products.items():
            if len({s.shape for s in products}) == 1:
                products = [torch.stack(products).sum(0)]
            self.fisher[layer] = sum(layer_rules.fisher_of_products(s) for s in products)


class _Pass:
    """One profile of one model: the pass, run again where its taps ask for it, and the table."""

    def __init__(
        self,
        model: nn.Module,
        every_layer: list[Layer],
        chosen: list[Layer],
        metrics: list[str],
        backend: str,
        loss_scale: float,
    ) -> None:
        self._model = model
        self._every_layer = every_layer
        self._chosen = chosen
        self._metrics = metrics
        self._backend = backend
        self._scale = loss_scale
        self._needed = statistics_needed(metrics)
        self._weight_gradients = bool(self._needed & {GRADIENT, GRADIENT_ABS, PRODUCT, PRODUCT_ABS})
        self._backward = bool(self._needed & BACKWARD)
        modules = dict(model.named_modules())
        self._modules = modules
        self._embeddings = [m for m in modules.values() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
        self._ancestors = {layer: _ancestors(layer.module_name, modules) for layer in chosen}
        self._trainable_before = {layer: layer.weight.parameter.requires_grad for layer in chosen}

    def run(self, compute_loss: Callable[[], Tensor]) -> LayerProfile:
        # Without weight gradients (fisher alone, or forward metrics) no weight takes part: what the taps anchor does.
        trainable = (
            [layer.weight.parameter for layer in self._chosen] if self._weight_gradients or not self._backward else []
        )
        routes = Routes()
        with torch.enable_grad(), _eager(), ModelState(self._model, trainable) as state:
            while True:
                statistics = _Statistics(self._needed, self._backend)
                taps, loss = self._once(compute_loss, routes, statistics)
                revised = taps.revised() if self._backward else None
                if revised is None:
                    break
                routes = revised
                state.clear_gradients()
                state.rewind()
            statistics.finish()
            reached = [layer for layer in self._chosen if self._is_reached(layer, taps, loss)]
            if not reached:
                raise ValueError(
                    "the loss does not depend on the model's layers: no gradient reached any of "
                    + _some([layer.name for layer in self._chosen])
                )
            return self._table(reached, statistics, taps, float(loss.detach()) / self._scale)

    def _once(self, compute_loss: Callable[[], Tensor], routes: Routes, statistics: _Statistics) -> tuple[Taps, Tensor]:
        taps = Taps(
            self._chosen,
            self._embeddings,
            {parent for ancestors in self._ancestors.values() for parent in ancestors[1:2]},
            statistics,
            routes,
            outputs=OUTPUT in self._needed,
            gradients=self._weight_gradients,
            output_gradients=FISHER in self._needed,
            keep_outputs=PRODUCT in self._needed and not self._needed & NEEDS_TILES,
        )
        with taps:
            with nullcontext() if self._backward else _saving_nothing():
                loss = compute_loss()
            self._check_loss(loss, statistics, compute_loss)
            if self._backward:
                taps.backward(loss)
        return taps, loss

    def _check_loss(self, loss: Any, statistics: _Statistics, compute_loss: Callable[[], Tensor]) -> None:
        if not isinstance(loss, Tensor):
            raise TypeError(f"the loss is a {type(loss).__name__}; a scalar tensor is needed")
        if loss.numel() != 1:
            raise ValueError(f"the loss has shape {tuple(loss.shape)}; a scalar is needed (take its mean)")
        if not loss.is_floating_point():
            raise TypeError(f"the loss is {loss.dtype}; a floating-point scalar is needed")
        if not bool(torch.isfinite(loss)):
            raise ValueError(f"the loss is {float(loss)}: {self._explain_not_finite(statistics, compute_loss)}")
        if not loss.requires_grad:
            raise ValueError(
                "the loss does not depend on the model's layers: it has no graph (was it detached, or computed under "
                "no_grad or from numbers?)"
            )

    def _explain_not_finite(self, statistics: _Statistics, compute_loss: Callable[[], Tensor]) -> str:
        weights = [n for n, p in self._model.named_parameters() if p.is_floating_point() and not _all_finite(p)]
        if weights:
            return "weights that are not finite: " + _some(weights)
        outputs: list[str] = []

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if isinstance(output, Tensor) and output.is_floating_point() and not _all_finite(output):
                    outputs.append(name)

            return hook

        handles = [layer.module.register_forward_hook(note(layer.name)) for layer in self._every_layer]
        try:
            with torch.no_grad():
                compute_loss()
        finally:
            for handle in handles:
                handle.remove()
        if outputs:
            return "layers whose outputs are not finite, first ones first: " + _some(list(dict.fromkeys(outputs)))
        return "all weights and all outputs of layers are finite, so it arises in the loss itself or in the inputs"

    def _is_reached(self, layer: Layer, taps: Taps, loss: Tensor) -> bool:
        if self._backward:
            return taps.reached(layer)
        if not hasattr(self, "_leaves"):
            self._leaves, self._opaque = _leaves_of(loss)
        called = layer.module in taps.uses
        return id(layer.weight.parameter) in self._leaves or (self._opaque and called)

    def _table(self, rows: list[Layer], statistics: _Statistics, taps: Taps, loss: float) -> LayerProfile:
        depth = self._depth(rows, taps)
        rows = sorted(rows, key=depth.__getitem__)
        head = self._head()
        values = np.empty((len(rows), len(self._metrics)))
        info = {}
        for i, layer in enumerate(rows):
            found, nonfinite = self._statistics_of(layer, statistics)
            values[i] = [METRICS[name].value(found) for name in self._metrics]
            module = layer.output_module or layer.module
            info[layer.name] = {
                "numel": layer.weight.parameter.numel(),
                "kind": layer.kind,
                "depth": depth[layer],
                "uses": taps.uses.get(module, 1),
                "shape": list(layer.weight.parameter.shape),
                "head": layer.module_name == head,
                "trainable": self._trainable_before[layer],
                "shared_with": [other.name for other in layer.weight.layers if other is not layer],
                "parameter": layer.parameter_name,
                "module": layer.module_name,
                "nonfinite": nonfinite,
                "note": layer.note or self._missing_output(layer, statistics),
            }
        names = [layer.name for layer in rows]
        return LayerProfile(
            names,
            self._metrics,
            values,
            info=info,
            loss=loss,
            backend="+".join(sorted({self._backend_of(layer) for layer in rows})),
            uncovered=self._uncovered(rows, taps),
        )

    def _statistics_of(self, layer: Layer, statistics: _Statistics) -> tuple[LayerStatistics, int]:
        """The statistics of a layer, gradients divided by the loss scale, and how many entries were not finite."""
        weight = layer.weight.parameter.detach()
        s = LayerStatistics(count=float(weight.numel()))
        nonfinite = 0.0
        gradients = statistics.gradients.get(layer.weight)
        if gradients is not None:
            s.weight_mean, s.weight_std = gradients.weight_mean, gradients.weight_std
            s.weight_norm = gradients.weight_norm
            s.gradient = _divided(gradients.gradient, self._scale)
            s.product_sum = gradients.product_sum / self._scale
            s.product_abs_sum = gradients.product_abs_sum / self._scale
            nonfinite += gradients.gradient.nonfinite + gradients.weight_nonfinite
        elif WEIGHT in self._needed:
            w = kernels.moments([weight], backend=self._backend)[0]
            s.weight_mean, s.weight_std, s.weight_norm = w.mean, w.std, w.norm
            nonfinite += w.nonfinite
        if layer in statistics.outputs:
            s.output = statistics.outputs[layer]
            nonfinite += s.output.nonfinite
        if layer in statistics.fisher:
            s.fisher = statistics.fisher[layer] / self._scale**2
            if not math.isfinite(s.fisher):
                s.fisher = math.nan
        return s, int(nonfinite)

    def _missing_output(self, layer: Layer, statistics: _Statistics) -> str:
        missing = [
            name
            for name, kind, found in (("act", OUTPUT, statistics.outputs), ("fisher", FISHER, statistics.fisher))
            if kind in self._needed and layer not in found
        ]
        if not missing:
            return ""
        module = layer.output_module
        what = f"{type(module).__name__} {layer.module_name!r}"
        return f"{' and '.join(missing)} undefined: {what} was not called as a module or has no single output tensor"

    def _depth(self, rows: list[Layer], taps: Taps) -> dict[Layer, int]:
        """Position in the order of first use; a module that is never called itself counts with its parent."""
        position = {layer: i for i, layer in enumerate(self._every_layer)}

        def key(layer: Layer) -> tuple[int, int]:
            own = [layer.output_module or layer.module, *self._ancestors[layer]]
            return next((taps.order[m] for m in own if m in taps.order), len(taps.order)), position[layer]

        return {layer: i for i, layer in enumerate(sorted(rows, key=key))}

    def _head(self) -> str | None:
        try:
            return find_head(self._model)
        except ValueError:  # it cannot tell; fine-tuning asks, a table need not
            return None

    def _backend_of(self, layer: Layer) -> str:
        return kernels.pick_backend(self._backend, layer.weight.parameter.device)

    def _uncovered(self, rows: list[Layer], taps: Taps) -> dict[str, str]:
        covered = {id(layer.weight.parameter) for layer in rows}
        chosen = set(self._chosen)
        reasons: dict[str, str] = {}
        for layer in self._every_layer:
            p = layer.weight.parameter
            if id(p) in covered or layer.weight.layers[0] is not layer:
                continue
            if reason := unsupported(p):
                pass
            elif any(owner in chosen for owner in layer.weight.layers):
                called = layer.module in taps.uses or layer.output_module in taps.uses
                reason = "no gradient reached it" + ("" if called else ": its module was not called")
            elif layer.is_embedding:
                reason = "an embedding; name it in layers= to profile it"
            else:
                reason = "not selected by layers="
            reasons[layer.parameter_name] = reason
        return reasons


def _loss_of(
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
    if isinstance(batch, Mapping):
        inputs, targets = _usable(dict(batch), model, "batch"), batch.get("labels")
        if loss_fn is None:
            return lambda: _own_loss(model(**inputs), inputs)
        arguments = {k: v for k, v in inputs.items() if k != "labels"}
        return lambda: loss_fn(_logits(model(**arguments)), inputs.get("labels", targets))
    if isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, targets = _usable(batch[0], model, "batch[0]"), _usable(batch[1], model, "batch[1]")
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


def _usable(value: Any, model: nn.Module, name: str) -> Any:
    """The batch with tensors that can take part in a graph and get no .grad; checks size and device."""
    if isinstance(value, Tensor):
        if value.dim() and value.shape[0] == 0:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: an empty batch has no gradient")
        devices = {p.device for p in model.parameters()}
        if value.device.type not in {device.type for device in devices} and devices:
            raise ValueError(
                f"{name} is on {value.device}, the model on {_some(sorted(map(str, devices)))}; move it there"
            )
        return value.clone() if value.is_inference() else value.detach()
    if isinstance(value, Mapping):
        return {k: _usable(v, model, f"{name}[{k!r}]") for k, v in value.items()}
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return type(value)(_usable(v, model, f"{name}[{i}]") for i, v in enumerate(value))
    return value


def _without_wrappers(model: nn.Module, closure: Callable[[], Tensor] | None) -> nn.Module:
    """The module that torch.compile or data parallelism wraps: its layers and hooks are the real ones."""
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        if closure is not None:
            raise ValueError(
                f"model is a {type(model).__name__}, whose forward waits for every gradient: let the closure call "
                "model.module, and pass model.module"
            )
        model = model.module
    original = getattr(model, "_orig_mod", None)
    return original if isinstance(original, nn.Module) else model


def _require_own_data(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(f"parameter {name!r} is not initialised yet; run one forward pass first")
        if p.device.type == "meta":
            owner = model.get_submodule(name.rpartition(".")[0])
            if hasattr(owner, "_hf_hook"):
                raise ValueError(
                    f"parameter {name!r} is offloaded (on the meta device between calls); load the model without "
                    "offloading, or leave out device_map"
                )
            raise ValueError(f"parameter {name!r} is on the meta device and has no data; load the weights first")
        if p.is_inference():
            raise ValueError(f"parameter {name!r} was made under torch.inference_mode and can have no gradient")


def _first_device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _eager() -> AbstractContextManager[Any]:
    """Hooks do not fire in compiled code, so compiled models and functions run eagerly during a profile."""
    # Whoever compiled something has imported this; importing it here would cost a second for nothing.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _saving_nothing() -> AbstractContextManager[Any]:
    """A graph without saved tensors: it tells which weights the loss reaches, at the memory of plain inference."""

    def unpack(_: Any) -> Tensor:
        raise RuntimeError(
            "forward-only metrics were asked for, but the loss takes gradients itself; add a backward one"
        )

    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, unpack)


def _leaves_of(loss: Tensor) -> tuple[set[int], bool]:
    """Parameters (by id) in the graph of a loss, and whether reentrant checkpointing hides a part of it."""
    leaves, opaque = set(), False
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        opaque = opaque or node.name() == "CheckpointFunctionBackward"
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        todo += [next_node for next_node, _ in node.next_functions]
    return leaves, opaque


def _ancestors(name: str, modules: dict[str, nn.Module]) -> list[nn.Module]:
    """The module and those around it, innermost first."""
    parts = name.split(".") if name else []
    return [modules[".".join(parts[:n])] for n in range(len(parts), -1, -1)]


def _divided(m: Moments, scale: float) -> Moments:
    if scale == 1.0:
        return m
    return Moments(m.count, m.mean / scale, m.m2 / scale**2, m.abs_mean / scale, m.abs_m2 / scale**2, m.nonfinite)


def _all_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x.detach()).all())


def _some(names: list[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
