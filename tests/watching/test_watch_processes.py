"""Two processes under DistributedDataParallel: gradients are those of the whole batch; sharded models are refused."""

import math

import pytest
import torch
from torch import distributed, multiprocessing, nn

import zest_fast

PROCESSES = 2
pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(inplace=True), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))


def data():
    x = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(0))
    return list(zip(x, x[..., :3].argmax(-1), strict=True))


def loss_of(model, x, y):
    return nn.functional.cross_entropy(model(x), y)


def test_gradients_are_those_of_all_processes(tmp_path):
    multiprocessing.spawn(run, (str(tmp_path),), nprocs=PROCESSES)


def run(rank, folder):
    """Runs in each process, where an assertion that fails ends the test."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    try:
        for view in (False, True):
            for accumulated in (1, 2):
                compare(rank, view, accumulated)
        in_backward(rank)
        unwrapped(rank)
        sharded()
    finally:
        distributed.destroy_process_group()


def compare(rank, view, accumulated):
    model, alone = model_of(), model_of()
    parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=view)
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (parallel, alone)]
    log, expected = [], []
    batches = data()
    with (
        zest_fast.watch(parallel, every=1, metrics="all", noise=True, updates=True, log=log.append) as watched,
        zest_fast.watch(alone, every=1, metrics="all", noise=True, updates=True, log=expected.append) as one,
    ):
        for start in range(0, 4, accumulated):
            for optimizer in optimizers:
                optimizer.zero_grad()
            for i, (x, y) in enumerate(batches[start : start + accumulated]):
                own = slice(rank * 4, rank * 4 + 4)
                if i + 1 < accumulated:
                    with parallel.no_sync():
                        (loss_of(parallel, x[own], y[own]) / accumulated).backward()
                else:
                    (loss_of(parallel, x[own], y[own]) / accumulated).backward()
            optimizers[0].step()
            for x, y in batches[start : start + accumulated]:
                for part in (slice(0, 4), slice(4, 8)):
                    (loss_of(alone, x[part], y[part]) / accumulated / PROCESSES).backward()
            optimizers[1].step()
    for found, wanted in zip(log, expected, strict=True):
        for metric in wanted.profile.metrics:
            if metric.startswith(("act_", "fisher", "noise")):
                assert metric.startswith("noise") or not any(map(math.isnan, found.profile.column(metric)))
                continue
            # The sum over processes is another order: a few roundings of float32.
            assert found.profile.column(metric) == pytest.approx(wanted.profile.column(metric), rel=1e-5, abs=1e-8)
        assert any("act and fisher are those of the batch of this process" in note for note in found.notes)
        assert found.profile.names == wanted.profile.names
    # A process knows |g_i|² of its own parts: the mean of what they estimate is what one with all of them does.
    for key, estimates in one._reporter._noise._estimates.items():
        own = watched._reporter._noise._estimates[key]
        mean = torch.tensor([(found.square, found.trace) for found in own], dtype=torch.float64)
        distributed.all_reduce(mean)
        for (square, trace), wanted in zip((mean / PROCESSES).tolist(), estimates, strict=True):
            assert square == pytest.approx(wanted.square, rel=1e-4, abs=1e-7)
            assert trace == pytest.approx(wanted.trace, rel=1e-4)


def in_backward(rank):
    """An optimizer in the backward pass sees the local gradient; what `.grad` holds then is not that of all."""
    model = nn.parallel.DistributedDataParallel(model_of())
    seen = []
    handle = model.module[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (x, y), *_ = data()
    with zest_fast.watch(model, every=1) as watched:
        loss_of(model, x[rank * 4 : rank * 4 + 4], y[rank * 4 : rank * 4 + 4]).backward()
        whole = model.module[0].weight.grad.clone()
        optimizer.step()
    handle.remove()
    assert seen and watched.last.profile["0"]["grad_norm"] == pytest.approx(float(whole.norm()), rel=1e-6)


def unwrapped(rank):
    model = model_of()
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with zest_fast.watch(model, every=1, noise=True) as watched:
        for x, y in data()[:2]:
            loss_of(parallel, x, y).backward()
        optimizer.step()
    notes = " ".join(watched.last.notes)
    assert math.isnan(watched.last.totals["noise_scale"]) and "pass the model that DistributedDataParallel" in notes
    assert "what is seen is of this process" in notes


def sharded():
    from torch.distributed.fsdp import fully_shard

    model = model_of()
    fully_shard(model)
    with pytest.raises(NotImplementedError, match=r"parameter '0\.weight' is a DTensor .* cannot be watched yet"):
        zest_fast.watch(model)
