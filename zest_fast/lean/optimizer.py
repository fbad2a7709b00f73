"""Optimizers that hold no more than they must: AdamW without copies, and steps taken inside the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.foundation.removable import Removable

ELEMENTWISE = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
)
"""Those that update each parameter by itself, entry by entry: their moments have its shape."""


def adamw(parameters: Iterable[Any], lr: float = 1e-3, **options: Any) -> torch.optim.AdamW:
    """torch.optim.AdamW that makes no copy of the weights while it steps.

    `foreach`, torch's choice on a GPU, holds one more copy of everything that trains: LLaMA-7B in bfloat16 needs 62.8
    instead of 50.7 GiB. This one takes the fused kernel where all parameters are on a GPU, and steps parameter by
    parameter elsewhere.

    Args:
        parameters: as for torch.optim.AdamW: tensors, named tensors or groups.
        lr: learning rate.
        **options: as for torch.optim.AdamW; `foreach=` and `fused=` in them are the caller's choice.

    Returns:
        The optimizer.

    Raises:
        ValueError, TypeError: what torch.optim.AdamW refuses.

    Examples:
        >>> import zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> selective = zest_fast.SelectiveBackward(model, ["0"])
        >>> optimizer = zest_fast.adamw(selective.parameters(), lr=1e-4)
        >>> optimizer.defaults["foreach"]
        False
    """
    groups = list(parameters)
    if "foreach" not in options and "fused" not in options:
        tensors = [p for group in groups for p in (group["params"] if isinstance(group, dict) else _tensors(group))]
        fused = bool(tensors) and all(p.is_cuda and p.is_floating_point() for p in tensors)
        options |= {"foreach": False, "fused": fused}
    return torch.optim.AdamW(groups, lr=lr, **options)


def _tensors(entry: Any) -> list[Tensor]:
    return [entry[1] if isinstance(entry, tuple) else entry]  # named parameters come as pairs


class OptimizerInBackward(Removable):
    """See `optimizer_in_backward`. `.remove()`, or the end of a `with` block, takes the steps out of backward again."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._step)
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]

    def remove(self) -> None:
        """Gradients are kept again and `optimizer.step()` uses them. A second call does nothing."""
        while self._handles:
            self._handles.pop().remove()

    def _step(self, parameter: Tensor) -> None:
        groups = self.optimizer.param_groups
        group = next(group for group in groups if any(p is parameter for p in group["params"]))
        everything = group["params"]
        group["params"] = [parameter]  # the group itself and no copy: schedulers change its learning rate
        self.optimizer.param_groups = [group]
        try:
            type(self.optimizer).step(self.optimizer)  # not the instance's: schedulers count the calls of that one
        finally:
            group["params"] = everything
            self.optimizer.param_groups = groups
        parameter.grad = None


def optimizer_in_backward(optimizer: torch.optim.Optimizer) -> OptimizerInBackward:
    """Step each parameter of `optimizer` as soon as its gradient is complete, and drop the gradient.

    One gradient is alive at a time, and the weights after `loss.backward()` are those after a plain step, bit for bit.
    The loop stays as it is: learning rate schedulers act on the same optimizer, and its `.step()` and `.zero_grad()`
    find no gradient and do nothing.

    Not to be combined with what needs all gradients at once or several backward passes for one step: clipping by the
    norm of all gradients, accumulation over batches, torch.amp.GradScaler, reentrant checkpointing of a parameter that
    is used in several segments.

    Args:
        optimizer: any of torch.optim that updates each parameter by itself.

    Returns:
        A handle: `.remove()`, or the end of a `with` block, takes the steps out of backward again.

    Raises:
        TypeError: something else than an optimizer.
        ValueError: one that needs all gradients at once (LBFGS), or whose parameters hold gradients already, which
            would be lost.

    Examples:
        >>> import torch, zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> optimizer = zest_fast.adamw(model.parameters())
        >>> scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        >>> with zest_fast.optimizer_in_backward(optimizer):
        ...     for x in torch.randn(2, 6, 4):
        ...         model(x).square().mean().backward()
        ...         optimizer.step()  # does nothing, but schedulers want to see it
        ...         scheduler.step()
        >>> model[0].weight.grad is None
        True
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer: LBFGS needs all gradients at once; take one that updates each parameter by itself")
    parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
    if any(p.grad is not None for p in parameters):
        raise ValueError("optimizer: some of its parameters hold a gradient; call optimizer.zero_grad() first")
    return OptimizerInBackward(optimizer)
