"""The one pass: a forward and a backward over one mini-batch, and out comes every metric of every layer."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zest_fast import kernels
from zest_fast.foundation.interrupts import HeldInterrupts
from zest_fast.foundation.nearest import some
from zest_fast.foundation.options import Backend, MetricNames
from zest_fast.foundation.torch_private import compiler_is_loaded
from zest_fast.kernels.storage import has_storage, is_fake, why_no_storage
from zest_fast.profiling.averaging import profile_each
from zest_fast.profiling.borrowing.model_state import ModelState
from zest_fast.profiling.functions import attributes_read, forwards_of, hooks_of, may_write, referred
from zest_fast.profiling.graph import custom_functions, leaves_of
from zest_fast.profiling.layer_profile import LayerProfile
from zest_fast.profiling.layer_rules import has_output_rule
from zest_fast.profiling.layers import Layer, LayerSelection, find_layers
from zest_fast.profiling.loss import RepeatedLoss, check_loss, loss_of
from zest_fast.profiling.metrics import BACKWARD, select_metrics, statistics_needed
from zest_fast.profiling.on_request.gradient_pass import GradientPass
from zest_fast.profiling.on_request.request import OnRequest
from zest_fast.profiling.out_of_memory import say_where
from zest_fast.profiling.processes.together import Alone, together_or_alone
from zest_fast.profiling.table import Passed, Subject, ancestors, build_profile
from zest_fast.profiling.taps import Routes, Taps, run_until_it_stands
from zest_fast.profiling.watched import watched_for

_in_progress: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def profile(
    model: nn.Module,
    batch: Any = None,
    *,
    batches: Iterable[Any] | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    closure: Callable[[], Tensor] | None = None,
    layers: LayerSelection = None,
    metrics: MetricNames | None = None,
    backend: Backend = "auto",
    loss_scale: float = 1.0,
) -> LayerProfile:
    """Every metric of every layer from one forward and one backward pass over one mini-batch.

    No gradient is kept: a Linear's exists only tile by tile, any other layer's one at a time. The model runs in the
    mode that it is in (train or eval) and is bit for bit as it was afterwards, also when forward, loss or backward
    raises: weights, buffers, ``requires_grad``, ``.grad``, hooks, modes and random state. Gradients are taken of every
    profiled weight, also of those that are frozen. A pass may be run again where counting shows that the first could
    not see all uses of a weight (a parameter used outside of its module under reentrant checkpointing, say). Whatever
    model, loss_fn or closure raise passes through unchanged.

    A model in DistributedDataParallel, sharded by FSDP2 (``fully_shard``) or split by tensor parallelism is profiled by
    all of its processes together, each with its own batch (tensor parallelism: the same one): metrics are of the global
    batch, and the same on every process (docs/processes.md).

    Args:
        model: any module; weights of float32, float64, bfloat16 or float16.
        batch: a mapping (called as ``model(**batch)``; the loss is ``output.loss``) or a pair (inputs, targets), inputs
            being one tensor, a tuple of arguments or a mapping.
        batches: instead, several of these: a list, or a loader, of which all batches are profiled one after the other,
            each by a pass of its own. Values are then means over the batches in which a metric is defined (which is not
            the metric of all samples at once: the norm of a mean gradient is smaller than the mean of the norms),
            ``.loss`` is the mean loss, and ``.spread`` has the standard deviations. A layer that some batches do not
            reach has the means of the others, as ``.info[...]["note"]`` says. Every process of a distributed model
            needs the same number.
        loss_fn: ``loss_fn(output, targets)`` -> scalar mean loss; cross-entropy by default for a pair. Of a
            ModelOutput it gets the logits; for a mapping the targets are ``batch.get("labels")``.
        closure: instead of a batch, a function without arguments that runs the model and returns the scalar loss.
        layers: which rows: a regular expression (the whole name must match), an iterable of names, a predicate
            (module name, module) -> bool, or None = every layer but embeddings.
        metrics: names (see ``zest_fast.profiling.metrics.METRICS``); None = all that one pass yields. What only other
            metrics need is not computed: without backward metrics there is no backward pass. On request only:

            - "grasp": a forward and a double backward, which keep a buffer of its size for each weight and the graph of
              the gradient. Where double backward fails, a central finite difference, which ``.info[...]["note"]`` says.
            - "synflow": a pass in eval mode and float64 on inputs of ones, parameters positive, normalisation layers
              (torch's; else modules without submodules that have "norm" in the name of their class) the identity. It
              holds a float64 copy of all parameters. The embedding of the model's tokens yields ones; other integer
              and boolean inputs (masks, positions) stay as they are. Not for a closure.
            - "agree_dot", "agree_sign", "agree_cos": a pass each for the even and the odd samples, as if each half were
              the batch (batch norm in train mode included; where the loss is a mean over tokens, the mean over those
              of the half). For each weight they keep at most a gradient of its size. The batch needs two samples,
              in the first dimension of its tensors, and a loss that is a mean over samples. Not for a closure.

            "all" = every one of these, too; what cannot be had is then NaN, and ``.info[...]["note"]`` says why.
        backend: "auto" (by device and layer; ``LayerProfile.backend`` says what ran), "cpu", "triton", "cuda", or
            "reference" (float64, slow, any device).
        loss_scale: the factor that the loss already carries (as under a GradScaler); the statistics and the reported
            loss are divided by it.

    Returns:
        A LayerProfile: layers x metrics in float64. ``.uncovered`` names every parameter of two or more dimensions
        that has no row, with the reason.

    Raises:
        TypeError, ValueError: an argument that does not fit, a model on the meta device, a loss that is not a finite
            scalar or does not depend on the model. The message names the argument or layer.
        RuntimeError: inside ``torch.inference_mode``, or inside another profile of the same model; where the loss of a
            pass that was run again is another one; where a hook of the backward pass wrote into weights that are too
            large for a copy; where another thread ran a backward pass over the model meanwhile; where another process
            that shares the model failed.
        NotImplementedError: TorchScript modules, which take no hooks, and models that lie on several processes in a way
            that is not followed, or metrics on request there.

    Examples:
        >>> import torch, zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> batch = torch.randn(6, 4), torch.randint(3, (6,))
        >>> profile = zest_fast.profile(model, batch, metrics=["snip", "fisher"])
        >>> profile.metrics
        ['snip', 'fisher']
        >>> model[0].weight.grad is None
        True
        >>> several = zest_fast.profile(model, batches=[batch, (torch.randn(6, 4), torch.randint(3, (6,)))])
        >>> several.spread.batches, several.spread.deviations.shape
        (2, (2, 15))
    """
    names = select_metrics(metrics)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; a torch.nn.Module is needed")
    if batches is not None:
        if batch is not None or closure is not None:
            raise ValueError("batches was given together with batch or closure; pass one of them")
        rest: dict[str, Any] = {"loss_fn": loss_fn, "layers": layers, "metrics": metrics, "backend": backend}
        return profile_each(batches, lambda one: profile(model, one, loss_scale=loss_scale, **rest))
    if not (isinstance(loss_scale, int | float) and math.isfinite(loss_scale) and loss_scale > 0):
        raise ValueError(f"loss_scale is {loss_scale!r}; a positive number is needed")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("profile needs gradients and cannot run inside torch.inference_mode(); leave it first")
    wrapper, model = unwrapped(model)
    if closure is not None and isinstance(wrapper, nn.DataParallel):
        raise ValueError(
            "model is a DataParallel, whose forward runs on copies: let the closure call model.module, and pass "
            "model.module"
        )
    modules = dict(model.named_modules())
    if any(module in _in_progress for module in modules.values()):
        raise RuntimeError("profile was called inside a profile of the same model; finish one before the next")
    processes = together_or_alone(wrapper, modules)
    with processes.telling(), HeldInterrupts() as interrupts, processes.borrowed():
        require_usable(modules)
        kernels.pick_backend(backend, _first_device(model))
        job = _Pass(model, modules, layers, names, backend, processes)
        compute_loss = loss_of(model, batch, loss_fn, closure)
        request = OnRequest(
            names,
            model,
            batch,
            loss_fn,
            closure,
            backend,
            lenient=isinstance(metrics, str),
            refused=processes.on_request_refused,
        )
        if processes.note:
            request.notes.append(processes.note)
        _in_progress.update(modules.values())
        try:
            functions = [function for function in (loss_fn, closure) if function is not None]
            return job.run(compute_loss, request, float(loss_scale), functions, interrupts)
        except Exception as error:
            say_where(error, modules, job.arrived)
            raise
        finally:
            _in_progress.difference_update(modules.values())


def is_being_profiled(module: nn.Module) -> bool:
    """Whether a call of this module belongs to a profile: the weights then require gradients that nobody asked for."""
    return module in _in_progress


_WAYS_TO_PARAMETERS = {"parameters", "named_parameters", "get_parameter", "_parameters", "weight", "bias"}


class _Pass:
    """One profile of one model: the pass, and again where its taps ask for it."""

    def __init__(
        self,
        model: nn.Module,
        modules: dict[str, nn.Module],
        selection: LayerSelection,
        metrics: list[str],
        backend: str,
        processes: Alone,
    ) -> None:
        self._processes = processes
        self._subject = Subject.of(model, modules, selection)
        self._model, self._modules, self._chosen = model, modules, self._subject.chosen
        self._metrics = metrics
        self._backend = backend
        self._size = _size(modules)
        self._embeddings = [m for m in modules.values() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
        self._parents = {parent for layer in self._chosen for parent in ancestors(layer, modules)[:1]}
        self._needed = statistics_needed(metrics)
        self._watched = watched_for(self._needed)
        self._backward = bool(self._needed & BACKWARD) or processes.whole_pass
        if processes.whole_pass:
            self._watched = replace(self._watched, gradients=True)
        self._saves = self._backward
        self._running: Taps | None = None

    def run(
        self,
        compute_loss: Callable[[], Tensor],
        request: OnRequest,
        loss_scale: float,
        users_functions: list[Callable[..., Any]],
        interrupts: HeldInterrupts,
    ) -> LayerProfile:
        self._interrupts = interrupts
        self._users_functions = users_functions
        routes = self._first_routes()
        with interrupts.interruptible():
            self._processes.open(self._chosen, self._metrics, loss_scale)
        while True:
            takes_part = self._watched.gradients or not self._backward
            trainable: list[Tensor] = [layer.weight.parameter for layer in self._chosen] if takes_part else []
            kept = self._state_around(trainable)
            with torch.enable_grad(), eager(), kept as state:
                self._state = state
                try:
                    taps, loss = self._until_it_stands(compute_loss, state, routes)
                except Exception:
                    if self._saves:
                        raise
                    self._saves = True  # a loss that takes gradients itself, or has words with hooks on saved tensors
                    continue
                statistics = self._statistics
                with interrupts.interruptible():
                    whole_loss = self._processes.finish(taps, statistics, self._chosen, loss, self._model, compute_loss)
                if self._looks_at_state:
                    self._require_the_same_loss(loss, compute_loss, state)
                reached = self._reached(taps, loss)
                made = self._made_during_the_pass()
                self._processes.settle()
            if reached is None:
                # Less than the whole pass cannot tell which layers the loss depends on.
                self._backward = self._saves = True
                self._watched = replace(self._watched, gradients=True)
                routes = replace(routes, tiles=False)
            elif statistics.overwritten - routes.copied:
                # Past autograd's sight (y.data): Y has to be out of its reach to be there in backward.
                routes = replace(taps.routes, copied=taps.routes.copied | statistics.overwritten)
            else:
                break
        if request.wanted:
            self._measure(request, reached)
        passed = Passed(taps, statistics, reached, made, whole_loss / loss_scale, loss_scale)
        return build_profile(self._subject, passed, request, self._metrics)

    def _first_routes(self) -> Routes:
        """What reading the user's code tells before the first pass."""
        modules = self._modules.values()
        functions = list(referred([*self._users_functions, *forwards_of(modules), *hooks_of(modules)]))
        read = [names for names in map(attributes_read, functions) if names & _WAYS_TO_PARAMETERS]
        own_flags = any("requires_grad" in names for names in read)
        self._looks_at_state = own_flags or any("grad" in names for names in read)
        self._writes = may_write(functions, modules)
        return Routes(own_flags=own_flags, tiles=not self._processes.whole_pass)

    def _state_around(self, trainable: list[Tensor]) -> ModelState:
        return ModelState(self._modules.values(), trainable, self._users_functions, values=True, writes=self._writes)

    def _made_during_the_pass(self) -> list[str]:
        """Parameters of two or more dimensions that the model did not have before."""
        if _size(self._modules) == self._size:
            return []
        known = {id(layer.weight.parameter) for layer in self._subject.layers}
        layers = find_layers(dict(self._model.named_modules()))
        return [layer.parameter_name for layer in layers if id(layer.weight.parameter) not in known]

    def _until_it_stands(
        self, compute_loss: Callable[[], Tensor], state: ModelState, routes: Routes
    ) -> tuple[Taps, Tensor]:
        repeated = RepeatedLoss(layer.weight.parameter for layer in self._chosen)
        first = True

        def prepare(routes: Routes) -> None:
            nonlocal first
            if not first:
                self._processes.settle()
                state.clear_gradients()
                state.rewind()
            first = False
            state.set_flags(own=routes.own_flags)

        def once(taps: Taps) -> Tensor:
            loss = self._once(taps, compute_loss, state)
            repeated.check(loss, taps.may_change_the_loss)
            return loss

        return run_until_it_stands(self._taps, once, prepare, routes, self._processes.agree)

    @property
    def arrived(self) -> Layer | None:
        """Whose gradient came last in the backward pass that runs, or failed."""
        return None if self._running is None else self._running.last_arrived

    def _taps(self, routes: Routes) -> Taps:
        self._statistics = self._processes.statistics(
            self._needed, self._backend, self._state.may_have_written, self._chosen
        )
        self._running = Taps(self._chosen, self._embeddings, self._parents, self._statistics, routes, self._watched)
        return self._running

    def _once(self, taps: Taps, compute_loss: Callable[[], Tensor], state: ModelState) -> Tensor:
        with taps:
            with nullcontext() if self._saves else _saving_nothing(), self._interrupts.interruptible():
                loss = state.guarded(compute_loss)()
            check_loss(loss)
            with self._interrupts.interruptible():
                self._processes.forward_is_done(taps, loss, self._model, compute_loss)
            if self._backward:
                state.clear_gradients()  # a loss that runs a backward pass by itself leaves some
                with self._interrupts.interruptible():
                    taps.backward(loss, state.parameters)
                    self._processes.backward_is_done()
        return loss

    def _require_the_same_loss(self, loss: Tensor, compute_loss: Callable[[], Tensor], state: ModelState) -> None:
        """Of code that looks at ``requires_grad`` or ``.grad``: what a profile changes there must not change a loss."""
        self._processes.settle()
        state.rewind()
        with state.as_handed_over(), self._interrupts.interruptible():
            own = float(state.guarded(compute_loss)().detach())
        found = float(loss.detach())
        if not math.isclose(own, found, rel_tol=1e-6):
            frozen = [layer.name for layer, trainable in self._subject.trainable.items() if not trainable]
            remedy = f"leave the frozen layers ({some(frozen)}) out with layers=, or unfreeze them" if frozen else ""
            raise ValueError(
                f"the loss depends on requires_grad or .grad of parameters: it is {own:.6g} as the model was handed "
                f"over and {found:.6g} in a profile, where every profiled layer takes part and no gradient is there; "
                + (remedy or "clear the gradients first (model.zero_grad())")
            )

    def _measure(self, request: OnRequest, reached: list[Layer]) -> None:
        """The passes beside the one, each from the state in which the model was handed over."""
        weights: list[Tensor] = [layer.weight.parameter for layer in reached]
        kept = self._state_around(weights)
        with torch.enable_grad(), eager(), kept as state:
            request.measure(GradientPass(reached, self._embeddings, state))

    def _reached(self, taps: Taps, loss: Tensor) -> list[Layer] | None:
        """The layers that the loss depends on; None where this pass cannot tell."""
        if self._backward:
            gradients = self._statistics.gradients  # of all processes
            reached = [layer for layer in self._chosen if taps.reached(layer) or layer.weight in gradients]
            plain = all(has_output_rule(layer) for layer in reached) and not taps.with_other_weights
            if not self._watched.gradients and (len(reached) < len(self._chosen) or not plain):
                return None  # a gradient may be out of sight at an output, or reach that and not the weight
        else:
            leaves, opaque = leaves_of(loss)
            called = {layer for layer in self._chosen if layer.called_module in taps.uses}
            seen = {layer for layer in self._chosen if id(layer.weight.parameter) in leaves}
            hidden = not opaque and any(taps.is_hidden(layer) for layer in called - seen)
            if hidden or (called - seen and custom_functions(loss)):
                return None  # a function of somebody's may call layers out of autograd's sight
            reached = [layer for layer in self._chosen if layer in seen or (opaque and layer in called)]
        if not reached:
            raise ValueError(
                "the loss does not depend on the model's layers: no gradient reached any of "
                + some(layer.name for layer in self._chosen)
            )
        return reached


def unwrapped(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The DistributedDataParallel or DataParallel that the model is in, else the model itself; and the module inside of
    all that torch.compile and data parallelism wrap around it: its layers and hooks are the real ones.
    """
    wrapper: nn.Module | None = None
    while True:
        original = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            wrapper, model = model, model.module
        elif isinstance(original, nn.Module):
            model = original
        else:
            return wrapper or model, model


def require_usable(modules: dict[str, nn.Module]) -> None:
    """Raises an error that names the module or parameter that takes no hooks or can have no gradient."""
    for module_name, module in modules.items():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"module {module_name!r}" if module_name else "the model"
            raise NotImplementedError(f"{where} is TorchScript, which takes no hooks; pass the module it was made from")
        for own_name, p in module._parameters.items():
            if p is None:
                continue
            name = f"{module_name}.{own_name}" if module_name else own_name
            if isinstance(p, nn.parameter.UninitializedParameter):
                raise ValueError(f"parameter {name!r} is not initialised yet; run one forward pass first")
            if p.is_meta and hasattr(module, "_hf_hook"):
                raise ValueError(
                    f"parameter {name!r} is offloaded (on the meta device between calls); load the model without "
                    "offloading, or leave out device_map"
                )
            if p.is_meta:
                raise ValueError(f"parameter {name!r} is on the meta device and has no data; load the weights first")
            if p.is_inference():
                raise ValueError(f"parameter {name!r} was made under torch.inference_mode and can have no gradient")
            if (type(p) in (Tensor, nn.Parameter) and not has_storage(p)) or is_fake(p):
                raise ValueError(f"parameter {name!r} is {why_no_storage(p)}")


def _size(modules: dict[str, nn.Module]) -> int:
    """How many modules and parameters these own by themselves."""
    return sum(len(module._modules) + len(module._parameters) for module in modules.values())


def _first_device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def eager() -> AbstractContextManager[Any]:
    """Hooks do not fire in compiled code, so compiled models and functions run eagerly during a profile."""
    return torch.compiler.set_stance("force_eager") if compiler_is_loaded() else nullcontext()


def _saving_nothing() -> AbstractContextManager[Any]:
    """A graph without saved tensors: it tells which weights the loss reaches, at the memory of plain inference."""

    def unpack(_: Any) -> Tensor:
        raise _GradientInLoss

    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, unpack)


class _GradientInLoss(RuntimeError):
    """The loss takes gradients itself, so what autograd saves is needed even where only the forward pass counts."""

    def __init__(self) -> None:
        super().__init__("what autograd saves was asked for in a pass for forward-only metrics, which saves nothing")
