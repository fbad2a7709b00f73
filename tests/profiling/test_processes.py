"""Profiles of models on several processes are those of one process with the whole batch: DDP, FSDP2, HSDP, tensor
parallelism. Processes are started twice, two and four, and run all cases one after the other."""

from __future__ import annotations

import math
import os
import random
import shutil
import tempfile
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from process_cases import (
    assert_equal,
    assert_same_state,
    assert_the_same_everywhere,
    images,
    net,
    outcomes,
    share,
    start,
    state_of,
    token_loss,
    tokens,
    whole,
)
from small_models import llama
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import zest_fast
from zest_fast.profiling.processes import meeting
from zest_fast.profiling.processes.gradient_mean import GradientMeans
from zest_fast.profiling.processes.meeting import OtherProcessFailed

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")


def own_batch(rank: int, processes: int):
    return share(tokens(), rank, processes)


def profile(model, rank: int, processes: int, **options):
    return zest_fast.profile(model, own_batch(rank, processes), loss_fn=token_loss, **options)


# --- DistributedDataParallel ------------------------------------------------------------------------------------------


def ddp_is_of_the_global_batch(rank, processes):
    found = profile(DistributedDataParallel(net()), rank, processes)
    assert_equal(found, whole(net()))
    assert all(f"on {processes} processes (DistributedDataParallel)" in row["note"] for row in found.info.values())
    assert [row["uses"] for row in found.info.values()] == [1] * len(found)


def ddp_of_convolutions(rank, processes):
    batch = torch.randn(8, 1, 9, 9, generator=torch.Generator().manual_seed(5)).double(), torch.arange(8) % 3
    found = zest_fast.profile(DistributedDataParallel(images()), share(batch, rank, processes))
    assert_equal(found, whole(images(), batch, F.cross_entropy))


def ddp_of_a_language_model_holds_one_gradient_at_a_time(rank, processes):
    made = []
    GradientMeans.__init__, before = noting(GradientMeans.__init__, made), GradientMeans.__init__
    ids = torch.arange(64).reshape(4, 16) % 40
    try:
        for reentrant in (None, False, True):
            torch.manual_seed(0)
            model, alone = llama().double(), llama().double()
            alone.load_state_dict(model.state_dict())
            if reentrant is not None:
                model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
            own = ids[rank::processes]
            batch = {"input_ids": own, "labels": own, "use_cache": False}
            found = zest_fast.profile(DistributedDataParallel(model), batch)
            spec = oracle.measure(alone, lambda alone=alone: alone(input_ids=ids, labels=ids, use_cache=False).loss)
            assert_equal(found, spec)
    finally:
        GradientMeans.__init__ = before
    assert [means.most_waiting for means in made] == [1] * len(made) and len(made) >= 3


def noting(function, made):
    def noted(self, *arguments):
        made.append(self)
        function(self, *arguments)

    return noted


def ddp_of_unequal_batches_is_the_mean_of_their_means(rank, processes):
    """What DDP trains with: a sample of a small batch weighs more."""
    x, y = tokens()
    sizes = [8 - (processes - 1), *[1] * (processes - 1)]
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    found = zest_fast.profile(DistributedDataParallel(net()), parts[rank], loss_fn=token_loss)
    model = net()
    weights = torch.cat([torch.full((n,), 1 / (n * processes)).double() for n in sizes])
    losses = lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none").unflatten(0, y.shape)  # noqa: E731
    assert_equal(found, oracle.measure(model, lambda: losses().mean(1) @ weights))


class Branches(nn.Module):
    """Two layers in an order that depends on the batch, one that only the first process uses, one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x, way):
        if way == 0:
            return self.c(self.b(self.a(x).relu()).relu())
        return self.a(self.b(x).relu()).relu()


def branches():
    torch.manual_seed(2)
    return Branches().double()


def ddp_where_control_flow_differs(rank, processes):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(5)).double()
    model, alone = branches(), branches()
    own = x[rank::processes]
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    found = zest_fast.profile(ddp, closure=lambda: model(own, rank).square().mean())
    spec = oracle.measure(
        alone, lambda: sum(alone(x[r::processes], r).square().mean() for r in range(processes)) / processes
    )
    assert_equal(found, spec, but=("fisher",))  # the reference takes two calls for two uses of the same samples
    assert "d.weight" in found.uncovered and found.info["c"]["uses"] == 1
    halves = [branches() for _ in range(processes)]
    parts = [
        oracle.measure(m, lambda m=m, r=r: m(x[r::processes], r).square().mean() / processes)
        for r, m in enumerate(halves)
    ]
    for name in found:
        of_name = [part.values[name]["fisher"] for part in parts if name in part.values]
        assert found[name]["fisher"] == pytest.approx(sum(of_name) / len(of_name), rel=1e-9)


class Tied(nn.Module):
    """A weight of two modules, another that is used by hand, and one module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.twice = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False), nn.Linear(8, 8)
        self.free = nn.Parameter(torch.randn(8, 8) / 3)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.twice(self.twice(self.embed(x)).tanh() @ self.free))


