"""Where a pass was when memory ran out: torch says how much it wanted, and not for which layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import TracebackType

import torch
from torch import nn

from zest_fast.profiling.layers import Layer

_ALLOCATORS = re.compile("can't allocate memory|not enough memory|[Oo]ut of memory")
_WANTED = re.compile(r"tried to allocate ([0-9.]+ ?(?:bytes|[KMGT]i?B))", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch's own error for a GPU, a plain RuntimeError of its allocator for the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return type(error) is RuntimeError and _ALLOCATORS.search(str(error)) is not None


def say_where(error: BaseException, modules: Mapping[str, nn.Module], arrived: Layer | None) -> None:
    """Adds a note to an error of this kind: the layer, the bytes, and what helps.

    modules: of the model, by name. arrived: whose gradient came last; None before the backward pass.
    """
    if not is_out_of_memory(error):
        return
    wanted = _WANTED.search(str(error))
    name = _innermost(error.__traceback__, modules)
    if name is not None:
        place = f"in {name!r}" if name else "in the model's own forward"
    elif arrived is not None:
        place = f"in the backward pass of {arrived.name!r}"
    else:
        place = "outside of any layer"
    error.add_note(
        f"memory ended {place}" + (f", which wanted {wanted[1]} more" if wanted else "") + "; the model is as it was: "
        "take a smaller batch, or checkpoint its blocks"
    )


def _innermost(traceback: TracebackType | None, modules: Mapping[str, nn.Module]) -> str | None:
    """The name of the module whose forward an error came from; None where it came from none."""
    names = {id(module): name for name, module in modules.items()}
    found = None
    while traceback is not None:
        found = names.get(id(traceback.tb_frame.f_locals.get("self")), found)
        traceback = traceback.tb_next
    return found
