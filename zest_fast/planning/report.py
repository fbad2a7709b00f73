"""What a plan says: peak memory of a step, what it is made of, the tensor that sets it, and what would fit instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from zest_fast.foundation.byte_counts import memory_bytes
from zest_fast.foundation.html_parts import escaped, html_table, paragraph
from zest_fast.foundation.nearest import some
from zest_fast.foundation.text_table import text_table
from zest_fast.planning.blocks import GROUPS, Layout
from zest_fast.planning.ledger import KINDS, Allocation
from zest_fast.planning.settings import Setting, dtype_name
from zest_fast.planning.step import Step

if TYPE_CHECKING:
    import pandas

CARDS = (8, 16, 24, 40, 80)  # GB as they are sold: GiB

# Of a card beyond the tensors of the step: the CUDA context with the workspaces of its libraries, and fragmentation.
_CONTEXT = 600 * 2**20
_FRAGMENTATION = 1.03

_GIB = 2**30
_LARGEST = "largest tensors of the step at its peak:"


@dataclass(frozen=True)
class HeldTensor:
    """A tensor that the step made and that is alive at the peak. phase: in which the operator `made_by` made it."""

    size: int
    kind: str
    module: str
    phase: str
    made_by: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        where = self.module or "the model"
        what = f"{self.dtype} {list(self.shape)}, {sized(self.size)} ({self.kind})"
        return f"{self.made_by} in {self.phase} of {where}: {what}"


@dataclass(frozen=True)
class Plan:
    """Peak memory and FLOPs of one training step, found by a dry run without weights and without a GPU.

    What `zest_fast.plan` and `zest_fast.plan_profile` return. Printed, it says all of this in words.

    Attributes:
        model: its name.
        setting: what was planned: layers, sizes, dtype, optimizer, device and the rest.
        peak_bytes: of all tensors, once the states of the optimizer exist; without the CUDA context and fragmentation.
            With setting.device "cpu" the copies that oneDNN makes are in it.
        flops: multiplications and additions of matrix products, convolutions and attention, each counted as one.
        breakdown: bytes at the peak by kind: weights (buffers included), gradients, optimizer (states, temporaries of
            the update), activations (inputs and temporaries included), loss (logits and what follows them). Sums to
            peak_bytes.
        groups: the same for embeddings (what stands before the blocks), blocks, head (what stands behind them).
        flops_by_phase: FLOPs of forward and backward.
        peak_phase: forward, backward or update.
        peak_tensor: what sets the peak: the first of `largest`, of equals the one that came last.
        largest: the largest tensors that the step made and holds at the peak.
        trainable_parameters: how many train.
        cut: the lowest layer that trains; "" for full fine-tuning.
        notes: what else a reader should know.
        purpose: training, or profiling.
        estimated: modules whose kernels keep what no tensor shows (LSTM), counted by a formula; a note says so.

    Examples:
        >>> import zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
        >>> step = zest_fast.plan(model, ["0"], batch_size=2, image_size=8)
        >>> sum(step.breakdown.values()) == step.peak_bytes
        True
    """

    model: str
    setting: Setting
    peak_bytes: int
    flops: int
    breakdown: dict[str, int]
    groups: dict[str, dict[str, int]]
    flops_by_phase: dict[str, int]
    peak_phase: str
    peak_tensor: HeldTensor
    largest: tuple[HeldTensor, ...]
    trainable_parameters: int
    cut: str
    notes: tuple[str, ...] = ()
    purpose: str = "training"
    estimated: tuple[str, ...] = ()
    _layout: Layout | None = field(default=None, repr=False, compare=False)
    _again: Callable[[Setting], Plan] | None = field(default=None, repr=False, compare=False)

    @property
    def fits(self) -> tuple[int, ...]:
        """Which of the cards with 8, 16, 24, 40 and 80 GB the step fits, with room for context and fragmentation."""
        return tuple(card for card in CARDS if fits(self.peak_bytes, card * _GIB))

    def again(self, **changes: Any) -> Plan:
        """The same plan with another setting; the model is not looked at anew.

        Args:
            **changes: attributes of `setting`, such as checkpoint, frozen or stream.

        Returns:
            A Plan.

        Raises:
            ValueError: a setting that cannot be, as of `plan`.
        """
        assert self._again is not None
        return self._again(replace(self.setting, **changes))

    def table(
        self,
        *,
        lowest_blocks: Iterable[int] | None = None,
        dtypes: Iterable[str] | None = None,
        optimizers: Iterable[Any] | None = None,
        batch_sizes: Iterable[int] | None = None,
        sequence_lengths: Iterable[int] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> pandas.DataFrame:
        """The same plan for other settings, each combination a dry run, and which cards it fits.

        Args:
            lowest_blocks: the layers moved so that their lowest is in this block; default: four from the bottom up,
                where the model has blocks and single layers train.
            dtypes: by default that of the plan.
            optimizers: by default that of the plan.
            batch_sizes: by default 1, 2 and 4 times that of the plan.
            sequence_lengths: by default that of the plan.
            progress: is called as it goes, with how many are done and how many there are.

        Returns:
            A row for each combination: lowest_block, dtype, optimizer, batch_size, sequence_length or image_size,
            peak_bytes, peak_gib, flops, and "8 GB" ... "80 GB" (bool).

        Raises:
            ValueError: lowest blocks that the model does not have, or has no use for.
        """
        import pandas

        settings = list(
            self._settings(
                self._blocks(lowest_blocks),
                [dtype_name(dtype) for dtype in (dtypes if dtypes else [self.setting.dtype])],
                list(optimizers or [self.setting.optimizer]),
                list(batch_sizes or [self.setting.batch_size * factor for factor in (1, 2, 4)]),
                [*(sequence_lengths if sequence_lengths else [self.setting.sequence_length])],
            )
        )
        rows = []
        for done, (block, setting) in enumerate(settings):
            if progress is not None:
                progress(done, len(settings))
            rows.append(self._row(block, setting))
        if progress is not None:
            progress(len(settings), len(settings))
        return pandas.DataFrame(rows)

    def within(self, max_memory: str | int, **axes: Any) -> pandas.DataFrame:
        """The rows of `table` that fit, with room for context and fragmentation, most memory first.

        Args:
            max_memory: bytes, "24GB" or "24GiB".
            **axes: as for `table`.

        Returns:
            The rows.

        Raises:
            ValueError: none fits; the message says which comes closest.
        """
        limit = memory_bytes(max_memory)
        table = self.table(**axes)
        fitting = table[[fits(peak, limit) for peak in table["peak_bytes"]]]
        if fitting.empty:
            closest = table.iloc[int(table["peak_bytes"].argmin())]
            words = ", ".join(f"{name} {closest[name]}" for name in _axes(table) if closest[name] is not None)
            raise ValueError(
                f"max_memory={max_memory!r}: nothing of the {len(table)} settings fits. Closest comes {words} with "
                f"{sized(int(closest['peak_bytes']))} of tensors, {sized(needed(int(closest['peak_bytes'])))} with the "
                "context of CUDA and fragmentation; try a smaller batch, shorter sequences, a higher lowest block, "
                "checkpoint= or frozen='int8' or 'nf4'"
            )
        return fitting.sort_values("peak_bytes", ascending=False, kind="stable").reset_index(drop=True)

    def _blocks(self, wanted: Iterable[int] | None) -> list[int | None]:
        names = self.setting.layers
        count = len(self._layout.blocks) if self._layout else 0
        if names is None or names == "all" or not count:
            if wanted is not None:
                raise ValueError("lowest_blocks needs a model with blocks, and single layers that train")
            return [None]
        blocks = list(dict.fromkeys(count * quarter // 4 for quarter in range(4)) if wanted is None else wanted)
        for block in blocks:
            if not 0 <= block < count:
                raise ValueError(f"lowest_blocks holds {block}: the model has blocks 0 to {count - 1}")
        return list(blocks)

    def _settings(
        self, blocks: list[int | None], dtypes: list[Any], optimizers: list[Any], batches: list[int], lengths: list[Any]
    ) -> Iterator[tuple[int | None, Setting]]:
        for block in blocks:
            layers = self.setting.layers
            if block is not None:
                assert self._layout is not None and isinstance(layers, tuple)
                try:
                    layers = self._layout.moved(layers, block)
                except ValueError:
                    continue  # so high up there are not as many layers
            for dtype in dtypes:
                for optimizer in optimizers:
                    for batch in batches:
                        for length in lengths:
                            changes = {"dtype": dtype, "optimizer": optimizer, "batch_size": batch}
                            yield block, replace(self.setting, layers=layers, sequence_length=length, **changes)

    def _row(self, block: int | None, setting: Setting) -> dict[str, Any]:
        assert self._again is not None
        plan = self if setting == self.setting else self._again(setting)
        images = setting.image_size is not None
        row: dict[str, Any] = {} if block is None else {"lowest_block": block}
        row |= {"dtype": setting.dtype, "optimizer": setting.optimizer_name, "batch_size": setting.batch_size}
        row["image_size" if images else "sequence_length"] = setting.image_size if images else setting.sequence_length
        row |= {"peak_bytes": plan.peak_bytes, "peak_gib": round(plan.peak_bytes / _GIB, 2), "flops": plan.flops}
        return row | {f"{card} GB": card in plan.fits for card in CARDS}

    def __str__(self) -> str:
        table = text_table(*self._parts())
        lines = [*self._words(), "", table, "", _LARGEST, *(f"  {tensor}" for tensor in self.largest[:5])]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        """For notebooks: the same, the parts of the peak as a table."""
        largest = "".join(f"<li>{escaped(tensor)}</li>" for tensor in self.largest[:5])
        notes = [paragraph(f"note: {note}") for note in self.notes]
        words = paragraph("\n".join(self._words()))
        return "".join([words, html_table(*self._parts()), paragraph(_LARGEST), f"<ul>{largest}</ul>", *notes])

    def _words(self) -> list[str]:
        return [
            f"{self.model}: {_what(self)}, {self.setting.size}, {self.setting.dtype or 'dtype as found'}",
            f"peak {sized(self.peak_bytes)} of tensors{_place(self.setting)} (dry run); fits "
            + (", ".join(f"{card} GB" for card in self.fits) or f"no card of up to {CARDS[-1]} GB"),
            f"  in {self.peak_phase}, set by {self.peak_tensor}",
            f"{self.flops / 1e12:.3g} TFLOP, {self.flops_by_phase.get('forward', 0) / 1e12:.3g} of them forward",
        ]

    def _parts(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table of what the peak is made of."""
        return ["GiB at the peak", *GROUPS, "all"], [self._line(kind) for kind in (*KINDS, "all")]

    def _line(self, kind: str) -> list[str]:
        kinds = KINDS if kind == "all" else (kind,)
        sums = [sum(self.groups[group][k] for k in kinds) for group in GROUPS]
        return [kind, *(f"{size / _GIB:.3f}" for size in (*sums, sum(sums)))]


