"""One dial: of the ways to save memory without another choice of layers, the fastest that fits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from zest_fast.finetuning.quantised_weights import frozen_linears
from zest_fast.foundation.byte_counts import memory_bytes
from zest_fast.foundation.options import Checkpoint, Frozen, PlannedDevice
from zest_fast.planning.batches import make_batch
from zest_fast.planning.blocks import layout_of
from zest_fast.planning.dry_run import faked
from zest_fast.planning.flop_formulas import flop_counter
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
TAKING_UP = 1e9
"""The same for what a step of a prefix cache does beside reading: `python -m bench.prefix_cache`, one thread."""
LEARNING = 10.0
"""Steps that a prefix cache takes to find what crosses the cut and to compare: three to twenty in that benchmark."""
_CROSSING = 4
"""Times what the lowest layer that trains is called with: inside attention the residual, queries, keys and values."""
_AT_MOST = 2
"""Times that: behind a gate, what the gate has computed is kept, too."""
_GIB = 2**30


@dataclass(frozen=True)
class Savings:
    """Ways to save memory and time: what `SelectiveBackward` takes (cache: a PrefixCache), and whether weights stay on
    disk (`open_streamed`)."""

    checkpoint: Checkpoint | None = None
    frozen: Frozen | None = None
    stream: bool = False
    cache: bool = False

    def __str__(self) -> str:
        words = [f"frozen={self.frozen!r}"] if self.frozen else []
        words += [f"checkpoint={self.checkpoint!r}"] if self.checkpoint else []
        words += ["weights on disk"] if self.stream else []
        words += ["a prefix cache"] if self.cache else []
        return ", ".join(words) or "nothing but lean saving"


class NothingFits(ValueError):
    """No way to save memory makes the step fit.

    Attributes:
        least: the way that needs the least.
        needs: bytes of it, on a GPU with its context and fragmentation.

    Examples:
        >>> import zest_fast
        >>> from zest_fast.planning.savings import NothingFits
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 10))
        >>> try:
        ...     zest_fast.fit_memory(model, ["0"], "1KB", batch_size=4, image_size=8)
        ... except NothingFits as error:
        ...     print(error.least, error.needs > 1000)
        nothing but lean saving True
    """

    def __init__(self, message: str, least: Savings, needs: int) -> None:
        super().__init__(message)
        self.least, self.needs = least, needs


@dataclass(frozen=True)
class Fit:
    """What `fit_memory` found.

    Attributes:
        savings: the fastest that fits.
        plan: of a step with it.
        cost: of a step, relative to one that saves nothing.
        explanation: in words, and what more memory would buy.
        cache_bytes: what a prefix cache keeps on disk for the samples of one step, at the most; 0 without one.

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
    cache_bytes: int = 0
    _rows: tuple[tuple[Savings, Plan, float], ...] = ()

    def to_pandas(self) -> pandas.DataFrame:
        """Every way that was planned, the cheapest first: the attributes of its Savings, peak_bytes, cost, flops."""
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
    batch_size: int | None = None,
    batch: Any = None,
    loss_fn: Callable[..., Tensor] | None = None,
    sequence_length: int | None = None,
    image_size: int | None = None,
    dtype: Any = "auto",
    optimizer: str | Build = "adamw",
    head: str | Iterable[str] | None = "auto",
    device: PlannedDevice | None = None,
    epochs: float = 1,
    steps: int | None = None,
    among: Collection[Savings] | None = None,
    accumulating: bool = False,
) -> Fit:
    """Of lean saving, checkpointing above the cut, int8, nf4, weights on disk, a prefix cache: the fastest that fits.

    The layers stay as they are (`choose(max_memory=...)` exchanges them). Each way is planned by a dry run, and priced
    by its FLOPs, by what unpacking costs, and by what is read from a disk, on prices that were measured on one CPU:
    they order the ways, and are no promise of seconds. int8 and nf4 round frozen weights, so that results are others;
    the rest changes no more than rounding. A prefix cache saves time and no memory: its first epoch runs whole.

    Args:
        model_or_config: as for `plan`.
        layers: as for `plan`; some are frozen.
        max_memory: bytes, "3GB" (10^9) or "3GiB" (2^30). On a GPU its context and fragmentation have to fit, too; on a
            CPU tensors alone count, and Python with its libraries takes half a GiB more.
        batch_size: as for `plan`, as all that follow until device.
        batch: one in place of the three sizes.
        loss_fn: with a batch.
        sequence_length: tokens of a sample.
        image_size: pixels of both sides.
        dtype: of weights and inputs.
        optimizer: its name, or what builds it.
        head: of SelectiveBackward.
        device: "cuda" or "cpu". Weights on disk and a prefix cache are offered for a CPU only: nothing was measured on
            a GPU, where reading weighs more beside multiplying; `plan(stream=True, device="cuda")` says what such a
            step holds.
        epochs: passes over the data, to which costs are averaged; a prefix cache pays above 1 only.
        steps: of the whole run, over which a cache's finding and comparing is spread; None = without end.
        among: the ways to choose from, where some are settled or cannot be; None = all of them.
        accumulating: as for `plan`.

    Returns:
        A Fit: print it.

    Raises:
        ValueError: nothing fits (a NothingFits: the message says what needs the least), what `plan` refuses, or an
            `among` of which nothing can be planned.

    Examples:
        >>> import zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10))
        >>> print(zest_fast.fit_memory(model, ["2"], "1GB", batch_size=4, image_size=8).savings)
        nothing but lean saving
    """
    limit = memory_bytes(max_memory)
    if not epochs > 0:
        raise ValueError(f"epochs={epochs!r}: more than 0 are needed")
    names = layers if isinstance(layers, str) else tuple(layers)
    if names == "all":
        raise ValueError("layers='all': nothing is frozen that could be kept smaller; name the layers that train")
    plain = plan(
        model_or_config,
        names,
        batch_size=batch_size,
        batch=batch,
        loss_fn=loss_fn,
        sequence_length=sequence_length,
        image_size=image_size,
        dtype=dtype,
        optimizer=optimizer,
        head=head,
        device=device,
        accumulating=accumulating,
    )
    where = plain.setting.device
    _, skeleton = named_model(model_or_config)
    ways = _ways(where, epochs) if among is None else list(dict.fromkeys(among))
    run = _Run(epochs, math.inf if steps is None else steps)
    prefix = _prefix(skeleton, plain, batch) if any(way.cache for way in ways) else None
    costs = _Costs(skeleton, plain, prefix, run)
    planned: dict[Savings, Plan] = {Savings(): plain}
    rows = []
    for savings in ways:
        try:
            found = _planned(planned, savings, prefix)
        except ValueError as error:  # no blocks to checkpoint, no Linear to pack: said where it is the only way
            refused = error
            continue
        rows.append((savings, found, costs.relative(savings, found)))
    if not rows:
        raise refused
    fit = _fastest(rows, limit, max_memory, where)
    return replace(fit, cache_bytes=_AT_MOST * prefix.kept if prefix is not None and fit.savings.cache else 0)


