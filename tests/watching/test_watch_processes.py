"""A watch of a model on several processes sees what one process with the whole batch does: DDP, FSDP2, HSDP, tensor
parallelism. Processes are started twice, two and four, and run all cases one after the other."""

from __future__ import annotations

import copy
import math
import os
import signal
import tempfile
import threading
import time
import warnings
from contextlib import contextmanager

import oracle
import pytest
import torch
from process_cases import TOLERANCE, assert_equal, assert_same_state, local, net, outcomes, share, token_loss, tokens
from small_models import llama
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import zest_fast
from zest_fast.watching.processes import step_meeting
from zest_fast.watching.processes.shared_window import SharedWindowStatistics

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
STEPS = 2


# --- one training, on several processes and on one --------------------------------------------------------------------


def whole_batches(count=1):
    """Of one step, one for each micro-batch."""
    x, y = tokens(8 * count)
    return list(zip(x.split(8), y.split(8), strict=True))


def own_batches(rank, processes, count=1):
    return [share(batch, rank, processes) for batch in whole_batches(count)]


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)


def train(model, micro_batches, *, hold_back=False, clip=True, steps=STEPS, optimizer=None):
    """hold_back: gradients are brought together in the last micro-batch only."""
    optimizer = optimizer or optimizer_of(model)
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


# --- layouts ----------------------------------------------------------------------------------------------------------


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
    log = watched(make(), own, metrics=None, hold_back=True)  # without hooks on modules every micro-batch counts
    assert [step.profile.loss for step in log] == pytest.approx(
        [spec.loss for spec, _ in expected(net(), whole_batches(2))], rel=TOLERANCE
    )
    watching = {"noise": True, "parts": True}
    assert_bit_equal(make, own_batches(rank, processes, 2), watching=watching, hold_back=True, **training)


def ddp_is_of_the_global_batch(rank, processes):
    check(in_ddp, rank, processes)


def fsdp_is_of_the_global_batch(rank, processes):
    check(sharded, rank, processes)


def hsdp_is_of_the_global_batch(rank, processes):
    check(hsdp, rank, processes)


# --- FSDP2 ------------------------------------------------------------------------------------------------------------


def fsdp_with_its_options(rank, processes):
    from torch.distributed.fsdp import CPUOffloadPolicy

    own, specs = own_batches(rank, processes), expected(net(), whole_batches())
    kept = {"reshard_after_forward": 2 if processes == 4 else False}
    for options in ({}, kept, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}):
        model = sharded(mesh=mesh_of(processes), **options)
        optimizer, shards = optimizer_of(model), [id(p) for p in model.parameters()]
        with torch.no_grad():
            model(own[0][0])
        assert shards != [id(p) for p in model.parameters()]  # the root at least stays gathered
        assert_as_expected(watched(model, own, optimizer=optimizer), specs)


def fsdp_of_uneven_and_empty_shards(rank, processes):
    sizes = {"width": 7, "inner": 1, "words": 20}
    log = watched(sharded(net(**sizes)), own_batches(rank, processes))
    assert_as_expected(log, expected(net(**sizes), whole_batches()))