def make_plan(
    model: str,
    setting: Setting,
    step: Step,
    layout: Layout,
    again: Callable[[Setting], Plan],
    notes: tuple[str, ...] = (),
    purpose: str = "training",
) -> Plan:
    """Sort what a dry run found."""
    groups = {group: dict.fromkeys(KINDS, 0) for group in GROUPS}
    group_of: dict[str, str] = {}
    for allocation in step.peak.alive:
        if allocation.module not in group_of:
            group_of[allocation.module] = layout.group(allocation.module)
        group = "head" if allocation.kind == "loss" else group_of[allocation.module]
        groups[group][allocation.kind] += allocation.size
    made = [allocation for allocation in step.peak.alive if allocation.phase != "before"]
    largest = [_held(made[i]) for i in sorted(range(len(made)), key=lambda i: (-made[i].size, -i))[:10]]
    return Plan(
        model=model,
        setting=setting,
        peak_bytes=step.peak.size,
        flops=sum(step.flops.values()),
        breakdown={kind: sum(sizes[kind] for sizes in groups.values()) for kind in KINDS},
        groups=groups,
        flops_by_phase=dict(step.flops),
        peak_phase=step.peak.last.phase,
        peak_tensor=largest[0],
        largest=tuple(largest),
        trainable_parameters=step.trainable,
        cut=step.cut,
        notes=(*notes, *_notes_on(step, setting)),
        purpose=purpose,
        estimated=step.estimated,
        _layout=layout,
        _again=again,
    )


