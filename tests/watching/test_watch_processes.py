"""A watch of a model on several processes sees what one process with the whole batch does: DDP, FSDP2, HSDP, tensor
parallelism. Processes are started twice, two and four, and run all cases one after the other."""

from __future__ import annotations

import copy
import math

import oracle
import pytest
import torch
from process_cases import TOLERANCE, assert_equal, assert_same_state, local, net, outcomes, share, token_loss, tokens
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import zest_fast

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
STEPS = 2


# --- one training, on several processes and on one ----------------------------------------------------------------------


def whole_batches(count=1):
    """Of one step, one for each micro-batch."""
    x, y = tokens(8 * count)
    return list(zip(x.split(8), y.split(8), strict=True))


def own_batches(rank, processes, count=1):
    return [share(batch, rank, processes) for batch in whole_batches(count)]


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)


def train(model, micro_batches, *, hold_back=False, clip=True, steps=STEPS):
    """hold_back: gradients are brought together in the last micro-batch only."""
    optimizer = optimizer_of(model)
    for step in range(steps):
        for i, (x, y) in enumerate(micro_batches):
            brings_together(model, not hold_back or i + 1 == len(micro_batches))
            (token_loss(model(x), y) / len(micro_batches)).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)  # less than any gradient here
        optimizer.step()
        optimizer.zero_grad(set_to_none=step % 2 == 1)
    return optimizer


def brings_together(model, on):
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = on
    elif hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(on)


def expected(model, micro_batches, *, clip=True, layers=None):
    """Of each step what one process with the whole batch has, and how far each weight moved."""
    x, y = (torch.cat(parts) for parts in zip(*micro_batches, strict=True))
    optimizer, found = optimizer_of(model), []
    for _ in range(STEPS):
        now = copy.deepcopy(model)
        spec = oracle.measure(now, lambda now=now: token_loss(now(x), y), layers)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        token_loss(model(x), y).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        moved = {
            n: (float((p.detach() - before[n]).norm()), float(before[n].norm())) for n, p in model.named_parameters()
        }
        found.append((spec, moved))
    return found


def watched(model, micro_batches, *, metrics="all", updates=True, layers=None, every=1, watching=None, **training):
    log = []
    options = {"metrics": metrics, "updates": updates, "layers": layers, **(watching or {})}
    with zest_fast.watch(model, every=every, log=log.append, **options):
        train(model, micro_batches, **training)
    return log


def assert_as_expected(log, specs):
    assert [step.step for step in log] == list(range(STEPS))
    for step, (spec, moved) in zip(log, specs, strict=True):
        assert step.notes == () or all("did not meet" not in note for note in step.notes)
        assert_equal(step.profile, spec)
        weights = {spec.parameters[name]: values["grad_norm"] for name, values in spec.values.items()}
        assert step.totals["grad_norm"] == pytest.approx(math.hypot(*weights.values()), rel=TOLERANCE)
        ratio = math.hypot(*(moved[w][0] for w in weights)) / math.hypot(*(moved[w][1] for w in weights))
        assert step.totals["update_ratio"] == pytest.approx(ratio, rel=TOLERANCE)
        for name in spec.values:
            a, b = moved[spec.parameters[name]]
            assert step.profile[name]["update_ratio"] == pytest.approx(a / b, rel=TOLERANCE)


def state_after(model, micro_batches, **training):
    """What must be the same to the bit, watched or not."""
    optimizer = train(model, micro_batches, **training)
    return state(model, optimizer)


def state(model, optimizer):
    of_optimizer = [{key: local(x).clone() for key, x in s.items() if x is not None} for s in optimizer.state.values()]
    return {
        "weights": [local(p).clone() for p in model.parameters()],
        "gradients": [None if p.grad is None else local(p.grad).clone() for p in model.parameters()],
        "optimizer": of_optimizer,
        "random": torch.get_rng_state(),
    }


def assert_bit_equal(make, micro_batches, *, watching=None, **training):
    torch.manual_seed(7)
    plain = state_after(make(), micro_batches, **training)
    torch.manual_seed(7)
    model = make()
    with zest_fast.watch(model, every=1, metrics="all", updates=True, **(watching or {})):
        optimizer = train(model, micro_batches, **training)
    assert_same_state(plain, state(model, optimizer))


# --- layouts ------------------------------------------------------------------------------------------------------------


def mesh_of(*shape):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def sharded(model=None, **options):
    from torch.distributed.fsdp import fully_shard

    model = model or net()
    for block in (model.a, model.b):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def in_ddp():
    return DistributedDataParallel(net())


def hsdp():
    return sharded(mesh=mesh_of(2, distributed.get_world_size() // 2))


def check(make, rank, processes, **training):
    """Metrics with one micro-batch and with two, and that training is the same to the bit."""
    for count in (1, 2):
        own = own_batches(rank, processes, count)
        for hold_back in {False, count > 1}:
            log = watched(make(), own, hold_back=hold_back, **training)
            assert_as_expected(log, expected(net(), whole_batches(count), **training))
    watching = {"noise": True, "parts": True}
    assert_bit_equal(make, own_batches(rank, processes, 2), watching=watching, hold_back=True, **training)


def ddp_is_of_the_global_batch(rank, processes):
    check(in_ddp, rank, processes)


def fsdp_is_of_the_global_batch(rank, processes):
    check(sharded, rank, processes)


def hsdp_is_of_the_global_batch(rank, processes):
    check(hsdp, rank, processes)


ON_TWO = {
    case.__name__: case
    for case in (
        ddp_is_of_the_global_batch,
        fsdp_is_of_the_global_batch,
    )
}
ON_FOUR = {
    case.__name__: case
    for case in (
        ddp_is_of_the_global_batch,
        fsdp_is_of_the_global_batch,
        hsdp_is_of_the_global_batch,
    )
}


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    return outcomes(ON_TWO, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def on_four(tmp_path_factory):
    return outcomes(ON_FOUR, 4, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("case", ON_TWO)
def test_two_processes(case, on_two):
    assert not on_two[case], on_two[case]


@pytest.mark.parametrize("case", ON_FOUR)
def test_four_processes(case, on_four):
    assert not on_four[case], on_four[case]