def fsdp_in_mixed_precision(rank, processes):
    """Gradients are those that the optimizer gets: of the float32 shards."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(net().float(), mp_policy=policy)
    (x, y), *_ = own_batches(rank, processes)
    with zest_fast.watch(model, every=1, metrics="all", noise=True, parts=True) as watch:
        token_loss(model(x).float(), y).backward()
        seen = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        values = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
        optimizer_of(model).step()
    assert not watch.last.notes, watch.last.notes
    for row in watch.last.profile.info.values():
        of_row = watch.last.profile[name_of(row)]
        g, w = seen[row["parameter"]].double(), values[row["parameter"]].double()
        assert of_row["grad_norm"] == pytest.approx(float(g.norm()), rel=TOLERANCE)
        assert of_row["snip"] == pytest.approx(float((g * w).abs().sum()), rel=TOLERANCE)
        assert of_row["weight_std"] == pytest.approx(float(w.std(correction=0)), rel=TOLERANCE)
    (part,) = watch.last.parts
    assert all(map(math.isfinite, part.column("grad_norm"))) and "noise_scale" in watch.last.totals


def name_of(row):
    return row["module"]


def fsdp_of_what_is_frozen(rank, processes):
    """Rows that do not train have weights and outputs; what is frozen or thawed in between is followed."""
    model, alone = sharded(), net()
    own = own_batches(rank, processes)
    model.a.up.weight.requires_grad_(False)
    log = []
    with zest_fast.watch(model, every=1, metrics="all", frozen=True, log=log.append):
        train(model, own, steps=1, clip=False)
        model.b.up.weight.requires_grad_(False)
        train(model, own, steps=2, clip=False)
    (spec, _), *_ = expected(alone, whole_batches())
    for metric in ("weight_std", "act_std", "act_mean"):
        assert log[0].profile["a.up"][metric] == pytest.approx(spec.values["a.up"][metric], rel=TOLERANCE, abs=1e-9)
    assert math.isnan(log[0].profile["a.up"]["grad_norm"]) and log[0].profile["b.up"]["grad_norm"] > 0
    assert math.isnan(log[2].profile["b.up"]["grad_norm"]) and log[2].profile["b.up"]["weight_std"] > 0


def fsdp_that_reduces_never(rank, processes):
    """An optimizer that steps while FSDP2 holds gradients back steps without them, and the step says so."""
    model, (x, y) = sharded(), own_batches(rank, processes)[0]
    optimizer = optimizer_of(model)
    with zest_fast.watch(model, every=1) as watch:
        model.set_requires_gradient_sync(False)
        for _ in range(2):
            token_loss(model(x), y).backward()
        optimizer.step()
        assert any("held gradients back" in note for note in watch.last.notes)
        assert all(math.isnan(row) for row in watch.last.profile.column("grad_norm"))
        model.set_requires_gradient_sync(True)
        token_loss(model(x), y).backward()
        optimizer.step()
    assert watch.last.totals["grad_norm"] > 0 and watch.last.step == 1


def fsdp_of_two_dimensions_of_gradients(rank, processes):
    """HSDP that reduces over shards in each micro-batch, and over replicas in the last."""
    model, own = hsdp(), own_batches(rank, processes, 2)
    specs = expected(net(), whole_batches(2))
    log = []
    with zest_fast.watch(model, every=1, metrics="all", updates=True, log=log.append):
        optimizer = optimizer_of(model)
        for _ in range(STEPS):
            for i, (x, y) in enumerate(own):
                model.set_requires_all_reduce(i == 1)
                (token_loss(model(x), y) / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
    assert_as_expected(log, specs)


def optimizers_in_the_backward_pass(rank, processes):
    """FSDP2 calls hooks of a shard once its gradient is reduced."""
    model = sharded()

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    log, (x, y) = [], own_batches(rank, processes)[0]
    with zest_fast.watch(model, every=1, metrics="all", updates=True, log=log.append):
        for _ in range(STEPS):
            token_loss(model(x), y).backward()
    assert [one.step for one in log] == list(range(STEPS))
    (spec, _), *_ = expected(net(), whole_batches())
    assert_equal(log[0].profile, spec)
    assert log[0].totals["update_ratio"] > 0


# --- noise scale, parts, overflow, histograms -------------------------------------------------------------------------


def noise_is_of_the_micro_batches_of_all(rank, processes):
    """By its definition (McCandlish et al. 2018, A.1), from |g|² of every micro-batch, and of their mean."""
    parts = [batch for r in range(processes) for batch in own_batches(r, processes, 2)]
    gradients = []
    for x, y in parts:
        model = net()
        token_loss(model(x), y).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    count, samples = len(parts), len(parts[0][0])

    def scale(weights):
        one = [sum(float(g[w].square().sum()) for w in weights) for g in gradients]
        of_mean = sum(float((sum(g[w] for g in gradients) / count).square().sum()) for w in weights)
        square = (count * of_mean - sum(one) / count) / (count - 1)
        return (sum(one) / count - square) * samples / square if square > 0 else math.nan

    for make in (in_ddp, sharded):
        for hold_back in (False, True):
            own = own_batches(rank, processes, 2)
            options = {"metrics": None, "watching": {"noise": True}, "clip": False, "steps": 1}
            (step,) = watched(make(), own, hold_back=hold_back, **options)
            weights = {name: row["parameter"] for name, row in step.profile.info.items()}
            for name, weight in weights.items():
                assert step.profile[name]["noise_scale"] == pytest.approx(scale([weight]), rel=TOLERANCE, nan_ok=True)
            assert step.totals["noise_scale"] == pytest.approx(scale(weights.values()), rel=TOLERANCE)
            assert not step.notes


def parts_are_of_the_micro_batches_of_each(rank, processes):
    own = own_batches(rank, processes, 2)
    for make in (in_ddp, sharded):
        (step,) = watched(make(), own, watching={"parts": True}, steps=1, hold_back=True)
        assert len(step.parts) == 2
        for part, (x, y) in zip(step.parts, own, strict=True):
            alone = net()
            spec = oracle.measure(alone, lambda alone=alone, x=x, y=y: token_loss(alone(x), y) / 2)
            assert part.loss == pytest.approx(spec.loss, rel=TOLERANCE)
            for name in spec.values:
                for metric in part.metrics:
                    error = oracle.relative_error(metric, part[name][metric], spec.values[name], spec.numel[name])
                    assert error < TOLERANCE, (name, metric)
                assert "of the micro-batch of this process" in part.info[name]["note"]


def one_overflow_is_an_overflow_of_all(rank, processes):
    for make in (in_ddp, sharded):
        model, (x, y) = make(), own_batches(rank, processes)[0]
        optimizer = optimizer_of(model)
        with zest_fast.watch(model, every=1) as watch:
            scale = float("inf") if rank == 1 else 1.0
            (token_loss(model(x), y) * scale).backward()
            optimizer.step()
        assert watch.last.overflow and not math.isfinite(watch.last.profile.loss)


def steps_that_a_scaler_skips(rank, processes):
    """On all processes alike, where one has a gradient that is not finite; the next try is another meeting."""
    for make in (in_ddp, sharded):
        model, log, own = make(), [], own_batches(rank, processes)[0]
        optimizer, scaler = optimizer_of(model), torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
        with zest_fast.watch(model, every=1, metrics="all", updates=True, log=log.append):
            for step in range(3):
                factor = float("inf") if step == 0 and rank == 1 else 1.0
                scaler.scale(token_loss(model(own[0]), own[1]) * factor).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        assert [(one.step, one.overflow) for one in log] == [(0, True), (0, False), (1, False)]
        assert not any("did not meet" in note for one in log for note in one.notes)
        for one, (spec, _) in zip(log[1:], expected(net(), whole_batches(), clip=False), strict=True):
            assert_equal(one.profile, spec)


def histograms_are_of_whole_weights(rank, processes):
    own = own_batches(rank, processes)
    (step,) = watched(in_ddp(), own, watching={"histograms": True}, steps=1)
    counts, _ = step.histograms["head"]["gradient"]
    assert counts.sum() == 160
    with pytest.raises(NotImplementedError, match=r"histograms=True: .*shard \(FSDP2\)"):
        zest_fast.watch(sharded(), histograms=True)


# --- tensor parallelism -----------------------------------------------------------------------------------------------


def tensor_parallel(plan, model=None):
    from torch.distributed.tensor.parallel import parallelize_module

    return parallelize_module(model or net(), mesh_of(distributed.get_world_size()), plan)


def plans():
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
    )

    blocks = {f"{b}.up": ColwiseParallel() for b in "ab"} | {f"{b}.down": RowwiseParallel() for b in "ab"}
    split = {f"{b}.up": ColwiseParallel(input_layouts=Shard(1)) for b in "ab"}
    split |= {f"{b}.down": RowwiseParallel(output_layouts=Shard(1)) for b in "ab"}
    norms = {name: SequenceParallel() for name in ("a.norm", "b.norm", "norm")}
    enter = {"a": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=True)}
    last = {"head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())}
    return {"blocks": blocks, "sequence parallel": split | norms | enter | last}


def tensor_parallel_is_of_the_whole_layer(rank, processes):
    for plan in plans().values():
        for count in (1, 2):
            log = watched(tensor_parallel(plan), whole_batches(count), clip=False)
            assert_as_expected(log, expected(net(), whole_batches(count), clip=False))
    watching = {"noise": True, "parts": True}
    make = lambda: tensor_parallel(plans()["sequence parallel"])  # noqa: E731
    assert_bit_equal(make, whole_batches(2), watching=watching, clip=False)


def tensor_parallel_parts_and_noise(rank, processes):
    batches, model = whole_batches(2), tensor_parallel(plans()["blocks"])
    (step,) = watched(model, batches, clip=False, steps=1, watching={"parts": True, "noise": True})
    gradients = []
    for part, (x, y) in zip(step.parts, batches, strict=True):
        alone = net()
        spec = oracle.measure(alone, lambda alone=alone, x=x, y=y: token_loss(alone(x), y) / 2)
        for name in spec.values:
            for metric in part.metrics:
                error = oracle.relative_error(metric, part[name][metric], spec.values[name], spec.numel[name])
                assert error < TOLERANCE, (name, metric)
        gradients.append(spec.values)
    (spec, _), *_ = expected(net(), batches, clip=False)
    for name, values in spec.values.items():
        one = [g[name]["grad_norm"] ** 2 * 4 for g in gradients]
        square = 2 * values["grad_norm"] ** 2 - sum(one) / 2
        scale = (sum(one) / 2 - square) * 8 / square if square > 0 else math.nan
        assert step.profile[name]["noise_scale"] == pytest.approx(scale, rel=TOLERANCE, nan_ok=True)


class Gated(nn.Module):
    """A router that every process holds whole, in a region where each has a part of the sequence."""

    def __init__(self):
        super().__init__()
        self.embed, self.gate, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)

    def forward(self, x):
        return self.head(self.gate(self.embed(x)))


def gated():
    torch.manual_seed(1)
    return Gated().double()


def tensor_parallel_gradients_that_are_parts_of_sums(rank, processes):
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import PrepareModuleOutput, SequenceParallel

    cut = PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(1))
    gate = SequenceParallel(use_local_output=False)
    join = PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate())
    model = tensor_parallel({"embed": cut, "gate": gate}, gated())
    tensor_parallel({"gate": join}, model)
    (x, y), *_ = whole_batches()
    token_loss(model(x), y).backward()
    assert any(placement.is_partial() for placement in model.gate.weight.grad.placements)
    model.zero_grad()
    log = watched(model, whole_batches(), clip=False)
    assert_as_expected(log, expected(gated(), whole_batches(), clip=False))


def tensor_parallel_of_different_batches_is_said(rank, processes):
    model = tensor_parallel(plans()["blocks"])
    with pytest.warns(RuntimeWarning, match=r"did not meet at step 0 \(the loss differs between processes"):
        log = watched(model, own_batches(rank, processes), clip=False)
    for step in log:
        assert math.isnan(step.profile.loss) and all(map(math.isnan, step.profile.column("grad_norm")))
        assert any("loss differs" in note for note in step.notes)


# --- processes that do not meet, and training that goes on ------------------------------------------------------------


@contextmanager
def short_limits():
    names = ("TIME_LIMIT_S", "AGAIN_S", "_LATER_S")
    before, start = [getattr(step_meeting, name) for name in names], time.monotonic()
    step_meeting.TIME_LIMIT_S, step_meeting.AGAIN_S, step_meeting._LATER_S = 0.4, 0.2, 0.2
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(step_meeting, name, value)
    assert time.monotonic() - start < 10


def train_apart(model, rank, processes, steps):
    """Without a collective, so that no process waits for another."""
    optimizer, (x, y) = optimizer_of(model), own_batches(rank, processes)[0]
    for _ in range(steps):
        with model.no_sync():
            token_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def notes_of(log):
    return ["; ".join(step.notes) for step in log]


def one_process_alone_watches(rank, processes):
    """The others do not come: said once, and training is the same. What DDP has brought together stays."""
    for make in (in_ddp, sharded, lambda: tensor_parallel(plans()["sequence parallel"])):
        split = make not in (in_ddp, sharded)
        own = whole_batches() if split else own_batches(rank, processes)
        plain = state_after(make(), own, clip=False)
        model, log = make(), []
        if rank == 0:
            with (
                short_limits(),
                pytest.warns(
                    RuntimeWarning, match=r"did not meet at step 0 \(process 1 has not come within 0 s"
                ) as said,
                zest_fast.watch(model, every=1, metrics="all", updates=True, log=log.append),
            ):
                optimizer = train(model, own, clip=False)
            (text,) = [str(one.message) for one in said if "zest_fast" in str(one.message)]
            assert "it has begun no watch" in text
        else:
            optimizer = train(model, own, clip=False)
        assert_same_state(plain, state(model, optimizer))
        for (spec, _), step in zip(expected(net(), whole_batches(), clip=False), log, strict=bool(log)):
            assert math.isnan(step.profile.loss) and "the processes did not meet at this step" in step.notes[-1]
            assert math.isnan(step.profile["head"]["fisher"]) and math.isnan(step.profile["head"]["act_std"])
            if make is in_ddp:
                assert step.profile["head"]["snip"] == pytest.approx(spec.values["head"]["snip"], rel=TOLERANCE)
                assert step.totals["update_ratio"] > 0
            else:
                assert all(map(math.isnan, step.profile.values.flatten())) and math.isnan(step.totals["grad_norm"])
                assert math.isnan(step.totals["update_ratio"])
        distributed.barrier()


def processes_that_log_at_other_steps(rank, processes):
    model, log = in_ddp(), []
    with (
        short_limits(),
        pytest.warns(RuntimeWarning, match=r"step 0 \(process 1 watches otherwise than process 0: .*'every': 2"),
        zest_fast.watch(model, every=1 + rank, metrics="all", log=log.append),
    ):
        train(model, own_batches(rank, processes), steps=3)
    assert [step.step for step in log] == [[0, 1, 2], [0, 2]][rank]
    assert all("did not meet" in notes for notes in notes_of(log))
    assert all(step.profile["head"]["snip"] > 0 for step in log)
    distributed.barrier()


def processes_with_other_layers(rank, processes):
    model = in_ddp()
    with pytest.warns(RuntimeWarning, match=r"process 1 watches other layers than process 0: a.up"):
        watched(model, own_batches(rank, processes), layers=["head", "a.up"][: 2 - rank])


def one_process_leaves(rank, processes):
    """By an error, or because it has done all its steps: no other waits for it."""
    model, log = in_ddp(), []

    def run():
        with zest_fast.watch(model, every=1, metrics="all", log=log.append):
            for step, _ in enumerate(train_apart(model, rank, processes, 3)):
                if rank == 1 and step == 1:
                    raise KeyError("a bad sample")

    start = time.monotonic()
    if rank == 1:
        with pytest.raises(KeyError, match="a bad sample"):
            run()
    else:
        with pytest.warns(RuntimeWarning, match=r"step 2 \(process 1 has left its watch \(KeyError: 'a bad sample'\)"):
            run()
        assert len(log) == 3
    assert time.monotonic() - start < 10
    assert_as_expected(
        watched(in_ddp(), own_batches(rank, processes)), expected(net(), whole_batches())
    )  # the next watch begins anew


def one_process_counts_otherwise(rank, processes):
    model, log = in_ddp(), []
    (x, y), *_ = own_batches(rank, processes)
    optimizer = optimizer_of(model)
    with short_limits(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zest_fast.watch(model, every=2, metrics="all", log=log.append) as watch:
            for step in range(5):
                token_loss(model(x), y).backward()
                optimizer.step()
                if rank == 1 and step == 0:
                    watch.steps += 2
    assert [step.step for step in log] == [[0, 2, 4], [0, 4, 6]][rank]
    assert ["did not meet" in notes for notes in notes_of(log)] == [False, True, True]
    distributed.barrier()


def one_process_is_late(rank, processes):
    """One step is lost, and the next one is not."""
    model, log = in_ddp(), []
    with short_limits(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zest_fast.watch(model, every=1, metrics="all", log=log.append):
            for step, _ in enumerate(train_apart(model, rank, processes, 4)):
                if step == 0 and rank == 1:
                    time.sleep(1.0)
                elif step == 1:
                    distributed.barrier()
    assert ["did not meet" in notes for notes in notes_of(log)] == [False, True, False, False], notes_of(log)
    assert [math.isnan(step.profile.loss) for step in log] == [False, True, False, False]


def trainer_hands_over_the_model_in_its_wrapper(rank, processes):
    """By way of accelerate: Trainer's callbacks get what is inside."""
    transformers = pytest.importorskip("transformers")
    from zest_fast.integrations.trainer import WatchCallback

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # accelerate asks for them, and does not use them
    ids = torch.arange(128).reshape(8, 16) % 40
    rows, log, alone = [{"input_ids": row, "labels": row} for row in ids], [], []
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, max_steps=1, per_device_train_batch_size=8 // processes, use_cpu=True, ddp_backend="gloo",
            report_to=[], save_strategy="no", disable_tqdm=True, learning_rate=1e-3,
        )  # fmt: skip
        torch.manual_seed(0)
        model, copied = llama().double(), llama().double()
        copied.load_state_dict(model.state_dict())
        for again in range(2):
            callback = WatchCallback(every=1, metrics="all", noise=True, log=log.append)
            transformers.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback]).train()
            assert len(log) == again + 1 and not log[-1].notes, log[-1].notes
    with zest_fast.watch(copied, every=1, metrics="all", log=alone.append) as watch:
        copied.train()(input_ids=ids, labels=ids).loss.backward()
        watch.step()
    for metric in oracle.METRICS:
        assert log[0].profile.column(metric) == pytest.approx(alone[0].profile.column(metric), rel=1e-6, abs=1e-12)
    assert log[0].profile.loss == pytest.approx(alone[0].profile.loss, rel=TOLERANCE)
    assert "on 2 processes (DistributedDataParallel)" in log[0].profile.info[log[0].profile.names[0]]["note"]
    distributed.barrier()


