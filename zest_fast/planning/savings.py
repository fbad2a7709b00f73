"""One dial: of the ways to save memory without another choice of layers, the fastest that fits."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from zest_fast.finetuning.quantised_weights import frozen_linears
from zest_fast.foundation.byte_counts import memory_bytes
from zest_fast.foundation.options import Checkpoint, Frozen, PlannedDevice
from zest_fast.planning.blocks import layout_of
from zest_fast.planning.optimizers import Build
from zest_fast.planning.plan import plan
from zest_fast.planning.report import Plan, needed, sized
from zest_fast.planning.settings import DTYPES, packed_bytes
from zest_fast.planning.skeletons import named_model

if TYPE_CHECKING:
    import pandas

UNPACKING = {"int8": 340.0, "nf4": 130.0}
"""FLOPs of a matrix product that take as long as unpacking one weight: `python -m bench.stream costs`, one thread."""
READING = 150.0
"""The same for one byte from a disk of 2 GB/s. What the system still has in its cache costs next to nothing."""
_GIB = 2**30


@dataclass(frozen=True)
class Savings:
    """Ways to save memory: what `SelectiveBackward` takes, and whether weights stay on disk (`open_streamed`)."""

    checkpoint: Checkpoint | None = None
    frozen: Frozen | None = None
    stream: bool = False

    def __str__(self) -> str:
        words = [f"frozen={self.frozen!r}"] if self.frozen else []
        words += [f"checkpoint={self.checkpoint!r}"] if self.checkpoint else []
        words += ["weights on disk"] if self.stream else []
        return ", ".join(words) or "nothing but lean saving"


@dataclass(frozen=True)
class Fit:
    """What `fit_memory` found.

    Attributes:
        savings: the fastest that fits.
        plan: of a step with it.
        cost: of a step, relative to one that saves nothing.
        explanation: in words, and what more memory would buy.

    Examples:
        >>> import zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10))
        >>> found = zest_fast.fit_memory(model, ["2"], "1GB", batch_size=4, image_size=8)
        >>> found.cost, found.plan.peak_bytes < 10**9
        (1.0, True)
    """

    savings: Savings
    plan: Plan
    cost: float
    explanation: str
    _rows: tuple[tuple[Savings, Plan, float], ...] = ()

    def to_pandas(self) -> pandas.DataFrame:
        """Every way that was planned, the cheapest first: checkpoint, frozen, stream, peak_bytes, cost, flops."""
        import pandas

        return pandas.DataFrame(
            [
                {**vars(savings), "peak_bytes": plan.peak_bytes, "cost": cost, "flops": plan.flops}
                for savings, plan, cost in self._rows
            ]
        )

    def __str__(self) -> str:
        return self.explanation


def fit_memory(
    model_or_config: Any,
    layers: Iterable[str] | str,
    max_memory: str | int,
    *,
    batch_size: int,
    sequence_length: int | None = None,
    image_size: int | None = None,
    dtype: Any = "bfloat16",
    optimizer: str | Build = "adamw",
    head: str | Iterable[str] | None = "auto",
    device: PlannedDevice | None = None,
) -> Fit:
    """Of lean saving, checkpointing above the cut, int8, nf4 and weights on disk: the fastest way that fits.

    The layers stay as they are (`choose(max_memory=...)` exchanges them). Each way is planned by a dry run, and priced
    by its FLOPs, by what unpacking costs, and by what is read from a disk, on prices that were measured on one CPU:
    they order the ways, and are no promise of seconds. int8 and nf4 round frozen weights, so that results are others;
    the rest changes no more than rounding.

    Args:
        model_or_config: as for `plan`.
        layers: as for `plan`; some are frozen.
        max_memory: bytes, "3GB" (10^9) or "3GiB" (2^30). On a GPU its context and fragmentation have to fit, too; on a
            CPU tensors alone count, and Python with its libraries takes half a GiB more.
        batch_size: as for `plan`, as all that follow.
        sequence_length: tokens of a sample.
        image_size: pixels of both sides.
        dtype: of weights and inputs.
        optimizer: its name, or what builds it.
        head: of SelectiveBackward.
        device: "cuda" or "cpu". Weights on disk are offered for a CPU only: nothing was measured on a GPU, where
            reading weighs more beside multiplying; `plan(stream=True, device="cuda")` says what such a step holds.

    Returns:
        A Fit: print it.

    Raises:
        ValueError: nothing fits; the message says what needs the least. And what `plan` refuses.

    Examples:
        >>> import zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10))
        >>> print(zest_fast.fit_memory(model, ["2"], "1GB", batch_size=4, image_size=8).savings)
        nothing but lean saving
    """
    limit = memory_bytes(max_memory)
    names = layers if isinstance(layers, str) else tuple(layers)
    if names == "all":
        raise ValueError("layers='all': nothing is frozen that could be kept smaller; name the layers that train")
    plain = plan(
        model_or_config,
        names,
        batch_size=batch_size,
        sequence_length=sequence_length,
        image_size=image_size,
        dtype=dtype,
        optimizer=optimizer,
        head=head,
        device=device,
    )
    where = plain.setting.device
    _, skeleton = named_model(model_or_config)
    weights = _FrozenWeights(skeleton, plain)
    rows = [(Savings(), plain, 1.0)]
    for savings in _ways(where):
        try:
            planned = plain.again(**vars(savings))
        except ValueError:  # no blocks to checkpoint, no Linear to pack: said by whoever asks for it by name
            continue
        rows.append((savings, planned, weights.cost(savings, planned) / weights.cost(Savings(), plain)))
    rows.sort(key=lambda row: (row[2], row[1].peak_bytes))
    takes = [needed(row[1].peak_bytes) if where == "cuda" else row[1].peak_bytes for row in rows]
    fitting = next((place for place, size in enumerate(takes) if size <= limit), None)
    if fitting is None:
        least = min(range(len(rows)), key=takes.__getitem__)
        raise ValueError(
            f"max_memory={max_memory!r}: no way to save memory makes a step of these layers fit; with {rows[least][0]} "
            f"it needs {sized(takes[least])}. Choose fewer or higher layers, a smaller batch or a shorter sequence"
        )
    savings, planned, cost = rows[fitting]
    lines = [f"{savings}: {sized(takes[fitting])} for a step, at {cost:.2f} of the cost of one that saves nothing"]
    if savings.frozen:
        lines.append(f"  {savings.frozen} rounds frozen weights: results are others than without it")
    if savings.stream:
        lines.append(
            "  weights on disk: open the folder by open_streamed; as fast as the disk where it does not fit into memory"
        )
    if fitting:
        next_one = min(range(fitting), key=takes.__getitem__)
        more, (better, _, price) = takes[next_one] - limit, rows[next_one]
        lines.append(
            f"  {sized(more)} more would buy {better}, at {price:.2f}" + ("; the next GiB buys nothing" * (more > _GIB))
        )
    return Fit(savings, planned, cost, "\n".join(lines), tuple(rows))


def _ways(device: str) -> list[Savings]:
    checkpoints: tuple[Checkpoint | None, ...] = (None, "above-cut")
    formats: tuple[Frozen | None, ...] = (None, "int8", "nf4")
    streams = (False, True) if device == "cpu" else (False,)
    ways = [Savings(*way) for way in itertools.product(checkpoints, formats, streams)]
    return [way for way in ways if way != Savings()]


class _FrozenWeights:
    """How many there are in nn.Linear layers, below the cut and above it."""

    def __init__(self, model: nn.Module, plain: Plan) -> None:
        layers, owners = plain.setting.layers, dict(model.named_modules())
        named = layers if isinstance(layers, tuple) else ()
        trained = {id(p) for name in named if name in owners for p in owners[name].parameters(recurse=False)}
        order = {name: place for place, name in enumerate(owners)}
        cut = order.get(plain.cut, 0)
        try:
            linears = frozen_linears(model, trained, layout_of(model).head, "int8")
        except ValueError:
            linears = {}
        self._shapes = [
            (module.weight.numel(), module.out_features, order[name] > cut) for name, module in linears.items()
        ]
        self._itemsize = DTYPES[plain.setting.dtype or "float32"][0].itemsize

    def cost(self, savings: Savings, planned: Plan) -> float:
        """In FLOPs: of the step, of unpacking and of reading, in forward, in backward and where it is recomputed."""
        cost = float(planned.flops)
        for weights, rows, is_above in self._shapes:
            uses = 1 + is_above * (2 if savings.checkpoint else 1)
            if savings.frozen:
                cost += UNPACKING[savings.frozen] * weights * uses
            if savings.stream:
                size = packed_bytes(weights, rows, savings.frozen) if savings.frozen else weights * self._itemsize
                cost += READING * size * uses
        return cost
