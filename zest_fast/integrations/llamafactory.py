"""LLaMA-Factory with only the best layers trainable: `python -m zest_fast.integrations.llamafactory config.yaml`.

Its release has no place for a plugin that sees a trainer, so this is a launcher: the keys `zest_*` of the file are
ours, the others go to LLaMA-Factory's own `run_exp`. The layers are ranked on its data as its `train()` begins. With
several processes, `torchrun --nproc-per-node 2 -m zest_fast.integrations.llamafactory config.yaml`.

The folder that LLaMA-Factory writes is a model that from_pretrained loads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import Trainer

from zest_fast.foundation.nearest import nearest
from zest_fast.integrations.tool_settings import ToolSettings, read_settings, refuse_conflicts, warn_untested

STAGES = ("pt", "sft", "dpo", "kto")  # rm and ppo add a value head and train by other means

# What freezes, adapts or quantises in LLaMA-Factory by other keys, or trains with something else than a Trainer here.
CONFLICTS = (
    "adapter_name_or_path",
    "freeze_extra_modules",
    "freeze_trainable_layers",
    "freeze_trainable_modules",
    "quantization_bit",
    "use_apollo",
    "use_badam",
    "use_galore",
    "use_hyper_parallel",
    "use_kt",
    "use_llama_pro",
    "use_mca",
    "use_megatron_bridge",
    "use_ray",
    "use_unsloth",
)


def train(values: Mapping[str, Any]) -> None:
    """Train by a configuration of LLaMA-Factory that has keys `zest_*` beside its own.

    Args:
        values: as its YAML file holds them.

    Raises:
        ValueError: what `read_settings` refuses; another finetuning_type than full; a stage that trains by other means,
            nothing to train, or another key that says what trains or how the rest is kept.
    """
    settings = read_settings(values)
    refuse_conflicts(values, CONFLICTS)
    kind = values.get("finetuning_type", "lora")
    if kind != "full":
        raise ValueError(
            f"finetuning_type: {kind!r} (lora where it is not there) and zest_* both say what trains: write "
            "finetuning_type: full, of which only the chosen layers train"
        )
    if values.get("stage", "sft") not in STAGES:
        raise ValueError(f"stage: {values['stage']!r} is not trained by its Trainer alone; {nearest('', STAGES)}")
    if not values.get("do_train"):
        raise ValueError("do_train: true is not there, and nothing would train")
    warn_untested("llamafactory")
    from llamafactory.train.tuner import run_exp

    with _prepared_before_training(settings):
        run_exp({key: value for key, value in values.items() if not key.startswith("zest_")})


@contextlib.contextmanager
def _prepared_before_training(settings: ToolSettings) -> Iterator[None]:
    """Whichever Trainer trains within: LLaMA-Factory makes it, and hands it to nobody."""
    train = Trainer.train

    def prepared_train(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        settings.prepare(trainer)
        return train(trainer, *args, **kwargs)

    Trainer.train = prepared_train  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Trainer.train = train  # type: ignore[method-assign]


if __name__ == "__main__":
    from llamafactory.hparams import read_args

    found = read_args()
    if not isinstance(found, Mapping):
        raise SystemExit("usage: python -m zest_fast.integrations.llamafactory config.yaml [key=value ...]")
    train(found)