def gradients_that_were_not_averaged_are_said(rank, processes):
    model, log = in_ddp(), []
    with zest_fast.watch(model, every=1, log=log.append):
        list(train_apart(model, rank, processes, 1))
    assert math.isnan(log[0].profile["head"]["snip"])
    assert "it differs between processes: the gradients of this step were not averaged" in notes_of(log)[0]
    model, log = in_ddp(), []
    if rank == 1:
        with torch.no_grad():
            model.module.b.up.weight[0, 0] += 1e-3
    with zest_fast.watch(model, every=1, log=log.append):
        train(model, own_batches(rank, processes), steps=1)
    assert "b.up: gradient undefined: its weight differs between processes" in notes_of(log)[0]
    assert math.isnan(log[0].profile["b.up"]["weight_std"]) and log[0].profile["a.up"]["weight_std"] > 0


def what_one_process_cannot_read_is_not_there(rank, processes):
    """A part must not pass for the whole."""
    reduce = SharedWindowStatistics.reduce

    def refusing(self, weight, dw, w):
        if rank == 1 and weight.layers[0].name == "b.up":
            raise ValueError("its gradient is odd")
        reduce(self, weight, dw, w)

    SharedWindowStatistics.reduce = refusing
    try:
        for make in (in_ddp, sharded):
            (step,) = watched(make(), own_batches(rank, processes), steps=1)
            assert math.isnan(step.profile["b.up"]["snip"]) and math.isnan(step.profile["b.up"]["weight_std"])
            assert "b.up: gradient undefined: its gradient is odd" in step.notes
            assert step.profile["a.up"]["snip"] > 0 and step.profile["b.up"]["act_std"] > 0
    finally:
        SharedWindowStatistics.reduce = reduce


