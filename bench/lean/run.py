"""`python -m bench.lean`: what a step of selective fine-tuning keeps and costs, plain, lean, and beside a full one.

    full    every parameter trains, batch norm in training mode
    cut     five layers and the head train, backward ends at the lowest of them (at half the depth)
    lean    the same, and what is frozen above the cut keeps only what the gradient of its input needs
    bottom_cut, bottom_lean    likewise with the first layer among the five: backward runs through the whole network

Convolutional networks in float32 with batches of 32 images of 224²: counted bytes of an AdamW step (states included,
weights and batch not), bytes that autograd keeps, and processor time of a step. LLaMA in bfloat16: bytes that a frozen
block keeps for each token, beside the formulas 16 d + 6 f (plain) and 12 d + 4 f (lean); and those of the loss.

Writes bench/results/lean.json. About a quarter of an hour on one idle core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.measure import write_result
from zest_fast import SelectiveBackward
from zest_fast.benchmarking.hooks import profiled_layers
from zest_fast.benchmarking.models import TINY, Batch, Case, llama, mobilenetv2, resnet50
from zest_fast.benchmarking.timing import interleave, median, ratio
from zest_fast.lean.apply import apply_lean
from zest_fast.lean.optimizer import adamw
from zest_fast.planning.counted_memory import peak_bytes

MIB = 2**20
CHOSEN = 5
BLOCK = {"hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 8, "num_key_value_heads": 8}
TINY_BLOCK = {"hidden_size": 32, "intermediate_size": 88, "num_attention_heads": 2, "num_key_value_heads": 2}


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.lean", description="lean saving beside full fine-tuning")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--batch", type=int, default=32, help="images (default 32)")
    parser.add_argument("--quick", action="store_true", help="tiny models: checks that everything runs, says nothing")
    parser.add_argument("--out", type=Path, help="folder for the JSON (default bench/results)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=130)
    networks = (
        [case for case in TINY if case.model in ("resnet50", "mobilenetv2")]
        if options.quick
        else [
            Case("resnet50", f"{options.batch}x224²", partial(resnet50, options.batch, 224)),
            Case("mobilenetv2", f"{options.batch}x224²", partial(mobilenetv2, options.batch, 224)),
        ]
    )
    results = []
    for case in networks:
        results.append(measure_network(case, options.rounds))
        console.print(_network_table(results[-1]))
    sizes, tokens = (TINY_BLOCK, 8) if options.quick else (BLOCK, 256)
    results.append(measure_block(sizes, tokens))
    console.print(_block_table(results[-1]))
    settings = {"rounds": options.rounds, "quick": options.quick, "chosen_layers": CHOSEN, "clock": "process time"}
    console.print(f"wrote {write_result('lean', settings, results, options.out)}")


def measure_network(case: Case, rounds: int) -> dict[str, object]:
    """Bytes and processor time of a step of each. Counting the bytes warms up for the clock."""
    with ExitStack() as stack:
        steps = {name: stack.enter_context(variant) for name, variant in _variants(case).items()}
        peaks, kept, losses = {}, {}, {}
        for name, step in steps.items():
            losses[name], kept[name] = [], []
            peaks[name] = peak_bytes(partial(step.counted, losses[name], kept[name]))
        runs = {name: step.once for name, step in steps.items()}
        times = interleave(runs, rounds, warmup=0, clock=time.process_time)
        layers = chosen(steps["lean"].model, 0.5)
    return {
        "model": case.model,
        "shape": case.shape,
        "layers": layers,
        "loss": {name: value for name, (value,) in losses.items()},
        "kept_bytes": {name: count for name, (count,) in kept.items()},
        "peak_bytes": peaks,
        "peak_to_full": {name: peak / peaks["full"] for name, peak in peaks.items()},
        "seconds": {name: median(values).as_dict() for name, values in times.items()},
        "time_to_full": {name: ratio(times, name, "full").as_dict() for name in times if name != "full"},
    }


class Step:
    """A training step of one model."""

    def __init__(self, model: nn.Module, batch: Batch, parameters: list[nn.Parameter]) -> None:
        self.model, self.batch = model, batch
        self.parameters = parameters
        self.optimizer = adamw(parameters, lr=1e-5)

    def once(self) -> None:
        self.model(**self.batch).loss.backward()
        self._update()

    def counted(self, losses: list[float], kept: list[int]) -> None:
        """The same with an optimizer that has its states; adds the loss and the bytes that autograd keeps."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self._update()
        with keeping(self.model) as counted:
            loss = self.model(**self.batch).loss
        losses.append(float(loss.detach()))
        kept.append(sum(counted.values()))
        loss.backward()
        self._update()

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def _variants(case: Case) -> dict[str, AbstractContextManager[Step]]:
    return {
        "full": _full(case),
        "cut": _selective(case, 0.5, lean=False),
        "lean": _selective(case, 0.5, lean=True),
        "bottom_cut": _selective(case, 0, lean=False),
        "bottom_lean": _selective(case, 0, lean=True),
    }


