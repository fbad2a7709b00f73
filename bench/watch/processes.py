"""The same loops in several processes under DistributedDataParallel, on one machine with gloo."""

from __future__ import annotations

import json
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing, nn

from bench.watch.loops import Loop
from zest_fast.benchmarking.models import TINY, Case, bert

SMALL = Case(
    "bert",
    "2x32, 4 blocks of 256",
    partial(
        bert,
        2,
        32,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        vocab_size=4000,
    ),
)


def measure_processes(count: int, rounds: int, *, tiny: bool = False) -> dict[str, Any]:
    """A step takes as long as the slowest process does."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_run, (count, rounds, tiny, folder), nprocs=count)
        return json.loads((Path(folder) / "result.json").read_text())


def _run(rank: int, count: int, rounds: int, tiny: bool, folder: str) -> None:
    from bench.watch.__main__ import one_step, summary, timed  # which imports this module
    from bench.watch.loops import loops_of

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    try:
        case = TINY[0] if tiny else SMALL
        model, batch = case.build()
        loops = loops_of(nn.parallel.DistributedDataParallel(model), batch)

        def together(loop: Loop, before: int) -> float:
            distributed.barrier()
            seconds = torch.tensor(one_step(loop, before))
            distributed.all_reduce(seconds, distributed.ReduceOp.MAX)
            return float(seconds)

        times = timed(loops, rounds, together)
        if rank == 0:
            found = {
                "model": case.model,
                "shape": case.shape,
                "processes": count,
                "parameters": sum(p.numel() for p in model.parameters()),
                **summary(times),
            }
            (Path(folder) / "result.json").write_text(json.dumps(found))
    finally:
        distributed.destroy_process_group()
