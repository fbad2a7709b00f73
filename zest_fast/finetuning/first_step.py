"""The first step of a user's own loop: which optimizer it is, and whether most of the step was rounded away."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from zest_fast.finetuning.rounding import lost_steps
from zest_fast.foundation.torch_private import FakeTensor

_MOST = 0.5  # of the weights: `summary(optimizer)` and `verify()` speak of fewer, too


class FirstStep:
    """Waits for the first step of an optimizer that holds one of the chosen weights.

    chosen: gives them by name. met: is called with the optimizer. Both are methods of one object, which is held weakly:
    a model that nobody has any more is not kept. told: whether nothing is to be said any more.
    """

    _all: ClassVar[list[FirstStep]] = []

    def __init__(self, chosen: Callable[[], Mapping[str, nn.Parameter]], met: Callable[[Any], None]) -> None:
        for other in list(self._all):  # of models that are gone: inside of a step no hook can be taken out
            if other._chosen is None or other._chosen() is None:
                other.remove()
        self.told = False
        self._met = False
        self._chosen: Any = weakref.WeakMethod(chosen)
        self._meet: Any = weakref.WeakMethod(met)
        self._handle: Any = register_optimizer_step_post_hook(self._stepped)
        self._all.append(self)

    def remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            self._all.remove(self)

    def _stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._met or self._chosen() is None:
            return
        chosen = self._chosen()()
        own = {id(parameter) for parameter in chosen.values()}
        held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in own]
        if not held or any(isinstance(parameter, FakeTensor) for parameter in held):
            return
        self._met = True
        self._meet()(optimizer)
        lost = None if self.told else lost_steps(optimizer, chosen)
        if lost is not None and lost.share >= _MOST:
            warnings.warn(f"the first step: {lost}", stacklevel=4)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model has no optimizer yet, and waits for none."""
        return {"told": True, "_met": True, "_chosen": None, "_meet": None, "_handle": None}
