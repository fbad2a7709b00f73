"""Plain attributes of modules, such as counters and lists of auxiliary losses: kept, and put back."""

from __future__ import annotations

import operator
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable
from typing import Any, NamedTuple

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
        self._modules = list(modules)
        self._before: list[_Attributes | None] = [None] * len(self._modules)
        self._containers: dict[int, tuple[Any, Any]] = {}
        self.tensors: list[Tensor] = []
        """Tensors that are no parameters or buffers, each once."""
        self.objects: list[Any] = []
        """What else was found, one level into containers: generators of random numbers may be among it."""
        self.renew()

    def renew(self) -> None:
        """Keeps what is there now, of the same modules; those with nothing but numbers and strings, which are the same
        ones, are not looked through again."""
        self._empty()
        for number, (module, known) in enumerate(zip(self._modules, self._before, strict=True)):
            if known is None or not known.is_light or known.now is not vars(module) or not _has_same(*known[:2]):
                self._before[number] = self._attributes(vars(module))
        self.tensors = list({id(tensor): tensor for tensor in self.tensors}.values())

    def let_go(self) -> None:
        """Of whatever takes memory; what is left speeds up `renew`, without which nothing can be put back any more."""
        self._empty()
        self._before = [known if known is not None and known.is_light else None for known in self._before]

    def _empty(self) -> None:
        self._containers.clear()
        self.tensors, self.objects = [], []

    def _attributes(self, now: dict[str, Any]) -> _Attributes:
        others = [now[name] for name in sorted(now.keys() - _OF_TORCH) if type(now[name]) not in _COMMON]
        for value in others:
            self._look_at(value)
        return _Attributes(now, now.copy(), is_light=not others)

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
        for known in self._before:
            if known is None or _has_same(known.now, known.before):
                continue  # the usual case
            now, before = known.now, known.before
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


class _Attributes(NamedTuple):
    """Of one module."""

    now: dict[str, Any]
    before: dict[str, Any]
    is_light: bool
    """Whether they are numbers and strings, beside what torch keeps there."""


_NOTHING = object()


def _has_same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether two dictionaries hold the same objects under the same names, in the same order."""
    return (
        len(now) == len(before)
        and all(map(operator.is_, now.values(), before.values()))
        and now.keys() == before.keys()
    )


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
