"""Gradient agreement: do the even and the odd samples of a batch pull a weight in the same direction?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from zest_fast.kernels import Collector
from zest_fast.kernels.agreement import agreement_sums
from zest_fast.profiling.layers import Weight
from zest_fast.profiling.loss import loss_of
from zest_fast.profiling.metrics import NAN, Agreement, LayerStatistics
from zest_fast.profiling.on_request.gradient_pass import GradientPass
from zest_fast.profiling.on_request.measure import Asked


class GradientAgreement:
    """The statistic ``agreement`` of every weight (see ``measure.Measure``)."""

    def __init__(self, asked: Asked) -> None:
        batch = asked.batch_for("splits the samples")
        self._even, self._odd = (loss_of(asked.model, half, asked.loss_fn, None) for half in halves(batch))
        self._found: dict[Weight, Agreement] = {}

    def measure(self, passes: GradientPass, collector: Collector) -> str:
        self._found = agreement(passes, self._even, self._odd)
        return ""

    def add_to(self, statistics: LayerStatistics, weight: Weight, loss_scale: float) -> None:
        if weight in self._found:
            found = self._found[weight]
            statistics.agreement = Agreement(
                found.dot / loss_scale**2, found.sign_dot / loss_scale, found.norms / loss_scale**2
            )


@dataclass(frozen=True)
class _Whole:
    """dW as it is."""

    dw: Tensor

    def rows(self, first: int, last: int) -> Tensor:
        return self.dw[first:last]


@dataclass(frozen=True)
class _Product:
    """dW = LᵀR of a linear layer, L [T, rows], R [T, columns]: formed a few rows at a time."""

    left: Tensor
    right: Tensor

    @classmethod
    def or_whole(cls, left: Tensor, right: Tensor) -> _Product | _Whole:
        """What takes less memory to keep."""
        smaller = left.numel() + right.numel() < left.shape[1] * right.shape[1]
        return cls(left.clone(), right.clone()) if smaller else _Whole(left.t() @ right)

    def rows(self, first: int, last: int) -> Tensor:
        return self.left[:, first:last].t() @ self.right


def agreement(
    passes: GradientPass, even_loss: Callable[[], Tensor], odd_loss: Callable[[], Tensor]
) -> dict[Weight, Agreement]:
    """Agreement of each weight's gradients of two losses, a pass for each.

    A pass a half and not rows of X and G of one joint pass: batch norm in train mode, losses that are means over
    tokens, and layers that see samples in another order or mixed would give other gradients there, silently. The
    price is one more forward and backward over the batch, and what is kept of the first half: for a linear layer the
    smaller of its gradient and the two matrices that it is the product of, for any other its gradient.
    """
    even: dict[Weight, _Whole | _Product] = {}
    sums: dict[Weight, Tensor] = {}

    def keep(weight: Weight, dw: Tensor) -> None:
        even[weight] = _Whole(_dense(dw))

    def keep_factors(weight: Weight, left: Tensor, right: Tensor) -> None:
        even[weight] = _Product.or_whole(left, right)

    def compare(weight: Weight, odd: _Whole | _Product) -> None:
        if weight in even:
            sums[weight] = _sums(weight.parameter, even[weight], odd)

    passes.run(_finite(even_loss, "even"), keep, keep_factors)
    passes.run(
        _finite(odd_loss, "odd"),
        lambda weight, dw: compare(weight, _Whole(_dense(dw))),
        lambda weight, left, right: compare(weight, _Product(left, right)),
    )
    return {weight: _agreement(*sums[weight].tolist()) if weight in sums else _APART for weight in passes.weights}


def _sums(weight: Tensor, a: _Whole | _Product, b: _Whole | _Product) -> Tensor:
    rows = len(weight)
    step = max(1, _TILE_ENTRIES * rows // max(1, weight.numel()))
    total = torch.zeros(5, dtype=torch.float64, device=weight.device)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        total += agreement_sums(a.rows(first, last), b.rows(first, last))
    return total


_TILE_ENTRIES = 1 << 20  # of dW at once
_APART = Agreement(0.0, 0.0, 0.0)  # a weight that the samples of one half do not reach, such as that of an expert


def _agreement(dot: float, sign_a: float, sign_b: float, square_a: float, square_b: float) -> Agreement:
    found = Agreement(dot, (sign_a + sign_b) / 2, math.sqrt(square_a) * math.sqrt(square_b))
    return found if math.isfinite(square_a) and math.isfinite(square_b) else Agreement(NAN, NAN, NAN)


def _dense(dw: Tensor) -> Tensor:
    return dw.to_dense()  # nn.Embedding(sparse=True)


def _finite(compute_loss: Callable[[], Tensor], half: str) -> Callable[[], Tensor]:
    def compute() -> Tensor:
        loss = compute_loss()
        if isinstance(loss, Tensor) and not bool(loss.isfinite().all()):
            raise ValueError(f"agree_*: the mean loss of the {half} samples is {float(loss.detach())}")
        return loss

    return compute


def halves(batch: Any) -> tuple[Any, Any]:
    """The even and the odd samples of a batch in the form that it has: a mapping, or a pair (inputs, targets).

    Tensors are cut along their first dimension, which has to be that of the samples, and so are lists that hold
    something for each sample. Tensors without dimensions or with one row, numbers and strings go to both halves.

    Raises:
        ValueError: fewer than two samples, or a tensor whose first dimension is not theirs.
        TypeError: inputs that cannot be cut.
    """
    name = "batch" if isinstance(batch, Mapping) else "batch[0]"
    samples = _samples(batch if isinstance(batch, Mapping) else batch[0])
    if samples is None:
        raise TypeError(f"agree_*: {name} holds no tensor whose first dimension tells the samples")
    if samples < 2:
        raise ValueError("agree_*: the batch has one sample; at least two are needed")
    even, odd = (_cut(batch, slice(first, None, 2), samples) for first in (0, 1))
    return even, odd


def _cut(batch: Any, which: slice, samples: int) -> Any:
    if isinstance(batch, Mapping):
        return _part(batch, which, samples, "batch")
    return tuple(_part(part, which, samples, f"batch[{i}]") for i, part in enumerate(batch))


def _samples(value: Any) -> int | None:
    """The first dimension of the first tensor that has one."""
    if isinstance(value, PackedSequence):
        raise TypeError("agree_*: a PackedSequence cannot be cut into samples; pass a padded batch")
    if isinstance(value, Tensor):
        return value.shape[0] if value.dim() else None
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((found for found in map(_samples, parts) if found is not None), None)


def _part(value: Any, which: slice, samples: int, name: str) -> Any:
    if isinstance(value, Tensor):
        if value.dim() == 0 or value.shape[0] == 1:
            return value
        if value.shape[0] != samples:
            raise ValueError(
                f"agree_*: {name} has shape {tuple(value.shape)}, but the batch has {samples} samples; its first "
                "dimension must be the samples"
            )
        return value[which].contiguous()  # as a batch of its own would be: models call .view on it
    if isinstance(value, Mapping):
        return {key: _part(entry, which, samples, f"{name}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, tuple | list):
        if len(value) == samples and not any(isinstance(entry, Tensor | tuple | list) for entry in value):
            return value[which]
        parts = [_part(entry, which, samples, f"{name}[{i}]") for i, entry in enumerate(value)]
        return tuple(parts) if isinstance(value, tuple) else parts
    return value
