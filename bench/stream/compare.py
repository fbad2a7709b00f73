"""A step of the same model resident, streamed, cached and both, beside plain freezing and accelerate's disk offload.

A LLaMA of 1.1 B parameters in bfloat16 (random weights), 1 x 256 tokens, five layers from half of the depth up, AdamW
in the backward pass. Times are interleaved, in one process, on warm files; peaks (VmHWM) are those of a process for
each arm, which takes two steps. "plain freezing" is requires_grad_(False) and nothing else; "accelerate, disk" is
`dispatch_model` with frozen blocks on the disk, as its guide has it. Its `cpu_offload` is no arm: where the CPU
computes, too, each layer gets the very memory that was put aside (accelerate 1.15: equal addresses), so that nothing
is saved, and what trains gets no gradient, as every parameter is on the meta device between passes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zest_fast
from bench.measure import ROOT
from bench.stream.measured import GIB, forget_peak, status
from zest_fast.benchmarking.timing import interleave, median, ratio
from zest_fast.lean.optimizer import adamw, optimizer_in_backward
from zest_fast.planning.blocks import layout_of

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
TINY = {**SHAPE, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
TOKENS = 256
ROUNDS = 5
WARM = 9
"""Steps before: a cache compares its 1st, 2nd, 4th and 8th pass with the full one."""
ARMS = (
    "plain freezing",
    "resident",
    "streamed",
    "resident, cached",
    "streamed, cached",
    "streamed int8",
    "accelerate, disk",
)


def compare(folder: Path, *, tiny: bool = False) -> list[dict[str, Any]]:
    """A row for each arm. folder: where the weights are written, and stay."""
    weights, layers = _weights(folder, tiny)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        steps = {arm: step_of(arm, weights, layers, Path(scratch)) for arm in ARMS}
        losses = {arm: [step(), step()] for arm, step in steps.items()}
        for arm, step in steps.items():
            for _ in range(WARM if "cached" in arm else 0):
                step()
        seconds = interleave(steps, ROUNDS, warmup=0)
        del steps
        rows = []
        for arm in ARMS:
            command = [sys.executable, "-m", "bench.stream", "arm", "--folder", str(folder), "--case", arm]
            command += ["--tiny"] if tiny else []
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            row: dict[str, Any] = {"arm": arm, "losses": losses[arm], **json.loads(done.stdout.splitlines()[-1])}
            row["seconds"] = median(seconds[arm]).as_dict()
            row["to_resident"] = ratio(seconds, arm, "resident").as_dict()
            rows.append(row)
            print(f"{arm}: {row['to_resident']['median']:.2f} of resident, {row['peak_gib']:.2f} GiB", flush=True)
    return rows


def arm_alone(arm: str, folder: Path, *, tiny: bool) -> dict[str, Any]:
    """Peak of this process in the second and third step."""
    weights, layers = _weights(folder, tiny)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        step = step_of(arm, weights, layers, Path(scratch))
        step()
        forget_peak()
        step()
        step()
        return {"peak_gib": status("VmHWM") / GIB}


def _weights(folder: Path, tiny: bool) -> tuple[Path, tuple[str, ...]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**(TINY if tiny else SHAPE), use_cache=False)
    with torch.device("meta"):
        layout = layout_of(LlamaForCausalLM(config))
    layers = layout.stand_ins(5, len(layout.blocks) // 2)
    path = folder / f"compared-{'tiny' if tiny else '1b'}"
    if not path.exists():
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    packed = folder / f"{path.name}-int8"
    if not packed.exists():
        zest_fast.pack(path, packed, frozen="int8")
    return path, layers


def step_of(arm: str, weights: Path, layers: tuple[str, ...], scratch: Path) -> Callable[[], float]:
    """A function that takes one step and returns the loss before it."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    if arm.startswith("streamed"):
        folder = weights.with_name(f"{weights.name}-int8") if "int8" in arm else weights
        model: Any = zest_fast.open_streamed(folder, train=layers)
    else:
        model = LlamaForCausalLM.from_pretrained(weights, dtype=torch.bfloat16)
    model.train()
    if arm == "plain freezing" or arm.startswith("accelerate"):
        model.requires_grad_(False)
        for name in layers:
            model.get_submodule(name).requires_grad_(True)
        if arm.startswith("accelerate"):
            model = _offloaded(model, layers, scratch / "offloaded")
    else:
        cache = zest_fast.PrefixCache(scratch / arm.replace(" ", "-")) if "cached" in arm else None
        zest_fast.SelectiveBackward(model, layers, cache=cache)
    optimizer = adamw([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = torch.randint(model.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))

    def step() -> float:
        with optimizer_in_backward(optimizer):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        return loss.item()

    return step


def _offloaded(model: nn.Module, layers: tuple[str, ...], folder: Path) -> nn.Module:
    from accelerate import dispatch_model

    trained = {name.split(".")[2] for name in layers}
    places: dict[str, str] = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places["model.rotary_emb"] = "cpu"
    for number, _ in enumerate(model.model.layers):  # type: ignore[arg-type, union-attr]
        places[f"model.layers.{number}"] = "cpu" if str(number) in trained else "disk"
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)
