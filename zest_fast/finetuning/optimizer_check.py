"""Whether an optimizer holds what trains, and nothing that is frozen."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from zest_fast.foundation.nearest import some


def check_optimizer(
    optimizer: Any, chosen: Mapping[str, nn.Parameter], model: nn.Module, replaced: Collection[int] = ()
) -> int:
    """How many parameters of something else than `model` the optimizer holds.

    replaced: ids of weights that were in the model before its frozen ones were quantised.
    Raises ValueError when one of the `chosen` is missing, or when it holds parameters of the model that are frozen;
    TypeError for what is no optimizer.
    """
    groups = getattr(optimizer, "param_groups", None)
    if groups is None:
        raise TypeError(f"optimizer must be a torch optimizer with param_groups, not {type(optimizer).__name__}")
    held = {id(parameter): parameter for group in groups for parameter in group["params"]}
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    missing = [name for name, parameter in chosen.items() if id(parameter) not in held]
    frozen = [own[key] for key, parameter in held.items() if key in own and not parameter.requires_grad]
    foreign = len(held.keys() - own.keys())
    problems = []
    if missing:
        strangers = f" (it holds {foreign} parameters of something else: was the model copied since?)" * bool(foreign)
        problems.append(f"lacks {some(map(repr, missing))}, which train{strangers}")
    if frozen:
        problems.append(f"holds {some(map(repr, frozen))}, which are frozen: it was built before the model was wrapped")
    if old := len(held.keys() & set(replaced)):
        problems.append(f"holds {old} weights that are quantised by now: it was built before the model was wrapped")
    if problems:
        raise ValueError(f"the optimizer {'; and it '.join(problems)}; build it from .parameters() after wrapping")
    return foreign
