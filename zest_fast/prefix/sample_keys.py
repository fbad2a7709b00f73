"""Which samples a call of a model is about: its arguments, row by row, and a digest of each row."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_map

from zest_fast.prefix.activation_files import DIGEST
from zest_fast.prefix.boundaries import order_of
from zest_fast.prefix.inputs import take

_OF_THE_LOSS = ("num_items_in_batch",)
"""Arguments by which a loss is divided and that change from batch to batch: nothing below the cut reads them."""


@dataclass(frozen=True)
class Samples:
    """The arguments of one call: tensors whose first dimension is that of the samples, and all else."""

    args: tuple[Any, ...]
    keywords: Mapping[str, Any]
    count: int
    shared: str
    """Digest of all else, and of the shapes of a sample: what two calls must have in common to be compared."""

    @classmethod
    def of(cls, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Samples | str:
        """Or why they cannot be told apart."""
        leaves, structure = _leaves(args, keywords)
        count = next((leaf.shape[0] for _, leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), None)
        if not count:
            return "the batch is empty" if count == 0 else "no argument is a tensor with a dimension of samples"
        state = hashlib.blake2b(structure.encode(), digest_size=DIGEST)
        for name, leaf in leaves:
            if isinstance(leaf, Tensor):
                if leaf.requires_grad:
                    return f"{name!r} requires a gradient"
                if leaf.layout != torch.strided or leaf.is_nested or leaf.is_meta:
                    return f"{name!r} is a tensor of layout {leaf.layout}"
                rows = leaf.dim() > 0 and leaf.shape[0] == count
                state.update(f"{name}|{leaf.dtype}|{tuple(leaf.shape[rows:])}|{leaf.device.type}|".encode())
                if not rows:
                    state.update(_plain_bytes(leaf))
            elif leaf is None or isinstance(leaf, bool | int | float | str):
                state.update(f"{name}|{leaf!r}|".encode())
            else:
                return f"{name!r} is a {type(leaf).__name__}"
        return cls(args, keywords, count, state.hexdigest())

    @cached_property
    def digests(self) -> list[bytes]:
        """Of each sample: the bytes of its rows in all arguments, as they lie in memory. An image in channels_last is
        another sample than the same one that is contiguous: neither is copied to be hashed."""
        rows = [leaf for _, leaf in _leaves(self.args, self.keywords)[0] if self._has_rows(leaf)]
        orders, views = zip(*map(_by_memory, rows), strict=True)
        dense = [(contents, len(contents) // self.count) for contents in map(_plain_bytes, views)]
        head, found = str(orders).encode(), []
        for row in range(self.count):
            state = hashlib.sha256(head)  # with the instructions that CPUs have for it twice as fast as blake2b
            for contents, size in dense:
                state.update(contents[row * size : (row + 1) * size])
            found.append(state.digest()[:DIGEST])
        return found

    def take(self, rows: Tensor) -> Samples:
        """Some of the samples."""

        def of(leaf: Any) -> Any:
            return take(leaf, rows) if self._has_rows(leaf) else leaf

        return Samples(tree_map(of, self.args), tree_map(of, dict(self.keywords)), len(rows), self.shared)

    def few(self, count: int) -> Samples:
        """So many of them at most, different ones first."""
        if self.count <= count:
            return self
        different = {digest: row for row, digest in reversed(list(enumerate(self.digests)))}.values()
        rows = [*sorted(different), *sorted(set(range(self.count)).difference(different))]
        return self.take(torch.tensor(sorted(rows[:count])))

    def _has_rows(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == self.count


def _leaves(args: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[list[tuple[str, Any]], str]:
    """All arguments but those of the loss, with where they are, and how they are nested."""
    counted = {name: value for name, value in keywords.items() if name not in _OF_THE_LOSS}
    found, structure = tree_flatten_with_path((args, dict(sorted(counted.items()))))
    return [("".join(map(str, path[1:])) or "0", leaf) for path, leaf in found], str(structure)


def _by_memory(leaf: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """The order of its dimensions in memory, and the tensor in it; its own where samples do not lie one by one."""
    order = order_of(leaf)
    dense = leaf.detach().permute(order)
    return (order, dense) if order[0] == 0 and dense.is_contiguous() else (tuple(range(leaf.dim())), leaf)


def _plain_bytes(tensor: Tensor) -> memoryview:
    dense = tensor.detach().cpu().contiguous()
    return dense.view(-1).view(torch.uint8).numpy().data if dense.numel() else memoryview(b"")
