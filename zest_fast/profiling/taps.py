"""Where one pass is tapped: hooks and autograd functions, and nothing of statistics.

Two routes bring weight gradients out, and neither keeps one:

- leaf route, for every weight: a post-accumulate hook hands over dW and drops it at once, so one dW is alive at a time;
- tile route, for plain Linear and Conv1D on top: the weight is frozen during the layer's own forward, so that autograd
  forms no dW, and a pre-hook on the output's graph node sees G when it arrives and reduces GᵀX tile by tile.

X and Y are kept by a ``Keeper``, beside the graph and not in a closure: so checkpointing and offloading hooks see them.
A pre-hook on the node, unlike a backward hook or a tensor hook, also sees G when the output is overwritten in place
later, or is a view that is. What a first pass cannot know (a weight used outside of its module, say) is found out by
counting, and ``Taps.revised`` then says how the pass has to be run again.

Only what belongs to this pass counts: calls on its own thread, gradients that its own backward pass brings. A backward
pass of the user's (``torch.autograd.grad`` in the loss, in a hook or in an adjoint) may fire the same nodes; the taps
are told of it and do not take what it computes for gradients of the loss.

Where the passes are the user's own (``Watched.as_it_is``) there may be several backward passes, each between
``begin_backward`` and ``end_backward``, and ``tell_what_was_missed`` at the end says what nobody can run again.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zest_fast.foundation.removable import Leaving
from zest_fast.foundation.torch_private import (
    current_task,
    forward_hooks,
    gradient_hooks,
    is_altered,
    is_transformed,
    is_view,
)
from zest_fast.kernels import DTYPES
from zest_fast.profiling.engine import Watching, has_accumulation_hooks, is_plain
from zest_fast.profiling.graph import OtherGradients
from zest_fast.profiling.held import Held, Keeper, Overwritten
from zest_fast.profiling.layer_rules import has_output_rule, has_tile_rule, linear_gradient, output_again
from zest_fast.profiling.layers import Layer, Weight
from zest_fast.profiling.out_of_memory import is_out_of_memory
from zest_fast.profiling.processes.local import is_distributed, stands_for
from zest_fast.profiling.watched import Watched, is_unwatched


class Observer(Protocol):
    """Who is told what passes by. Tensors are detached and live only during the call."""

    def output(self, layer: Layer, y: Tensor) -> Callable[[], None] | None:
        """Y of one use, in forward; what is returned is called when a gradient arrives at it."""

    def linear(self, layer: Layer, x: Tensor, g: Tensor) -> None:
        """X and G of the only use of a linear layer, in backward."""

    def weight_gradient(self, weight: Weight, dw: Tensor) -> None:
        """dW, all uses together."""

    def output_gradient(self, layer: Layer, y: Callable[[], Tensor], g: Tensor, only_use: bool) -> None:
        """Y and G of one use, in backward."""

    def untouched(self, layer: Layer) -> None:
        """No gradient reached any of its outputs, and none was out of sight."""

    def missed(self, layer: Layer, why: str, *, outputs: bool) -> None:
        """Uses that cannot be observed: of their output gradients, and where ``outputs`` of the outputs, too."""


@dataclass(frozen=True)
class Routes:
    """How a pass is run."""

    tiles: bool = True
    """False when the loss or a backward pass differentiates by itself: weights then have to take part in every call."""
    own_flags: bool = False
    """Whether parameters beside the profiled weights require gradients as their user has it: the loss looks at them."""
    leaf: frozenset[int] = frozenset()
    """Weights (by id) that are used in other ways than by their module, hence by the leaf route only."""
    until_the_end: frozenset[int] = frozenset()
    """Weights whose gradient arrives in several parts (reentrant checkpointing): summed before it is reduced."""
    copied: frozenset[Layer] = frozenset()
    """Layers whose output is overwritten in place, or its gradient changed by a hook on its node, in a way that loses Y
    or G: a copy takes its place."""
    threads: frozenset[Layer] = frozenset()
    """Layers of which calls on other threads are part of the pass: a module may hand its work to a pool."""
    anchored: bool = False
    """Whether outputs of embeddings require a gradient, without which reentrant checkpointing drops what follows."""


@dataclass(eq=False)
class _Counts:
    """What happened to one weight in one pass."""

    weight: Weight
    tiled: bool
    calls: int = 0
    calls_without_grad: int = 0
    tile_firings: int = 0
    leaf_firings: int = 0
    frozen: bool = False
    """Whether it is frozen right now, in a call of its module."""
    freezes: int = 0
    seen_elsewhere: dict[int, int] = field(default_factory=dict)
    """``freezes`` when a call on another thread (by its id) began, before the one that lasted."""
    not_by_tiles: bool = False
    """A use was seen that the tile route gets wrong."""
    dense: Tensor | None = None

    @property
    def reached(self) -> bool:
        return bool(self.tile_firings or self.leaf_firings)


class _Anchor(torch.autograd.Function):
    """Makes a tensor that nothing trainable precedes part of the graph."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class Taps(AbstractContextManager["Taps"]):
    """Hooks on the given layers for one forward and one backward pass; leaving the context removes them.

    Args:
        layers: rows to observe; their weights must require a gradient where ``watched.gradients``.
        embeddings: modules whose outputs are anchored if ``routes`` says so.
        parents: modules whose calls are noted as well: where a layer's own module is never called, they tell its depth.
        watched: what is handed to ``observer``.
    """

    def __init__(
        self,
        layers: Iterable[Layer],
        embeddings: Iterable[nn.Module],
        parents: Iterable[nn.Module],
        observer: Observer,
        routes: Routes,
        watched: Watched,
    ) -> None:
        self._layers = list(layers)
        self._embeddings = list(embeddings)
        self._parents = list(parents)
        self._observer = observer
        self.routes = routes
        self._watched = watched
        self._handles: list[Any] = []
        self._anchor = torch.zeros((), requires_grad=True)
        self._keeper = Keeper(self._anchor)
        self._thread = threading.get_ident()
        self._outer = current_task()  # -1 but for a profile within a backward pass of the user's
        self._in_final_backward = False
        self._roots: list[Any] = []
        self._task: int | None = None  # of the final backward pass
        self._own_passes = 0  # backward passes that run now, in the loss or inside of the final one
        self._searches = 0  # those inside of the final one that accumulate nothing
        self._engine_was_called = False
        self._differentiates = False
        self._without_graph = False  # a call without its own weight would take part if what precedes it did
        self._accumulates = False  # the loss runs a backward pass by itself
        self._others: OtherGradients | None = None
        self._disturbed = False
        self._lost: set[Layer] = set()
        self._overwritten: set[Layer] = set()
        self._missed: dict[Layer, str] = {}
        self._hook_ids: set[int] = set()
        self._first_hooks: dict[nn.Module, int] = {}
        self._tapped: set[Layer] = set()
        self._threads: set[Layer] = set()
        self._calls: dict[Layer, int] = {}
        self._output_firings: dict[Layer, int] = {}
        self._passes = 0  # backward passes that are over
        self._taps_made: dict[Layer, int] = {}
        self._arrivals: dict[Layer, int] = {}
        self._arrived_at: set[Layer] = set()  # in the backward pass that runs
        self.last_arrived: Layer | None = None
        """Whose gradient came last, of its output or its weight; None again when the backward pass is through."""
        self._passes_with: dict[Layer, int] = {}
        self._out_of_the_graph: set[Layer] = set()
        self.order: dict[nn.Module, int] = {}
        """Owner modules in the order of their first call."""
        self.uses: dict[nn.Module, int] = {}
        self.with_other_weights: dict[nn.Module, int] = {}
        """Calls of modules in which another tensor stood in the place of their weight."""
        weights = {id(layer.weight): layer.weight for layer in self._layers}
        self._counts = {w: _Counts(w, self._is_tiled(w)) for w in weights.values()}
        self._tiled_parameters = {id(c.weight.parameter) for c in self._counts.values() if c.tiled}

    def _is_tiled(self, weight: Weight) -> bool:
        p = weight.parameter
        return (
            self._watched.gradients
            and self.routes.tiles
            and id(p) not in self.routes.leaf
            and len(weight.layers) == 1
            and not gradient_hooks(p)  # a user's hook on the gradient acts on the leaf route only
            and has_tile_rule(weight.layers[0].module)
        )

    def __enter__(self) -> Taps:
        self._handles.append(Leaving(Watching(self).__enter__()))
        by_module: dict[nn.Module, list[Layer]] = {}
        for layer in self._layers:
            by_module.setdefault(layer.called_module, []).append(layer)
        for module, layers in by_module.items():
            tiled = self._counts[layers[0].weight] if self._counts[layers[0].weight].tiled else None
            by_itself = tiled is None and all(
                map(has_output_rule, layers)
            )  # torch's own forward: it calls no other module
            if not by_itself:
                before = ModuleHook(self._before(tiled))
                self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            after = ModuleHook(self._after(module, layers, tiled, by_itself))
            handle = module.register_forward_hook(after, with_kwargs=True, prepend=True, always_call=tiled is not None)
            self._handles.append(handle)
            self._first_hooks[module] = handle.id
        for module in self._parents:
            if module not in by_module:
                self._handles.append(module.register_forward_pre_hook(ModuleHook(self._count)))
        if self._watched.gradients:
            for counts in self._counts.values():
                hook = self._leaf_hook(counts)
                self._handles.append(counts.weight.parameter.register_post_accumulate_grad_hook(hook))
        if self.routes.anchored:
            self._handles += anchor_outputs(self._embeddings)
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begins(self, roots: Any, accumulates: bool, inputs: Iterable[Any]) -> Callable[[bool], None] | None:
        """A backward pass begins, perhaps not ours (see ``engine.Watching``)."""
        if not self._is_own() or (self._in_final_backward and current_task() == self._outer):
            return None  # of another thread, or the final one
        self._engine_was_called = True
        search = self._in_final_backward and not accumulates
        if not self._in_final_backward:
            self._differentiates |= accumulates or any(id(x) in self._tiled_parameters for x in inputs)
            self._accumulates |= accumulates
        elif search:
            self._differentiates = True
        elif self._others is not None:
            self._others.set_aside(roots)
        self._own_passes += 1
        self._searches += search

        def ended(_: bool) -> None:
            self._own_passes -= 1
            self._searches -= search

        return ended

    def _is_own(self) -> bool:
        """Whether what runs on this thread belongs to this pass: GPUs have threads of their own for backward."""
        return (
            threading.get_ident() == self._thread
            or self._own_passes > 0
            or (self._in_final_backward and current_task() == self._task)
        )

    def _is_own_call(self) -> bool:
        """The same of a module's call, which on another thread can only be a recomputation of ours."""
        return threading.get_ident() == self._thread or (current_task() != self._outer and self._is_own())

    def backward(self, loss: Tensor, parameters: Iterable[Tensor]) -> None:
        """The backward pass, in which gradients are handed to the observer.

        Tensors that are none of ``parameters`` (inputs, another model's weights) keep the ``.grad`` that they have.

        Raises:
            RuntimeError: another thread ran a backward pass over the same weights meanwhile, or the loss ran one by
                itself and freed the graph.
        """
        for counts in self._counts.values():
            if counts.frozen:  # somebody removed the hook that ends this
                self._thaw(counts)
                counts.not_by_tiles = True
            elif counts.tiled and has_accumulation_hooks(counts.weight.parameter):
                counts.not_by_tiles = True
        self._others = OtherGradients(parameters)
        try:
            with self._others:
                self._others.set_aside([loss])
                self.begin_backward([loss])
                loss.backward()
        except RuntimeError as error:
            if self._accumulates and "backward through the graph a second time" in str(error):
                raise RuntimeError(
                    "the closure ran backward() on its loss, which freed the graph; let it return the loss as it is "
                    "(no zero_grad, no backward), as a profile runs the backward pass itself"
                ) from error
            raise
        finally:
            self.end_backward()
        self.last_arrived = None
        if self._disturbed:
            raise RuntimeError(
                "another thread ran a backward pass over the model during its profile, and gradients of the two cannot "
                "be told apart; profile the model while no other thread trains it"
            )
        if self._differentiates and self.routes.tiles:
            return  # to be run again
        self.tell_what_was_missed()
        for counts in self._counts.values():
            p = counts.weight.parameter
            if counts.dense is not None or p.grad is not None:
                parts = [dw for dw in (counts.dense, p.grad) if dw is not None]
                counts.dense = p.grad = None
                self._observer.weight_gradient(counts.weight, parts[0] if len(parts) == 1 else parts[0] + parts[1])

    def begin_backward(self, roots: Iterable[Tensor]) -> None:
        """What arrives from now on are gradients of the loss."""
        self._in_final_backward = True
        self._roots = [r.grad_fn.register_prehook(self._note_the_task) for r in roots if r.grad_fn is not None]

    def end_backward(self) -> bool:
        """That backward pass is over; ``as_it_is`` others may follow. Whether it went through an output of a layer."""
        self._in_final_backward = False
        for handle in self._roots:
            handle.remove()
        self._roots = []
        self._task = None
        arrived, self._arrived_at = self._arrived_at, set()
        if not arrived:
            return False
        self._passes += 1
        for layer in arrived:
            self._passes_with[layer] = self._passes_with.get(layer, 0) + 1
        self._calls.clear()  # uses in other passes are uses of other samples
        return True

    def tell_what_was_missed(self) -> None:
        """Tells the observer which gradients of outputs were not there, and which were out of sight."""
        if self._watched.as_it_is:
            self._miss_what_cannot_be_run_again()
        for layer, why in self._missed.items():
            self._observer.missed(layer, why, outputs=False)
        seen_or_missed = {*self._output_firings, *self._lost, *self._overwritten, *self._missed}
        for layer in self._tapped - seen_or_missed:
            if self._watched.output_gradients:
                self._observer.untouched(layer)

    def _miss_what_cannot_be_run_again(self) -> None:
        for layer in self._overwritten:
            self._missed.setdefault(
                layer, "its output was overwritten in place, or a hook on its node may change its gradient"
            )
        for layer in self._out_of_the_graph - self._arrivals.keys():
            self._missed.setdefault(
                layer, "its output is not part of the graph: neither it nor what precedes it trains"
            )
        for layer, made in self._taps_made.items():
            arrivals, passes = self._arrivals.get(layer, 0), self._passes_with.get(layer, 0)
            if layer in self._lost and arrivals < made:
                self._missed.setdefault(layer, "its output is a view that may have been written in place")
            elif arrivals and arrivals < made and passes < self._passes:
                self._missed.setdefault(layer, f"a gradient reached it in {passes} of {self._passes} backward passes")
        for layer in self._threads - self.routes.threads:
            self._observer.missed(layer, "it was called on another thread; seen from the next step on", outputs=True)

    def _note_the_task(self, _: Any) -> None:
        if self._task is None and self._in_final_backward:
            self._task = current_task()

    def reached(self, layer: Layer) -> bool:
        """Whether the loss depends on the layer, as far as this pass could see."""
        if self._watched.gradients:
            return self._counts[layer.weight].reached
        return bool(self._output_firings.get(layer))

    def is_hidden(self, layer: Layer) -> bool:
        """Whether the layer was called where no graph is made, as inside of a function that makes its own."""
        return self._counts[layer.weight].calls_without_grad > 0

    @property
    def may_change_the_loss(self) -> tuple[bool, bool] | None:
        """What decides which parameters take part, where the loss takes gradients; None where that is all the same."""
        return (self.routes.tiles, self.routes.own_flags) if self._engine_was_called else None

    def revised(self, failed: Exception | None = None) -> Routes | None:
        """How the pass has to be run again, or None where its result stands.

        failed: how the pass ended; it is run again where what the taps changed may be the reason.
        """
        old = self.routes
        if failed is not None:
            new = replace(old, tiles=False, own_flags=True)
            own = type(failed).__module__ != "builtins" or getattr(failed, "is_final", False)  # no doing of the taps
            suspect = not own and not is_out_of_memory(failed)
            return new if suspect and new != old else None
        leaf, until_the_end, unreached_without_grad = set(old.leaf), set(old.until_the_end), False
        for counts in self._counts.values():
            key = id(counts.weight.parameter)
            if (counts.tile_firings and counts.leaf_firings and counts.calls <= 1) or counts.not_by_tiles:
                leaf.add(key)
            if counts.leaf_firings > 1 and not self._summed_at_the_end(counts):
                until_the_end.add(key)
            if self._watched.gradients and counts.calls_without_grad and not counts.reached:
                unreached_without_grad = True
        new = replace(
            old,
            tiles=old.tiles and not self._differentiates,
            own_flags=old.own_flags or self._accumulates or self._without_graph or unreached_without_grad,
            leaf=frozenset(leaf),
            until_the_end=frozenset(until_the_end),
            copied=old.copied | self._overwritten | {s for s in self._lost if self._lost_gradient(s)},
            threads=old.threads | self._threads,
            anchored=old.anchored or (unreached_without_grad and bool(self._embeddings)),
        )
        return None if new == old else new

    def _lost_gradient(self, layer: Layer) -> bool:
        return self._counts[layer.weight].reached and not self._output_firings.get(layer)

    def is_summed_at_the_end(self, weight: Weight) -> bool:
        """Whether the gradient of a weight is handed over when the backward pass is over, as far as is known."""
        return self._summed_at_the_end(self._counts[weight])

    def _summed_at_the_end(self, counts: _Counts) -> bool:
        """Whether uses are added up until the backward pass is over, because they arrive one by one."""
        several = counts.calls > 1 or len(counts.weight.layers) > 1
        return id(counts.weight.parameter) in self.routes.until_the_end or (
            several and (counts.tiled or counts.calls_without_grad > 0)
        )

    def _before(self, tiled: _Counts | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if is_unwatched():
                return
            if not self._is_own_call():
                if tiled is not None:
                    tiled.seen_elsewhere[threading.get_ident()] = tiled.freezes - tiled.frozen
                return
            self._count(module, args)
            if tiled is not None and self._can_tile(tiled.weight.parameter, module, first_input(args, kwargs)):
                tiled.frozen = True
                tiled.freezes += 1  # in this order, for calls on other threads
                tiled.weight.parameter.requires_grad_(False)

        return hook

    def _can_tile(self, p: nn.Parameter, module: nn.Module, x: Any) -> bool:
        """Whether this call computes Y = XWᵀ and nothing else, with the parameter itself."""
        return (
            p.requires_grad  # the user's own code may freeze it for a while
            and torch.is_grad_enabled()
            and module._parameters.get("weight") is p
            and not gradient_hooks(p)  # as in _is_tiled; a forward may put one there
            and has_tile_rule(module)  # once more: whoever patches it may do so within the loss
            and _is_dense(x)
            and is_plain(x)
            and is_plain(p)
            and not is_transformed(x)
            and not is_altered()
        )

    def _count(self, module: nn.Module, args: Any) -> None:
        if current_task() == self._outer and self._is_own_call() and not is_unwatched():
            self.order.setdefault(module, len(self.order))
            self.uses[module] = self.uses.get(module, 0) + 1

    def _after(
        self, owner: nn.Module, layers: list[Layer], tiled: _Counts | None, counts_calls: bool
    ) -> Callable[..., Tensor | None]:
        """owner: who gets the hook. counts_calls: whether no hook before the call does."""
        places = [_place(layer) for layer in layers]
        of_owner = [layer for layer in layers if layer.output_module is owner]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            if is_unwatched():
                return None
            observed = of_owner if module is owner else []  # a copy of it, with its hooks, has outputs of its own
            if not self._is_own_call():
                return self._elsewhere(observed, tiled, first_input(args, kwargs), output)
            if counts_calls:
                self._count(module, args)
            frozen = tiled is not None and tiled.frozen
            if frozen:
                self._thaw(tiled)  # type: ignore[arg-type]
                if next(iter(forward_hooks(module))) != self._first_hooks[module] or not _is_dense(
                    first_input(args, kwargs)
                ):  # what came in or goes out is not what the layer works with
                    tiled.not_by_tiles = True  # type: ignore[union-attr]
            recomputing = current_task() != self._outer  # or a call of the user's own backward
            for layer in layers if not recomputing else ():
                counts = self._counts[layer.weight]
                counts.calls += 1
                counts.calls_without_grad += not torch.is_grad_enabled()
                self._calls[layer] = self._calls.get(layer, 0) + 1
            own = True
            for holder, name, parameter in places:
                own = own and stands_for(holder.get(name), parameter)
            if not own and not recomputing:
                self.with_other_weights[module] = self.with_other_weights.get(module, 0) + 1
            if not isinstance(output, Tensor) or output.dtype not in DTYPES:
                return None
            # It may be computed when it is looked at.
            deferred = self._watched.as_it_is and not (is_plain(output) or is_distributed(output))
            if deferred or is_transformed(output):
                why = "it ran inside of torch.func or forward-mode differentiation"
                if deferred:
                    why = f"its output is a {type(output).__name__}, no plain tensor"
                for layer in observed:
                    self._observer.missed(layer, why, outputs=not recomputing)
                return None
            told: list[Callable[[], None]] = []
            if self._watched.outputs and not recomputing:
                told = [t for layer in observed if (t := self._observer.output(layer, output.detach())) is not None]
            gradients = self._watched.output_gradients and bool(observed)
            if not torch.is_grad_enabled() or not (frozen or gradients or told):
                return None
            if self._watched.as_it_is and recomputing and module not in self.uses:
                return None  # its forward was before us: what checkpointing counts must be the same in both
            return self._tap(observed, tiled if frozen else None, first_input(args, kwargs), output, own, told=told)

        return hook

    @staticmethod
    def _thaw(tiled: _Counts) -> None:
        tiled.frozen = False
        tiled.weight.parameter.requires_grad_(True)

    def _elsewhere(self, layers: list[Layer], tiled: _Counts | None, x: Any, output: Any) -> Tensor | None:
        """A call on another thread: somebody else's, unless its gradient turns out to be part of this pass."""
        grad = torch.is_grad_enabled()
        before = tiled.seen_elsewhere.pop(threading.get_ident(), tiled.freezes) if tiled is not None else 0
        if tiled is not None and grad and tiled.freezes != before:
            tiled.not_by_tiles = True  # frozen by us while it was used there
        if (
            not layers
            or not grad
            or not isinstance(output, Tensor)
            or output.dtype not in DTYPES
            or is_transformed(output)
        ):
            return None
        if self.routes.threads.issuperset(layers):
            own = all(stands_for(holder.get(name), parameter) for holder, name, parameter in map(_place, layers))
            return self._tap(layers, None, x, output, own, elsewhere=True)

        def arrived(_: Any) -> None:
            if self._in_final_backward and self._is_own():
                self._threads.update(layers)

        if output.grad_fn is not None:
            output.grad_fn.register_prehook(arrived)
        return None

    def _tap(
        self,
        layers: list[Layer],
        tiled: _Counts | None,
        x: Tensor | None,
        y: Tensor,
        own: bool,
        elsewhere: bool = False,
        told: Iterable[Callable[[], None]] = (),
    ) -> Tensor | None:
        """Puts a pre-hook on the graph node of y; returns what takes the place of y, if anything does.

        own: whether the layers' modules hold the profiled weights in this call. elsewhere: y comes from another
        thread, and is observed when its gradient arrives, which tells whose it is. told: called when it arrives.
        """
        result, kept = None, y
        if self._watched.as_it_is and (not y.requires_grad or y.grad_fn is None):
            if y.requires_grad:
                self._missed.update(dict.fromkeys(layers, "its module returns a parameter as it is"))
            self._out_of_the_graph.update(layers)
            return None
        if not y.requires_grad:
            if tiled is None and (self._watched.gradients or not own):
                self._without_graph = True
                return None  # nothing here takes part: the weight of a teacher, or one that the user froze meanwhile
            # .data and not .detach(): a version number of its own, since others may keep y and watch over its number.
            y = result = kept = _Anchor.apply(y.data, self._anchor)
        elif y.grad_fn is None:  # the module returns its own parameter
            y = result = y.view_as(y)
        shape, source = y.shape, y
        if any(layer in self.routes.copied for layer in layers):  # never ``as_it_is``
            result = y.clone()  # what others do to it, or hang on its node, stays off y
        elif is_view(y):
            base = y._base
            if base is not None and base.grad_fn is not None and _is_reshaped(base, y):
                source = base  # an in-place operation on y gives y a new node, its base keeps this one
            else:
                self._lost.update(layers)
        keep_x = tiled is not None or (
            self._watched.output_gradients
            and own
            and _is_dense(x)
            and is_plain(x)
            and not is_altered()
            and all(has_output_rule(layer) for layer in layers)
        )
        keep_y = self._watched.output_gradients or (elsewhere and self._watched.outputs)
        state = {
            "x": self._keeper.keep(x) if keep_x else None,  # type: ignore[arg-type]
            "y": self._keeper.keep(kept) if keep_y else None,
        }
        if current_task() == self._outer and not elsewhere:
            self._tapped.update(layers)
            for layer in layers:
                self._taps_made[layer] = self._taps_made.get(layer, 0) + 1
        index = source.output_nr
        bias = layers[0].module._parameters.get("bias") if layers else None

        def arrived(grads: tuple[Tensor | None, ...]) -> None:
            g = grads[index]
            if g is None or not state:
                if g is not None and self._watched.as_it_is and self._in_final_backward and self._is_own():
                    self._missed.update(dict.fromkeys(layers, "two backward passes went through one output of it"))
                return
            differentiated = torch.is_grad_enabled()  # a gradient of a gradient is being built
            self._differentiates |= differentiated
            if not self._in_final_backward or not self._is_own():  # torch.autograd.grad inside the loss
                return
            if self._task is None:
                self._task = current_task()
            if differentiated or (self._searches and current_task() != self._task):
                for layer in layers:
                    self._missed[layer] = "its output is differentiated by a backward pass inside of the backward pass"
                for tell in told:
                    tell()
                return
            if self._is_followed(handle):
                self._overwritten.update(layers)
            for tell in told:
                tell()
            self._arrived_at.update(layers)
            for layer in layers:
                self.last_arrived = layer
                self._arrivals[layer] = self._arrivals.get(layer, 0) + 1
            held_x, held_y = state["x"], state["y"]
            state.clear()  # frees X and Y as soon as this layer is done
            g = g.detach()
            if g.shape != shape:  # of a view that goes by the node of its base
                g = g.reshape(shape)
            self._gradient_arrived(layers, tiled, held_x, held_y, g, bias, elsewhere)

        node: Any = source.grad_fn
        handle = node.register_prehook(arrived)
        self._hook_ids.add(handle.id)
        return result

    def _is_followed(self, handle: Any) -> bool:
        """Whether a hook of the user's acts on the same node after ours, and may change the gradient."""
        hooks = handle.hooks_dict_ref()
        if hooks is None or next(reversed(hooks)) == handle.id:
            return False
        return any(
            key not in self._hook_ids for key in itertools.takewhile(lambda key: key != handle.id, reversed(hooks))
        )

    def _gradient_arrived(
        self,
        layers: list[Layer],
        tiled: _Counts | None,
        held_x: Held | None,
        held_y: Held | None,
        g: Tensor,
        bias: Tensor | None,
        elsewhere: bool,
    ) -> None:
        def y() -> Tensor:
            assert held_y is not None
            try:
                return held_y.get()
            except Overwritten:
                if held_x is None:
                    raise
                module = layers[0].output_module
                assert module is not None
                if module._parameters.get("bias") is not bias:  # that of the call was another one
                    raise
                return output_again(module, x if x is not None else held_x.get(), g.dtype)

        x = None
        if tiled is not None and gradient_hooks(tiled.weight.parameter):  # put there since
            tiled.not_by_tiles = True
        if held_x is not None and tiled is not None:
            try:
                x = held_x.get()
            except Overwritten:
                tiled.not_by_tiles = True
        try:
            for layer in layers if elsewhere else ():
                self.uses[layer.called_module] = self.uses.get(layer.called_module, 0) + 1
                if self._watched.outputs:
                    self._observer.output(layer, y())
            if self._watched.output_gradients:
                for layer in layers:
                    self._observer.output_gradient(layer, y, g, only_use=self._is_only_use(layer))
                    self._output_firings[layer] = self._output_firings.get(layer, 0) + 1
            if tiled is None or x is None:
                return
            tiled.tile_firings += 1
            (layer_of_weight,) = tiled.weight.layers  # also where a copy of its module was called, which is no layer
            if tiled.calls == 1:
                self._observer.linear(layer_of_weight, x, g)
            else:
                dw = linear_gradient(layer_of_weight.module, x, g)
                tiled.dense = dw if tiled.dense is None else tiled.dense.add_(dw)
        except Overwritten:
            self._overwritten.update(layers)

    def _is_only_use(self, layer: Layer) -> bool:
        return self._calls.get(layer, 0) == 1 and layer not in self.routes.threads

    def _leaf_hook(self, counts: _Counts) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            # FSDP2 hands over what its root gets when the pass is over, on whichever thread ends it.
            if not self._is_own() and not (is_distributed(p) and self._in_final_backward):
                self._disturbed = True
                return
            if p.grad is None or not self._in_final_backward:
                return
            counts.leaf_firings += 1
            self.last_arrived = counts.weight.layers[0]
            if not self._summed_at_the_end(counts):
                dw, p.grad = p.grad, None
                self._observer.weight_gradient(counts.weight, dw)

        return hook


class ModuleHook:
    """A hook on a module, without effect in copies and pickles of the module."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():  # code that is being traced: what runs later is no call of the module
            return None
        return self._function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return ModuleHook, (_do_nothing,)


def _do_nothing(*args: Any) -> None:
    """What a hook does in a copy."""


def run_until_it_stands(
    make: Callable[[Routes], Taps],
    once: Callable[[Taps], Tensor],
    prepare: Callable[[Routes], None],
    routes: Routes,
    agree: Callable[[Routes | None, Exception | None], Routes | None] = lambda revised, _: revised,
) -> tuple[Taps, Tensor]:
    """Runs a pass, and again where its taps ask for it; the taps that saw everything, and the loss.

    Args:
        make: taps for these routes.
        once: one pass with these taps -> the loss; what it raises passes through, where it raises it also without what
            the taps change (weights that are frozen for a call, parameters that do not train).
        prepare: called before each pass: makes everything as it was before the first.
        routes: of the first pass.
        agree: what becomes of ``Taps.revised`` (and of the error) where others run the same pass.
    """
    first_error: Exception | None = None
    while True:
        prepare(routes)
        taps = make(routes)
        try:
            loss = once(taps)
        except Exception as error:
            if isinstance(error, StopIteration) and first_error is not None:
                raise first_error from None  # an iterator that had one batch says nothing about the first run
            first_error = error
            revised = agree(taps.revised(error), error)
            if revised is None:
                raise
        else:
            revised = agree(taps.revised(), None)
            if revised is None:
                return taps, loss
        routes = revised


def _place(layer: Layer) -> tuple[dict[str, Tensor | None], str, Tensor]:
    """Where a layer's module holds its weight, under which name, and which: functional_call puts others there."""
    parameter = layer.weight.parameter
    return layer.module._parameters, layer.parameter_name.rpartition(".")[2], parameter  # type: ignore[return-value]


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """X of a layer: the first argument, whichever way it was handed over."""
    return args[0] if args else next(iter(kwargs.values()), None)


def _is_dense(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout == torch.strided and x.dtype in DTYPES and x.dim() > 0 and not x.is_nested


def _is_reshaped(base: Tensor, y: Tensor) -> bool:
    """Whether y is all of base in the same order, so that a gradient of one is a reshaped gradient of the other."""
    return base.numel() == y.numel() and base.is_contiguous() and y.is_contiguous()


def anchor_outputs(embeddings: Iterable[nn.Module]) -> list[Any]:
    """Hooks that make outputs of embeddings require a gradient: reentrant checkpointing drops what follows else."""
    return [module.register_forward_hook(ModuleHook(_require_grad)) for module in embeddings]


def _require_grad(module: nn.Module, args: Any, output: Any) -> None:
    if isinstance(output, Tensor) and output.is_floating_point() and torch.is_grad_enabled():
        output.requires_grad_(True)
