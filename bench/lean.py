"""`python -m bench.lean`: what a step of selective fine-tuning keeps and costs, plain and lean, beside full fine-tuning.

    full    every parameter trains, batch norm in training mode
    cut     five layers and the head train, backward ends at the lowest of them (at half the depth)
    lean    the same, and what is frozen above the cut keeps only what the gradient of its input needs

Convolutional networks in float32 with batches of 32 images of 224²: counted bytes of two AdamW steps (states included,
weights and batch not), bytes that autograd keeps, and processor time of a step. LLaMA in bfloat16: bytes that a frozen
block keeps for each token, beside the formulas 16 d + 6 f (plain) and 12 d + 4 f (lean); and those of the loss.

Writes bench/results/lean.json. About ten minutes on one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.measure import interleave, median, peak_bytes, ratio, write_result
from bench.models import TINY, Batch, Case, llama, mobilenetv2, resnet50
from bench.peers import profiled_layers
from zest_fast import SelectiveBackward
from zest_fast.finetuning.lean import apply_lean
from zest_fast.finetuning.lean_optimizer import adamw

MIB = 2**20
CHOSEN = 5
NETWORKS = (
    Case("resnet50", "32x224²", partial(resnet50, 32, 224)),
    Case("mobilenetv2", "32x224²", partial(mobilenetv2, 32, 224)),
)
BLOCK = {"hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 8, "num_key_value_heads": 8}
TINY_BLOCK = {"hidden_size": 32, "intermediate_size": 88, "num_attention_heads": 2, "num_key_value_heads": 2}


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.lean", description="lean saving beside full fine-tuning")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--quick", action="store_true", help="tiny models: checks that everything runs, says nothing")
    parser.add_argument("--out", type=Path, help="folder for the JSON (default bench/results)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=130)
    networks = [case for case in TINY if case.model in ("resnet50", "mobilenetv2")] if options.quick else NETWORKS
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
    """Bytes and processor time of a step of each of the three."""
    peaks, kept, losses = {}, {}, {}
    for name, tuned in _variants(case):
        with tuned as step:
            losses[name], kept[name] = kept_bytes(step.model, step.loss)
            peaks[name] = peak_bytes(step.twice)
    layers = half_depth(case.build()[0])
    times = _times(case, rounds)
    return {
        "model": case.model,
        "shape": case.shape,
        "layers": layers,
        "loss": losses,
        "kept_bytes": kept,
        "peak_bytes": peaks,
        "peak_to_full": {name: peak / peaks["full"] for name, peak in peaks.items()},
        "seconds": {name: median(values).as_dict() for name, values in times.items()},
        "time_to_full": {name: ratio(times, name, "full").as_dict() for name in times if name != "full"},
    }


class Step:
    """A training step of one model; the optimizer's states come into being with the first one."""

    def __init__(self, model: nn.Module, batch: Batch, parameters: list[nn.Parameter]) -> None:
        self.model, self.batch = model, batch
        self.parameters = parameters
        self.optimizer = adamw(parameters, lr=1e-5)

    def loss(self) -> Tensor:
        return self.model(**self.batch).loss

    def once(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def twice(self) -> None:
        self.optimizer = adamw(self.parameters, lr=1e-5)  # without states
        self.once()
        self.once()


def _variants(case: Case) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "full", _full(case)
    yield "cut", _selective(case, lean=False)
    yield "lean", _selective(case, lean=True)


@contextmanager
def _full(case: Case) -> Iterator[Step]:
    model, batch = case.build()
    yield Step(model, batch, list(model.parameters()))


@contextmanager
def _selective(case: Case, *, lean: bool) -> Iterator[Step]:
    model, batch = case.build()
    with SelectiveBackward(model, half_depth(model), lean=False) as tuned:
        with apply_lean(model) if lean else nullcontext():
            yield Step(model, batch, list(tuned.parameters()))


def half_depth(model: nn.Module) -> list[str]:
    """CHOSEN layers at even distances from the one at half the depth to the last before the head (in order of use)."""
    names = list(profiled_layers(model))[:-1]
    lowest, last = len(names) // 2, len(names) - 1
    return list(dict.fromkeys(names[lowest + (last - lowest) * i // (CHOSEN - 1)] for i in range(CHOSEN)))


def _times(case: Case, rounds: int) -> dict[str, list[float]]:
    """Processor seconds of a step: other processes share the cores, and do not count."""
    contexts = dict(_variants(case))
    steps = {name: context.__enter__() for name, context in contexts.items()}
    try:
        return interleave({name: step.once for name, step in steps.items()}, rounds, clock=time.process_time)
    finally:
        for context in contexts.values():
            context.__exit__(None, None, None)


def kept_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[float, int]:
    """The loss, and the bytes that autograd keeps for its backward pass: each storage once, without the model's own."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value = loss()
    return float(value.detach()), sum(kept.values())


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
    with apply_lean(model) if lean else nullcontext():
        return kept_bytes(model, lambda: model(**batch).loss)[1]


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
            f"{result['seconds'][name]['median']:.2f}",
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


if __name__ == "__main__":
    main()
