"""A plugin of axolotl: rank the layers on its own data, and train only the best.

    plugins: [zest_fast.integrations.axolotl.ZestPlugin]
    zest_top: 5

The folder that axolotl writes is a model that from_pretrained loads.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, model_validator

from zest_fast.integrations.tool_settings import read_settings, refuse_conflicts, warn_untested

# What freezes, adapts, merges or quantises in axolotl by other keys.
CONFLICTS = (
    "adapter",
    "lora_model_dir",
    "unfrozen_parameters",
    "freeze_mm_modules",
    "lisa_n_layers",
    "relora",
    "spectrum_top_fraction",
    "load_in_4bit",
    "load_in_8bit",
    "gptq",
    "quantization",
    "qat",
    "model_quantization_config",
)


class ZestArgs(BaseModel):
    """The keys of the plugin: see `ToolSettings`.

    Raises:
        ValueError: what they cannot be, and another key of axolotl that says what trains or how the rest is kept.
    """

    zest_top: int | None = None
    zest_layers: list[str] | None = None
    zest_probe: bool | float | str | None = None  # auto
    zest_max_memory: str | int | None = None

    @model_validator(mode="before")
    @classmethod
    def check_zest(cls, data: Any) -> Any:
        """Before axolotl loads anything."""
        read_settings(data)
        refuse_conflicts(data, CONFLICTS)
        return data


class ZestPlugin(BasePlugin):  # type: ignore[misc]
    """Freezes all but the chosen layers when axolotl has made its trainer, which has no optimizer yet."""

    def register(self, cfg: Any) -> None:
        """As the configuration is read."""
        warn_untested("axolotl")

    def get_input_args(self) -> str:
        """Where axolotl finds the keys."""
        return "zest_fast.integrations.axolotl.ZestArgs"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Rank, freeze, and verify when training ends: see `zest_fast.integrations.trainer.prepare`."""
        refuse_conflicts(cfg, CONFLICTS)  # once more: other plugins write into the configuration
        read_settings(cfg).prepare(trainer)
