"""When a step of the training ends, told from the optimizers that take it.

One optimizer, one step. Of several over one model a step ends when all of them that are known have stepped, or when the
next backward pass begins; an optimizer that comes after that, without a backward pass in between, belongs to the step
that ended. Optimizers that step inside of the backward pass end the step with it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch


class Round:
    """The optimizers that have taken the step that runs."""

    def __init__(self) -> None:
        self._known: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._in_backward: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._stepped: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._last: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._first = True
        self.has_begun = False
        """Whether one of them has stepped."""
        self.backward_since = False
        """Whether a backward pass of the model was seen since the step before ended."""
        self.other_since = False
        """The same of backward passes that added to no gradient of the model."""

    def belongs_to_the_last(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a step that an optimizer takes now is a part of the one that has ended."""
        if self.has_begun or self.backward_since or self._first:
            return False
        if self.other_since and optimizer not in self._known:
            return False  # of weights that are new, perhaps
        return optimizer not in self._last or optimizer in self._in_backward

    def has_stepped(self, optimizer: torch.optim.Optimizer) -> bool:
        return optimizer in self._stepped

    @property
    def last_was_seen(self) -> bool:
        """Whether optimizers of torch.optim took the step before, and no backward pass was seen since."""
        return bool(self._last) and not self.backward_since

    def join(self, optimizer: torch.optim.Optimizer | None, *, in_backward: bool = False) -> None:
        """An optimizer has stepped; None = one that is not of torch.optim."""
        self.has_begun = True
        if optimizer is not None:
            self._known.add(optimizer)
            self._stepped.add(optimizer)
            if in_backward:
                self._in_backward.add(optimizer)

    def know(self, optimizer: torch.optim.Optimizer) -> None:
        """It takes part in steps, and has stepped late in this one."""
        self._known.add(optimizer)
        self._last.add(optimizer)

    def is_complete(self, weights: Iterable[torch.Tensor]) -> bool:
        """Whether all have stepped; at first, when none is known, whether those that have hold all these weights."""
        if self._first:
            held = {id(p) for o in self._stepped for group in o.param_groups for p in group["params"]}
            return all(id(weight) in held for weight in weights)
        return all(optimizer in self._stepped for optimizer in self._known)

    def end(self) -> None:
        self._last, self._stepped = self._stepped, weakref.WeakSet()
        self._first = self.has_begun = self.backward_since = self.other_since = False
