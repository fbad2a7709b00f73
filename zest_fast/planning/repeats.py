"""Which blocks of a model are alike, so that a dry run has to go through a few of them only.

Blocks in a row are alike where nothing tells one from the next but its number: class, attributes, shapes, dtypes,
strides, what trains, modes and hooks. Whatever cannot be compared counts as different. The number itself may be there
(`layer_idx`), as long as nobody computes with it: `BlockNumber` refuses that.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.foundation.torch_private import gradient_hooks, post_accumulate_hooks
from zest_fast.planning.blocks import Layout
from zest_fast.planning.settings import Setting

Path = tuple[str, str]  # of an attribute: the module in its block, and its name

_PLAIN = (str, float, bool, type(None), bytes, torch.dtype, torch.device)
_CONTENTS = ("_parameters", "_buffers", "_modules")
_OF_TORCH = {*vars(nn.Module()), "forward"} - {"training"}


class Unlike(Exception):
    """Blocks that look alike are not: the dry run has to go through all of them."""


class BlockNumber:
    """In the place of a block's number, an attribute of it. Whoever looks at it or computes with it is refused.

    It is no int: of one, lists and ranges ask nothing that could be refused.
    """

    def _asked(self, *others: object) -> Any:
        raise Unlike("a block asks for its number")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = __bool__ = _asked
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __rmod__ = _asked
    __floordiv__ = __rfloordiv__ = __truediv__ = __rtruediv__ = __divmod__ = __rdivmod__ = __pow__ = __rpow__ = _asked
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __lshift__ = __rlshift__ = _asked
    __rshift__ = __rrshift__ = __neg__ = __pos__ = __abs__ = __invert__ = _asked
    __int__ = __float__ = __complex__ = __index__ = __round__ = __trunc__ = __floor__ = __ceil__ = _asked
    __str__ = __repr__ = __format__ = __getattr__ = _asked
    __class__ = property(_asked)  # isinstance asks for it


@dataclass(frozen=True)
class Run:
    """Blocks in a row that are alike. blocks: their places in `Layout.blocks`. traced: the first, the last and, in one
    run of each kind, the one after the first, which all that are skipped are copies of. like: the place of that one.
    numbers: the attributes that hold the number of the block.
    """

    blocks: range
    traced: tuple[int, ...]
    like: int
    numbers: frozenset[Path]

    @property
    def skipped(self) -> range:
        return range(self.traced[-2] + 1, self.traced[-1])


def runs_of(model: nn.Module, layout: Layout, setting: Setting) -> tuple[Run, ...]:
    """The runs in which at least one block can be skipped; none where that saves nothing or is not certain."""
    blocks = [model.get_submodule(name) for name in layout.blocks]
    if len(blocks) < 4 or not isinstance(setting.optimizer, str) or _share(model, blocks):
        return ()
    trained = _trained(model, layout, setting)
    cut = min((place for place, tails in enumerate(trained) if tails), default=-1)  # backward ends in it
    alone = {cut}
    alone |= {place for name in _heads(layout, setting) if (place := layout.block_of(name)) is not None}
    runs: list[Run] = []
    start = 0
    while start < len(blocks):
        stop, numbers = start + 1, None
        while stop < len(blocks) and _follows(layout.blocks[stop], layout.blocks[start], stop - start):
            if {start, stop} & alone or trained[stop] != trained[start]:
                break
            found = differences(blocks[start], blocks[stop], stop - start)
            if found is None or (numbers is not None and found != numbers):
                break
            numbers, stop = found, stop + 1
        if numbers is not None:
            run = _run(runs, blocks, trained, cut, range(start, stop), numbers)
            runs += [run] if run is not None else []
        start = stop
    return tuple(runs)


def _run(
    earlier: list[Run],
    blocks: list[nn.Module],
    trained: list[frozenset[str]],
    cut: int,
    places: range,
    numbers: frozenset[Path],
) -> Run | None:
    """The run of these blocks, if any of them can be skipped."""
    first, last = places[0], places[-1]
    for other in earlier:
        like = other.blocks[0]
        same = trained[like] == trained[first] and (like < cut) == (first < cut) and numbers == other.numbers
        if same and differences(blocks[like], blocks[first], first - like) == numbers:
            return Run(places, (first, last), other.like, numbers) if len(places) > 2 else None
    return Run(places, (first, first + 1, last), first + 1, numbers) if len(places) > 3 else None


def _trained(model: nn.Module, layout: Layout, setting: Setting) -> list[frozenset[str]]:
    """What trains in each block, by the name within it."""
    if setting.layers is None or setting.layers == "all":
        everything = setting.layers == "all"
        names = [name for name, p in model.named_parameters() if everything or p.requires_grad]
    else:
        names = list(setting.layers)
    tails: list[set[str]] = [set() for _ in layout.blocks]
    for name in names:
        place = layout.block_of(name)
        if place is not None:
            tails[place].add(name[len(layout.blocks[place]) :])
    return [frozenset(found) for found in tails]


def _heads(layout: Layout, setting: Setting) -> list[str]:
    said = [] if setting.head is None else [setting.head] if isinstance(setting.head, str) else list(setting.head)
    return [*said, *([layout.head] if layout.head else [])]


def _follows(name: str, first: str, distance: int) -> bool:
    """Whether a block is `distance` places behind another one in the same list."""
    (parent, _, number), (of_first, _, its) = name.rpartition("."), first.rpartition(".")
    return parent == of_first and number.isdecimal() and its.isdecimal() and int(number) == int(its) + distance


def _share(model: nn.Module, blocks: list[nn.Module]) -> bool:
    """Whether a module or tensor of a block is used in a second place, too."""
    everywhere: Counter[int] = Counter()
    for _, module in model.named_modules(remove_duplicate=False):
        everywhere.update([id(module), *(id(tensor) for tensor in _tensors(module))])
    return any(
        everywhere[id(x)] > 1 for block in blocks for module in block.modules() for x in (module, *_tensors(module))
    )


def _tensors(module: nn.Module) -> list[Tensor]:
    return [x for x in (*module._parameters.values(), *module._buffers.values()) if x is not None]


def differences(one: nn.Module, other: nn.Module, distance: int) -> frozenset[Path] | None:
    """Where `other`, `distance` places behind `one`, has another number; None where something else differs."""
    numbers: set[Path] = set()
    ours, theirs = list(one.named_modules()), list(other.named_modules())
    if [name for name, _ in ours] != [name for name, _ in theirs]:
        return None
    for (name, a), (_, b) in zip(ours, theirs, strict=True):
        if type(a) is not type(b) or vars(a).keys() != vars(b).keys():
            return None
        if not all(map(_same_tensors, (a._parameters, a._buffers), (b._parameters, b._buffers))):
            return None
        for attribute, x in vars(a).items():
            y = vars(b)[attribute]
            if attribute in _CONTENTS or _same(x, y):
                continue
            if type(x) is not int or type(y) is not int or y - x != distance:
                return None
            numbers.add((name, attribute))
    return frozenset(numbers)


def _same_tensors(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> bool:
    return ours.keys() == theirs.keys() and all(
        (a is None and b is None) or (a is not None and b is not None and _described(a) == _described(b))
        for a, b in zip(ours.values(), theirs.values(), strict=True)
    )


def _described(x: Tensor) -> tuple[Any, ...]:
    hooks = (gradient_hooks(x), post_accumulate_hooks(x))
    return type(x), x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.is_leaf, *map(bool, hooks), vars_of(x)


def vars_of(x: Tensor) -> tuple[Any, ...]:
    """What was written onto a tensor: by name, plain values as they are and others by identity."""
    return tuple((name, value if type(value) in _PLAIN else id(value)) for name, value in sorted(vars(x).items()))


def _same(x: Any, y: Any) -> bool:
    """Whether two attributes are the same object, or the same in plain values and containers of them."""
    if x is y:
        return True
    if type(x) is not type(y):
        return False
    if isinstance(x, _PLAIN) or type(x) is int:
        return bool(x == y)
    if isinstance(x, list | tuple):
        return len(x) == len(y) and all(map(_same, x, y))
    if isinstance(x, dict):
        return list(x) == list(y) and all(map(_same, x.values(), y.values()))
    if isinstance(x, set | frozenset):
        return all(isinstance(entry, _PLAIN) or type(entry) is int for entry in x) and bool(x == y)
    return False


def state_of(block: nn.Module, numbers: Iterable[Path]) -> list[Any]:
    """What a block may go by now, but for its numbers: plain values of its modules, of objects that they hold, of their
    classes and of the files that these are from, in which some keep count.
    """
    held = [
        (name, attribute, _values(value))
        for name, module in block.named_modules()
        for attribute, value in vars(module).items()
        if attribute not in _OF_TORCH and (name, attribute) not in numbers
    ]
    kinds = dict.fromkeys(kind for module in block.modules() for kind in type(module).__mro__)
    own = [kind for kind in kinds if kind.__module__.partition(".")[0] not in ("builtins", "torch")]
    files = [sys.modules[name] for name in dict.fromkeys(kind.__module__ for kind in own) if name in sys.modules]
    return held + [
        _values(value, within=True)
        for place in (*own, *files)
        for name, value in vars(place).items()
        if not name.startswith("__")
    ]


def _values(x: Any, within: bool = False) -> Any:
    """A copy that compares by value; None for what has no plain value."""
    if type(x) is int or isinstance(x, _PLAIN):
        return type(x), x
    if isinstance(x, list | tuple):
        return [_values(entry, within) for entry in x]
    if isinstance(x, dict):
        return [(_values(key, within), _values(entry, within)) for key, entry in x.items()]
    if within or isinstance(x, nn.Module | Tensor | type) or callable(x) or not hasattr(x, "__dict__"):
        return None
    return _values(vars(x), within=True)  # a configuration, or what blocks keep count in
