"""Labels of a table: names of classes, numbers to predict, several names a row; refused by name where they are none."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zest_fast.foundation.nearest import nearest, some


def class_names(labels: Sequence[Any]) -> tuple[str, ...]:
    """The classes among `labels`, sorted: integers (also written as text) by value, everything else as text.

    ValueError where a label is a fraction (a target of regression) or a list (several labels at once): these are no
    classes.
    """
    names = set(label_names(labels))
    integers = all(name.removeprefix("-").isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if integers else 0, name)))  # "01" before "1", always


def encode_labels(labels: Sequence[Any], names: Sequence[str] | None = None) -> list[int]:
    """Class ids: the position of each label among `names` (None = the sorted classes of `labels` themselves)."""
    ids = {name: index for index, name in enumerate(names or class_names(labels))}
    found = label_names(labels)
    for unknown in set(found) - set(ids):
        raise ValueError(f"label {unknown!r} is none of the model's classes; {nearest(unknown, ids)}")
    return [ids[name] for name in found]


def label_names(labels: Sequence[Any]) -> list[str]:
    """The labels as names of classes, one each: 1, 1.0 (Parquet of pandas, gaps in integers) and "1.0" (CSV) are "1".

    Text is taken for numbers only where all of it is numbers and one of them has a decimal point.
    """
    texts = [_label_name(label) for label in labels]
    if not any(isinstance(label, str) for label in labels) or not all(map(_NUMBER.fullmatch, texts)):
        return texts
    if not any("." in text or "e" in text.lower() for text in texts):
        return texts
    return [_whole(float(text), text) for text in texts]


_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")


_LIST = re.compile(r"\s*\[(|[^\]]*,.*|\s*[-+.\d]+\s*)\]\s*", re.DOTALL)  # as a CSV file holds one; "[spam]" is a name


def _label_name(label: Any) -> str:
    if isinstance(label, float):
        return _whole(label, str(label))
    if isinstance(label, list | tuple | dict | set) or (isinstance(label, str) and _LIST.fullmatch(label)):
        raise ValueError(
            f"label {shortened(label)} holds several values; one class a row is an integer or a string, several labels "
            "a row are a list (JSONL, Parquet) or columns of 0 and 1, for the task multi-label"
        )
    if not isinstance(label, str | int):
        raise ValueError(f"label {shortened(label)} is a {type(label).__name__}; classes are integers or strings")
    return str(label)


def _whole(number: float, text: str) -> str:
    if not number.is_integer():
        raise ValueError(
            f"label {text} is a fraction, and classes are integers or strings: the task regression predicts numbers "
            "(numbers that are names need a letter: 'v1.5')"
        )
    return str(int(number))


def shortened(label: Any) -> str:
    text = repr(label)
    return text if len(text) <= 60 else f"{text[:57]}..."


def strange_classes(labels: list[str]) -> list[str]:
    """Classes that differ in blanks or capitals alone, and more classes than can be learnt from so many rows."""
    notes = []
    counts = Counter(labels)
    alike: dict[str, list[str]] = {}
    for name in sorted(counts):
        alike.setdefault(name.strip().casefold(), []).append(name)
    if pairs := [" and ".join(map(repr, names)) for names in alike.values() if len(names) > 1]:
        notes.append(f"labels that differ in blanks or capitals alone are classes of their own: {some(pairs)}")
    single = [name for name, count in counts.items() if count == 1]
    if len(single) > len(counts) / 2 and len(counts) > 10:
        notes.append(
            f"{len(single)} of the {len(counts)} classes have a single row: are these labels classes, and in the right "
            "column?"
        )
    return notes


def are_lists(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(value, list) for value in values)


def are_numbers(values: Sequence[Any]) -> bool:
    """Whether all are numbers, also written as text."""
    return all(
        (isinstance(value, int | float) and not isinstance(value, bool))
        or (isinstance(value, str) and _NUMBER.fullmatch(value) is not None)
        for value in values
    )


def have_fractions(values: Sequence[Any]) -> bool:
    """Whether all are numbers and one is not whole: targets of a regression, which are no classes."""
    return are_numbers(values) and any(not float(value).is_integer() for value in values)


def targets_of(values: Sequence[Any], places: Sequence[str], column: str) -> list[float]:
    """Numbers to predict. Raises ValueError that names the row for what is none."""
    for place, value in zip(places, values, strict=True):
        if not are_numbers([value]) or not math.isfinite(float(value)):
            raise ValueError(f"{place}: column {column!r} is {shortened(value)}, and regression needs finite numbers")
    return [float(value) for value in values]


@dataclass(frozen=True)
class LabelSets:
    """Several labels a row: the names of all, sorted or by column, and those of each row."""

    names: tuple[str, ...]
    rows: list[list[str]]

    def encoded(self, names: Sequence[str] | None) -> list[list[float]]:
        """Rows of 0.0 and 1.0, one entry for each of `names` (None = all that occur)."""
        order = {name: index for index, name in enumerate(names or self.names)}
        for unknown in sorted(set(self.names) - set(order)):
            raise ValueError(f"label {unknown!r} is none of the model's; {nearest(unknown, order)}")
        return [[float(name in row) for name in order] for row in map(set, self.rows)]


def sets_of_lists(values: Sequence[Any], places: Sequence[str], column: str) -> LabelSets:
    """Of a column of lists: of names, or of 0 and 1, one for each label, which are then called "0", "1" ...

    Raises ValueError for what is no list of these, and where lists of 0 and 1 could be either.
    """
    for place, value in zip(places, values, strict=True):
        if not isinstance(value, list) or not all(isinstance(entry, str | int) for entry in value):
            raise ValueError(
                f"{place}: column {column!r} is {shortened(value)}, and several labels a row are a list of names, or "
                "of 0 and 1"
            )
    sizes = {len(value) for value in values}
    binary = len(sizes) == 1 and sizes != {0} and all(entry in (0, 1) for value in values for entry in value)
    if binary and all(len(set(value)) == len(value) for value in values):
        raise ValueError(
            f"column {column!r} holds lists of 0 and 1 that may be names of labels or say for each label whether it is "
            "there: write names as text, or each label as a column of 0 and 1"
        )
    if binary:
        count = sizes.pop()
        rows = [[str(index) for index, entry in enumerate(value) if entry] for value in values]
        return LabelSets(tuple(map(str, range(count))), rows)
    rows = [label_names(value) for value in values]
    found = [name for row in rows for name in row]
    if not found:
        raise ValueError(f"column {column!r} has no label in any row")
    return LabelSets(class_names(found), rows)


def sets_of_columns(columns: Mapping[str, Sequence[Any]], places: Sequence[str]) -> LabelSets:
    """Of a column of 0 and 1 for each label. Raises ValueError for anything else in one."""
    rows: list[list[str]] = [[] for _ in places]
    for name, values in columns.items():
        for place, row, value in zip(places, rows, values, strict=True):
            if str(value).strip().lower() not in _FLAGS:
                raise ValueError(
                    f"{place}: column {name!r} is {shortened(value)}, and a column for each label holds 0 and 1 alone"
                )
            row += [name] if _FLAGS[str(value).strip().lower()] else []
    return LabelSets(tuple(columns), rows)


_FLAGS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}