def _fastest(rows: list[tuple[Savings, Plan, float]], limit: int, max_memory: str | int, where: str) -> Fit:
    rows.sort(key=lambda row: (row[2], row[1].peak_bytes))
    takes = [needed(row[1].peak_bytes) if where == "cuda" else row[1].peak_bytes for row in rows]
    fitting = next((place for place, size in enumerate(takes) if size <= limit), None)
    if fitting is None:
        least = min(range(len(rows)), key=takes.__getitem__)
        raise NothingFits(
            f"max_memory={max_memory!r}: no way to save memory makes a step of these layers fit; with {rows[least][0]} "
            f"it needs {sized(takes[least])}. Choose fewer or higher layers, a smaller batch or a shorter sequence",
            rows[least][0],
            takes[least],
        )
    savings, planned, cost = rows[fitting]
    lines = [f"{savings}: {sized(takes[fitting])} for a step, at {cost:.2f} of the cost of one that saves nothing"]
    if savings.frozen:
        lines.append(f"  {savings.frozen} rounds frozen weights: results are others than without it")
    if savings.stream:
        lines.append(
            "  weights on disk: open the folder by open_streamed; as fast as the disk where it does not fit into memory"
        )
    if savings.cache:
        lines.append("  a prefix cache: layers below the cut run once for each sample, and have to be in eval mode")
    if fitting:
        next_one = min(range(fitting), key=takes.__getitem__)
        more, (better, _, price) = takes[next_one] - limit, rows[next_one]
        lines.append(
            f"  {sized(more)} more would buy {better}, at {price:.2f}" + ("; the next GiB buys nothing" * (more > _GIB))
        )
    return Fit(savings, planned, cost, "\n".join(lines), _rows=tuple(rows))


