"""A step of a LLaMA whose frozen weights stay on disk: resident memory and time, on a CPU.

    python -m bench.stream shape --model llama-7b --frozen nf4 --tokens 512 --folder /scratch
    python -m bench.stream shape --model llama-7b --frozen none --tokens 128 512 --folder /scratch --check
    python -m bench.stream compare --folder /scratch  # resident, streamed, cached, accelerate (compare.py)
    python -m bench.stream pair --folder /scratch     # a real model and data, from the same seeds (pair.py)
    python -m bench.stream costs --folder /scratch    # of unpacking a weight and of reading it, in FLOPs of a product

Weights are random, in bfloat16: memory and time do not depend on them. They are written into a folder of `--folder`
once, piece by piece, and stay there. Each case runs in a process of its own: it opens the folder, wraps five layers, as
a plan chooses them from `--lowest-block` on (half of the blocks where it is left out), and takes steps with AdamW
inside of backward. VmHWM, the kernel's high-water mark of resident memory, holds Python, torch and scratch as well, and
mapped pages for as long as they are resident; the page cache, which the system takes back when it needs memory, is not
in it. The largest parts of it, anonymous and of files, are sampled. `read_gib` is what the step read from the disk: the
page cache may hold all of it, so the first step after a reboot, or with less memory, is another one than the second.

`--check` compares the gradients of the layers that train with those of their blocks in float64, and with those in
bfloat16 with all weights in memory, from the same inputs and the same gradients of outputs, block by block, in another
process.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import zest_fast
from bench.measure import RESULTS, ROOT, write_result
from bench.prefix_cache import EPOCHS, RATE, ROUNDS, SAMPLES
from bench.stream.compare import TOKENS, arm_alone, compare
from bench.stream.measured import GIB, forget_peak, read_bytes, sampled, status
from bench.stream.pair import PAIR, pair_rows
from bench.stream.random_folder import write_random
from zest_fast.benchmarking.timing import interleave, ratio
from zest_fast.finetuning.quantised_formats import FORMATS
from zest_fast.foundation.options import Checkpoint
from zest_fast.lean.apply import apply_lean
from zest_fast.lean.optimizer import adamw, optimizer_in_backward
from zest_fast.planning.blocks import layout_of
from zest_fast.streaming.mapped_files import MappedFile

LAYERS = 5
COSTED = (11008, 4096)
SHAPES: dict[str, dict[str, Any]] = {
    "llama-7b": {},
    "llama-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "llama-3-8b": {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
    "llama-3-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
TINY = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 4000,
}


@dataclass(frozen=True)
class Case:
    """folder: of the weights. frozen: "int8", "nf4" or None. checkpoint: as for SelectiveBackward."""

    model: str
    frozen: str | None
    tokens: int
    folder: str
    layers: tuple[str, ...]
    checkpoint: Checkpoint | None = None
    steps: int = 2
    threads: int = 1


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.stream", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["shape", "costs", "compare", "pair", "arm"])
    parser.add_argument("--model", choices=list(SHAPES), default="llama-7b")
    parser.add_argument("--frozen", choices=["none", "int8", "nf4"], default="nf4")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--folder", type=Path, help="where the weights are written, and stay")
    parser.add_argument("--lowest-block", type=int, help="default: half of the blocks")
    parser.add_argument("--checkpoint", action="store_true", help="blocks recompute their activations in backward")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="gradients against float64, block by block")
    parser.add_argument("--again", action="store_true", help="measure what the JSON has already")
    parser.add_argument("--tiny", action="store_true", help="a toy of the same make, to see that it runs")
    parser.add_argument("--out", type=Path, help="folder of the JSON, in place of bench/results")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # how this starts itself
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "arm":
        print(json.dumps(arm_alone(options.case, options.folder, tiny=options.tiny)))
        return
    if options.case:
        case = json.loads(options.case)
        case = Case(**{**case, "layers": tuple(case["layers"])})
        print(json.dumps(check(case) if options.check else measure(case)))
        return
    if options.folder is None:
        parser.error("--folder is needed: the weights are written there")
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.what == "compare":
        rows = compare(options.folder, tiny=options.tiny)
        write_result(
            "stream_compared", {"dtype": "bfloat16", "batch": 1, "tokens": TOKENS}, rows, options.out, "stream"
        )
        return
    if options.what == "pair":
        settings = {"pair": PAIR, "rate": RATE, "rounds": ROUNDS, "epochs": EPOCHS, "samples": SAMPLES["smollm2"]}
        write_result("stream_pair", settings, pair_rows(options.folder), options.out, "stream")
        return
    if options.what == "costs":
        write_result("stream_costs", {"shape": COSTED, "tokens": 512}, costs(options.folder), options.out, "stream")
        return
    results = _Results(options.out)
    name, frozen = "tiny" if options.tiny else options.model, None if options.frozen == "none" else options.frozen
    checkpoint: Checkpoint | None = "above-cut" if options.checkpoint else None
    for tokens in options.tokens:
        if (name, frozen, tokens, checkpoint) in results.rows and not options.again:
            continue
        folder, layers = _weights(options, name, frozen)
        case = Case(name, frozen, tokens, str(folder), layers, checkpoint, options.steps, options.threads)
        row = _run(case) | {"planned_gib": _planned(options, name, case) / GIB}
        if options.check:
            row["check"] = _run(case, "--check")
        results.add(row)


class _Results:
    """The rows of the JSON, by case."""

    def __init__(self, out: Path | None) -> None:
        self._out = out
        path = (out or RESULTS) / "stream.json"
        found = json.loads(path.read_text())["results"] if path.exists() else []
        self.rows: dict[tuple, dict] = {_key(row): row for row in found}

    def add(self, row: dict) -> None:
        key = _key(row)
        self.rows[key] = row
        rows = [self.rows[key] for key in sorted(self.rows, key=lambda key: tuple(one or "" for one in key))]
        settings: dict[str, object] = {"dtype": "bfloat16", "batch": 1, "layers": LAYERS}
        write_result("stream", {**settings, "optimizer": "fused adamw in backward"}, rows, self._out)
        name = " ".join(map(str, filter(None, key)))
        times = ", ".join(f"{seconds:.1f}" for seconds in row["seconds"])
        print(f"{name} tokens: {row['peak_gib']:.2f} GiB of {row['files_gib']:.1f} GiB in files, {times} s", flush=True)


def _key(row: dict) -> tuple:
    return row["model"], row["frozen"], row["tokens"], row["checkpoint"]


def _weights(options: argparse.Namespace, name: str, frozen: str | None) -> tuple[Path, tuple[str, ...]]:
    """The folder of the weights, written where it is not there, and the layers that train."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**(TINY if options.tiny else SHAPES[name]), use_cache=False)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    with torch.device("meta"):
        layout = layout_of(LlamaForCausalLM(config))
    lowest = options.lowest_block if options.lowest_block is not None else len(layout.blocks) // 2
    layers = layout.stand_ins(LAYERS, lowest)
    folder = options.folder / f"{name}-{frozen or 'bfloat16'}-from-{lowest}"
    if not folder.exists():
        options.folder.mkdir(parents=True, exist_ok=True)
        print(f"writing {folder}", flush=True)
        write_random(folder, config, frozen, layers)
    return folder, layers