def _notes_on(step: Step, setting: Setting) -> list[str]:
    if not step.estimated:
        return []
    names = some(map(repr, step.estimated))
    other = "; what cuDNN keeps differs from that" if setting.device == "cuda" else ""
    return [f"what the kernels of {names} keep for backward is counted by oneDNN's formula for float32{other}"]


def _place(setting: Setting) -> str:
    return " on the CPU" if setting.device == "cpu" else ""


def needed(peak_bytes: int) -> int:
    """Bytes of a card for a step with this peak: fragmentation and the context of CUDA on top."""
    return int(peak_bytes * _FRAGMENTATION) + _CONTEXT


def tensors_within(limit: int) -> int:
    """Bytes of tensors that a card of so many has room for; below 1 where there is none."""
    return int((limit - _CONTEXT) / _FRAGMENTATION)


def fits(peak_bytes: int, limit: int) -> bool:
    return needed(peak_bytes) <= limit


def _held(allocation: Allocation) -> HeldTensor:
    return HeldTensor(
        allocation.size,
        allocation.kind,
        allocation.module,
        allocation.phase,
        allocation.operator,
        allocation.shape,
        str(allocation.dtype).removeprefix("torch."),
    )


def _what(plan: Plan) -> str:
    layers, count = plan.setting.layers, f"{plan.trainable_parameters:,} parameters"
    if plan.purpose != "training":
        return f"{plan.purpose} of {count}"
    if layers is None or isinstance(layers, str):
        what = f"full fine-tuning of {count}" if layers == "all" else f"{count} train"
    else:
        some = f"{len(layers)} layer{'s' * (len(layers) != 1)}"
        what = f"{some} with {count} train, the lowest is {plan.cut}"
    return f"{what}, {plan.setting.optimizer_name}"


def _axes(table: pandas.DataFrame) -> list[str]:
    return [c for c in ("lowest_block", "dtype", "optimizer", "batch_size", "sequence_length") if c in table.columns]


def sized(size: int) -> str:
    """In GiB, MiB or KiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size / 2**10:.1f} KiB"
