"""Where one pass is tapped: hooks and autograd functions, and nothing of statistics.

Two routes bring weight gradients out, and neither keeps one:

- leaf route, for every weight: a post-accumulate hook hands over dW and drops it at once, so one dW is alive at a time;
- tile route, for plain Linear and Conv1D on top: the weight is frozen during the layer's own forward, so that autograd
  forms no dW, and a pre-hook on the output's graph node sees G when it arrives and reduces GᵀX tile by tile.

X and Y are kept by ``_Hold``, an autograd function beside the graph, and not in a closure: so checkpointing and
offloading hooks see them. A pre-hook on the node, unlike a backward hook or a tensor hook, also sees G when the output
is overwritten in place later, or is a view that is. What a first pass cannot know (a weight used outside of its
module, say) is found out by counting, and ``Taps.revised`` then says how the pass has to be run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zest_fast.kernels import DTYPES
from zest_fast.profiling.layer_rules import has_output_rule, has_tile_rule, linear_gradient, output_again
from zest_fast.profiling.layers import Layer, Weight


class Observer(Protocol):
    """Who is told what passes by. Tensors are detached and live only during the call."""

    def output(self, layer: Layer, y: Tensor) -> None:
        """Y of one use, in forward."""

    def linear(self, layer: Layer, x: Tensor, g: Tensor, y: Callable[[], Tensor]) -> None:
        """X and G of the only use of a linear layer, in backward; y() gives Y."""

    def weight_gradient(self, weight: Weight, dw: Tensor) -> None:
        """dW, all uses together."""

    def output_gradient(self, layer: Layer, y: Callable[[], Tensor], g: Tensor, only_use: bool) -> None:
        """Y and G of one use, in backward."""


@dataclass(frozen=True)
class Routes:
    """How a pass is run."""

    tiles: bool = True
    """False when the loss itself contains a gradient: its second derivative needs weights that take part."""
    leaf: frozenset[int] = frozenset()
    """Weights (by id) that are used in other ways than by their module, hence by the leaf route only."""
    until_the_end: frozenset[int] = frozenset()
    """Weights whose gradient arrives in several parts (reentrant checkpointing): summed before it is reduced."""
    copied: frozenset[Layer] = frozenset()
    """Layers whose output is overwritten in place in a way that loses Y or G: a copy takes its place."""
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
    dense: Tensor | None = None

    @property
    def reached(self) -> bool:
        return bool(self.tile_firings or self.leaf_firings)


class Overwritten(Exception):
    """A tensor that was kept for the backward pass was modified in place after that."""


class _Hold(torch.autograd.Function):
    """Keeps a tensor as autograd keeps its own; the output is never used."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