class Way(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.a, self.b, self.head = (
            nn.Embedding(20, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 20),
        )

    def forward(self, x, way):
        y = self.a(self.embed(x))
        z = self.b(y)
        return self.head(y if way else z)


def a_layer_that_counts_on_some_processes(rank, processes):
    """Its gradient is that of all; of its outputs nothing says how many samples the others have."""
    torch.manual_seed(1)
    alone, log = Way().double(), []
    model = DistributedDataParallel(copy.deepcopy(alone), find_unused_parameters=True)
    (x, y), *_ = own_batches(rank, processes)
    with zest_fast.watch(model, every=1, metrics="all", log=log.append):
        optimizer = optimizer_of(model)
        token_loss(model(x, rank == 0), y).backward()
        optimizer.step()
    parts = [batches[0] for batches in (own_batches(r, processes) for r in range(processes))]
    spec = oracle.measure(
        alone, lambda: sum(token_loss(alone(x, r == 0), y) for r, (x, y) in enumerate(parts)) / processes
    )
    found = log[0].profile
    for name in ("a", "b", "head"):
        for metric in set(oracle.METRICS) - {"fisher"}:
            error = oracle.relative_error(metric, found[name][metric], spec.values[name], spec.numel[name])
            assert error < TOLERANCE, (name, metric)
    assert math.isnan(found["b"]["fisher"]) and "fisher undefined" in found.info["b"]["note"]
    assert found["a"]["fisher"] > 0


def ctrl_c_while_it_waits(rank, processes):
    """The watch ends, and leaves nothing."""
    if rank == 0:
        model = in_ddp()
        timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt), zest_fast.watch(model, every=1):
            steps = train_apart(model, rank, processes, 1)
            timer.start()
            list(steps)
        assert not model.module.head._forward_hooks
    else:
        in_ddp()
    distributed.barrier()