def tied():
    torch.manual_seed(2)
    return Tied().double()


def ddp_of_tied_and_free_weights(rank, processes):
    assert_equal(profile(DistributedDataParallel(tied()), rank, processes), whole(tied()))


class Recomputed(nn.Module):
    """One layer in two regions of reentrant checkpointing: its gradient arrives in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)

    def forward(self, x):
        y = self.embed(x).requires_grad_()
        for _ in range(2):
            y = checkpoint(lambda y: self.layer(y).tanh(), y, use_reentrant=True)
        return self.head(y)


def recomputed():
    torch.manual_seed(2)
    return Recomputed().double()


def ddp_of_gradients_in_several_parts(rank, processes):
    assert_equal(profile(DistributedDataParallel(recomputed()), rank, processes), whole(recomputed()))


def ddp_of_sparse_gradients_and_a_scaled_loss(rank, processes):
    def sparse():
        model = net()
        model.embed.sparse = True
        return model

    layers = [*whole(net()).values, "embed"]
    scaled = lambda y, t: 1024 * token_loss(y, t)  # noqa: E731
    own = own_batch(rank, processes)
    found = zest_fast.profile(DistributedDataParallel(sparse()), own, loss_fn=scaled, layers=layers, loss_scale=1024)
    assert_equal(found, whole(sparse(), layers=layers))


class OwnCheckpoint(torch.autograd.Function):
    """Checkpointing as other libraries write it: its graph shows no weight."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function, ctx.x = function, x
        return function(x)

    @staticmethod
    def backward(ctx, g):
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            ctx.function(x).backward(g)
        return None, x.grad


class HiddenLayers(Recomputed):
    def forward(self, x):
        y = self.embed(x).requires_grad_()
        return self.head(OwnCheckpoint.apply(lambda y: self.layer(y).tanh(), y))


def hidden():
    torch.manual_seed(2)
    return HiddenLayers().double()


def ddp_of_layers_that_the_graph_does_not_show(rank, processes):
    found = profile(DistributedDataParallel(hidden()), rank, processes)
    assert_equal(found, whole(hidden()))