def _ways(device: str, epochs: float) -> list[Savings]:
    checkpoints: tuple[Checkpoint | None, ...] = (None, "above-cut")
    formats: tuple[Frozen | None, ...] = (None, "int8", "nf4")
    on_disk = (False, True) if device == "cpu" else (False,)
    caches = on_disk if epochs > 1 else (False,)
    return [Savings(*way) for way in itertools.product(checkpoints, formats, on_disk, caches)]


def _planned(known: dict[Savings, Plan], savings: Savings, prefix: _Prefix | None) -> Plan:
    """known: those of steps without a cache, by which it is filled. ValueError where there is no such step."""
    plain = replace(savings, cache=False)
    if plain not in known:
        how = {"checkpoint": plain.checkpoint, "frozen": plain.frozen, "stream": plain.stream}
        known[plain] = known[Savings()].again(**how)
    step = known[plain]
    if not savings.cache:
        return step
    if prefix is None:
        raise ValueError("a prefix cache: no call of the lowest layer that trains is met in a dry run")
    more = _AT_MOST * prefix.kept
    breakdown = {**step.breakdown, "activations": step.breakdown["activations"] + more}
    return replace(step, peak_bytes=step.peak_bytes + more, breakdown=breakdown)


@dataclass(frozen=True)
class _Run:
    epochs: float
    steps: float


@dataclass(frozen=True)
class _Prefix:
    """Of a forward pass up to the cut. flops: until its layer is called. kept: bytes of a batch that a cache reads."""

    flops: int
    kept: int


def _prefix(skeleton: nn.Module, plain: Plan, batch: Any) -> _Prefix | None:
    """None where no call of the layer of the cut is met."""
    module = dict(skeleton.named_modules()).get(plain.cut)
    if module is None:
        return None
    itemsize = DTYPES[plain.setting.dtype][0].itemsize if plain.setting.dtype else 0

    def noted(_: nn.Module, args: Any, keywords: Any) -> None:
        first = next(x for x in (*args, *keywords.values()) if isinstance(x, Tensor))
        size = first.numel() * (itemsize if itemsize and first.is_floating_point() else first.element_size())
        raise _AtTheCut(_Prefix(counter.get_total_flops(), _CROSSING * size))

    handle = module.register_forward_pre_hook(noted, with_kwargs=True)
    try:
        example = make_batch(skeleton, plain.setting) if batch is None else batch
        with suppress(StopIteration), faked(skeleton, example) as compute_loss, flop_counter() as counter:
            compute_loss()
    except _AtTheCut as reached:
        return reached.prefix
    finally:
        handle.remove()
    return None


class _AtTheCut(Exception):
    """Nothing more of this pass is wanted."""

    def __init__(self, prefix: _Prefix) -> None:
        super().__init__()
        self.prefix = prefix


class _Costs:
    """In FLOPs, by the frozen weights in nn.Linear layers, below the cut and above it."""

    def __init__(self, model: nn.Module, plain: Plan, prefix: _Prefix | None, run: _Run) -> None:
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
        self._prefix, self._run = prefix, run
        self._plain = float(plain.flops)

    def relative(self, savings: Savings, planned: Plan) -> float:
        """Of a step, to one that saves nothing, on the average of the run."""
        return self._of(savings, planned) / self._plain

    def _of(self, savings: Savings, planned: Plan) -> float:
        """Of the step, of unpacking and of reading, in forward, in backward and where it is recomputed."""
        cost, below = float(planned.flops), 1.0
        if savings.cache and self._prefix is not None:
            below = min(1.0, 1 / self._run.epochs)
            cost += READING * self._prefix.kept + TAKING_UP + LEARNING * self._plain / self._run.steps
            cost -= (1 - below) * self._prefix.flops
        for weights, rows, is_above in self._shapes:
            uses = (2 + (savings.checkpoint is not None)) if is_above else below
            if savings.frozen:
                cost += UNPACKING[savings.frozen] * weights * uses
            if savings.stream:
                size = packed_bytes(weights, rows, savings.frozen) if savings.frozen else weights * self._itemsize
                cost += READING * size * uses
        return cost
