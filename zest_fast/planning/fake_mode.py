"""Fake tensors on which a model runs as it would on real ones.

torch's meta kernels refuse what the real ones do, and transformers takes fake tensors for a trace: it then builds masks
in full that a real step, which looks at their values, leaves out (with grouped-query attention keys and values are
repeated for them as well).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from zest_fast.foundation.torch_private import FakeTensor, FakeTensorMode

_GROUPED = getattr(getattr(torch.ops.aten, "_grouped_mm", None), "default", None)
_MASKS = "transformers.masking_utils"
_PACKED = "find_packed_sequence_indices"
_IGNORE = ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa")


class FakeMode(FakeTensorMode):
    """torch's, with tensors that a model keeps outside of its buffers taking part as they are."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _GROUPED and any(x.dtype != torch.bfloat16 for x in args[:2]):
            return _grouped_product(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs or {})


def _grouped_product(a: Tensor, b: Tensor, offsets: Any = None, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """Experts' matrix products: the meta kernel knows bfloat16 only, which sets no size of the result."""
    low = [x.to(torch.bfloat16) for x in (a, b)]
    return torch.ops.aten._grouped_mm.default(*low, offsets, bias).to(out_dtype or a.dtype)


@contextmanager
def masks_as_in_a_real_step(batch: Any) -> Iterator[None]:
    """Let transformers leave out the masks that mask nothing of this batch: of texts in one piece, without padding.

    batch: what the model gets, before its tensors are fake; one without values counts as padded.
    """
    try:
        masks = importlib.import_module(_MASKS)
    except ImportError:  # without transformers, or with one that has no such file
        yield
        return
    inputs = batch if isinstance(batch, Mapping) else {}
    stand_ins: dict[str, Callable[..., Any]] = {}
    if inputs.get("position_ids") is None and hasattr(masks, _PACKED):
        stand_ins[_PACKED] = lambda position_ids: None
    if _masks_nothing(inputs.get("attention_mask")):
        stand_ins |= {name: _without_padding(getattr(masks, name)) for name in _IGNORE if hasattr(masks, name)}
    found = {name: getattr(masks, name) for name in stand_ins}
    vars(masks).update(stand_ins)
    try:
        yield
    finally:
        vars(masks).update(found)


def _masks_nothing(mask: Any) -> bool:
    if not isinstance(mask, Tensor):
        return mask is None
    return mask.device.type != "meta" and type(mask) is not FakeTensor and bool((mask == 1).all())


def _without_padding(original: Callable[..., Any]) -> Callable[..., Any]:
    def ignore(padding_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        return original(None, *args, **kwargs)

    return ignore