class Writing(nn.Module):
    """Large enough not to be copied as a whole; writes into its weights while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gain = net(width=128, inner=1024), nn.Parameter(torch.ones(20).double())

    def forward(self, x):
        with torch.no_grad():
            self.gain.mul_(1.5)
            self.inner.a.down.bias.add_(0.25)
        return self.inner(x) * self.gain


def models_that_write_are_given_back(rank, processes):
    spec = whole(Writing())
    model = Writing()
    split_ = {f"inner.{name}": style for name, style in plans()["blocks"].items()}
    for one, batch in (
        (DistributedDataParallel(Writing()), own_batch(rank, processes)),
        (sharded(model, [model.inner.a, model.inner.b]), own_batch(rank, processes)),
        (tensor_parallel(Writing(), split_), tokens()),
    ):
        before = state_of(one)
        found = zest_fast.profile(one, batch, loss_fn=token_loss)
        assert_equal(found, spec)
        assert_same_state(before, state_of(one))


def ddp_of_some_metrics_and_layers(rank, processes):
    model = DistributedDataParallel(net())
    spec = whole(net())
    for metrics in (["weight_std", "act_mean"], ["fisher"], ["snip"]):
        found = profile(model, rank, processes, metrics=metrics, layers=r"a\..*|head")
        assert found.names == ["a.up", "a.down", "head"] and found.metrics == metrics
        for name in found:
            for metric in metrics:
                assert oracle.relative_error(metric, found[name][metric], spec.values[name], spec.numel[name]) < 1e-6
    everything = profile(model, rank, processes, metrics="all")
    assert everything.info["head"]["note"].count("takes passes of its own") >= 1
    assert all(everything["head"][name] != everything["head"][name] for name in ("grasp", "synflow", "agree_cos"))
    with pytest.raises(NotImplementedError, match=r"'grasp' takes passes of its own.*DistributedDataParallel"):
        profile(model, rank, processes, metrics=["grasp"])


def ddp_in_half_precision(rank, processes):
    """Sums are formed in float32: no cell is farther off than plain autograd in bfloat16."""
    model, plain = net().bfloat16(), net().bfloat16()
    found = profile(DistributedDataParallel(model), rank, processes)
    exact = net().bfloat16().double()
    verdict = oracle.compare_rounded(found, whole(exact), whole(plain))
    assert not verdict.misses, verdict.misses


def ddp_leaves_all_as_it_was_and_trains_on(rank, processes):
    inner = images().train()
    inner.a.bias.requires_grad_(False)
    model = DistributedDataParallel(inner)
    model.module.b.weight.register_post_accumulate_grad_hook(lambda p: None)
    x, y = torch.randn(8, 1, 9, 9).double(), torch.arange(8) % 3
    own = share((x, y), rank, processes)
    F.cross_entropy(model(own[0]), own[1]).backward()
    before, python, calls = state_of(model), random.getstate(), len(model._forward_pre_hooks)
    zest_fast.profile(model, own)
    assert_same_state(before, state_of(model))
    assert random.getstate() == python and len(model._forward_pre_hooks) == calls
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    F.cross_entropy(model(own[0]), own[1]).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, gradients[name])


def ddp_whose_backward_is_still_to_come(rank, processes):
    """Its reducer takes gradients of the profile for those that it waits for: nothing tells before."""
    own, x = own_batch(rank, processes), torch.ones(2, 4)
    linear = nn.Linear(4, 2, bias=False)  # the reducer gets all that it waits for
    for inner, batch, loss_fn in ((net(), own, token_loss), (linear, (x, x[:, :2]), F.mse_loss)):
        model = DistributedDataParallel(inner)
        model(batch[0])
        with pytest.raises(RuntimeError, match=r"still waiting for its backward pass.*no_grad"):
            zest_fast.profile(model, batch, loss_fn=loss_fn)
        assert all(p.grad is None for p in model.parameters())
        zest_fast.profile(model, batch, loss_fn=loss_fn)
        loss_fn(model(batch[0]), batch[1]).backward()
        assert all(p.grad is not None for p in model.parameters())


# --- what fails on one process ends the others with a message ---------------------------------------------------------


class Failing(nn.Module):
    def __init__(self, where: str = "") -> None:
        super().__init__()
        self.inner, self.where = net(), where

    def forward(self, x):
        if self.where == "forward":
            raise ValueError("a bad sample")
        y = self.inner(x)
        if self.where == "backward":
            self.inner.b.up.weight.register_hook(fail)
        if self.where == "output":
            y.register_hook(fail)
        return y * float("nan") if self.where == "nan" else y


def fail(_):
    raise ValueError("a bad gradient")


def ddp_where_one_process_fails(rank, processes):
    for where, text in (("forward", "a bad sample"), ("backward", "a bad gradient")):
        model = DistributedDataParallel(Failing(where if rank == processes - 1 else ""))
        before, start = state_of(model), time.monotonic()
        if rank == processes - 1:
            with pytest.raises(ValueError, match=text):
                profile(model, rank, processes)
        else:
            with pytest.raises(OtherProcessFailed, match=rf"process {processes - 1} failed .*ValueError: {text}"):
                profile(model, rank, processes)
        assert time.monotonic() - start < 20
        model.module.inner.b.up.weight._backward_hooks = None
        assert_same_state(before, state_of(model))
    assert_equal(profile(DistributedDataParallel(net()), rank, processes), whole(net()))  # and they are in step


def ddp_where_all_processes_fail_alike(rank, processes):
    model = DistributedDataParallel(Failing("backward"))
    with pytest.raises(ValueError, match=r"a bad gradient"):
        profile(model, rank, processes)
    assert_equal(profile(DistributedDataParallel(net()), rank, processes), whole(net()))


def ddp_with_a_loss_that_is_not_finite_on_one_process(rank, processes):
    model = DistributedDataParallel(Failing("nan" if rank == 1 else ""))
    with pytest.raises(ValueError, match=r"the loss of process 1 is nan"):
        profile(model, rank, processes)


def ddp_of_different_things_is_refused(rank, processes):
    model = DistributedDataParallel(net())
    with pytest.raises(ValueError, match=r"profiles other layers than the first \(1 and 1; first difference: b.up"):
        profile(model, rank, processes, layers=["a.up" if rank == 0 else "b.up"])
    with pytest.raises(ValueError, match=r"called with other metrics"):
        profile(model, rank, processes, metrics=["snip" if rank == 0 else "fisher"])
    if rank == 1:
        with torch.no_grad():
            model.module.b.up.weight[0, 0] += 0.01
    with pytest.raises(ValueError, match=r"weight of layer 'b.up' differs between processes"):
        profile(model, rank, processes)
    with pytest.raises(ValueError if rank else OtherProcessFailed, match=r"no layer is named 'nothing'"):
        profile(DistributedDataParallel(net()), rank, processes, layers=["nothing"] if rank else None)
    own, model = own_batch(rank, processes), DistributedDataParallel(net())
    with pytest.raises(ValueError, match=r"let it call model\.module"):
        zest_fast.profile(model, closure=lambda: token_loss(model(own[0]), own[1]))


def wrappers_that_are_not_known_are_refused(rank, processes):
    from torch.distributed._composable.replicate import replicate
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flat = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    with pytest.raises(NotImplementedError, match=r"the model is a FullyShardedDataParallel \(FSDP1\)"):
        profile(flat, rank, processes)
    inside = net()
    inside.a = DistributedDataParallel(inside.a)
    with pytest.raises(NotImplementedError, match=r"module 'a' is a DistributedDataParallel inside of the model"):
        profile(inside, rank, processes)
    with pytest.raises(NotImplementedError, match=r"was given to replicate\(\)"):
        profile(replicate(net()), rank, processes)
    engine = type("DeepSpeedEngine", (nn.Sequential,), {"__module__": "deepspeed.runtime.engine"})
    with pytest.raises(NotImplementedError, match=r"the model is a DeepSpeedEngine of DeepSpeed"):
        profile(engine(net()), rank, processes)


def ddp_that_is_compiled_or_hands_out_its_buckets(rank, processes):
    spec = whole(net())
    assert_equal(profile(torch.compile(DistributedDataParallel(net())), rank, processes), spec)
    assert_equal(profile(DistributedDataParallel(torch.compile(net())), rank, processes), spec)
    model, own = DistributedDataParallel(net(), gradient_as_bucket_view=True), own_batch(rank, processes)
    for _ in range(2):
        token_loss(model(own[0]), own[1]).backward()
        before = state_of(model)
        assert_equal(profile(model, rank, processes), spec)
        assert_same_state(before, state_of(model))
        model.zero_grad()


def one_process_that_does_not_come_is_named(rank, processes):
    """Runs last: processes are out of step afterwards."""
    distributed.barrier()
    if rank == 0:
        meeting.TIME_LIMIT_S, before = 0.5, meeting.TIME_LIMIT_S
        try:
            with pytest.raises(
                OtherProcessFailed, match=r"process 1 has not come within 0 s.*ranks 0, 1.*call profile"
            ):
                profile(DistributedDataParallel(net(), init_sync=False), rank, processes)
        finally:
            meeting.TIME_LIMIT_S = before
    else:
        DistributedDataParallel(net(), init_sync=False)
    distributed.barrier()


# --- FSDP2 and HSDP ---------------------------------------------------------------------------------------------------


def mesh_of(*shape):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def sharded(model, blocks=(), **options):
    from torch.distributed.fsdp import fully_shard

    for block in blocks or (model.a, model.b):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def fsdp_is_of_the_global_batch(rank, processes):
    from torch.distributed.fsdp import CPUOffloadPolicy

    spec = whole(net())
    kept = {"reshard_after_forward": 2 if processes == 4 else False}  # 2: on pairs of processes
    for options in ({}, kept, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}):
        model = sharded(net(), mesh=mesh_of(processes), **options)
        with torch.no_grad():
            model(own_batch(rank, processes)[0])
        for reshard in (True, False):
            model.set_reshard_after_backward(reshard)
            found = profile(model, rank, processes)
            assert_equal(found, spec)
        assert "FSDP2" in found.info["head"]["note"] and found.info["head"]["shape"] == [20, 8]


def in_single_precision(rank, processes):
    exact, plain = whole(net().float().double()), whole(net().float())
    for model in (DistributedDataParallel(net().float()), sharded(net().float())):
        verdict = oracle.compare(profile(model, rank, processes), exact, plain)
        assert not verdict.misses and len(verdict.left_out) < 0.1 * verdict.cells, verdict


def several_calls_in_one_closure(rank, processes):
    """Two micro-batches: FSDP2 reduces the gradient of each, and their sum is what counts."""
    parts = [tuple(part[i::2] for part in tokens()) for i in range(2)]

    def closure(model, batches):
        return lambda: sum(token_loss(model(x), y) for x, y in batches) / 2

    spec = oracle.measure(alone := net(), closure(alone, parts))
    own = [share(part, rank, processes) for part in parts]
    for model in (DistributedDataParallel(net()), sharded(net())):
        inner = getattr(model, "module", model)
        found = zest_fast.profile(model, closure=closure(inner, own))
        assert_equal(found, spec)
        assert found.info["a.up"]["uses"] == 2


def code_that_looks_at_flags(rank, processes):
    """The loss is computed once more, as the model was handed over."""

    def loss(y, t):
        return token_loss(y, t) + 0 * sum(p.requires_grad for p in model.parameters())

    for model in (DistributedDataParallel(net()), sharded(net())):
        model.set_reshard_after_backward(False) if hasattr(model, "set_reshard_after_backward") else None
        before = state_of(model)
        found = zest_fast.profile(model, own_batch(rank, processes), loss_fn=loss)
        assert_equal(found, whole(net()))
        assert_same_state(before, state_of(model))


def hsdp_is_of_the_global_batch(rank, processes):
    model = sharded(net(), mesh=mesh_of(2, processes // 2))
    found = profile(model, rank, processes)
    assert_equal(found, whole(net()))
    assert f"on {processes} processes (HSDP)" in found.info["head"]["note"]
    with torch.no_grad():
        local = model.b.up.weight.to_local()
        local[0, 0] += 1e-3 * (rank == processes - 1)
    with pytest.raises(ValueError, match=r"weight of layer 'b.up' differs between the replicas of HSDP"):
        profile(model, rank, processes)


def fsdp_of_some_metrics_and_layers(rank, processes):
    model, spec = sharded(net()), whole(net(), layers=["a.up", "embed"])
    for metrics in (["weight_std", "act_mean"], ["fisher"], ["snip"]):
        found = profile(model, rank, processes, metrics=metrics, layers=["a.up", "embed"])
        assert found.names == ["embed", "a.up"]
        for name in found:
            for metric in metrics:
                assert oracle.relative_error(metric, found[name][metric], spec.values[name], spec.numel[name]) < 1e-6
        assert_the_same_everywhere(found)


def fsdp_between_a_forward_and_its_backward(rank, processes):
    model, own, reference = sharded(net()), own_batch(rank, processes), net()
    loss = token_loss(model(own[0]), own[1])
    assert_equal(profile(model, rank, processes), whole(reference))
    loss.backward()
    torch.testing.assert_close(model.head.weight.grad.full_tensor(), reference.head.weight.grad)
    torch.testing.assert_close(model.a.up.weight.grad.full_tensor(), reference.a.up.weight.grad)


def fsdp_by_columns(rank, processes):
    from torch.distributed.tensor import Shard

    placed = sharded(net(), shard_placement_fn=lambda p: Shard(1) if p.dim() == 2 and p.shape[1] % 4 == 0 else None)
    assert_equal(profile(placed, rank, processes), whole(net()))


def fsdp_where_control_flow_differs(rank, processes):
    """What torch reduces only where every process has a gradient is refused, and taken where it was told of it."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(5)).double()
    own, model = x[rank::processes], sharded_whole(branches())
    with pytest.raises(NotImplementedError, match=r"different layers \(c not on all.*reduce_scatter_unused_params"):
        zest_fast.profile(model, closure=lambda: model(own, rank).square().mean())
    model.set_reduce_scatter_unused_params(True)
    found = zest_fast.profile(model, closure=lambda: model(own, rank).square().mean())
    alone = branches()
    spec = oracle.measure(
        alone, lambda: sum(alone(x[r::processes], r).square().mean() for r in range(processes)) / processes
    )
    assert set(found) == set(spec.values) | {"d"}  # zeros on every process
    for name, metric in ((name, metric) for name in spec.values for metric in ("snip", "grad_norm", "act_std")):
        assert oracle.relative_error(metric, found[name][metric], spec.values[name], spec.numel[name]) < 1e-6
    assert found["d"]["grad_norm"] == 0


