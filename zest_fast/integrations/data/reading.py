"""What reading gives before it is split and shuffled: the samples of each part, and what makes batches of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zest_fast.integrations.data.tables import Table


@dataclass(frozen=True)
class Samples:
    """Samples of the part that trains, and what makes batches of them. validation: empty where it is split off."""

    train: Any
    collate: Callable[[list[Any]], Any]
    taken: str
    notes: tuple[str, ...] = ()
    validation: Any = ()


def parts_of(data: Any) -> list[Any]:
    return [data] if data.validation is None else [data, data.validation]


def second(parts: Sequence[Any]) -> Any:
    return parts[1] if len(parts) > 1 else ()


def texts_of(data: Table, column: str) -> list[str]:
    """A column as texts; ValueError, naming the row, for lists, blanks and what is no text."""
    values = data.column(column)
    for place, value in zip(data.places, values, strict=True):
        if not isinstance(value, str | int | float):
            raise ValueError(
                f"{data.path}, {place}: column {column!r} holds a {type(value).__name__}, not a text; name the column "
                "of texts, or join its parts into one"
            )
        if isinstance(value, str) and not value.strip():
            raise ValueError(f"{data.path}, {place}: column {column!r} is empty")
    return [str(value) for value in values]
