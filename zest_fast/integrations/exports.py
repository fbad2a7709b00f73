"""A choice of layers as a configuration of LLaMA-Factory or axolotl, which selects exactly these layers there.

Both match names their own way: axolotl matches regular expressions at the beginning of parameter names, with a literal
dot; LLaMA-Factory trains whole modules of its first or last blocks, or hands names to PEFT, which takes every module
whose name ends in one. With a `model`, an export is checked against all of its names and refused where it would select
others as well; without, parameters are taken to be called weight and bias.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from zest_fast.finetuning.trainable_layers import chosen_layers, head_modules, layer_names
from zest_fast.foundation.nearest import nearest, some
from zest_fast.ranking.ranking import Ranking

__all__ = ["as_yaml", "axolotl", "axolotl_lora", "llama_factory"]

METHODS = ("lora", "freeze")


def axolotl(
    layers: Ranking | Iterable[str],
    model: nn.Module | None = None,
    *,
    n: int | None = None,
    head: str | Iterable[str] | None = "auto",
) -> dict[str, Any]:
    """`{"unfrozen_parameters": [...]}` for axolotl's YAML, without an `adapter:` there: weight and bias of these train.

    Args:
        layers: names, or a Ranking of which the `n` best are taken.
        model: whose parameters these are; None = names are written as patterns.
        n: how many layers of a Ranking.
        head: trains too, with all its parameters: "auto" = that of a classifier, nothing for a language model (without
            a model and with names only it is not known, and to be named); names; None.

    Returns:
        The settings; `as_yaml` writes them.

    Raises:
        ValueError: no layers, or names that the model does not have.

    Examples:
        >>> from zest_fast.integrations.exports import axolotl
        >>> axolotl(["model.layers.3.mlp.up_proj"])
        {'unfrozen_parameters': ['^model.layers.3.mlp.up_proj.(weight|bias)$']}
    """
    names, whole = selected(layers, n), trained_head(model, layers, head)
    if model is None:
        return {
            "unfrozen_parameters": [
                *(f"^{_literal(name)}.(weight|bias)$" for name in names),
                *(f"^{_literal(name)}." for name in whole),
            ]
        }
    return {
        "unfrozen_parameters": [
            f"^{_literal(name)}$" for name in [*parameter_names(model, names), *_below(model, whole, names)]
        ]
    }


def axolotl_lora(
    layers: Ranking | Iterable[str],
    model: nn.Module | None = None,
    *,
    n: int | None = None,
    r: int = 8,
    head: str | Iterable[str] | None = "auto",
) -> dict[str, Any]:
    """Settings for axolotl's YAML that adapt exactly these layers: `adapter: lora`, with the layers by name.

    Args:
        layers: names, or a Ranking of which the `n` best are taken.
        model: whose layers these are; None = names are written as they are, which PEFT takes for the ends of names.
        n: how many layers of a Ranking.
        r: rank of the adapters, and lora_alpha.
        head: as in `axolotl`; trains whole (lora_modules_to_save).

    Returns:
        The settings; `as_yaml` writes them.

    Raises:
        ValueError: no layers, all of them in the head, or names that the model does not have.

    Examples:
        >>> from zest_fast.integrations.exports import axolotl_lora
        >>> axolotl_lora(["model.layers.3.mlp.up_proj"], r=4)["lora_target_modules"]
        ['model.layers.3.mlp.up_proj']
    """
    whole = trained_head(model, layers, head)
    names = outside_of_head(selected(layers, n), whole)
    others = suffix_matches(model, names) if model is not None else []
    # A text is one regular expression for axolotl and PEFT, and has to match whole names.
    targets: Any = "|".join(map(re.escape, names)) if others else list(names)
    settings = {"adapter": "lora", "lora_r": r, "lora_alpha": r, "lora_target_modules": targets}
    return settings | ({"lora_modules_to_save": list(whole)} if whole else {})


def llama_factory(
    layers: Ranking | Iterable[str],
    model: nn.Module | None = None,
    *,
    n: int | None = None,
    method: str = "lora",
    r: int = 8,
    head: str | Iterable[str] | None = "auto",
) -> dict[str, Any]:
    """Settings for LLaMA-Factory's YAML.

    Args:
        layers: names, or a Ranking of which the `n` best are taken.
        model: whose layers these are; "freeze" needs it.
        n: how many layers of a Ranking.
        method: "lora" = adapters of rank `r` on exactly these layers. "freeze" = train the layers themselves, which
            LLaMA-Factory can say only of whole modules (self_attn, mlp) in its first or last blocks.
        r: rank of the adapters.
        head: as in `axolotl`.

    Returns:
        The settings; `as_yaml` writes them.

    Raises:
        ValueError: no layers, or LLaMA-Factory would train other layers as well; the message names some of them.

    Examples:
        >>> from zest_fast.integrations.exports import llama_factory
        >>> llama_factory(["model.layers.3.mlp.up_proj"], r=4)
        {'finetuning_type': 'lora', 'lora_target': 'model.layers.3.mlp.up_proj', 'lora_rank': 4, 'lora_alpha': 4}
    """
    names, whole = selected(layers, n), trained_head(model, layers, head)
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; {nearest(method, METHODS)}")
    if method == "freeze":
        if model is None:
            raise ValueError("method='freeze' needs model=: its names tell whether whole blocks can say this choice")
        return _frozen_blocks(model, names, whole)
    if model is not None and (others := suffix_matches(model, names)):
        raise ValueError(
            f"lora_target matches the ends of names, so these layers would bring in {some(others)}; "
            "export to PEFT instead, whose configuration can hold a regular expression"
        )
    adapted = outside_of_head(names, whole)
    settings = {"finetuning_type": "lora", "lora_target": ",".join(adapted), "lora_rank": r, "lora_alpha": r}
    return settings | ({"additional_target": ",".join(whole)} if whole else {})


def outside_of_head(names: Sequence[str], whole: Sequence[str]) -> tuple[str, ...]:
    """Those that get an adapter: what trains whole has none."""
    inside = tuple(f"{name}." for name in whole)
    found = tuple(name for name in names if not f"{name}.".startswith(inside))
    if not found:
        raise ValueError(f"layers: all of them are in the head, {some(whole)}, which trains whole; choose others")
    return found


def selected(layers: Ranking | Iterable[str], n: int | None) -> tuple[str, ...]:
    """The names: given, or the n best of a Ranking. Raises as `layer_names`, and ValueError where there are none."""
    names = layer_names(layers, n)
    if not names:
        raise ValueError("layers is empty: nothing would train")
    return names


def trained_head(
    model: nn.Module | None, layers: Ranking | Iterable[str], head: str | Iterable[str] | None
) -> tuple[str, ...]:
    """Names of the modules to train whole beside the layers: see `head_modules`.

    Without a model, "auto" goes by the row that a Ranking knows as the head, unless that is called as those of language
    models are, with the module around it where that is called as the heads of classifiers are. Nothing for names only.
    """
    if model is not None:
        return head_modules(model, head)
    if head != "auto":
        return () if head is None else layer_names([head] if isinstance(head, str) else head, argument="head")
    rows = layers.heads if isinstance(layers, Ranking) else ()
    found = []
    for row in rows:
        parts = row.split(".")
        if parts[-1] in _OF_LANGUAGE_MODELS:
            continue
        while len(parts) > 1 and parts[-2] in _OF_CLASSIFIERS:
            parts.pop()
        found.append(".".join(parts))
    return tuple(found)


_OF_LANGUAGE_MODELS = ("lm_head", "embed_out", "output_projection", "decoder")
_OF_CLASSIFIERS = ("classifier", "classification_head", "score", "head")


def parameter_names(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """Full names of the weights and biases of these layers, in their order, under every name where they are tied."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [
        name for part in chosen_layers(model, layers) for parameter in part.parameters for name in names[id(parameter)]
    ]