def sharded_whole(model):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def fsdp_of_uneven_and_empty_shards(rank, processes):
    sizes = {"width": 7, "inner": 5, "words": 20}
    assert_equal(profile(sharded(net(**sizes)), rank, processes), whole(net(**sizes)))

    def tiny():
        torch.manual_seed(3)
        return nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 1), nn.Linear(1, 20)).double()

    model = tiny()
    assert_equal(profile(sharded(model, [model[1]]), rank, processes), whole(tiny()))  # one row: others have none


def fsdp_with_checkpointing_and_tied_weights(rank, processes):
    ids = torch.arange(64).reshape(4, 16) % 40
    own = ids[rank::processes]
    for reentrant in (False, True):
        torch.manual_seed(0)
        model, alone = llama(tie_word_embeddings=True).double(), llama(tie_word_embeddings=True).double()
        alone.load_state_dict(model.state_dict())
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        sharded(model, model.model.layers)
        found = zest_fast.profile(model, {"input_ids": own, "labels": own, "use_cache": False})
        spec = oracle.measure(alone, lambda alone=alone: alone(input_ids=ids, labels=ids, use_cache=False).loss)
        assert_equal(found, spec)


def fsdp_in_mixed_precision_of_a_frozen_base(rank, processes):
    """FSDP2 reads its dtypes off what trains: what is frozen is profiled all the same, and all trains on as before."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for begun in (False, True):
        model = net().float()
        model.requires_grad_(False)
        model.b.up.weight.requires_grad_(True)
        sharded(model, mp_policy=policy)
        own = own_batch(rank, processes)
        if begun:
            token_loss(model(own[0]).float(), own[1]).backward()
            model.zero_grad()
        found = zest_fast.profile(model, own, loss_fn=lambda y, t: token_loss(y.float(), t))
        plain, exact = net().bfloat16(), net().bfloat16().double()
        verdict = oracle.compare_rounded(
            found, whole(exact), whole(plain, loss_fn=lambda y, t: token_loss(y.float(), t))
        )
        misses = [miss for miss in verdict.misses if "weight_" not in miss]  # the weights themselves are float32
        assert not misses, misses
        assert [row["trainable"] for row in found.info.values()].count(True) == 1
        token_loss(model(own[0]).float(), own[1]).backward()
        assert [p.grad.dtype for p in model.parameters() if p.grad is not None] == [torch.float32]


def fsdp_leaves_all_as_it_was_and_trains_on(rank, processes):
    own = own_batch(rank, processes)
    model, alone = sharded(net()), net()
    for one in (model, alone):
        one.a.norm.weight.requires_grad_(False)
    stepped = []
    model.a.up.weight.register_post_accumulate_grad_hook(stepped.append)
    token_loss(model(own[0]), own[1]).backward()
    for gather in (False, True):
        if gather:  # the root stays gathered after an evaluation
            with torch.no_grad():
                model(own[0])
        assert gather == any(not hasattr(p, "full_tensor") for p in model.parameters())
        before = state_of(model)
        profile(model, rank, processes)
        assert_same_state(before, state_of(model))
    assert len(stepped) == 1  # an optimizer in backward rests
    model.reshard()
    model.zero_grad()
    token_loss(model(own[0]), own[1]).backward()
    x, y = tokens()
    token_loss(alone(x), y).backward()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad.full_tensor(), q.grad)


def fsdp_in_the_middle_of_an_accumulation_is_refused(rank, processes):
    model, own = sharded(net()), own_batch(rank, processes)
    model.set_requires_gradient_sync(False)
    with pytest.raises(ValueError, match=r"middle of an accumulation.*set_requires_gradient_sync"):
        profile(model, rank, processes)
    token_loss(model(own[0]), own[1]).backward()
    model.set_requires_gradient_sync(True)
    with pytest.raises(ValueError, match=r"holds gradients of earlier passes"):
        profile(model, rank, processes)
    token_loss(model(own[0]), own[1]).backward()
    expected = net()
    x, y = tokens()
    (2 * token_loss(expected(x), y)).backward()
    torch.testing.assert_close(model.head.weight.grad.full_tensor(), expected.head.weight.grad)
    assert_equal(profile(model, rank, processes), whole(net()))


def fsdp_that_divides_by_another_number(rank, processes):
    """As where a loss is a sum, divided by the tokens of all processes."""
    model = sharded(net())
    for module in (model.a, model.b, model):
        module.set_gradient_divide_factor(1.0)
    count = tokens()[1].numel()
    found = zest_fast.profile(
        model,
        own_batch(rank, processes),
        loss_fn=lambda y, t: F.cross_entropy(y.flatten(0, 1), t.flatten(), reduction="sum") / count,
    )
    assert_equal(found, whole(net()))


def fsdp_of_parts_is_refused(rank, processes):
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model.a)
    with pytest.raises(NotImplementedError, match=r"'embed.weight' is not sharded, while others are"):
        profile(model, rank, processes)
    with pytest.raises(NotImplementedError, match=r"'snip.*|'grasp' takes passes"):
        profile(sharded(net()), rank, processes, metrics=["grasp"])


def fsdp_where_processes_fail(rank, processes):
    failing = Failing("forward")
    model = sharded(failing, [failing.inner])
    before = state_of(model)
    with pytest.raises(ValueError, match=r"a bad sample"):  # on all of them
        profile(model, rank, processes)
    assert_same_state(before, state_of(model))
    failing.where = "output"
    with pytest.raises(ValueError, match=r"a bad gradient"):
        profile(model, rank, processes)
    assert_same_state(before, state_of(model))
    failing.where = "nan" if rank == 0 else ""
    with pytest.raises(ValueError, match=r"the loss of process 0 is nan"):
        profile(model, rank, processes)

    def loss(y, t):
        if rank == 1:
            raise ValueError("a bad target")
        return token_loss(y, t)

    failing.where = ""
    with pytest.raises(
        ValueError if rank == 1 else OtherProcessFailed, match=r"ValueError: a bad target|^a bad target"
    ):
        zest_fast.profile(model, own_batch(rank, processes), loss_fn=loss)
    found = profile(model, rank, processes)
    alone = Failing()
    assert_equal(found, whole(alone))


# --- tensor parallelism -----------------------------------------------------------------------------------------------


def tensor_parallel(model, plan):
    from torch.distributed.tensor.parallel import parallelize_module

    return parallelize_module(model, mesh_of(distributed.get_world_size()), plan)


def plans():
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
    )

    blocks = {f"{b}.up": ColwiseParallel() for b in "ab"} | {f"{b}.down": RowwiseParallel() for b in "ab"}
    head = {"head": ColwiseParallel(output_layouts=Replicate())}
    split = {f"{b}.up": ColwiseParallel(input_layouts=Shard(1)) for b in "ab"}
    split |= {f"{b}.down": RowwiseParallel(output_layouts=Shard(1)) for b in "ab"}
    norms = {name: SequenceParallel() for name in ("a.norm", "b.norm", "norm")}
    enter = {"a": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=True)}
    last = {"head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())}
    return {
        "blocks": blocks,
        "blocks, embedding and head": {"embed": RowwiseParallel(input_layouts=Replicate())} | blocks | head,
        "sequence parallel": split | norms | enter | last,
    }


def tensor_parallel_is_of_the_whole_layer(rank, processes):
    layers = [*whole(net()).values, "embed"]
    spec = whole(net(), layers=layers)
    for name, plan in plans().items():
        model = tensor_parallel(net(), plan)
        before = state_of(model)
        found = zest_fast.profile(model, tokens(), loss_fn=token_loss, layers=layers)
        if "embed" in plan:  # its parts are summed up once, and that is not ours to do
            assert "act and fisher undefined: tensor parallelism leaves it" in found.info["embed"]["note"]
            of_outputs = dict.fromkeys(("act_mean", "act_std", "act_abs_mean", "act_abs_std", "fisher"), math.nan)
            assert_equal(found, replace(spec, values=spec.values | {"embed": spec.values["embed"] | of_outputs}))
        else:
            assert_equal(found, spec)
        assert "tensor parallel" in found.info["head"]["note"], name
        assert_same_state(before, state_of(model))


def tensor_parallel_language_model_as_transformers_loads_it(rank, processes):
    transformers = pytest.importorskip("transformers")
    distributed_config = pytest.importorskip("transformers.distributed").DistributedConfig(
        tp_size=processes, tp_plan="auto"
    )
    torch.manual_seed(0)
    ids = torch.arange(64).reshape(4, 16) % 40
    alone, folder = llama(tie_word_embeddings=False).double(), [tempfile.mkdtemp()]
    distributed.broadcast_object_list(folder)
    if rank == 0:
        alone.save_pretrained(folder[0])
    distributed.barrier()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder[0], distributed_config=distributed_config, dtype=torch.float64
    )
    assert hasattr(model.lm_head.weight, "full_tensor")
    found = zest_fast.profile(model, {"input_ids": ids, "labels": ids, "use_cache": False})
    assert_equal(found, oracle.measure(alone, lambda: alone(input_ids=ids, labels=ids, use_cache=False).loss))
    distributed.barrier()
    if rank == 0:
        shutil.rmtree(folder[0])


def tensor_parallel_with_a_distributed_loss(rank, processes):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel

    head = {"head": ColwiseParallel(output_layouts=Replicate(), use_local_output=False)}
    model = tensor_parallel(net(), plans()["blocks"] | head)

    def loss(y, t):
        return token_loss(y, distribute_tensor(t, y.device_mesh, [Replicate()]))

    assert_equal(zest_fast.profile(model, tokens(), loss_fn=loss), whole(net()))

    def partial(y, t):
        t = distribute_tensor(t, y.device_mesh, [Shard(0)])
        return token_loss(y.redistribute(placements=[Shard(0)]), t)

    with pytest.raises(ValueError, match=r"the loss is a DTensor of parts .*full_tensor"):
        zest_fast.profile(model, tokens(), loss_fn=partial)


def tensor_parallel_of_different_batches_is_refused(rank, processes):
    model = tensor_parallel(net(), plans()["blocks"])
    with pytest.raises(ValueError, match=r"loss differs between processes of one tensor-parallel model"):
        profile(model, rank, processes)


class Sequences(nn.Module):
    """A plain layer that sees a part of the sequence on each process, which nothing tells."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.plain, self.up, self.head = (
            nn.Embedding(20, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 20),
        )

    def forward(self, x):
        return self.head(self.up(self.plain(self.embed(x))))