def _planned(options: argparse.Namespace, name: str, case: Case) -> int:
    """Bytes of tensors, by a dry run."""
    from transformers import LlamaConfig

    config = LlamaConfig(**(TINY if options.tiny else SHAPES[name]), use_cache=False)
    how: dict[str, Any] = {"checkpoint": case.checkpoint, "frozen": case.frozen, "stream": True}
    sizes = {"batch_size": 1, "sequence_length": case.tokens}
    return zest_fast.plan(config, case.layers, optimizer="adamw-fused-in-backward", **sizes, **how).peak_bytes


def _run(case: Case, *options: str) -> dict:
    """In a process of its own."""
    command = [sys.executable, "-m", "bench.stream", "shape", "--case", json.dumps(asdict(case)), *options]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def measure(case: Case) -> dict:
    """One case, in this process, which should do nothing else."""
    torch.set_num_threads(case.threads)
    started = time.perf_counter()
    model = zest_fast.open_streamed(case.folder, train=case.layers)
    opening = time.perf_counter() - started
    model.train()  # or transformers would not checkpoint
    tuned = zest_fast.SelectiveBackward(model, case.layers, checkpoint=case.checkpoint)
    gc.collect()
    wrapping, peak_when_wrapped = time.perf_counter() - started - opening, status("VmHWM")
    peak_is_of_steps = forget_peak()
    optimizer = adamw(tuned.parameters(), lr=1e-4, fused=True)
    losses: list[float] = []
    seconds: list[float] = []
    read = [read_bytes()]
    with sampled("RssAnon", "RssFile") as largest, optimizer_in_backward(optimizer):
        for _ in range(case.steps):
            started = time.perf_counter()
            loss = model(**_batch(model, case.tokens)).loss
            loss.backward()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - started)
            read.append(read_bytes())
    peak = status("VmHWM")
    tuned.verify()
    return {
        "model": case.model,
        "frozen": case.frozen,
        "tokens": case.tokens,
        "checkpoint": case.checkpoint,
        "files_gib": sum(file.stat().st_size for file in Path(case.folder).glob("*.safetensors")) / GIB,
        "trained_gib": sum(parameter.nbytes for parameter in tuned.parameters()) / GIB,
        "peak_gib": peak / GIB,
        "peak_is_of_steps": peak_is_of_steps,
        "peak_when_wrapped_gib": peak_when_wrapped / GIB,
        "largest_anonymous_gib": largest["RssAnon"] / GIB,
        "largest_of_files_gib": largest["RssFile"] / GIB,
        "resident_after_gib": status("VmRSS") / GIB,
        "seconds": seconds,
        "read_gib": [(after - before) / GIB for before, after in pairwise(read)],
        "opening_seconds": opening,
        "wrapping_seconds": wrapping,
        "losses": losses,
        "cut": tuned.cut,
        "layers": case.layers,
        "load_average": os.getloadavg()[0],
    }


