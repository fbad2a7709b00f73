"""What a SelectiveBackward trains, for people to read."""

from __future__ import annotations

from dataclasses import dataclass

from zest_fast.foundation.html_parts import html_table


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
        lines = [self._title()]
        for what, said in self._rows():
            first, *more = said.splitlines() or [""]
            lines += [f"  {what:<9} {first}", *(" " * 12 + line for line in more)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """For notebooks: the same as a table."""
        return html_table(["", ""], self._rows(), left=2, caption=self._title())

    def _title(self) -> str:
        return f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters train ({self.share:.2%})"

    def _rows(self) -> list[tuple[str, str]]:
        """What is to be said, and of what."""
        because = f", which shares its weight with {self.tied}" if self.tied else ""
        rows = [
            ("layers", "\n".join(self.layers or ["none"])),
            ("head", ", ".join(self.head or ["none"])),
            ("backward", f"ends at {self.cut}{because}"),
        ]
        if self.lean:
            rows.append(("lean", "\n".join(line.strip() for line in self.lean.removeprefix("lean: ").splitlines())))
        rows += [(what, said) for what, said in (("frozen", self.frozen), ("cache", self.cache)) if said]
        if self.skipped_parameters:
            share = self.skipped_parameters / self.total_parameters
            rows.append(("skipped", f"{self.skipped_parameters:,} parameters below ({share:.2%}) ran without a graph"))
        if self.foreign:
            rows.append(("optimizer", f"also holds {self.foreign:,} parameters that are not of this model"))
        return [*rows, ("rounding", self.rounding)] if self.rounding else rows
