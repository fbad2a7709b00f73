"""A choice of layers as a LoRA configuration of PEFT: low-rank adapters on exactly these layers (LoRA + ZEST)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft import LoraConfig
from torch import nn

from zest_fast.finetuning.trainable_layers import head_layers
from zest_fast.integrations.exports import selected, suffix_matches
from zest_fast.profiling.heads import is_language_model
from zest_fast.profiling.layers import is_transformers_conv1d
from zest_fast.profiling.nearest import some
from zest_fast.ranking.ranking import Ranking

_ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def lora_config(
    layers: Ranking | Iterable[str],
    model: nn.Module,
    *,
    n: int | None = None,
    r: int = 8,
    ranks: Mapping[str, int] | None = None,
    head: str | Iterable[str] | None = "auto",
    **options: Any,
) -> LoraConfig:
    """A `LoraConfig` for `get_peft_model(model, ...)` that adapts exactly these layers.

    layers: names, or a Ranking of which the `n` best are taken.
    ranks: for some of the layers another rank than `r`.
    head: trained whole (PEFT's modules_to_save), as in SelectiveBackward: "auto" = that of a classifier, nothing for a
        language model; names; None.
    options: further arguments of LoraConfig; lora_alpha is `r` where not given.

    Raises ValueError for a layer that the model does not have or PEFT cannot adapt.
    """
    names = selected(layers, n)
    others = suffix_matches(model, names)
    unfit = [name for name in names if not _adaptable(dict(model.named_modules()).get(name))]
    if unfit:
        raise ValueError(f"layers: LoRA adapts Linear, Conv and Embedding, not {some(unfit)}; leave out what it cannot")
    if unknown := set(ranks or ()) - set(names):
        raise ValueError(f"ranks names layers that are not among the chosen ones: {some(sorted(unknown))}")
    whole = [part.name for part in head_layers(model, head)]
    if is_language_model(model):
        options.setdefault("task_type", "CAUSAL_LM")
    return LoraConfig(
        r=r,
        # PEFT takes a list for the ends of names; where another module ends the same, only a whole match tells.
        target_modules="|".join(map(re.escape, names)) if others else list(names),
        rank_pattern={f"^{re.escape(name)}": rank for name, rank in (ranks or {}).items()},
        modules_to_save=whole or None,
        **{"lora_alpha": r, **options},
    )


def _adaptable(module: nn.Module | None) -> bool:
    return isinstance(module, _ADAPTABLE) or (module is not None and is_transformers_conv1d(module))
