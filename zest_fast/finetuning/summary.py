"""What a SelectiveBackward trains, for people to read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """Counts of parameters (each once, however many modules share it), what trains, and where backward ends.

    cut: the lowest layer that trains. tied: the chosen layer or head whose weight the cut shares; "" if the cut itself
    was chosen.
    """

    trainable_parameters: int
    total_parameters: int
    layers: tuple[str, ...]
    head: tuple[str, ...]
    cut: str
    tied: str = ""

    @property
    def share(self) -> float:
        """Trainable parameters as a fraction of all."""
        return self.trainable_parameters / self.total_parameters

    def __str__(self) -> str:
        because = f", which shares its weight with {self.tied}" if self.tied else ""
        lines = [
            f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters train ({self.share:.2%})",
            "  layers    " + ("\n" + " " * 12).join(self.layers or ["none"]),
            "  head      " + ", ".join(self.head or ["none"]),
            f"  backward  ends at {self.cut}{because}",
        ]
        return "\n".join(lines)
