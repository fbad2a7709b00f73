"""The gradient noise scale from a few batches, without training: a pass for each, and another one for its error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zest_fast import kernels
from zest_fast.foundation.interrupts import HeldInterrupts
from zest_fast.foundation.options import Backend
from zest_fast.profiling.borrowing.model_state import ModelState
from zest_fast.profiling.layers import LayerSelection, Weight, find_layers, select_layers
from zest_fast.profiling.loss import loss_of
from zest_fast.profiling.on_request.gradient_pass import GradientPass
from zest_fast.profiling.processes.local import is_distributed
from zest_fast.profiling.profile import eager, require_usable, unwrapped
from zest_fast.watching.noise import estimate


@dataclass(frozen=True)
class NoiseScale:
    """The gradient noise scale B = tr(Σ) / |G|² of a model (McCandlish et al. 2018), in samples.

    Attributes:
        layers: names.
        values: float64 [layers]; NaN where the batches cannot tell the gradient from its noise.
        errors: standard errors, by the jackknife over batches.
        total: of all layers together.
        error: its standard error.
        batch_size: what it suggests: at a batch of this size a step is worth half of one with the exact gradient.
        batches: how many were taken.

    Examples:
        >>> import torch, zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> batches = [(x, x[:, :3].argmax(1)) for x in torch.randn(8, 16, 4)]
        >>> found = zest_fast.noise_scale(model, batches)
        >>> found.layers, found.batches
        (('0', '2'), 8)
    """

    layers: tuple[str, ...]
    values: np.ndarray
    errors: np.ndarray
    total: float
    error: float
    batch_size: int | None
    batches: int


def noise_scale(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    layers: LayerSelection = None,
    backend: Backend = "auto",
) -> NoiseScale:
    """The gradient noise scale per layer and in all, and the batch size that it suggests.

    Each batch is a draw of the gradient; a forward and a backward pass for each gives its square and the sum of all, a
    second pass its product with that sum, of which the standard error is made (leaving out one batch at a time). Held
    are one sum and one gradient of each layer. The model runs in the mode that it is in, from the same buffers for each
    batch but with other random numbers, and is bit for bit as it was afterwards, also after an error or Ctrl-C.

    Args:
        model: as of `profile`.
        batches: three or more, drawn independently, as `profile` takes them; kept in a list, since each is used twice.
            Samples are counted in the first dimension of the first tensor. Batches of different sizes weigh the same.
        loss_fn: as of `profile`; a mean over samples.
        layers: as of `profile`.
        backend: as of `profile`.

    Returns:
        A NoiseScale.

    Raises:
        TypeError, ValueError: batches or layers that do not fit, fewer than three batches.
        RuntimeError, NotImplementedError: as of `profile`.

    Examples:
        >>> import torch, zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> batches = [(x, x[:, :3].argmax(1)) for x in torch.randn(8, 16, 4)]
        >>> zest_fast.noise_scale(model, batches).total > 0
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; a torch.nn.Module is needed")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("noise_scale needs gradients and cannot run inside torch.inference_mode(); leave it first")
    if isinstance(batches, Mapping | Tensor) or not isinstance(batches, Iterable):
        raise TypeError(f"batches is a {type(batches).__name__}; an iterable of batches, as profile takes, is needed")
    batches = list(batches)
    if len(batches) < 3:
        raise ValueError(f"batches: {len(batches)} of them; three or more are needed for a noise scale and its error")
    sizes = [_samples(batch, number) for number, batch in enumerate(batches)]
    _, model = unwrapped(model)
    modules = dict(model.named_modules())
    require_usable(modules)
    _require_whole(model)
    chosen = select_layers(find_layers(modules), layers)
    losses = [loss_of(model, batch, loss_fn, None) for batch in batches]
    weights: list[Tensor] = [layer.weight.parameter for layer in chosen]
    functions = [loss_fn] if loss_fn is not None else []
    embeddings = [m for m in modules.values() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    borrowed = ModelState(modules.values(), weights, functions, values=True)
    with HeldInterrupts() as interrupts, torch.enable_grad(), eager(), borrowed as state:
        job = _Batches(GradientPass(chosen, embeddings, state), losses, backend, interrupts)
        squares, products, total = job.run()
    names, rows = _by_layer(job.weights)
    found = [_jackknifed(squares[:, row], products[:, row], total[row], sizes) for row in rows]
    everything = _jackknifed(squares.sum(1), products.sum(1), total.sum(), sizes)
    return NoiseScale(
        layers=names,
        values=np.array([value for value, _ in found]),
        errors=np.array([error for _, error in found]),
        total=everything[0],
        error=everything[1],
        batch_size=max(1, round(everything[0])) if math.isfinite(everything[0]) else None,
        batches=len(batches),
    )


class _Batches:
    """The passes over a borrowed model."""

    def __init__(
        self,
        passes: GradientPass,
        losses: list[Callable[[], Tensor]],
        backend: Backend,
        interrupts: HeldInterrupts,
    ) -> None:
        self._passes, self._losses, self._backend, self._interrupts = passes, losses, backend, interrupts
        self.weights = passes.weights

    def run(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """|g_i|² and g_i·s [batches, weights], and |s|² [weights], s being the sum of all g_i."""
        squares = np.zeros((len(self._losses), len(self.weights)))
        products = np.zeros_like(squares)
        sums: dict[Weight, Tensor] = {}
        for i in range(len(self._losses)):
            for weight, gradient in self._gradients(i).items():
                squares[i, self.weights.index(weight)] = self._square(gradient)
                if weight in sums:
                    sums[weight].add_(gradient)
                else:
                    wide = torch.promote_types(gradient.dtype, torch.float32)
                    sums[weight] = gradient.to(wide, copy=True)
        for i in range(len(self._losses)):
            for weight, gradient in self._gradients(i).items():
                products[i, self.weights.index(weight)] = _dot(gradient, sums[weight])
        total = np.array([self._square(sums[w]) if w in sums else 0.0 for w in self.weights])
        return squares, products, total

    def _gradients(self, i: int) -> dict[Weight, Tensor]:
        """Of the i-th batch; random numbers are those of the batch, the same in both passes over it."""
        held: dict[Weight, Tensor] = {}

        def loss() -> Tensor:
            torch.manual_seed(i)
            return self._losses[i]()

        def receive(weight: Weight, dw: Tensor) -> None:
            held[weight] = dw.coalesce().to_dense() if dw.layout != torch.strided else dw

        with self._interrupts.interruptible():
            self._passes.run(loss, receive)
        self._passes.rewind()
        return held

    def _square(self, gradient: Tensor) -> float:
        (found,) = kernels.moments([gradient], backend=self._backend)
        return found.norm**2


def _dot(a: Tensor, b: Tensor) -> float:
    """In float64, a part at a time."""
    pairs = zip(a.reshape(-1).split(1 << 20), b.reshape(-1).split(1 << 20), strict=True)
    return math.fsum(float(x.double() @ y.double()) for x, y in pairs)


def _jackknifed(squares: np.ndarray, products: np.ndarray, total: float, sizes: list[int]) -> tuple[float, float]:
    """The noise scale of |g_i|², g_i·s and |s|², and its standard error."""
    n = len(squares)
    value = _ratio(squares, total, sizes)
    without = []
    for i in range(n):
        rest = np.delete(squares, i)
        without.append(_ratio(rest, total - 2 * products[i] + squares[i], sizes[:i] + sizes[i + 1 :]))
    spread = np.array(without) - np.mean(without)
    return value, float(math.sqrt((n - 1) / n * np.sum(spread**2)))


def _ratio(squares: np.ndarray, square_of_sum: float, sizes: list[int]) -> float:
    found = estimate(list(squares), square_of_sum / len(squares) ** 2, sizes)
    return float(found.trace / found.square) if found.square > 0 else math.nan


def _by_layer(weights: list[Weight]) -> tuple[tuple[str, ...], list[int]]:
    """Names of rows, and of each its place among the weights; those of one weight share it."""
    pairs = [(layer.name, place) for place, weight in enumerate(weights) for layer in weight.layers]
    return tuple(name for name, _ in pairs), [place for _, place in pairs]


def _inside(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, tuple | list) else []


def _samples(batch: Any, number: int) -> int:
    todo = _inside(batch)
    while todo:
        value = todo.pop(0)
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
        todo = _inside(value) + todo
    raise ValueError(f"batches[{number}]: no tensor whose first dimension counts samples")


def _require_whole(model: nn.Module) -> None:
    """Refuses sharded models: a pass of one process alone would wait for the others for ever."""
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise NotImplementedError(
                f"module {name!r} is sharded by FullyShardedDataParallel: noise_scale takes whole models; "
                "watch(noise=True) takes sharded ones (FSDP2)"
            )
    for name, p in model.named_parameters():
        if is_distributed(p):
            raise NotImplementedError(
                f"parameter {name!r} is a DTensor (fully_shard, tensor parallel): noise_scale takes whole models; "
                "watch(noise=True) takes sharded ones"
            )
