"""What LightGBM's `Booster.model_to_string` gives, read into trees of our own.

The text of a file never reaches LightGBM: its parser trusts what it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from zest_fast.foundation.documents import shown
from zest_fast.ranking.trees import LARGEST, MOST_TREES, Tree

_CATEGORICAL, _DEFAULT_LEFT, _MISSING_SHIFT, _MOST_DECISION = 1, 2, 2, 0b1111


def trees_from_text(text: str, features: Sequence[str]) -> tuple[Tree, ...]:
    """The trees of a model of one output over columns named `features`.

    Raises ValueError, naming the tree and the key, for anything else: categorical splits, linear leaves, averages.
    """
    head, *blocks = text.split("\nTree=")
    if not head.startswith("tree\n"):
        raise ValueError("expected the text of LightGBM's model_to_string")
    keys = _keys(head)
    wanted = {"num_class": "1", "num_tree_per_iteration": "1", "feature_names": " ".join(features)}
    for key, value in wanted.items():
        if keys.get(key) != value:
            raise ValueError(f"{key}: expected {shown(value)}, found {shown(keys.get(key))}")
    if "average_output" in head.split("\n"):
        raise ValueError("average_output: trees that are averaged are not read")
    if len(blocks) > MOST_TREES:
        raise ValueError(f"expected at most {MOST_TREES} trees, found {len(blocks)}")
    if "\nend of trees" not in text:
        raise ValueError("expected 'end of trees' behind the last tree; the text is torn")
    return tuple(_tree(number, block, len(features)) for number, block in enumerate(blocks))


def _tree(number: int, block: str, features: int) -> Tree:
    first, _, rest = block.partition("\n")
    try:
        if first != str(number):
            raise ValueError(f"expected the number {number}, found {shown(first)}")
        keys = _keys(rest.partition("\nend of trees")[0])
        for key in ("num_cat", "is_linear"):
            if keys.get(key, "0") != "0":
                raise ValueError(f"{key}: expected 0, found {shown(keys[key])}")
        decisions = _numbers(keys, "decision_type", int)
        if ((decisions & ~_MOST_DECISION) != 0).any() or ((decisions >> _MISSING_SHIFT) > 2).any():
            raise ValueError("decision_type: expected splits by a number")
        if (decisions & _CATEGORICAL).any():
            raise ValueError("decision_type: expected splits by a number, found one by a category")
        values = _numbers(keys, "leaf_value", float)
        counts = _numbers(keys, "leaf_count", int)
        if len(values) == 1:
            counts = np.ones(1, dtype=np.int64)  # a tree that found no split does not count its rows
        if _numbers(keys, "num_leaves", int).tolist() != [len(values)]:
            raise ValueError(f"num_leaves: expected {len(values)}, found {shown(keys.get('num_leaves'))}")
        columns = _numbers(keys, "split_feature", int)
        if (columns >= features).any():
            raise ValueError(f"split_feature: expected columns below {features}, found {int(columns.max())}")
        return Tree(
            features=columns,
            thresholds=np.clip(_numbers(keys, "threshold", float), -LARGEST, LARGEST),  # inf where only NaN goes right
            missing=decisions >> _MISSING_SHIFT,
            default_left=(decisions & _DEFAULT_LEFT) != 0,
            left=_numbers(keys, "left_child", int),
            right=_numbers(keys, "right_child", int),
            values=values,
            counts=counts,
        )
    except ValueError as error:
        raise ValueError(f"tree {number}, {error}") from error


def _keys(text: str) -> dict[str, str]:
    return {key: value for key, equals, value in (line.partition("=") for line in text.split("\n")) if equals}


def _numbers(keys: dict[str, str], key: str, kind: Callable[[str], Any]) -> np.ndarray:
    if key not in keys:
        raise ValueError(f"{key}: it is not there")
    try:
        found = [kind(word) for word in keys[key].split()]
        return np.array(found, dtype=np.int64 if kind is int else np.float64)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{key}: expected numbers, found {shown(keys[key])}") from error
