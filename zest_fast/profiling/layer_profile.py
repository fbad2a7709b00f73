"""The table that one profile yields: a row for each layer, a column for each metric. NumPy only.

pandas, pyarrow and matplotlib are imported by the methods that need them, torch by none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zest_fast.foundation.nearest import nearest
from zest_fast.foundation.text_table import number, printable, shorten, text_table

if TYPE_CHECKING:
    import pandas

LEADING_METRICS = ("snip", "fisher", "rgn", "grad_norm")  # what repr shows where it is there


class LayerRow(Mapping[str, float]):
    """The metrics of one layer, read-only: metric -> float."""

    def __init__(self, layer: str, metrics: Sequence[str], values: np.ndarray) -> None:
        self._layer = layer
        self._values = dict(zip(metrics, values.tolist(), strict=True))

    def __getitem__(self, metric: str) -> float:
        try:
            return self._values[metric]
        except (KeyError, TypeError):
            raise KeyError(f"layer {self._layer!r} has no metric {metric!r}; {nearest(metric, self._values)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        values = ", ".join(f"{metric} {number(value)}" for metric, value in self._values.items())
        return printable(f"{self._layer}: {values}")


@dataclass(frozen=True)
class Spread:
    """How the metrics of a profile differ between the batches of which it is the mean; read-only arrays.

    batches: how many there were. deviations: float64 [layers, metrics], standard deviation over the batches in which a
    metric is defined, divided by n - 1; NaN below two of them. counts: int64 [layers, metrics], how many these are.
    """

    batches: int
    deviations: np.ndarray
    counts: np.ndarray

    def __post_init__(self) -> None:
        for array in (self.deviations, self.counts):
            array.setflags(write=False)


class LayerProfile:
    """Metrics of every layer of a model for one mini-batch (definitions: `zest_fast.profiling.metrics`), or their means
    over several.

    Looks up like a mapping from layer name to row: `profile["layer"]["snip"]`, `len(profile)`, `for name in profile`.

    Args:
        names: layers, one a row.
        metrics: columns.
        values: float64 [layers, metrics]; copied, and read-only here.
        info: for each layer what is no metric: numel, kind, depth, uses, shape, head, ...
        loss: of the batch.
        backend: the kernels that computed the values.
        uncovered: parameter name -> why it has no row.
        spread: of values that are means over batches, how these differ; None of one batch.

    Attributes:
        names: list of str.
        metrics: list of str.
        values: see above, as info, loss, backend, uncovered and spread.

    Raises:
        ValueError: these do not fit together.
        TypeError: names or metrics that are no strings.

    Examples:
        >>> import torch, zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> profile = zest_fast.profile(model, (torch.randn(6, 4), torch.randint(3, (6,))))
        >>> profile.names
        ['0', '2']
        >>> profile["0"]["snip"] == profile.values[0, profile.metrics.index("snip")].item()
        True
        >>> profile.save("profile.json").name
        'profile.json'
        >>> zest_fast.LayerProfile.load("profile.json").to_pandas().equals(profile.to_pandas())
        True
    """

    def __init__(
        self,
        names: Sequence[str],
        metrics: Sequence[str],
        values: np.ndarray,
        *,
        info: Mapping[str, Mapping[str, Any]],
        loss: float,
        backend: str,
        uncovered: Mapping[str, str],
        spread: Spread | None = None,
    ) -> None:
        self.names = _unique("names", names)
        self.metrics = _unique("metrics", metrics)
        self.values = np.array(values, dtype=np.float64)  # a copy: what the caller does to its own must not reach us
        if self.values.shape != (len(self.names), len(self.metrics)):
            raise ValueError(
                f"values has shape {list(self.values.shape)}, but there are {len(self.names)} names "
                f"and {len(self.metrics)} metrics"
            )
        self.values.setflags(write=False)
        if set(info) != set(self.names):
            odd = sorted(set(info) ^ set(self.names))
            raise ValueError(f"info needs one entry for each layer of names and no other; differing: {odd[:5]}")
        self.info = {name: dict(info[name]) for name in self.names}
        self.loss = float(loss)
        self.backend = str(backend)
        self.uncovered = dict(uncovered)
        for what in ("deviations", "counts") if spread is not None else ():
            if (shape := getattr(spread, what).shape) != self.values.shape:
                raise ValueError(f"spread.{what} has shape {list(shape)}, and values {list(self.values.shape)}")
        self.spread = spread
        self._row = {name: row for row, name in enumerate(self.names)}

    def __getitem__(self, layer: str) -> LayerRow:
        if layer not in self:
            raise KeyError(f"the profile has no layer {layer!r}; {nearest(layer, self.names)}")
        return LayerRow(layer, self.metrics, self.values[self._row[layer]])

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, str) and layer in self._row

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def column(self, metric: str) -> np.ndarray:
        """One metric of all layers.

        Args:
            metric: its name.

        Returns:
            float64 [layers], read-only, in the order of `names`.

        Raises:
            KeyError: the profile has no such metric; the message names the nearest.
        """
        if metric not in self.metrics:
            raise KeyError(f"the profile has no metric {metric!r}; {nearest(metric, self.metrics)}")
        return self.values[:, self.metrics.index(metric)]

    def to_pandas(self, *, spread: bool = False) -> pandas.DataFrame:
        """The table as a data frame.

        Args:
            spread: of means over batches, two more columns behind each metric: its standard deviation between them
                (`snip_deviation`), and in how many it is defined (`snip_batches`).

        Returns:
            A row for each layer (the index, named "layer"): the metrics, then every column of `info`.

        Raises:
            ValueError: spread=True of a profile of one batch.
        """
        import pandas

        if spread and self.spread is None:
            raise ValueError("spread=True: the profile is of one batch; profile(model, batches=[...]) tells the spread")
        index = pandas.Index(self.names, name="layer")
        columns: dict[str, Any] = {}
        for i, metric in enumerate(self.metrics):
            columns[metric] = self.values[:, i]
            if spread and self.spread is not None:
                columns[f"{metric}_deviation"] = self.spread.deviations[:, i]
                columns[f"{metric}_batches"] = self.spread.counts[:, i]
        for key in dict.fromkeys(key for row in self.info.values() for key in row):
            columns[key] = pandas.Series([self.info[name].get(key) for name in self.names], index=index)
        return pandas.DataFrame(columns, index=index)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write JSON (`.json`) or Parquet (`.parquet`), exact to the bit.

        Args:
            path: an existing file is replaced at once or kept.

        Returns:
            The path.

        Raises:
            ValueError: another suffix, or info that JSON cannot hold.
        """
        from zest_fast.profiling.profile_files import save_profile

        return save_profile(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LayerProfile:
        """Read what `save` wrote.

        Args:
            path: the file.

        Returns:
            The profile, exact to the bit.

        Raises:
            ValueError: it is torn, foreign or of a newer format; the message names it.
        """
        from zest_fast.profiling.profile_files import load_profile

        return load_profile(path)

    def plot(self, path: str | os.PathLike[str], metrics: Sequence[str] | None = None) -> Path:
        """Draw a heat map: a panel for each metric, layer type x depth. Needs `pip install 'zest_fast[plot]'`.

        Args:
            path: ending in .png, .svg or .pdf.
            metrics: some of them, in this order; None = all.

        Returns:
            The path.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: another ending, or a metric that the profile lacks.
        """
        from zest_fast.profiling.heat_map import draw

        return draw(self, path, metrics)

    def __repr__(self) -> str:
        if not self.names:
            return self._title()
        header, rows, rest = self._shown()
        return f"{self._title()}\n{text_table(header, rows, left=2)}" + (f"\n{rest}" if rest else "")

    def _repr_html_(self) -> str:
        """For notebooks: the table of `repr`, and the heat map of its metrics where matplotlib is installed."""
        from zest_fast.foundation.html_parts import html_table, inline_image, paragraph
        from zest_fast.profiling.heat_map import can_draw, heat_map

        if not self.names:
            return paragraph(self._title())
        header, rows, rest = self._shown()
        parts = [html_table(header, rows, left=2, caption=self._title()), paragraph(rest) if rest else ""]
        if can_draw() and self.metrics:
            shown = self._leading()
            alt = f"Heat map of {', '.join(shown)}: layer type down, depth across, colour is the rank among all layers"
            parts.append(inline_image(heat_map(self, shown), alt))
        return "".join(parts)

    def _title(self) -> str:
        head = f"LayerProfile: {len(self)} layers x {len(self.metrics)} metrics"
        head += f", means of {self.spread.batches} batches" if self.spread is not None else ""
        head += f", loss {number(self.loss)}, backend {printable(self.backend)}"
        return head + (f", {len(self.uncovered)} uncovered" if self.uncovered else "")

    def _leading(self) -> list[str]:
        return [metric for metric in LEADING_METRICS if metric in self.metrics] or self.metrics[:4]

    def _shown(self) -> tuple[list[str], list[list[str]], str]:
        """Header and rows of a table that fits on a screen, and what is left out of it."""
        shown, rows = self._leading(), list(range(len(self)))
        if len(rows) > 10:
            rows = [*rows[:5], -1, *rows[-3:]]
        rest = len(self.metrics) - len(shown)
        more = f"(+ {rest} more metrics: .metrics, .to_pandas())" if rest else ""
        return ["layer", "kind", *shown], [self._cells(row, shown) for row in rows], more

    def _cells(self, row: int, metrics: Sequence[str]) -> list[str]:
        if row < 0:
            return ["…", *[""] * (1 + len(metrics))]
        name = self.names[row]
        return [
            shorten(name),
            str(self.info[name].get("kind", "")),
            *(number(self[name][metric]) for metric in metrics),
        ]


def _unique(argument: str, names: Sequence[str]) -> list[str]:
    if isinstance(names, str):
        raise TypeError(f"{argument} must be a sequence of strings, not one string: {names!r}")
    names = list(names)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument} must hold strings only")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{argument} holds {twice!r} more than once")
    return names
