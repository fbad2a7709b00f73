"""ms-swift with only the best layers trainable: a callback of its registry.

A file of two lines, `from zest_fast.integrations.swift import register` and `register(top=5)`, goes to
`swift sft --tuner_type full --external_plugins FILE --callbacks zest`. The folder that swift writes is a model that
from_pretrained loads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from swift.callbacks import TrainerCallback, callbacks_map

from zest_fast.integrations.tool_settings import ToolSettings, read_settings, refuse_conflicts, show_log, warn_untested
from zest_fast.integrations.trainer import ZestCallback, prepared_callback

# What freezes or quantises in swift by other options; of a multimodal model it fills freeze_parameters by itself.
CONFLICTS = (
    "adapters",
    "freeze_parameters_ratio",
    "freeze_parameters_regex",
    "lisa_activated_layers",
    "quant_bits",
    "quant_method",
    "trainable_parameters",
    "trainable_parameters_regex",
    "use_galore",
)


def register(
    *,
    top: int | None = None,
    layers: Iterable[str] | None = None,
    probe: float | Literal["auto"] | None = "auto",
    max_memory: str | int | None = None,
) -> None:
    """Put `zest` into swift's registry of callbacks.

    Args:
        top: how many layers train, the best by the first batch.
        layers: their names, instead.
        probe: as of `prepare`.
        max_memory: the same.

    Raises:
        ValueError: what they cannot be; then and when swift makes its trainer, an option of it that says otherwise what
            trains or how the rest is kept.
    """
    named = None if layers is None else list(layers)
    share = False if probe is None else probe
    keys = {"zest_top": top, "zest_layers": named, "zest_probe": share, "zest_max_memory": max_memory}
    settings = read_settings(keys)
    warn_untested("ms-swift")

    class Zest(ZestSwiftCallback):
        pass

    Zest.settings = settings
    callbacks_map["zest"] = Zest


class ZestSwiftCallback(TrainerCallback):  # type: ignore[misc]
    """Freezes when swift's trainer is made and has no optimizer yet; then does what a ZestCallback does."""

    settings: ToolSettings
    zest: ZestCallback

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        options = {"zest_top": self.settings.top, "zest_layers": self.settings.layers, **vars(args)}
        if (kind := options.get("tuner_type")) != "full":
            raise ValueError(f"--tuner_type {kind} and the callback zest both say what trains: write --tuner_type full")
        multimodal = getattr(getattr(self.trainer, "model_meta", None), "is_multimodal", False)
        refuse_conflicts(options, CONFLICTS if multimodal else (*CONFLICTS, "freeze_parameters"))
        # Where nothing is said swift checkpoints by re-entering autograd, which gives no gradient at the lowest layer.
        args.gradient_checkpointing_kwargs = {
            "use_reentrant": False,
            **(getattr(args, "gradient_checkpointing_kwargs", None) or {}),
        }
        show_log()
        self.zest = prepared_callback(self.trainer, **self.settings.arguments())

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.zest.on_train_begin(*args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.zest.on_train_end(*args, **kwargs)
