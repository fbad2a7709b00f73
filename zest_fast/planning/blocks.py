"""Where a model repeats itself: its blocks, what stands before and after them, and layers moved from block to block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from zest_fast.profiling.heads import find_head
from zest_fast.profiling.layers import find_layers

GROUPS = ("embeddings", "blocks", "head")


@dataclass(frozen=True)
class Layout:
    """Names of modules. blocks: in order; empty where nothing repeats. head: None where none can be told."""

    blocks: tuple[str, ...]
    head: str | None
    order: tuple[str, ...]  #: every module
    layers: tuple[str, ...]  #: every layer, embeddings included
    embeddings: frozenset[str]

    def group(self, module: str) -> str:
        """One of GROUPS: what is in no block counts to the embeddings before them and to the head after them."""
        if module in self.embeddings:
            return "embeddings"
        if self.head is not None and f"{module}.".startswith(f"{self.head}."):
            return "head"
        if not self.blocks or self.block_of(module) is not None or any(_inside(block, module) for block in self.blocks):
            return "blocks"
        before = module not in self.order or self.order.index(module) < self.order.index(self.blocks[0])
        return "embeddings" if before else "head"

    def block_of(self, name: str) -> int | None:
        """The number of the block that a module or layer is in."""
        return next((number for number, block in enumerate(self.blocks) if _inside(name, block)), None)

    def stand_ins(self, count: int, lowest: int) -> tuple[str, ...]:
        """`count` layers from block `lowest` on, evenly over what is there: for a plan before the layers are chosen."""
        above = self._above(lowest)
        if not 1 <= count <= len(above):
            raise ValueError(f"layers={count}: there are {len(above)} layers from block {lowest} on")
        if count == 1:
            return (above[0],)
        return tuple(above[round(place * (len(above) - 1) / (count - 1))] for place in range(count))

    def _above(self, lowest: int) -> list[str]:
        rows = [name for name in self.layers if name not in self.embeddings and name != self.head]
        if not self.blocks:
            return rows
        if not 0 <= lowest < len(self.blocks):
            raise ValueError(f"lowest block {lowest}: the model has blocks 0 to {len(self.blocks) - 1}")
        return [name for name in rows if (self.block_of(name) or 0) >= lowest and self.block_of(name) is not None]

    def moved(self, layers: Sequence[str], lowest: int) -> tuple[str, ...]:
        """The same layers with the lowest of them in block `lowest`, the others closer together or further apart.

        Raises ValueError where the blocks from there on have no room for them.
        """
        places = {name: self.block_of(name) for name in layers}
        numbers = [number for number in places.values() if number is not None]
        if not numbers:
            return tuple(layers)
        old, last = min(numbers), len(self.blocks) - 1
        taken: list[str] = []
        for name, number in sorted(places.items(), key=lambda place: (place[1] is None, place[1])):
            if number is None:
                taken.append(name)
                continue
            wanted = lowest + round((number - old) * (last - lowest) / max(last - old, 1))
            taken.append(self._free_place(name, number, wanted, lowest, taken))
        return tuple(taken)

    def _free_place(self, name: str, number: int, wanted: int, lowest: int, taken: Sequence[str]) -> str:
        """The layer of the same name in the block nearest to `wanted` that is not taken."""
        tail = name[len(self.blocks[number]) :]
        for block in sorted(range(lowest, len(self.blocks)), key=lambda block: abs(block - wanted)):
            candidate = self.blocks[block] + tail
            if candidate in self.layers and candidate not in taken:
                return candidate
        raise ValueError(f"layers: {name!r} has no place left from block {lowest} on")


def layout_of(model: nn.Module) -> Layout:
    rows = find_layers(dict(model.named_modules()))
    names = tuple(layer.name for layer in rows)
    return Layout(
        blocks=_blocks(model),
        head=_head(model, names),
        order=tuple(name for name, _ in model.named_modules()),
        layers=names,
        embeddings=frozenset(layer.name for layer in rows if layer.is_embedding),
    )


def _blocks(model: nn.Module) -> tuple[str, ...]:
    """The class of modules with several weights whose instances hold the most parameters, the more instances the
    better: decoder layers, residual blocks. No list of architectures.
    """
    instances: dict[type, list[str]] = {}
    sizes: dict[type, int] = {}
    for name, module in model.named_modules():
        kind = type(module)
        nested = any(_inside(name, other) for other in instances.get(kind, ()))
        if nested or sum(p.dim() > 1 for p in module.parameters()) < 2 or not name:
            continue
        instances.setdefault(kind, []).append(name)
        sizes[kind] = sizes.get(kind, 0) + sum(p.numel() for p in module.parameters())
    repeated = [kind for kind, names in instances.items() if len(names) > 1]
    if not repeated:
        return ()
    best = max(repeated, key=lambda kind: (sizes[kind], len(instances[kind])))
    return tuple(instances[best])


def _head(model: nn.Module, layers: Sequence[str]) -> str | None:
    try:
        return find_head(model) or None
    except ValueError:
        return layers[-1] if layers else None


def _inside(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")
