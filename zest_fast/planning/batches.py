"""An example batch for a model: contents do not matter, shapes and dtypes do."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from zest_fast.planning.settings import Setting
from zest_fast.profiling.heads import is_language_model, unwrap

_IMAGES, _TOKENS = "images", "tokens"


def make_batch(model: nn.Module, setting: Setting) -> Any:
    """A mapping for a model of transformers, a pair (inputs, targets) for any other, of the sizes in `setting`.

    Texts come without padding, hence without a mask. Raises ValueError for a size that is missing or has no place.
    """
    inner = unwrap(model)
    reads = _reads(inner)
    size = _size(inner, setting, reads)
    batch = setting.batch_size
    if reads == _IMAGES:
        inputs = torch.zeros(batch, _channels(inner), size, size, dtype=_float_dtype(inner))
    else:
        inputs = torch.zeros(batch, size, dtype=torch.long)
    if not hasattr(inner, "config"):
        targets = inputs if reads == _TOKENS and is_language_model(inner) else torch.zeros(batch, dtype=torch.long)
        return inputs, targets
    return {inner.main_input_name: inputs, **_labels(inner, batch, size)}


def cast(batch: Any, dtype: torch.dtype | None) -> Any:
    """The same batch with floating-point inputs in the dtype of the model."""
    return tree_map_only(Tensor, lambda x: x.to(dtype) if dtype and x.is_floating_point() else x, batch)


def _reads(model: nn.Module) -> str:
    name = getattr(model, "main_input_name", None)
    if name is not None:
        if name in ("pixel_values", "input_ids"):
            return _IMAGES if name == "pixel_values" else _TOKENS
        raise ValueError(f"a plan makes batches of images or tokens, and {type(model).__name__} reads {name!r}")
    first = next((m for m in model.modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))), None)
    if isinstance(first, nn.Conv2d):
        return _IMAGES
    if isinstance(first, nn.Embedding):
        return _TOKENS
    raise ValueError(
        f"cannot tell what {type(model).__name__} reads: its first layer is neither an nn.Conv2d (images) nor an "
        "nn.Embedding (tokens); pass an example batch to zest_fast.planned_peak"
    )


def _size(model: nn.Module, setting: Setting, reads: str) -> int:
    needed, other = ("image_size", "sequence_length") if reads == _IMAGES else ("sequence_length", "image_size")
    size = getattr(setting, needed)
    if size is None:
        made_for = getattr(getattr(model, "config", None), "image_size", None) if reads == _IMAGES else None
        hint = f" (the configuration was made for {made_for})" if made_for else ""
        raise ValueError(f"{needed} is needed: {type(model).__name__} reads {reads}; pass {needed}={hint}")
    if getattr(setting, other) is not None:
        raise ValueError(f"{other} has no meaning for {type(model).__name__}, which reads {reads}; leave it out")
    most = _positions(model) if reads == _TOKENS else None
    if most is not None and size > most:
        raise ValueError(f"sequence_length={size}: {type(model).__name__} has {most} positions")
    return int(size)


def _positions(model: nn.Module) -> int | None:
    """How many positions a model has learned an embedding for; None where they are computed."""
    tables = [m for n, m in model.named_modules() if isinstance(m, nn.Embedding) and re.search(r"position|wpe", n)]
    return getattr(getattr(model, "config", None), "max_position_embeddings", None) if tables else None


def _channels(model: nn.Module) -> int:
    if hasattr(model, "config"):
        return int(getattr(model.config, "num_channels", 3))
    return next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels


def _float_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _labels(model: Any, batch: int, size: int) -> dict[str, Tensor]:
    kind = type(model).__name__
    if "QuestionAnswering" in kind:
        return {name: torch.zeros(batch, dtype=torch.long) for name in ("start_positions", "end_positions")}
    if re.search(r"For\w*Classification", kind) and "TokenClassification" not in kind:
        whole = model.config.num_labels > 1  # one output is a regression
        return {"labels": torch.zeros(batch, dtype=torch.long if whole else _float_dtype(model))}
    return {"labels": torch.zeros(batch, size, dtype=torch.long)}
