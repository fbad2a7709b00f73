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
_INPUTS = {"pixel_values": _IMAGES, "input_ids": _TOKENS}  # by main_input_name


def make_batch(model: nn.Module, setting: Setting) -> Any:
    """A mapping for a model of transformers, a pair (inputs, targets) for any other, of the sizes in `setting`.

    Texts come without padding, hence without a mask. Raises ValueError for a size that is missing or has no place.
    """
    inner = unwrap(model)
    reads = _reads(inner)
    size = _size(inner, setting, reads)
    return _zeros(inner, reads, setting.batch_size, (size, size) if reads == _IMAGES else (size,))


def stand_in_batch(model: nn.Module) -> dict[str, Tensor]:
    """A batch of the paper's size for a model of transformers, where it is: 1 x 512 tokens, or 32 images.

    Raises ValueError for any other model.
    """
    inner: Any = unwrap(model)
    config = getattr(inner, "config", None)
    reads = _INPUTS.get(getattr(inner, "main_input_name", None) or "")
    if config is None or reads is None:
        raise ValueError(f"what {type(model).__name__} takes is not known; pass batch=")
    if reads == _TOKENS:
        batch = _zeros(inner, reads, 1, (min(512, getattr(config, "max_position_embeddings", None) or 512),))
    else:
        size = getattr(config, "image_size", None) or 224
        batch = _zeros(inner, reads, 32, (size, size) if isinstance(size, int) else tuple(size))
    device = next((parameter.device for parameter in model.parameters()), None)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _zeros(model: Any, reads: str, batch: int, size: tuple[int, ...]) -> Any:
    """size: of the sides of an image, or how many tokens."""
    if reads == _IMAGES:
        inputs = torch.zeros(batch, _channels(model), *size, dtype=_float_dtype(model))
    else:
        inputs = torch.zeros(batch, *size, dtype=torch.long)
    if not hasattr(model, "config"):
        targets = inputs if reads == _TOKENS and is_language_model(model) else torch.zeros(batch, dtype=torch.long)
        return inputs, targets
    return {model.main_input_name: inputs, **_labels(model, batch, size[0])}


def cast(batch: Any, dtype: torch.dtype | None) -> Any:
    """The same batch with floating-point inputs in the dtype of the model."""
    return tree_map_only(Tensor, lambda x: x.to(dtype) if dtype and x.is_floating_point() else x, batch)


def _reads(model: nn.Module) -> str:
    name = getattr(model, "main_input_name", None)
    if name is not None:
        if name in _INPUTS:
            return _INPUTS[name]
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
    if not re.search(r"For[A-Z]|LM", kind) and not is_language_model(model):  # a class of the user's own
        return {"labels": torch.zeros(batch, dtype=torch.long)}
    return {"labels": torch.zeros(batch, size, dtype=torch.long)}
