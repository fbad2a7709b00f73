"""Peer (d): BackPACK and Opacus, where they are installed and run on a model (pip install backpack-for-pytorch opacus).

Neither offers the statistics of profile(). The nearest that both have is the norm of each sample's gradient, layer by
layer, so this is what they are timed on, by the route that each is fastest with: BatchL2Grad, and ghost norms. It is a
price for orientation.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from zest_fast.benchmarking.hooks import profiled_layers
from zest_fast.benchmarking.models import Batch

Norms = dict[str, Tensor]
QUANTITY = "norm of each sample's gradient, per layer"


def backpack_norms(model: nn.Module) -> Callable[[Batch], Norms]:
    """A function that gives {layer: norms [n]} by BackPACK; it works on a copy, since extend() cannot be undone.

    BatchL2Grad 1.7 overlooks the groups of a convolution (2 to 7 times too large on MobileNetV2), where BatchGrad is
    right.
    """
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad, BatchL2Grad

    model, layers = _copy(model)
    for module in layers.values():
        extend(module)
    grouped = any(getattr(module, "groups", 1) > 1 for module in layers.values())

    def run(batch: Batch) -> Norms:
        with _quiet(), backpack(BatchGrad() if grouped else BatchL2Grad()):
            model(**batch).loss.backward()
        norms = {name: _pop_norms(m.weight, grouped) for name, m in layers.items()}
        model.zero_grad(set_to_none=True)
        return norms

    return run


def _pop_norms(weight: Tensor, grouped: bool) -> Tensor:
    if not grouped:
        return weight.batch_l2.sqrt()
    norms = weight.grad_batch.flatten(1).norm(dim=1)
    del weight.grad_batch
    return norms


def opacus_norms(model: nn.Module) -> Callable[[Batch], Norms]:
    """The same by the ghost norms of Opacus, which undo the mean of the loss over n samples; also on a copy."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    model, layers = _copy(model)
    with _quiet():
        wrapped = GradSampleModuleFastGradientClipping(
            model, loss_reduction="mean", strict=False, use_ghost_clipping=True
        )

    def run(batch: Batch) -> Norms:
        with _quiet():
            wrapped(**batch).loss.backward()
        samples = len(next(iter(batch.values())))
        norms = {name: m.weight._norm_sample / samples for name, m in layers.items()}
        model.zero_grad(set_to_none=True)
        return norms

    return run


def _copy(model: nn.Module) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A copy in which only the profiled weights require a gradient, and its profiled layers."""
    model = copy.deepcopy(model)
    layers = profiled_layers(model)
    model.requires_grad_(False)
    for module in layers.values():
        module.weight.requires_grad_(True)
    return model, layers


@contextmanager
def _quiet() -> Iterator[None]:
    """Both warn of first layers whose input needs no gradient, and of modules whose parameters are frozen here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


LIBRARIES = {"backpack": backpack_norms, "opacus": opacus_norms}
