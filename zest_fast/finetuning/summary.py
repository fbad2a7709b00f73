"""What a SelectiveBackward trains, for people to read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """Counts of parameters (each once, however many modules share it), what trains, and where backward ends.

    cut: the lowest layer that trains. tied: the chosen layer or head whose weight the cut shares; "" if the cut itself
    was chosen. lean: what keeps less for the backward pass, and what stays plain and why; "" without lean saving.
    frozen: what is kept quantised; "" if nothing is. cache: what a PrefixCache holds and has done; "" without one.
    skipped_parameters: of the modules that ran without a graph in the first forward pass; 0 before.
    foreign: parameters of something else in the optimizer that was checked.
    rounding: which weights in bfloat16 or float16 the steps of that optimizer cannot move; "" if they can.
    """

    trainable_parameters: int
    total_parameters: int
    layers: tuple[str, ...]
    head: tuple[str, ...]
    cut: str
    tied: str = ""
    lean: str = ""
    frozen: str = ""
    cache: str = ""
    skipped_parameters: int = 0
    foreign: int = 0
    rounding: str = ""

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
        lines += [f"  {line}" for line in self.lean.splitlines()]
        if self.frozen:
            lines.append(f"  frozen    {self.frozen}")
        if self.cache:
            lines.append(f"  cache     {self.cache}")
        if self.skipped_parameters:
            share = self.skipped_parameters / self.total_parameters
            lines.append(f"  skipped   {self.skipped_parameters:,} parameters below ({share:.2%}) ran without a graph")
        if self.foreign:
            lines.append(f"  optimizer also holds {self.foreign:,} parameters that are not of this model")
        if self.rounding:
            lines.append(f"  rounding  {self.rounding}")
        return "\n".join(lines)
