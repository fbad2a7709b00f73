"""Two processes: what a wrapped model learns in DDP, FSDP2 and tensor parallelism is what one process learns."""

import pytest
import torch
from process_cases import start
from small_models import llama
from torch import distributed, nn

from zest_fast.finetuning.delta_files import read_delta
from zest_fast.finetuning.selective_backward import SelectiveBackward

LAYER = "model.layers.2.mlp.down_proj"
IDS = torch.arange(64).reshape(4, 16) % 40
PROCESSES = 2
ORDERS = ("wrapped-then-fsdp", "fsdp-then-wrapped", "wrapped-then-split", "split-then-wrapped")
pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")


def test_two_processes_learn_what_one_does(tmp_path):
    start(learn_in_all_ways, (str(tmp_path),), PROCESSES)
    one, *others = (read_delta(tmp_path / f"{order}.safetensors") for order in ORDERS)
    for other in others:
        assert one.base == other.base
        assert_alike(one.parameters[f"{LAYER}.weight"], other.parameters[f"{LAYER}.weight"], LAYER)


def learn_in_all_ways(rank, folder):
    """Runs in each process, where an assertion that fails ends the test."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    try:
        learn(rank, parallel=nn.parallel.DistributedDataParallel)
        learn(rank, parallel=nn.parallel.DistributedDataParallel, checkpointing=True)
        for order in ORDERS:
            tuned, model, wanted = learn(rank, sharded=order)
            path = f"{folder}/{order}.safetensors"
            tuned.save(path)
            distributed.barrier()
            with torch.no_grad():
                model.get_parameter(f"{LAYER}.weight").zero_()
            tuned.load(path)
            assert_close(model, wanted)
            with pytest.raises(ValueError, match=rf"'{LAYER}\.weight' is sharded .*torch\.distributed\.checkpoint"):
                tuned.save_run(f"{folder}/run", torch.optim.SGD(tuned.parameters()))
    finally:
        distributed.destroy_process_group()


def learn(rank, *, parallel=lambda model: model, sharded="", checkpointing=False):
    torch.manual_seed(0)
    model = llama()
    alone = llama()
    alone.load_state_dict(model.state_dict())
    alone.requires_grad_(False).get_submodule(LAYER).weight.requires_grad_(True)
    spread = split if "split" in sharded else shard
    if sharded.endswith("then-wrapped"):
        spread(model)
    tuned = SelectiveBackward(model, [LAYER])
    if sharded.startswith("wrapped-then"):
        spread(model)
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": True})
    ran = parallel(model)
    own = IDS if "split" in sharded else IDS[rank::PROCESSES]
    pairs = [(ran, own, tuned.parameters()), (alone, IDS, [alone.get_submodule(LAYER).weight])]
    for one, rows, parameters in pairs:
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        for _ in range(3):
            one(input_ids=rows, labels=rows, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert tuned.cut == LAYER and "model.layers.1" in tuned._cut.skipped
    assert_close(model, alone)
    tuned.verify()
    return tuned, model, alone


def shard(model):
    from torch.distributed.fsdp import fully_shard

    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)


def split(model):
    """Tensor parallelism: columns of what goes up, rows of what comes down."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"model.layers.*.mlp.down_proj": RowwiseParallel()}
    plan |= {f"model.layers.*.mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    parallelize_module(model, init_device_mesh("cpu", (PROCESSES,)), plan)


def assert_close(model, wanted):
    for (name, found), expected in zip(model.named_parameters(), wanted.parameters(), strict=True):
        assert_alike(found.full_tensor() if hasattr(found, "full_tensor") else found, expected, name)


def assert_alike(found, expected, name):
    """The sum over processes is another order: a few roundings of float32."""
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max(), name
