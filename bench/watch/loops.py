"""Training loops of one model, with a watch, with what others do, and with nothing.

A loop is entered (hooks go in, which is not timed), takes steps, and is left.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import zest_fast
from bench.profile.peers import written_out
from zest_fast.benchmarking.hooks import profiled_layers
from zest_fast.benchmarking.models import Batch

NEVER = 1 << 40
BINS = 64  # of a histogram, in wandb and in a watch


class Loop:
    """The plain one: a step is forward, backward, AdamW and zero_grad, at a rate that leaves the model where it is."""

    def __init__(self, model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.batch, self.optimizer = model, batch, optimizer
        self.handles: list[Any] = []

    def step(self) -> None:
        self.model(**self.batch).loss.backward()
        self.read()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def __enter__(self) -> Loop:
        self.put_in()
        return self

    def __exit__(self, *exception: object) -> None:
        while self.handles:
            self.handles.pop().remove()

    def put_in(self) -> None:
        """The hooks, into `handles`; here none."""
        return

    def read(self) -> None:
        """Between backward and the step; here nothing."""
        return


class Watched(Loop):
    """zest_fast.watch. logged: every step is; else none of those that are timed."""

    def __init__(self, *args: Any, logged: bool = True, **options: Any) -> None:
        super().__init__(*args)
        self.last: Any = None
        every, first = (1, 0) if logged else (NEVER, 1)
        self._watch = partial(zest_fast.watch, self.model, every=every, first_step=first, log=self._take, **options)

    def put_in(self) -> None:
        watched = self._watch()
        watched.__enter__()
        self.handles.append(watched)

    def _take(self, step: Any) -> None:
        self.last = step


class Histograms(Loop):
    """As wandb.watch(log="gradients"): a hook on every parameter takes a histogram of every k-th gradient."""

    def __init__(self, *args: Any, logged: bool = True) -> None:
        super().__init__(*args)
        self.every = 1 if logged else NEVER
        self.log: dict[str, tuple[list[float], list[float]]] = {}

    def put_in(self) -> None:
        self.handles += [
            parameter.register_hook(_AtEvery(self.every, partial(self._histogram, name)))
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        ]

    def _histogram(self, name: str, gradient: Tensor) -> None:
        """The passes over it that wandb makes: a copy, two looks for what is not finite, both ends, the counts."""
        flat = gradient.detach().clone().reshape(-1).float()
        if bool((~torch.isfinite(flat)).all()):
            return
        finite = torch.isfinite(flat)
        if not bool(finite.all()):
            flat = flat[finite]
        low, high = flat.min().item(), flat.max().item()
        if low == high:
            self.log[name] = [float(flat.numel())], [low, high]
            return
        counts = flat.histc(bins=BINS, min=low, max=high)
        self.log[name] = counts.tolist(), torch.linspace(low, high, steps=BINS + 1).tolist()


class _AtEvery:
    def __init__(self, every: int, run: Callable[[Tensor], None]) -> None:
        self._every, self._run, self._count = every, run, 0

    def __call__(self, gradient: Tensor) -> None:
        self._count += 1
        if self._count == self._every:
            self._count = 0
            self._run(gradient)


class Reductions(Loop):
    """A loop over the layers after backward: one torch expression for each metric of weight and gradient."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._layers = profiled_layers(self.model)
        self.table: dict[str, dict[str, float]] = {}

    def read(self) -> None:
        self.table = {name: _of_weight(module.weight) for name, module in self._layers.items()}


def _of_weight(weight: Tensor) -> dict[str, float]:
    w, g = weight.detach(), weight.grad
    assert g is not None
    product = w * g
    values = {
        "weight_mean": w.mean(),
        "weight_std": w.std(correction=0),
        "grad_mean": g.mean(),
        "grad_std": g.std(correction=0),
        "grad_abs_mean": g.abs().mean(),
        "grad_abs_std": g.abs().std(correction=0),
        "grad_norm": g.norm(),
        "plain": product.mean(),
        "snip": product.abs().sum(),
        "rgn": g.norm() / w.norm(),
    }
    return {metric: value.item() for metric, value in values.items()}


class Cached(Loop):
    """As TransformerLens caches a run with its backward: module hooks keep every layer's output and its gradient.

    reduced: the metrics of weights, gradients and outputs are taken from the cache, one torch expression for each.
    """

    def __init__(self, *args: Any, reduced: bool = False) -> None:
        super().__init__(*args)
        self._layers, self._reduced = profiled_layers(self.model), reduced
        self.cache: dict[str, Tensor] = {}
        self.table: dict[str, dict[str, float]] = {}

    def put_in(self) -> None:
        for name, module in self._layers.items():
            self.handles.append(module.register_forward_hook(partial(self._keep, name)))
            self.handles.append(module.register_full_backward_hook(partial(self._keep_gradient, name)))

    def read(self) -> None:
        if self._reduced:
            self.table = {
                name: written_out(module, self.cache[name], self.cache[f"{name} grad"])
                for name, module in self._layers.items()
            }
        self.cache.clear()

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.cache[name] = output.detach()

    def _keep_gradient(self, name: str, module: nn.Module, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        self.cache[f"{name} grad"] = outputs[0].detach()


LOOPS: dict[str, Callable[..., Loop]] = {
    "plain": Loop,
    "watch, not logged": partial(Watched, logged=False),
    "watch": Watched,
    "watch, all metrics": partial(Watched, metrics="all"),
    "watch, histograms": partial(Watched, histograms=True),
    "histograms, not logged": partial(Histograms, logged=False),
    "histograms": Histograms,
    "reductions": Reductions,
    "cache": Cached,
    "cache, reduced": partial(Cached, reduced=True),
}
"""By name. Of the last three a step that is not logged is a plain one."""


def loops_of(model: nn.Module, batch: Batch) -> dict[str, Loop]:
    """model: may be in DistributedDataParallel, whose layers are those of the module within."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, weight_decay=0.0)
    return {name: make(model, batch, optimizer) for name, make in LOOPS.items()}