def tensor_parallel_around_a_plain_layer_is_refused(rank, processes):
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleOutput

    torch.manual_seed(1)
    cut = PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(1))
    model = tensor_parallel(
        Sequences().double(),
        {"embed": cut, "up": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())},
    )
    with pytest.raises(NotImplementedError, match=r"holds whole differ between processes: plain \(its output"):
        zest_fast.profile(model, tokens(), loss_fn=token_loss)


def mixed_meshes_are_refused(rank, processes):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Partial, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import parallelize_module

    mesh = init_device_mesh("cpu", (1, processes), mesh_dim_names=("data", "model"))
    model = parallelize_module(net(), mesh["model"], plans()["blocks"])
    fully_shard(model, mesh=mesh["data"])
    with pytest.raises(NotImplementedError, match=r"with FSDP2 only parameters that fully_shard has spread"):
        profile(model, rank, processes)
    with pytest.raises(NotImplementedError, match=r"inside of a DistributedDataParallel"):
        profile(DistributedDataParallel(tensor_parallel(net(), plans()["blocks"]), init_sync=False), rank, processes)
    odd = nn.Linear(4, 4)
    odd.weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0), Shard(1)]))
    with pytest.raises(NotImplementedError, match=r"'weight' lies on processes as .*only Shard or Replicate"):
        zest_fast.profile(odd, (torch.ones(2, 4), torch.ones(2, dtype=torch.long)))
    assert Partial


