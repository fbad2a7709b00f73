"""Names the chosen weights that the first backward pass did not reach."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn


class FirstBackward:
    """Watches for the gradients of the first backward pass; its hooks are gone with the first `check()` after that."""

    def __init__(self, chosen: Mapping[str, nn.Parameter]) -> None:
        self._waiting = dict.fromkeys(chosen)
        self._chosen = len(chosen)
        self._handles = [
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, name))
            for name, parameter in chosen.items()
        ]

    @property
    def has_come(self) -> bool:
        return len(self._waiting) < self._chosen

    def check(self) -> None:
        """Warn of the weights that got no gradient, once, if there was a backward pass."""
        if not self._handles or not self.has_come:
            return
        self.remove()
        if self._waiting:
            missed = ", ".join(map(repr, self._waiting))
            warnings.warn(
                f"the first backward pass brought no gradient to {missed}: not on the path of this loss; choose other "
                "layers, unless other batches take another path",
                stacklevel=6,
            )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _arrived(self, name: str, parameter: Tensor) -> None:
        self._waiting.pop(name, None)