def wrappers_that_are_not_known_are_refused(rank, processes):
    from torch.distributed._composable.replicate import replicate
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flat = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    with pytest.raises(NotImplementedError, match=r"the model is a FullyShardedDataParallel \(FSDP1\)"):
        zest_fast.watch(flat)
    with pytest.raises(NotImplementedError, match=r"was given to replicate\(\)"):
        zest_fast.watch(replicate(net()))
    engine = type("DeepSpeedEngine", (nn.Sequential,), {"__module__": "deepspeed.runtime.engine"})
    with pytest.raises(NotImplementedError, match=r"the model is a DeepSpeedEngine of DeepSpeed"):
        zest_fast.watch(engine(net()))
    with pytest.raises(NotImplementedError, match=r"'embed.weight' is a DTensor .*noise_scale takes whole models"):
        zest_fast.noise_scale(sharded(), own_batches(rank, processes, 3))
    model = in_ddp().module
    log = watched(model, own_batches(rank, processes, 2), steps=1, watching={"noise": True})
    assert "what is seen is of this process" in notes_of(log)[0]
    assert "pass the model that DistributedDataParallel returned" in notes_of(log)[0]


ON_TWO = {
    case.__name__: case
    for case in (
        ddp_is_of_the_global_batch,
        fsdp_is_of_the_global_batch,
        fsdp_with_its_options,
        fsdp_of_uneven_and_empty_shards,
        fsdp_in_mixed_precision,
        fsdp_of_what_is_frozen,
        fsdp_that_reduces_never,
        optimizers_in_the_backward_pass,
        noise_is_of_the_micro_batches_of_all,
        parts_are_of_the_micro_batches_of_each,
        one_overflow_is_an_overflow_of_all,
        steps_that_a_scaler_skips,
        histograms_are_of_whole_weights,
        tensor_parallel_is_of_the_whole_layer,
        tensor_parallel_parts_and_noise,
        tensor_parallel_gradients_that_are_parts_of_sums,
        tensor_parallel_of_different_batches_is_said,
        processes_that_log_at_other_steps,
        processes_with_other_layers,
        one_process_leaves,
        one_process_counts_otherwise,
        one_process_is_late,
        gradients_that_were_not_averaged_are_said,
        what_one_process_cannot_read_is_not_there,
        a_layer_that_counts_on_some_processes,
        wrappers_that_are_not_known_are_refused,
        ctrl_c_while_it_waits,
        one_process_alone_watches,
    )
}
ON_FOUR = {
    case.__name__: case
    for case in (
        ddp_is_of_the_global_batch,
        fsdp_is_of_the_global_batch,
        hsdp_is_of_the_global_batch,
        fsdp_with_its_options,
        fsdp_of_uneven_and_empty_shards,
        fsdp_of_two_dimensions_of_gradients,
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


@pytest.mark.slow  # Trainer is imported in each process
def test_trainer(tmp_path):
    case = trainer_hands_over_the_model_in_its_wrapper
    assert outcomes({case.__name__: case}, 2, tmp_path) == {case.__name__: ""}
