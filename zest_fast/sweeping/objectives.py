"""What a trial trains for and is scored by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from zest_fast.prefix.inputs import logits_of


class Objective(Protocol):
    """Of the samples of one set of inputs. Workers get it pickled."""

    @property
    def chunk(self) -> int:
        """Samples in an evaluated pass."""

    def loss(self, output: Any, rows: Tensor) -> Tensor:
        """The mean loss of these samples, a scalar with a graph. output: the model's for the samples `rows`."""

    def evaluate(self, outputs: Iterable[tuple[Tensor, Any]]) -> dict[str, Any]:
        """What is recorded of (rows, output) of all samples."""


@dataclass(frozen=True)
class Classification:
    """Cross-entropy and accuracy. targets: class numbers, int64 [samples]."""

    targets: Tensor
    chunk: int = 64

    def loss(self, output: Any, rows: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits_of(output), self.targets[rows])

    def evaluate(self, outputs: Iterable[tuple[Tensor, Any]]) -> dict[str, float]:
        """Accuracy and mean loss."""
        loss, correct = 0.0, 0
        for rows, output in outputs:
            logits, targets = logits_of(output).double(), self.targets[rows]
            loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            correct += int((logits.argmax(1) == targets).sum())
        return {"accuracy": correct / len(self.targets), "loss": loss / len(self.targets)}
