"""The layers of one profile as arrays: what every feature and prior is computed from. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from zest_fast.foundation.documents import ListOf, Number, Specification, Text, shown
from zest_fast.profiling.layer_profile import LayerProfile

if TYPE_CHECKING:
    import pandas

Shape = tuple[int, ...]
IDENTITY = ("model", "dataset", "seed", "head_state")
"""The columns of records that tell one profile from another."""
_NEEDED: dict[str, Specification] = {
    "kind": Text(1000),
    "depth": Number(0, 2**53),
    "numel": Number(0, 2**53),
    "shape": ListOf(Number(0, 2**53, integer=True), least=2, most=64),
}
"""What is needed of each layer beside its metrics, and what it may be."""


@dataclass(frozen=True)
class Group:
    """The layers of one profile without the head, by depth and then by name: results do not depend on the row order."""

    names: tuple[str, ...]
    kinds: np.ndarray
    """str [layers]"""
    depths: np.ndarray
    """float [layers]: order of first use, 0 = the first, 1 = the last of these layers."""
    numels: np.ndarray
    shapes: tuple[Shape, ...]
    metrics: Mapping[str, np.ndarray]
    """float [layers] each; NaN where undefined."""
    rows: np.ndarray
    """int [layers]: where each layer stands in the caller's table."""
    table_rows: int

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def traits(self) -> Traits:
        return Traits.of(self.kinds, self.depths, self.shapes)

    def in_table(self, values: np.ndarray) -> np.ndarray:
        """[layers, ...] -> [rows of the caller's table, ...]; NaN for the head."""
        table = np.full((self.table_rows, *values.shape[1:]), np.nan)
        table[self.rows] = values
        return table


@dataclass(frozen=True)
class Traits:
    """What layers of different architectures can be compared by; each [layers]."""

    kinds: np.ndarray
    depths: np.ndarray
    widening: np.ndarray
    """log2 of outputs over inputs of the weight: > 0 for an up-projection."""
    kernel_area: np.ndarray
    """log2 of the entries of the kernel: 0 for a linear layer and a 1x1 convolution."""

    @classmethod
    def of(cls, kinds: np.ndarray, depths: np.ndarray, shapes: Iterable[Shape]) -> Traits:
        shapes = list(shapes)
        return cls(
            np.asarray(kinds),
            np.asarray(depths, dtype=np.float64),
            np.array([math.log2(max(1, shape[0]) / max(1, shape[1])) for shape in shapes]),
            np.array([math.log2(max(1, math.prod(shape[2:]))) for shape in shapes]),
        )


def group_of(profile: LayerProfile | pandas.DataFrame | Group) -> Group:
    """The layers of a profile, or of the rows of one profile as `load_records()` and `to_pandas()` give them.

    Raises TypeError for anything else; ValueError where columns lack, where the rows are of several profiles, or where
    no layer is left beside the head.
    """
    if isinstance(profile, Group):
        return profile
    if isinstance(profile, LayerProfile):
        info = [profile.info[name] for name in profile.names]
        columns: dict[str, Sequence[Any]] = {
            key: [row.get(key) for row in info] for key in (*_NEEDED, "head") if any(key in row for row in info)
        }
        metrics = {metric: profile.column(metric) for metric in profile.metrics}
        return _group(profile.names, columns, metrics, "the profile's info")
    if not hasattr(profile, "columns"):
        raise TypeError(f"profile must be a LayerProfile or a DataFrame, not {type(profile).__name__}")
    for key in IDENTITY:
        if key in profile and profile[key].nunique(dropna=False) > 1:
            found = sorted(map(str, profile[key].unique()))[:3]
            raise ValueError(f"the rows are of several profiles ({key}: {', '.join(found)}); pass those of one")
    names = list(profile.get("layer", profile.index))
    columns = {key: profile[key].tolist() for key in (*_NEEDED, "head") if key in profile}
    numeric = profile.select_dtypes("number")
    return _group(names, columns, {str(key): numeric[key].to_numpy(np.float64) for key in numeric}, "the rows")


def _group(
    names: Sequence[str], columns: Mapping[str, Sequence[Any]], metrics: Mapping[str, np.ndarray], source: str
) -> Group:
    missing = [key for key in _NEEDED if key not in columns]
    if missing and len(names):
        raise ValueError(f"{source} lack {', '.join(missing)}, which features need; pass what profile() yields")
    columns = {key: [_plain(value) for value in values] for key, values in columns.items()}
    heads = columns.get("head", [False] * len(names))
    for name, head in zip(names, heads, strict=True):
        if head is not None and head not in (False, True):
            raise ValueError(f"layer {str(name)!r}, head: expected true or false, found {shown(head)}")
    body = [row for row in range(len(names)) if not heads[row]]
    if not body:
        raise ValueError("there is no layer to rank beside the head")
    for row in body:
        for key, specification in _NEEDED.items():
            specification.check(columns[key][row], f"layer {str(names[row])!r} of {source}, {key}")
    body.sort(key=lambda row: (columns["depth"][row], str(names[row])))
    ordered = tuple(str(names[row]) for row in body)
    if len(set(ordered)) != len(ordered):
        twice = next(name for name in ordered if ordered.count(name) > 1)
        raise ValueError(f"layer {twice!r} occurs more than once; pass the rows of one profile")
    rows = np.array(body)
    depths = np.array([columns["depth"][row] for row in body], dtype=np.float64)
    return Group(
        names=ordered,
        kinds=np.array([str(columns["kind"][row]) for row in body]),
        depths=depths / max(1.0, depths.max()),
        numels=np.array([columns["numel"][row] for row in body], dtype=np.float64),
        shapes=tuple(tuple(int(size) for size in columns["shape"][row]) for row in body),
        metrics={metric: np.asarray(values)[rows] for metric, values in metrics.items()},
        rows=rows,
        table_rows=len(names),
    )


def _plain(value: Any) -> Any:
    """NumPy's scalars and arrays, as a table of records holds them, as numbers and lists."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value