def check(case: Case) -> dict:
    """Relative errors of the trained layers' gradients, by layer, and the largest; whether they are those of the same
    blocks with all weights in memory, bit for bit, whose errors come from bfloat16 alone."""
    torch.set_num_threads(case.threads)
    model: Any = zest_fast.open_streamed(case.folder, train=case.layers)
    tuned = zest_fast.SelectiveBackward(model, case.layers)
    blocks = {number: block for number, block in enumerate(model.model.layers) if _trained(block)}
    seen: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    gradients: dict[int, Tensor] = {}
    handles = []
    for number, block in blocks.items():
        watch = _Watch(number, seen, gradients)
        handles.append(block.register_forward_hook(watch, with_kwargs=True))
    model(**_batch(model, case.tokens)).loss.backward()
    for handle in handles:
        handle.remove()
    tuned.remove()
    errors, of_resident, same = {}, {}, {}
    for number, block in blocks.items():
        wanted, resident = (
            _resident(model, number, block, *seen[number], gradients[number], dtype)
            for dtype in (torch.float64, torch.bfloat16)
        )
        for name, gradient in wanted.items():
            found = block.get_submodule(name).weight.grad
            assert found is not None
            layer = f"model.layers.{number}.{name}"
            errors[layer] = float((found.double() - gradient).norm() / gradient.norm())
            of_resident[layer] = float((resident[name].double() - gradient).norm() / gradient.norm())
            same[layer] = torch.equal(found, resident[name])
    if set(errors) != set(case.layers):
        raise RuntimeError(f"gradients of {sorted(errors)} were checked, and {sorted(case.layers)} train")
    return {
        "equal_to_resident": all(same.values()),
        "largest_relative_error": max(errors.values()),
        "relative_errors": errors,
        "relative_errors_of_resident": of_resident,
    }


