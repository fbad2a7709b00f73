"""What was put into a user's model and is taken out again, by `.remove()` or at the end of a `with` block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Self


class Leaving:
    """A handle among others: to remove it is to leave a context that was entered."""

    def __init__(self, context: AbstractContextManager[Any]) -> None:
        self._context = context

    def remove(self) -> None:
        self._context.__exit__(None, None, None)


class Removable(ABC):
    """`with` gives the object itself, and its end removes it, whatever happened inside."""

    @abstractmethod
    def remove(self) -> None:
        """Give back what was found. A second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()