@contextmanager
def _full(case: Case) -> Iterator[Step]:
    model, batch = case.build()
    yield Step(model, batch, list(model.parameters()))


@contextmanager
def _selective(case: Case, depth: float, *, lean: bool) -> Iterator[Step]:
    model, batch = case.build()
    with (
        SelectiveBackward(model, chosen(model, depth), lean=False) as tuned,
        apply_lean(model) if lean else nullcontext(),
    ):
        yield Step(model, batch, list(tuned.parameters()))


def chosen(model: nn.Module, depth: float) -> list[str]:
    """CHOSEN layers at even distances, from the one at this depth (0 = the first) to the last before the head."""
    names = list(profiled_layers(model))[:-1]
    last = len(names) - 1
    lowest = round(last * depth)
    return list(dict.fromkeys(names[lowest + (last - lowest) * i // (CHOSEN - 1)] for i in range(CHOSEN)))


@contextmanager
def keeping(model: nn.Module) -> Iterator[dict[int, int]]:
    """Counts what autograd keeps for the backward pass: bytes of each storage, without the model's own."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept


def measure_block(sizes: dict[str, int], tokens: int) -> dict[str, object]:
    """Bytes for each token that a frozen LLaMA block keeps, and the loss, in bfloat16: models of one block more or
    less.
    """
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    kept: dict[str, dict[int, int]] = {"plain": {}, "lean": {}}
    for blocks in (1, 2):
        for name, counts in kept.items():
            counts[blocks] = _llama_bytes(sizes, tokens, blocks, lean=name == "lean")
    formulas = {"plain": 16 * width + 6 * inner, "lean": 12 * width + 4 * inner}
    return {
        "model": "llama block",
        "shape": f"1x{tokens}, d {width}, f {inner}",
        "bytes_per_token": {name: (counts[2] - counts[1]) / tokens for name, counts in kept.items()},
        "formula": formulas,
        "everything_else_per_token": {name: (2 * counts[1] - counts[2]) / tokens for name, counts in kept.items()},
    }


def _llama_bytes(sizes: dict[str, int], tokens: int, blocks: int, *, lean: bool) -> int:
    model, batch = llama(1, tokens, **(sizes | {"num_hidden_layers": blocks}))
    model.to(torch.bfloat16).requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(True)  # every block lies above the cut
    with apply_lean(model) if lean else nullcontext(), keeping(model) as kept:
        loss = model(**batch).loss  # noqa: F841  else the address of a freed storage is counted once for two
    return sum(kept.values())


def _network_table(result: dict) -> Table:
    table = Table(
        f"{result['model']} {result['shape']}", "kept MiB", "peak MiB", "x full", "CPU s", "x full", "interval"
    )
    for name, peak in result["peak_bytes"].items():
        relative = result["time_to_full"].get(name)
        table.add_row(
            name,
            f"{result['kept_bytes'][name] / MIB:.0f}",
            f"{peak / MIB:.0f}",
            f"{result['peak_to_full'][name]:.3f}",
            f"{result['seconds'][name]['median']:.2f}" if name in result["seconds"] else "",
            f"{relative['median']:.3f}" if relative else "",
            f"{relative['low']:.3f} to {relative['high']:.3f}" if relative else "",
        )
    return table


def _block_table(result: dict) -> Table:
    table = Table(f"{result['model']} {result['shape']}", "bytes a token", "formula", "everything else")
    for name, count in result["bytes_per_token"].items():
        rest = result["everything_else_per_token"][name]
        table.add_row(name, f"{count:.0f}", str(result["formula"][name]), f"{rest:.0f}")
    return table
