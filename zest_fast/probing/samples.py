"""Batches -> inputs by row and the loss of some rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.foundation.nearest import some
from zest_fast.prefix.inputs import Inputs, count, rows_of, take
from zest_fast.profiling.heads import is_classifier, unwrap
from zest_fast.profiling.loss import logits_of, loss_of, own_loss

_TARGETS = "targets"


@dataclass(frozen=True)
class Samples:
    """All samples of some batches."""

    inputs: Inputs
    targets: Tensor | None
    """None where the model computes its loss from labels among the inputs."""
    loss_fn: Callable[[Any, Any], Tensor] | None

    def __len__(self) -> int:
        return count(self.inputs)

    def of(self, rows: Tensor) -> Samples:
        targets = take(self.targets, rows) if self.targets is not None else None
        return Samples(rows_of(self.inputs, rows), targets, self.loss_fn)

    def class_numbers(self, model: nn.Module) -> Tensor | None:
        """int64 [samples], where it is class numbers that the loss is of."""
        if self.loss_fn is None and self.targets is not None and _are_classes(self.targets):
            return self.targets
        if self.loss_fn is None and isinstance(self.inputs, Mapping) and is_classifier(unwrap(model)):
            labels = self.inputs.get("labels")
            return labels if labels is not None and _are_classes(labels) else None
        return None

    def loss(self, output: Any, rows: Tensor) -> Tensor:
        """The mean loss of these samples."""
        if self.targets is None:
            inputs = self.inputs if isinstance(self.inputs, Mapping) else {}
            return own_loss(output, inputs)
        targets = take(self.targets, rows)
        criterion = self.loss_fn or nn.functional.cross_entropy
        return criterion(logits_of(output), targets)


def samples_of(model: nn.Module, batches: Any, loss_fn: Callable[[Any, Any], Tensor] | None) -> Samples:
    """All batches as one table. Raises TypeError and ValueError for batches that do not fit together."""
    if isinstance(batches, Mapping) or _is_pair(batches):
        batches = [batches]
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches is a {type(batches).__name__}; an iterable of batches, as profile takes, is needed")
    tables = []
    for number, batch in enumerate(batches):
        if number == 0:
            loss_of(model, batch, loss_fn, None)  # says what is wrong with a batch, its device or the loss function
        tables.append(_table(batch, number, loss_fn))
        if tables[-1].keys() != tables[0].keys():
            raise ValueError(
                f"batches[{number}] holds {some(sorted(tables[-1]))}, batches[0] {some(sorted(tables[0]))}; all must "
                "hold the same"
            )
    if not tables:
        raise ValueError("batches is empty; a probe needs samples to take gradients of and others to score")
    columns = {key: _column(key, [table[key] for table in tables]) for key in tables[0]}
    sizes = {key: len(column) for key, column in columns.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"batches: the tensors hold different numbers of samples in their first dimension: {sizes}")
    targets = columns.pop(_TARGETS, None)
    single = columns.get("")
    return Samples(single if single is not None else columns, targets, loss_fn)


def _table(batch: Any, number: int, loss_fn: Callable[..., Any] | None) -> dict[str, Tensor]:
    where = f"batches[{number}]"
    targets: Any = None
    if _is_pair(batch):
        inputs, targets = batch
    elif isinstance(batch, Mapping):
        inputs = dict(batch)
        if loss_fn is not None:
            targets = inputs.pop("labels", None)
            if targets is None:
                raise ValueError(f"{where} has no labels for loss_fn; add them, or pass pairs (inputs, targets)")
    else:
        raise TypeError(f"{where} is a {type(batch).__name__}; a mapping or a pair (inputs, targets) is needed")
    if isinstance(inputs, Tensor):
        inputs = {"": inputs}
    if not isinstance(inputs, Mapping):
        raise TypeError(
            f"{where}: inputs are a {type(inputs).__name__}; a probe takes a tensor or a mapping of tensors"
        )
    table = {str(key): value for key, value in inputs.items()}
    if targets is not None:
        table[_TARGETS] = targets
    for key, value in table.items():
        if not isinstance(value, Tensor) or not value.dim():
            found = "a number" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise TypeError(f"{where}[{key!r}] is {found}; a probe takes tensors of samples in their first dimension")
    return table


def _column(key: str, parts: list[Tensor]) -> Tensor:
    for number, part in enumerate(parts):
        if part.shape[1:] != parts[0].shape[1:] or part.dtype != parts[0].dtype or part.device != parts[0].device:
            raise ValueError(
                f"batches[{number}]: {key or 'the inputs'} are {_words(part)}, in batches[0] {_words(parts[0])}; a "
                "probe needs samples of one size: pad or crop all of them to one length"
            )
    return parts[0].detach() if len(parts) == 1 else torch.cat([part.detach() for part in parts])


def _words(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor)


def _are_classes(targets: Tensor) -> bool:
    return targets.dtype == torch.int64 and targets.dim() == 1
