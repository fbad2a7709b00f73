"""Eval mode for a while: a model may be partly in train mode, which `train()` afterwards would not bring back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """At the end each module is in the mode in which it was, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; at the end each module is in the mode in which it was."""
    with modes_kept(model):
        model.eval()
        yield
