"""A choice of layers as a LoRA configuration of PEFT: low-rank adapters on exactly these layers (LoRA + ZEST)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft import LoraConfig
from torch import nn

from zest_fast.foundation.nearest import some
from zest_fast.integrations.exports import selected, suffix_matches, trained_head
from zest_fast.profiling.heads import is_language_model
from zest_fast.profiling.layers import is_transformers_conv1d
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

    Args:
        layers: names, or a Ranking of which the `n` best are taken.
        model: to adapt.
        n: how many layers of a Ranking.
        r: rank of the adapters.
        ranks: for some of the layers another rank than `r`.
        head: trained whole (PEFT's modules_to_save): "auto" = that of a classifier, of one of transformers all that it
            has beside its base model; nothing for a language model; names; None. Layers inside of it get no adapter.
        **options: further arguments of LoraConfig; lora_alpha is `r` where not given.

    Returns:
        The configuration.

    Raises:
        ValueError: a layer that the model does not have or PEFT cannot adapt.
    """
    whole = trained_head(model, layers, head)
    inside = tuple(f"{name}." for name in whole)
    names = tuple(name for name in selected(layers, n) if not f"{name}.".startswith(inside))
    if not names:
        raise ValueError(f"layers: all of them are in the head, {some(whole)}, which trains whole; choose others")
    others = suffix_matches(model, names)
    unfit = [name for name in names if not _adaptable(dict(model.named_modules()).get(name))]
    if unfit:
        raise ValueError(f"layers: LoRA adapts Linear, Conv and Embedding, not {some(unfit)}; leave out what it cannot")
    if unknown := set(ranks or ()) - set(names):
        raise ValueError(f"ranks names layers that are not among the chosen ones: {some(sorted(unknown))}")
    if more := _ends_alike(model, whole):
        raise ValueError(
            f"head: PEFT takes modules_to_save for the ends of names, so {some(whole)} would bring in {some(more)}, "
            "which would train too; name another head=, or add them to it"
        )
    if is_language_model(model):
        options.setdefault("task_type", "CAUSAL_LM")
    return LoraConfig(
        r=r,
        # PEFT takes a list for the ends of names; where another module ends the same, only a whole match tells.
        target_modules="|".join(map(re.escape, names)) if others else list(names),
        rank_pattern={f"^{re.escape(name)}": rank for name, rank in (ranks or {}).items()},
        modules_to_save=list(whole) or None,
        **{"lora_alpha": r, **options},
    )


def _ends_alike(model: nn.Module, whole: Sequence[str]) -> list[str]:
    """Other modules that PEFT takes for one of these names, with parameters and not inside of them."""
    inside = tuple(f"{name}." for name in whole)
    return [
        name
        for name, module in model.named_modules()
        if name.endswith(tuple(whole)) and not f"{name}.".startswith(inside) and any(True for _ in module.parameters())
    ]


def _adaptable(module: nn.Module | None) -> bool:
    return isinstance(module, _ADAPTABLE) or (module is not None and is_transformers_conv1d(module))