def _below(model: nn.Module, modules: Sequence[str], without: Sequence[str]) -> list[str]:
    """Full names of the parameters of these modules that are not among those of the layers `without`."""
    known = set(parameter_names(model, without))
    inside = tuple(f"{name}." for name in modules)
    return [name for name, _ in model.named_parameters() if name.startswith(inside) and name not in known]


def suffix_matches(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """Other modules that PEFT takes for one of these names, because their own name ends in it."""
    chosen_layers(model, layers)  # an unknown name is an error
    ends = tuple(f".{name}" for name in layers)
    return [name for name, _ in model.named_modules() if name.endswith(ends) and name not in layers]


def used_without_a_call(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether the parent of a layer takes its weight and does not call it, so that an adapter around it does nothing.

    nn.MultiheadAttention always does; nn.TransformerEncoderLayer in eval mode without gradients (its fast path).
    """
    parents = nn.MultiheadAttention | nn.TransformerEncoderLayer
    return isinstance(modules.get(name.rpartition(".")[0]), parents)


def as_yaml(settings: Mapping[str, Any]) -> str:
    """The settings as YAML; strings are quoted as in JSON, which is YAML too.

    Args:
        settings: what `axolotl` or `llama_factory` returned.

    Returns:
        The text.

    Raises:
        TypeError: a value that JSON cannot hold.

    Examples:
        >>> from zest_fast.integrations.exports import as_yaml
        >>> print(as_yaml({"lora_rank": 4}), end="")
        lora_rank: 4
    """
    lines: list[str] = []
    for key, value in settings.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"  - {json.dumps(entry)}" for entry in value)]
        else:
            lines.append(f"{key}: {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def _literal(name: str) -> str:
    """As a pattern of axolotl, which escapes the dots by itself."""
    return ".".join(re.escape(part) for part in name.split("."))


def _frozen_blocks(model: nn.Module, layers: Sequence[str], head: Sequence[str]) -> dict[str, Any]:
    """finetuning_type: freeze. Its rule: a parameter trains if its name contains `.BLOCK.MODULE` for one of the first
    or last blocks and one of freeze_trainable_modules, or one of freeze_extra_modules.
    """
    names = [name for name, _ in model.named_parameters()]
    wanted = (set(parameter_names(model, layers)) | set(_below(model, head, layers))) & set(names)
    modules = sorted({found[1] for name in wanted if (found := _IN_A_BLOCK.search(name))})
    extra = sorted({name.split(".")[-2] for name in wanted if not _IN_A_BLOCK.search(name)})
    depth = _depth(model)
    closest: set[str] = set(names)
    for count in range(1, depth + 1) if modules else ():
        for sign, blocks in ((1, range(depth - count, depth)), (-1, range(count))):
            marks = [f".{block}.{module}" for block in blocks for module in modules] + extra
            trained = {name for name in names if any(mark in name for mark in marks)}
            if trained == wanted:
                settings = {
                    "finetuning_type": "freeze",
                    "freeze_trainable_layers": sign * count,
                    "freeze_trainable_modules": ",".join(modules),
                }
                return settings | ({"freeze_extra_modules": ",".join(extra)} if extra else {})
            if wanted < trained and len(trained) < len(closest):
                closest = trained
    raise ValueError(
        "LLaMA-Factory's freeze trains whole modules of the first or last blocks; no setting trains exactly these "
        f"layers, and the closest trains {some(sorted(closest - wanted))} as well; use method='lora', or axolotl"
    )


_IN_A_BLOCK = re.compile(r"\.\d+\.([^.]+)")


def _depth(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    keys = ("num_hidden_layers", "num_layers", "n_layer")  # the ones that LLaMA-Factory looks for
    depth = next((getattr(config, key) for key in keys if getattr(config, key, None)), None)
    if depth is None:
        raise ValueError(f"LLaMA-Factory's freeze needs a model whose configuration has one of {', '.join(keys)}")
    return depth
