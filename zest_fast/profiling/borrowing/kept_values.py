"""The values of a model's parameters, kept without a second copy of a large model.

Small models are copied as a whole. Of a large one, a tensor is copied at the moment at which something is about to
write into its memory: ``CopyOnWrite`` sees every operator of a forward pass and which of its arguments it writes, by
whatever alias (``.data``, ``detach``, a view, ``_foreach``, ``out=``). Version numbers would not do: they say that a
value is gone when it is gone, and ``.data`` escapes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from zest_fast.foundation.torch_private import neg_view, storage_key
from zest_fast.kernels.storage import has_storage
from zest_fast.profiling.processes.local import local_part

COPIED_BYTES = 4 << 20
"""Up to this size of all tensors, copying them costs less than watching every operator."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class KeptValues:
    """Values of tensors as they are now. A tensor that gets another storage (``p.data = ...``) gets its own back."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = [_Kept(tensor) for tensor in tensors]
        watched = [kept for kept in self._tensors if kept.storage]
        self.everything = sum(kept.values.nbytes for kept in watched) <= COPIED_BYTES
        """Whether there is a copy of every tensor, so that nothing has to be watched."""
        self._by_storage: dict[int, list[_Kept]] = {}
        self._copies: list[tuple[list[_Kept], Tensor]] = []
        if self.everything:
            groups: dict[tuple[torch.device, torch.dtype], list[_Kept]] = {}
            for kept in watched:
                groups.setdefault((kept.values.device, _as_integers(kept.values).dtype), []).append(kept)
            self._copies = [(group, _joined(group)) for group in groups.values()]
        else:
            for kept in watched:
                self._by_storage.setdefault(kept.storage, []).append(kept)

    def about_to_write(self, tensor: Tensor) -> None:
        """Copies what lies in the storage of this tensor, once."""
        if self._by_storage:
            group = self._by_storage.pop(storage_of(tensor), None)
            for kept in group or ():  # one by one: they may be of several types
                kept.saved = True
                self._copies.append(([kept], _joined([kept])))

    def ignore_writes(self, counts: Mapping[int, int]) -> None:
        """Takes back so many writes into tensors (by id), since they met other values than these."""
        for kept in self._tensors:
            kept.version += counts.get(id(kept.tensor), 0)

    def restore(self) -> None:
        """Puts storages and values back, and writes to nothing that is as it was."""
        for kept in self._tensors:
            kept.put_back()
        for group, copy in self._copies:
            if not torch.equal(_joined(group), copy):
                parts = copy.split([_as_integers(kept.values).numel() for kept in group])
                for kept, part in zip(group, parts, strict=True):
                    kept.write(part)

    @property
    def lost(self) -> list[Tensor]:
        """Tensors that were written in place without a copy."""
        if self.everything:
            return []
        return [kept.tensor for kept in self._tensors if not kept.saved and kept.tensor._version != kept.version]


class _Kept:
    """One tensor, and its values by an alias of its own (which holds on to the storage)."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.values, self.version = tensor, tensor.data, tensor._version
        self._identity = storage_of(tensor)
        plain = type(tensor) is nn.Parameter and tensor.layout == torch.strided  # whose storage was checked before
        self.storage = self._identity if (plain or has_storage(tensor)) and tensor.numel() else 0
        self.saved = False

    def put_back(self) -> None:
        now = self.tensor
        if storage_of(now) != self._identity or now.shape != self.values.shape:
            now.data = self.values

    def write(self, integers: Tensor) -> None:
        values = _as_integers(self.values)
        integers = integers.view(values.shape)
        if torch.equal(values, integers):
            return
        for dim, stride in enumerate(values.stride()):  # entries that an expanded tensor repeats are written once
            if stride == 0 and values.shape[dim] > 1:
                values, integers = values.narrow(dim, 0, 1), integers.narrow(dim, 0, 1)
        values.copy_(integers)


class CopyOnWrite(TorchDispatchMode):
    """Has tensors copied before an operator writes into their storage."""

    supports_higher_order_operators = True

    def __init__(self, levels: Iterable[KeptValues]) -> None:
        super().__init__()
        self._levels = list(levels)
        self.written: set[int] = set()
        """Storages that were written into, by ``storage_of``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = _written.get(func)
        if written is None:
            written = _written[func] = _written_arguments(func)
        for position, name in written:
            argument = args[position] if position < len(args) else kwargs.get(name)
            for tensor in argument if isinstance(argument, list | tuple) else (argument,):
                if isinstance(tensor, Tensor):
                    part = local_part(tensor)
                    self.written.add(storage_of(part))
                    for level in self._levels:
                        level.about_to_write(part)
        return func(*args, **kwargs)


_written: dict[Any, tuple[tuple[int, str], ...]] = {}


def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an operator writes into, by its schema; none of an operator without."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return ()
    return tuple(
        (i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write
    )


def _joined(group: list[_Kept]) -> Tensor:
    """A copy of the bits of all values, one after another."""
    return torch.cat([_as_integers(kept.values).reshape(-1) for kept in group])


def _as_integers(x: Tensor) -> Tensor:
    """The bits: a comparison of floats takes -0.0 for 0.0 and NaN for different from itself."""
    if x.is_neg():
        x = neg_view(x)  # the same memory without the bit
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    return x.view(_INTEGERS[x.element_size()])


def storage_of(x: Tensor) -> int:
    """A number for the storage, whatever address it has; 0 of a tensor that has none."""
    try:
        return storage_key(x.untyped_storage())
    except RuntimeError:
        return 0