# --- the processes ----------------------------------------------------------------------------------------------------

ON_TWO = {
    case.__name__: case
    for case in (
        ddp_is_of_the_global_batch,
        ddp_of_convolutions,
        ddp_of_a_language_model_holds_one_gradient_at_a_time,
        ddp_of_unequal_batches_is_the_mean_of_their_means,
        ddp_where_control_flow_differs,
        ddp_of_tied_and_free_weights,
        ddp_of_gradients_in_several_parts,
        ddp_of_sparse_gradients_and_a_scaled_loss,
        ddp_of_layers_that_the_graph_does_not_show,
        models_that_write_are_given_back,
        ddp_of_some_metrics_and_layers,
        ddp_in_half_precision,
        ddp_leaves_all_as_it_was_and_trains_on,
        ddp_whose_backward_is_still_to_come,
        ddp_where_one_process_fails,
        ddp_where_all_processes_fail_alike,
        ddp_with_a_loss_that_is_not_finite_on_one_process,
        ddp_of_different_things_is_refused,
        ddp_that_is_compiled_or_hands_out_its_buckets,
        wrappers_that_are_not_known_are_refused,
        fsdp_is_of_the_global_batch,
        several_calls_in_one_closure,
        code_that_looks_at_flags,
        in_single_precision,
        fsdp_of_some_metrics_and_layers,
        fsdp_between_a_forward_and_its_backward,
        fsdp_by_columns,
        fsdp_where_control_flow_differs,
        fsdp_of_uneven_and_empty_shards,
        fsdp_with_checkpointing_and_tied_weights,
        fsdp_in_mixed_precision_of_a_frozen_base,
        fsdp_leaves_all_as_it_was_and_trains_on,
        fsdp_in_the_middle_of_an_accumulation_is_refused,
        fsdp_that_divides_by_another_number,
        fsdp_of_parts_is_refused,
        fsdp_where_processes_fail,
        tensor_parallel_is_of_the_whole_layer,
        tensor_parallel_language_model_as_transformers_loads_it,
        tensor_parallel_with_a_distributed_loss,
        tensor_parallel_of_different_batches_is_refused,
        tensor_parallel_around_a_plain_layer_is_refused,
        mixed_meshes_are_refused,
        one_process_that_does_not_come_is_named,
    )
}
ON_FOUR = {
    case.__name__: case
    for case in (
        ddp_is_of_the_global_batch,
        ddp_of_unequal_batches_is_the_mean_of_their_means,
        fsdp_is_of_the_global_batch,
        fsdp_of_uneven_and_empty_shards,
        hsdp_is_of_the_global_batch,
        several_calls_in_one_closure,
        tensor_parallel_is_of_the_whole_layer,
        ddp_where_one_process_fails,
    )
}


