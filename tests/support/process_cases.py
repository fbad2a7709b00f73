"""Runs cases in several processes that are started once, and brings back what became of each of them."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import oracle
import torch
from torch import distributed, multiprocessing, nn
from torch.nn import functional as F

import zest_fast

_IMPORTED = ["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "transformers", "process_cases"]
TOLERANCE = 1e-6  # against the float64 reference
Case = Callable[[int, int], None]


def outcomes(cases: Mapping[str, Case], processes: int, folder: Path) -> dict[str, str]:
    """What went wrong in each case, on any process; empty where nothing did. Cases get (rank, processes)."""
    start(_run, (cases, processes, str(folder)), processes)
    by_rank = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    return {name: "\n".join(found[name] for found in by_rank if found[name]) for name in cases}


def start(function: Callable[..., None], arguments: tuple, processes: int) -> None:
    """Runs a function in new processes, as ``function(rank, *arguments)``; raises what it raises.

    They are forked from a server that has imported everything once, and has run nothing.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(_IMPORTED)
    multiprocessing.start_processes(function, arguments, processes, start_method="forkserver")


def _run(rank: int, cases: Mapping[str, Case], processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=60),  # of a case that leaves the processes out of step
    )
    found = {}
    for name, case in cases.items():
        try:
            case(rank, processes)
            found[name] = ""
        except BaseException:
            found[name] = f"process {rank}: {traceback.format_exc()}"
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """A small transformer without attention, and an output that is overwritten in place."""

    def __init__(self, width: int = 8, inner: int = 12, words: int = 20) -> None:
        super().__init__()
        self.embed, self.first = nn.Embedding(words, width), nn.Linear(width, width)
        self.a, self.b, self.norm = Block(width, inner), Block(width, inner), nn.LayerNorm(width)
        self.head = nn.Linear(width, words)

    def forward(self, x):
        x = F.relu(self.first(self.embed(x)), inplace=True)
        return self.head(self.norm(self.b(self.a(x))))


def net(**sizes: int) -> Net:
    torch.manual_seed(1)
    return Net(**sizes).double()


class Images(nn.Module):
    """Convolutions, plain and depthwise, in a layout of memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.b, self.head = nn.Conv2d(6, 6, 3, groups=6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(F.relu(self.b(F.relu(self.norm(self.a(x))))).mean((2, 3)))


def images() -> nn.Module:
    torch.manual_seed(1)
    return Images().double().to(memory_format=torch.channels_last).eval()


def tokens(samples: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randint(20, (2, samples, 8), generator=generator)
    return x, y


def token_loss(output, targets):
    return F.cross_entropy(output.flatten(0, 1), targets.flatten())


def share(batch, rank: int, processes: int):
    return tuple(part[rank::processes] for part in batch)


def whole(model: nn.Module, batch=None, loss_fn=token_loss, layers=None) -> oracle.Measurement:
    """The reference: one process with the whole batch."""
    x, y = tokens() if batch is None else batch
    return oracle.measure(model, lambda: loss_fn(model(x), y), layers)


def assert_equal(got: zest_fast.LayerProfile, spec: oracle.Measurement, *, but: tuple[str, ...] = ()) -> None:
    """Every metric of every layer but some is that of the reference; the profile is the same on every process."""
    assert set(got) == set(spec.values)
    for name, expected in spec.values.items():
        for metric in set(oracle.METRICS) - set(but):
            error = oracle.relative_error(metric, got[name][metric], expected, spec.numel[name])
            assert error <= TOLERANCE, (
                f"{name} {metric}: {got[name][metric]} instead of {expected[metric]} ({error:.1e})"
            )
    assert abs(got.loss - spec.loss) <= TOLERANCE * abs(spec.loss)
    assert_the_same_everywhere(got)


def assert_the_same_everywhere(got: zest_fast.LayerProfile) -> None:
    mine = (got.names, got.metrics, got.values.tobytes(), got.info, got.loss, got.backend, got.uncovered)
    everywhere = [None] * distributed.get_world_size()
    distributed.all_gather_object(everywhere, mine)
    assert all(other == mine for other in everywhere)


def state_of(model: nn.Module) -> dict:
    """What a profile must leave as it is, by the objects where they are objects."""
    parameters = dict(model.named_parameters())
    return {
        "values": {n: local(p).clone() for n, p in parameters.items()},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "identities": {n: id(p) for n, p in parameters.items()},
        "gradients": {
            n: None if p.grad is None else (id(p.grad), local(p.grad).clone()) for n, p in parameters.items()
        },
        "flags": {n: p.requires_grad for n, p in parameters.items()},
        "modes": [m.training for m in model.modules()],
        "hooks": [
            (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks)) for m in model.modules()
        ],
        "parameter hooks": [list(getattr(p, "_post_accumulate_grad_hooks", None) or ()) for p in parameters.values()],
        "random": torch.get_rng_state(),
    }


def local(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to_local() if hasattr(x, "to_local") else x.detach()


def assert_same_state(before: object, after: object, where: str = "") -> None:
    if isinstance(before, torch.Tensor):
        assert torch.equal(before, after), where
    elif isinstance(before, dict):
        assert before.keys() == after.keys(), where
        for key in before:
            assert_same_state(before[key], after[key], f"{where}/{key}")
    elif isinstance(before, tuple | list):
        assert len(before) == len(after), where
        for i, (a, b) in enumerate(zip(before, after, strict=True)):
            assert_same_state(a, b, f"{where}/{i}")
    else:
        assert before == after, where
