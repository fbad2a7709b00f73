"""A callback of Lightning: `Trainer(callbacks=[ZestFinetuning(ranking, n=5, module="model", delta="my.safetensors")])`.

Freezes before `configure_optimizers`, checks the optimizers when the fit begins, and verifies when it ends. Lightning
saves no folder of transformers: the delta is one with `zest-fast merge`, or call save_pretrained on the inner model.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback
from torch import nn

from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.finetuning.trainable_layers import layer_names
from zest_fast.integrations.tool_settings import warn_untested
from zest_fast.profiling.profile import profile
from zest_fast.ranking.ranking import Ranking, rank

_log = logging.getLogger("zest_fast")


class ZestFinetuning(Callback):  # type: ignore[misc]
    """Train only these layers of a LightningModule, and the head.

    Args:
        layers: names as in a profile of the `module`, a Ranking of which the `n` best are taken, or how many: then
            `batch` is profiled and ranked.
        n: how many layers of a Ranking.
        module: the attribute of the LightningModule that is the model ("model"); "" = the LightningModule itself.
        batch: where `layers` is how many, as of `zest_fast.profile`.
        delta: where to write what trained when the fit ends.
        **options: others of SelectiveBackward, such as `head`.

    Attributes:
        tuned: the SelectiveBackward since the fit began; `tuned.remove()` gives the model back.

    Raises:
        ValueError: layers or a module that are not there; when the fit begins, an optimizer that lacks what trains or
            holds what is frozen: give it `filter(lambda p: p.requires_grad, self.parameters())`.
    """

    def __init__(
        self,
        layers: int | Ranking | Iterable[str],
        *,
        n: int | None = None,
        module: str = "",
        batch: Any = None,
        delta: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        if isinstance(layers, int) and (batch is None or isinstance(layers, bool)):
            raise ValueError(f"layers={layers!r} needs batch=, by which the layers are ranked; or name them")
        self.layers: Any = layers if isinstance(layers, int) else layer_names(layers, n)
        self.module, self.batch, self.delta, self.options = module, batch, delta, options
        self.tuned: SelectiveBackward | None = None
        warn_untested("lightning")

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Before the optimizers are made."""
        if stage != "fit" or self.tuned is not None:
            return
        try:
            model = pl_module.get_submodule(self.module)
        except AttributeError as error:
            raise ValueError(f"module={self.module!r}: {error}") from error
        names = self.layers
        if isinstance(names, int):
            names = rank(profile(model, self.batch)).top(names)
        self.tuned = SelectiveBackward(model, names, **self.options)
        _log.info("%s", self.tuned.summary())

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """The optimizers are there: does each hold what trains, and nothing that is frozen?"""
        assert self.tuned is not None
        for optimizer in trainer.optimizers:
            self.tuned.summary(optimizer)

    def on_fit_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """What moved and what did not, in the log: a warning, since an error would throw the trained model away."""
        if self.tuned is None or not trainer.global_step or not trainer.is_global_zero:
            return
        try:
            _log.info("%s", self.tuned.verify())
        except RuntimeError as error:
            _log.warning("%s", error)
        if self.delta is not None:
            self.tuned.save(self.delta)