class _Held:
    """A tensor in the care of autograd. Detached, so that it holds no graph and no reference cycle arises."""

    def __init__(self, anchor: Tensor, tensor: Tensor) -> None:
        self._node: Any = _Hold.apply(anchor, tensor.detach()).grad_fn
        self._version = tensor._version

    def get(self) -> Tensor:
        try:
            (tensor,) = self._node.saved_tensors
        except RuntimeError as error:
            if "modified by an inplace operation" in str(error):
                raise Overwritten from None
            raise
        if tensor._version > self._version:  # checkpointing hands back what it recomputed without looking
            raise Overwritten
        return tensor


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
        layers: rows to observe; their weights must require a gradient where ``gradients``.
        embeddings: modules whose outputs are anchored if ``routes`` says so.
        parents: modules whose calls are noted as well: where a layer's own module is never called, they tell its depth.
        outputs: whether Y is observed in forward.
        gradients: whether dW is observed.
        output_gradients: whether Y and G are observed in backward.
        keep_outputs: whether Y of a tiled layer must be kept for ``Observer.linear``.
    """

    def __init__(
        self,
        layers: Iterable[Layer],
        embeddings: Iterable[nn.Module],
        parents: Iterable[nn.Module],
        observer: Observer,
        routes: Routes,
        *,
        outputs: bool,
        gradients: bool,
        output_gradients: bool,
        keep_outputs: bool,
    ) -> None:
        self._layers = list(layers)
        self._embeddings = list(embeddings)
        self._parents = list(parents)
        self._observer = observer
        self._routes = routes
        self._outputs = outputs
        self._gradients = gradients
        self._output_gradients = output_gradients
        self._keep_outputs = keep_outputs
        self._handles: list[Any] = []
        self._anchor = torch.zeros((), requires_grad=True)
        self._in_final_backward = False
        self._second_order = False
        self._lost: set[Layer] = set()
        self._overwritten: set[Layer] = set()
        self._calls: dict[Layer, int] = {}
        self._output_firings: dict[Layer, int] = {}
        self.order: dict[nn.Module, int] = {}
        """Owner modules in the order of their first call."""
        self.uses: dict[nn.Module, int] = {}
        weights = {id(layer.weight): layer.weight for layer in self._layers}
        self._counts = {w: _Counts(w, self._is_tiled(w)) for w in weights.values()}

    def _is_tiled(self, weight: Weight) -> bool:
        p = weight.parameter
        return (
            self._gradients
            and self._routes.tiles
            and id(p) not in self._routes.leaf
            and len(weight.layers) == 1
            and not p._backward_hooks  # a user's hook on the gradient acts on the leaf route only
            and has_tile_rule(weight.layers[0].module)
        )

    def __enter__(self) -> Taps:
        by_module: dict[nn.Module, list[Layer]] = {}
        for layer in self._layers:
            by_module.setdefault(layer.called_module, []).append(layer)
        for module, layers in by_module.items():
            tiled = self._counts[layers[0].weight] if self._counts[layers[0].weight].tiled else None
            self._handles.append(module.register_forward_pre_hook(self._before(tiled), with_kwargs=True))
            self._handles.append(
                module.register_forward_hook(
                    self._after(layers, tiled), with_kwargs=True, prepend=True, always_call=tiled is not None
                )
            )
        for module in self._parents:
            if module not in by_module:
                self._handles.append(module.register_forward_pre_hook(self._count))
        if self._gradients:
            for counts in self._counts.values():
                hook = self._leaf_hook(counts)
                self._handles.append(counts.weight.parameter.register_post_accumulate_grad_hook(hook))
        if self._routes.anchored:
            self._handles += anchor_outputs(self._embeddings)
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def backward(self, loss: Tensor) -> None:
        """The backward pass, in which gradients are handed to the observer."""
        self._in_final_backward = True
        try:
            loss.backward()
        finally:
            self._in_final_backward = False
        if self._second_order and self._routes.tiles:
            return  # to be run again
        for counts in self._counts.values():
            p = counts.weight.parameter
            if counts.dense is not None or p.grad is not None:
                parts = [dw for dw in (counts.dense, p.grad) if dw is not None]
                counts.dense = p.grad = None
                self._observer.weight_gradient(counts.weight, parts[0] if len(parts) == 1 else parts[0] + parts[1])

    def reached(self, layer: Layer) -> bool:
        """Whether the loss depends on the layer, as far as this pass could see."""
        if self._gradients:
            return self._counts[layer.weight].reached
        return bool(self._output_firings.get(layer))

    def revised(self) -> Routes | None:
        """How the pass has to be run again, or None where its result stands."""
        old = self._routes
        leaf, until_the_end, unreached_without_grad = set(old.leaf), set(old.until_the_end), False
        for counts in self._counts.values():
            key = id(counts.weight.parameter)
            if counts.tile_firings and counts.leaf_firings and counts.calls <= 1:
                leaf.add(key)
            if counts.leaf_firings > 1 and not self._summed_at_the_end(counts):
                until_the_end.add(key)
            if self._gradients and counts.calls_without_grad and not counts.reached:
                unreached_without_grad = True
        new = replace(
            old,
            tiles=old.tiles and not self._second_order,
            leaf=frozenset(leaf),
            until_the_end=frozenset(until_the_end),
            copied=old.copied | self._overwritten | {s for s in self._lost if self._lost_gradient(s)},
            anchored=old.anchored or (unreached_without_grad and bool(self._embeddings)),
        )
        return None if new == old else new

    def _lost_gradient(self, layer: Layer) -> bool:
        return self._counts[layer.weight].reached and not self._output_firings.get(layer)

    def _summed_at_the_end(self, counts: _Counts) -> bool:
        """Whether uses are added up until the backward pass is over, because they arrive one by one."""
        several = counts.calls > 1 or len(counts.weight.layers) > 1
        return id(counts.weight.parameter) in self._routes.until_the_end or (
            several and (counts.tiled or counts.calls_without_grad > 0)
        )

    def _before(self, tiled: _Counts | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._count(module, args)
            if tiled is not None and torch.is_grad_enabled() and _is_dense(first_input(args, kwargs)):
                tiled.weight.parameter.requires_grad_(False)

        return hook

    def _count(self, module: nn.Module, args: Any) -> None:
        if not _in_backward():
            self.order.setdefault(module, len(self.order))
            self.uses[module] = self.uses.get(module, 0) + 1

    def _after(self, layers: list[Layer], tiled: _Counts | None) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            frozen = tiled is not None and not tiled.weight.parameter.requires_grad
            if frozen:
                tiled.weight.parameter.requires_grad_(True)  # type: ignore[union-attr]
            recomputing = _in_backward()
            for layer in layers if not recomputing else ():
                counts = self._counts[layer.weight]
                counts.calls += 1
                counts.calls_without_grad += not torch.is_grad_enabled()
                self._calls[layer] = self._calls.get(layer, 0) + 1
            if not isinstance(output, Tensor) or output.dtype not in DTYPES:
                return None
            observed = [layer for layer in layers if layer.output_module is module]
            if self._outputs and not recomputing:
                for layer in observed:
                    self._observer.output(layer, output.detach())
            if not torch.is_grad_enabled() or not (frozen or (self._output_gradients and observed)):
                return None
            return self._tap(observed, tiled if frozen else None, first_input(args, kwargs), output)

        return hook

    def _tap(self, layers: list[Layer], tiled: _Counts | None, x: Tensor | None, y: Tensor) -> Tensor | None:
        """Puts a pre-hook on the graph node of y; returns what takes the place of y, if anything does."""
        result, kept = None, y
        if any(layer in self._routes.copied for layer in layers):
            y = result = y.clone()
        if not y.requires_grad:
            # .data and not .detach(): a version number of its own, since others may keep y and watch over its number.
            y = result = kept = _Anchor.apply(y.data, self._anchor)
        elif y.grad_fn is None:  # the module returns its own parameter
            y = result = y.view_as(y)
        shape, source = y.shape, y
        if y._is_view():
            base = y._base
            if base is not None and base.grad_fn is not None and _is_reshaped(base, y):
                source = base  # an in-place operation on y gives y a new node, its base keeps this one
            else:
                self._lost.update(layers)
        keep_x = _is_dense(x) and (tiled is not None or all(has_output_rule(layer) for layer in layers))
        keep_y = self._output_gradients or (tiled is not None and self._keep_outputs)
        state = {
            "x": _Held(self._anchor, x) if keep_x else None,  # type: ignore[arg-type]
            "y": _Held(self._anchor, kept) if keep_y else None,
        }
        index = source.output_nr

        def arrived(grads: tuple[Tensor | None, ...]) -> None:
            g = grads[index]
            if g is None or not state:
                return
            if torch.is_grad_enabled():  # a gradient of a gradient is being built
                self._second_order = True
                return
            if not self._in_final_backward:  # torch.autograd.grad inside the loss
                return
            held_x, held_y = state["x"], state["y"]
            state.clear()  # frees X and Y as soon as this layer is done
            self._gradient_arrived(layers, tiled, held_x, held_y, g.detach().reshape(shape))

        node: Any = source.grad_fn
        node.register_prehook(arrived)
        return result

    def _gradient_arrived(
        self, layers: list[Layer], tiled: _Counts | None, held_x: _Held | None, held_y: _Held | None, g: Tensor
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
                return output_again(module, x if x is not None else held_x.get(), g.dtype)

        try:
            x = held_x.get() if held_x is not None and tiled is not None else None
            if self._output_gradients:
                for layer in layers:
                    self._observer.output_gradient(layer, y, g, only_use=self._calls.get(layer, 0) == 1)
                    self._output_firings[layer] = self._output_firings.get(layer, 0) + 1
            if tiled is None or x is None:
                return
            tiled.tile_firings += 1
            if tiled.calls == 1:
                self._observer.linear(layers[0], x, g, y)
            else:
                dw = linear_gradient(layers[0].module, x, g)
                tiled.dense = dw if tiled.dense is None else tiled.dense.add_(dw)
        except Overwritten:
            self._overwritten.update(layers)

    def _leaf_hook(self, counts: _Counts) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            if p.grad is None or not self._in_final_backward:
                return
            counts.leaf_firings += 1
            if not self._summed_at_the_end(counts):
                dw, p.grad = p.grad, None
                self._observer.weight_gradient(counts.weight, dw)

        return hook


def _in_backward() -> bool:
    """Whether autograd is running: a forward hook then sees a recomputation."""
    return torch._C._current_graph_task_id() != -1


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """X of a layer: the first argument, whichever way it was handed over."""
    return args[0] if args else next(iter(kwargs.values()), None)


def _is_dense(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout == torch.strided and x.dtype in DTYPES and x.dim() > 0


def _is_reshaped(base: Tensor, y: Tensor) -> bool:
    """Whether y is all of base in the same order, so that a gradient of one is a reshaped gradient of the other."""
    return base.numel() == y.numel() and base.is_contiguous() and y.is_contiguous()


def anchor_outputs(embeddings: Iterable[nn.Module]) -> list[Any]:
    """Hooks that make outputs of embeddings require a gradient: reentrant checkpointing drops what follows else."""
    return [module.register_forward_hook(_require_grad) for module in embeddings]


def _require_grad(module: nn.Module, args: Any, output: Any) -> None:
    if isinstance(output, Tensor) and output.is_floating_point() and torch.is_grad_enabled():
        output.requires_grad_(True)