class _Watch:
    """A forward hook: keeps what a block got, and the gradient of what it gave."""

    def __init__(self, number: int, seen: dict, gradients: dict) -> None:
        self._number, self._seen, self._gradients = number, seen, gradients

    def __call__(self, block: nn.Module, args: tuple, keywords: dict, output: Any) -> None:
        self._seen[self._number] = args, keywords
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.register_hook(lambda gradient: self._gradients.update({self._number: gradient.detach()}))


def _trained(block: nn.Module) -> dict[str, nn.Parameter]:
    """By the names of their layers in the block."""
    return {name.removesuffix(".weight"): p for name, p in block.named_parameters() if p.requires_grad}


def _resident(
    model: Any, number: int, block: nn.Module, args: tuple, keywords: dict, gradient: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Gradients of what trains in a block of plain modules, from the same input and the same gradient of its output."""
    with torch.device("meta"):
        plain = type(block)(model.config, number)
    for name, module in plain.named_modules():
        if "weight" in module._parameters:
            weight: Any = block.get_submodule(name).weight
            module._parameters["weight"] = nn.Parameter(weight.detach().to(dtype, copy=True), requires_grad=False)
    trained = list(_trained(block))
    for name in trained:
        plain.get_submodule(name).weight.requires_grad_(True)  # type: ignore[operator, union-attr]
    args, keywords = _in(dtype, args), _in(dtype, keywords)
    if dtype != torch.float64:
        apply_lean(plain)  # as the streamed one is: what is recomputed rounds otherwise in bfloat16
    output = plain.eval()(*args, **keywords)
    (output[0] if isinstance(output, tuple) else output).backward(gradient.to(dtype))
    return {name: plain.get_submodule(name).weight.grad for name in trained}  # type: ignore[misc, union-attr]


def costs(folder: Path) -> list[dict[str, Any]]:
    """What unpacking, and mapping and dropping, one weight costs: in FLOPs, two a multiplication and addition, of a
    product of matrices in bfloat16 that takes as long, interleaved."""
    weight, x = torch.randn(COSTED).to(torch.bfloat16), torch.randn(512, COSTED[1]).to(torch.bfloat16)
    path = folder / "weight.safetensors"
    save_file({"weight": weight}, path)
    mapped = MappedFile(path).parameter("weight")
    packed = {name: FORMATS[name].pack(weight) for name in FORMATS}

    def use_mapped() -> None:
        nn.functional.linear(x, mapped)
        mapped.pages.drop()  # type: ignore[attr-defined]

    runs: dict[str, Any] = {"product": lambda: nn.functional.linear(x, weight), "product, mapped": use_mapped}
    runs |= {
        name: partial(FORMATS[name].unpack, *parts, weight.shape, torch.bfloat16) for name, parts in packed.items()
    }
    seconds = interleave(runs, 9, clock=time.process_time)
    path.unlink()
    flops = 2 * 512
    found = [
        {"what": f"unpack {name}", "flops": flops * (each := ratio(seconds, name, "product")).median, **each.as_dict()}
        for name in FORMATS
    ]
    read = ratio(seconds, "product, mapped", "product")
    found.append({"what": "map and drop", "flops": flops * (read.median - 1), **read.as_dict()})
    for row in found:
        print(f"{row['what']}: {row['flops']:.0f} FLOPs a weight", flush=True)
    return found


def _in(dtype: torch.dtype, value: Any) -> Any:
    from torch.utils._pytree import tree_map_only

    def converted(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()

    return tree_map_only(Tensor, converted, value)


def _batch(model: Any, tokens: int) -> dict[str, Tensor]:
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


if __name__ == "__main__":
    main()
