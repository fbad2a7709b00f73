"""Plain attributes of modules, such as counters and lists of auxiliary losses: kept, and put back."""

from __future__ import annotations

import operator
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), Tensor, torch.dtype, torch.device, torch.Size)
_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict, Counter)
_COMMON = frozenset({bool, int, float, str, type(None)})
_LONGEST = 4096  # entries of a container that is kept: a table of that many is no state of a forward
_OF_TORCH = frozenset(vars(nn.Module()))


class KeptAttributes:
    """What modules hold in ``__dict__`` beside what torch keeps there, as it is now.

    Numbers, strings, None, tensors (by identity) and tuples of such are put back, containers get their entries back,
    and what was not there goes. Other objects stay as they are: what they mean is not known.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._before: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._containers: dict[int, tuple[Any, Any]] = {}
        self.tensors: list[Tensor] = []
        """Tensors that are no parameters or buffers, each once."""
        self.objects: list[Any] = []
        """What else was found, one level into containers: generators of random numbers may be among it."""
        for module in modules:
            attributes = vars(module)
            self._before.append((attributes, attributes.copy()))
            for name in sorted(attributes.keys() - _OF_TORCH):
                value = attributes[name]
                if type(value) not in _COMMON:
                    self._look_at(value)
        self.tensors = list({id(tensor): tensor for tensor in self.tensors}.values())

    def _look_at(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self.tensors.append(value)
        elif type(value) in _CONTAINERS and len(value) <= _LONGEST:
            self._containers[id(value)] = value, value.copy()
            entries = value.values() if isinstance(value, dict) else value
            self.objects.extend(entry for entry in entries if not isinstance(entry, _PLAIN))
        elif not isinstance(value, _PLAIN):
            self.objects.append(value)

    def restore(self) -> None:
        """Puts back what has changed."""
        for now, before in self._before:
            if (
                len(now) == len(before)
                and all(map(operator.is_, now.values(), before.values()))
                and now.keys() == before.keys()
            ):
                continue  # the usual case: the same keys in the same order
            changed = [name for name, value in before.items() if now.get(name, _NOTHING) is not value]
            for name in changed:
                if name not in _OF_TORCH and _is_plain(before[name]):
                    now[name] = before[name]
            if len(now) > len(before):
                for name in [name for name, value in now.items() if name not in before and _is_plain(value)]:
                    del now[name]
        for container, entries in self._containers.values():
            if not _same(container, entries):
                container.clear()
                container.extend(entries) if isinstance(container, list | deque) else container.update(entries)


_NOTHING = object()


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (type(value) is tuple and all(map(_is_plain, value)))


def _same(now: Any, before: Any) -> bool:
    """Whether two containers hold the same objects (an == of tensors would be a tensor)."""
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return all(now.get(key, _NOTHING) is value for key, value in before.items())
    if isinstance(now, set):
        return now == before
    return all(a is b for a, b in zip(now, before, strict=True))
