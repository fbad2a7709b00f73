"""The README of a delta, an adapter or a merged model: what was trained, how it was chosen, and how to use it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zest_fast.finetuning.delta_files import Delta, read_delta
from zest_fast.foundation.text_table import printable
from zest_fast.foundation.version import __version__
from zest_fast.integrations.exports import as_yaml

if TYPE_CHECKING:
    from zest_fast.integrations.sharing.lora import LoraExport

_MOST_ROWS = 200  # of a table of tensors
_NO_RECIPE = ("model", "record")  # the base, which is named by itself, and the loss of up to 500 steps


def model_card(
    path: str | os.PathLike[str],
    *,
    base: str | None = None,
    title: str | None = None,
    scores: Mapping[str, float] | None = None,
    license: str | None = None,
    adapter: LoraExport | None = None,
    merged: bool = False,
) -> str:
    """The text of a README.md (a model card of the hub) for a delta: what it says of itself, in words and tables.

    Args:
        path: the delta.
        base: the model that it was made on; None = what its recipe says. A folder of this machine is named by its last
            part alone, and only an id of the hub becomes `base_model`.
        title: of the page; None = the name of the file.
        scores: what was measured, such as {"accuracy": 0.875}, for the record.
        license: for the card's metadata, an identifier such as "apache-2.0"; nothing is made up here, and that of the
            base binds what is made of it.
        adapter: what `delta_to_lora` returned: the card is that of the adapter, with ranks and errors.
        merged: the card is that of a whole model into which the delta went.

    Returns:
        Markdown, with the metadata that the hub reads on top.

    Raises:
        ValueError: the file is torn or no delta.

    Examples:
        >>> import torch, zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> with zest_fast.SelectiveBackward(model, ["0"]) as tuned:
        ...     _ = tuned.save("delta.safetensors", recipe={"lr": 1e-3})
        >>> card = zest_fast.model_card("delta.safetensors", base="owner/name", scores={"accuracy": 0.9})
        >>> print(card[card.index("| layer") : card.index("## How the layers")].strip())
        | layer | tensor | shape | dtype |
        | --- | --- | --- | --- |
        | `0` | `bias` | 8 | float32 |
        | `0` | `weight` | 8 x 4 | float32 |
        | `2` | `bias` | 3 | float32 |
        | `2` | `weight` | 3 x 8 | float32 |
    """
    delta = read_delta(path)
    recipe = delta.recipe if isinstance(delta.recipe, dict) else {}
    named = base if base is not None else recipe.get("model")
    hub_id, spoken = _base_name(named)
    parts = [
        _metadata(hub_id, license, adapter, merged),
        f"# {_text(title or Path(path).stem)}",
        _what(delta, spoken, adapter, merged),
        *_trained(delta),
        *([] if adapter is None else _ranks(adapter)),
        *_chosen(delta.ranking),
        *_recipe({key: value for key, value in recipe.items() if key not in _NO_RECIPE}),
        *_scores(scores),
        *_use(Path(path).name, spoken, adapter, merged),
    ]
    return "\n\n".join(parts) + "\n"


def _base_name(named: Any) -> tuple[str | None, str]:
    """An id of the hub, where it is one, and how to call the base: no folder of this machine gets out."""
    if not isinstance(named, str) or not named:
        return None, "its base model"
    parts = named.split("/")
    is_path = Path(named).exists() or os.path.isabs(named) or named.startswith((".", "~")) or ":" in named
    if is_path or len(parts) > 2 or "\\" in named:
        return None, _code(Path(named).name)
    return named, _code(named)


def _metadata(hub_id: str | None, license: str | None, adapter: LoraExport | None, merged: bool) -> str:
    said: dict[str, Any] = {"library_name": "transformers" if merged else "zest_fast" if adapter is None else "peft"}
    if license is not None:
        said["license"] = license
    if hub_id is not None:
        said |= {"base_model": hub_id, "base_model_relation": "finetune" if adapter is None else "adapter"}
    said["tags"] = ["zest_fast", "sparse-fine-tuning", *(["lora"] if adapter is not None else [])]
    return f"---\n{as_yaml(said)}---"


def _what(delta: Delta, base: str, adapter: LoraExport | None, merged: bool) -> str:
    layers = _count(len(delta.layers), "layer")
    head = f" and the head ({', '.join(map(_code, delta.head))})" if delta.head else ""
    trained = f"{layers}{head} of {base} trained, by zest_fast {__version__}; everything else was frozen."
    if adapter is not None:
        return (
            f"{trained} This is a LoRA adapter of what they learned: products of low rank, with a relative Frobenius "
            f"error of {adapter.error:.3g} over all adapted weights."
        )
    if merged:
        return f"{trained} This is the whole model: what is not in the table below is bit for bit the base's."
    return (
        f"{trained} This is a delta: the trained tensors alone, whole and exact to the bit. It fits that base and "
        "refuses every other one."
    )


def _trained(delta: Delta) -> list[str]:
    tensors = {**delta.parameters, **delta.buffers}
    count = sum(tensor.numel() for tensor in delta.parameters.values())
    size = sum(tensor.nbytes for tensor in tensors.values())
    rows = ["| layer | tensor | shape | dtype |", "| --- | --- | --- | --- |"]
    for name, tensor in list(tensors.items())[:_MOST_ROWS]:
        owner, _, own = name.rpartition(".")
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        kind = str(tensor.dtype).removeprefix("torch.")
        rows.append(f"| {_code(owner)} | {_code(own)} | {shape} | {kind} |")
    more = [f"and {len(tensors) - _MOST_ROWS} more"] if len(tensors) > _MOST_ROWS else []
    names = f" Outputs: {', '.join(map(_code, delta.class_names))}." if delta.class_names else ""
    lead = f"{_count(count, 'parameter')} in {_count(len(tensors), 'tensor')}, {size / 2**20:,.2f} MiB.{names}"
    return ["## What was trained", lead, "\n".join(rows), *more]


def _ranks(adapter: LoraExport) -> list[str]:
    rows = ["| layer | rank | of | relative error |", "| --- | ---: | ---: | ---: |"]
    rows += [f"| {_code(one.name)} | {one.rank} | {one.full_rank} | {one.error:.3g} |" for one in adapter.layers]
    whole = [f"Saved whole, and exact: {', '.join(map(_code, adapter.whole))}."] if adapter.whole else []
    return ["## Ranks and errors", "\n".join(rows), *whole]


def _chosen(ranking: Any) -> list[str]:
    head = "## How the layers were chosen"
    if not isinstance(ranking, dict):
        return [head, "The delta does not say: they were named, or saved without a ranking."]
    text = f"By a ranking: {_text(str(ranking.get('by')))}."
    if ranking.get("note"):
        text += f" It said of itself: {_text(str(ranking['note']))}"
    return [head, text]


def _recipe(recipe: Mapping[str, Any]) -> list[str]:
    rows = [f"| {_text(key)} | {_text(str(value))} |" for key, value in recipe.items() if value is not None]
    return ["## Recipe", "\n".join(["| | |", "| --- | --- |", *rows])] if rows else []


def _scores(scores: Mapping[str, float] | None) -> list[str]:
    rows = [f"| {_text(key)} | {value:.4g} |" for key, value in (scores or {}).items()]
    return ["## Scores", "\n".join(["| what | value |", "| --- | ---: |", *rows])] if rows else []


def _use(file: str, base: str, adapter: LoraExport | None, merged: bool) -> list[str]:
    if adapter is not None:
        code = (
            "from peft import PeftModel\n\n"
            "model = PeftModel.from_pretrained(base, FOLDER_OR_ID)  # base: the model above, loaded"
        )
    elif merged:
        code = (
            "from transformers import AutoModel  # or the class for its task\n\nmodel = AutoModel.from_pretrained(ID)"
        )
    else:
        code = f'import zest_fast\n\nzest_fast.apply_delta(base, "{file}")  # base: the model above, loaded'
    return ["## How to use it", f"```python\n{code}\n```"]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _text(text: str) -> str:
    """As words of Markdown and of a table's cell; what a file of somebody else says is no markup."""
    plain = printable(text)
    for mark in "\\`*_[]<>|#":
        plain = plain.replace(mark, f"\\{mark}")
    return plain


def _code(text: str) -> str:
    return f"`{printable(text).replace('`', chr(39)).replace('|', '/')}`"
