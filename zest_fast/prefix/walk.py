"""The modules of a model, walked anew only where one was put in the place of another: a step asks for them often."""

from __future__ import annotations

from torch import nn


class Walk:
    """Of one model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._walk()

    @property
    def modules(self) -> list[nn.Module]:
        """Those of `model.modules()`, each once."""
        if not all(
            module._modules is held and [*held.values()] == children
            for module, held, children in zip(self._modules, self._held, self._children, strict=True)
        ):
            self._walk()
        return self._modules

    def _walk(self) -> None:
        self._modules = list(self._model.modules())
        self._held = [module._modules for module in self._modules]
        self._children = [[*held.values()] for held in self._held]