def one_goes_in_the_middle_of_a_forward(rank, folder):
    """FSDP2 gathers weights in forward: who fails there leaves the others in a collective that it never joins."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = Failing()
    sharded(model, [model.inner.a, model.inner.b])
    if rank == 1:
        model.inner.b.register_forward_pre_hook(lambda *_: fail(None))
        with pytest.raises(ValueError, match=r"a bad gradient"):
            profile(model, rank, 2)
        os._exit(0)  # as a script does that nobody catches errors for
    with pytest.raises(OtherProcessFailed, match=r"process 1 failed in this profile: ValueError: a bad gradient"):
        profile(model, rank, 2)
    Path(folder, "said").touch()
    os._exit(0)


def test_who_waits_in_a_collective_of_torch_learns_why_it_broke(tmp_path):
    start(one_goes_in_the_middle_of_a_forward, (str(tmp_path),), 2)
    assert (tmp_path / "said").exists()


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


# --- what needs one process -------------------------------------------------------------------------------------------


def test_a_pipeline_stage_is_profiled_by_itself():
    """Its closure gets what the stage gets: an input, and the gradient of its output."""
    model = net()
    (x, y), stages = tokens(), [nn.Sequential(model.embed, model.first, model.a), nn.Sequential(model.b, model.head)]
    between = stages[0](x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(token_loss(stages[1](between), y), between)
    both = oracle.measure(nn.Sequential(*stages), lambda: token_loss(stages[1](stages[0](x)), y))
    first = zest_fast.profile(stages[0], closure=lambda: (stages[0](x) * gradient).sum())
    last = zest_fast.profile(stages[1], (between.detach(), y), loss_fn=token_loss)
    for stage, found in enumerate((first, last)):
        for name in found:
            expected = both.values[f"{stage}.{name}"]
            for metric in oracle.METRICS:
                error = oracle.relative_error(metric, found[name][metric], expected, both.numel[f"{stage}.{name}"])
                assert error <= 1e-6, (name, metric)
    assert len(first) + len(last) == len(both.values)


def test_a_meeting_says_whose_turn_it_was(monkeypatch):
    store = distributed.HashStore()
    monkeypatch.setattr(distributed, "get_rank", lambda: current.rank)
    current = threading.local()
    found = {}

    def take_part(rank, act):
        current.rank = rank
        try:
            found[rank] = act(meeting.Meeting([3, 5, 8], store))
        except OtherProcessFailed as error:
            found[rank] = str(error)

    def all_of(acts):
        threads = [threading.Thread(target=take_part, args=pair) for pair in acts.items()]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        return [found[rank] for rank in (3, 5, 8)]

    def twice(m):
        return m.exchange(m._me, list), m.exchange(1, sum)

    assert all_of(dict.fromkeys((3, 5, 8), twice)) == [([3, 5, 8], 3)] * 3
    for failing in (3, 8):  # the first, which merges, and another one
        store = distributed.HashStore()
        acts = dict.fromkeys((3, 5, 8), lambda m: m.exchange(0, sum)) | {failing: lambda m: m.fail(KeyError("x"))}
        said = all_of(acts)
        text = f"process {failing} failed in this profile: KeyError: 'x'"
        assert [words for rank, words in zip((3, 5, 8), said, strict=True) if rank != failing] == [text, text]
    store = distributed.HashStore()
    monkeypatch.setattr(meeting, "TIME_LIMIT_S", 0.2)
    said = all_of(dict.fromkeys((3, 5), lambda m: m.exchange(0, sum)) | {8: lambda m: ""})
    assert all("process 8 has not come within" in words for words in said[:1])
    assert "has not come within" in said[1]
