"""Whether something can run, as a value that holds the reason where it cannot."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Availability:
    """True where it can run; else ``reason`` says why not and what to do about it."""

    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason


AVAILABLE = Availability()
