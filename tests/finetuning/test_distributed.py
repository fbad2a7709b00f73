"""Two processes: what a wrapped model learns in DistributedDataParallel and FSDP2 is what one process learns."""

import pytest
import torch
from small_models import llama
from torch import distributed, multiprocessing, nn

from zest_fast.finetuning.delta_files import read_delta
from zest_fast.finetuning.selective_backward import SelectiveBackward

LAYER = "model.layers.2.mlp.down_proj"
IDS = torch.arange(64).reshape(4, 16) % 40
PROCESSES = 2
ORDERS = ("wrapped-then-fsdp", "fsdp-then-wrapped")
pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")


def test_two_processes_learn_what_one_does(tmp_path):
    multiprocessing.spawn(learn_in_all_ways, (str(tmp_path),), nprocs=PROCESSES)
    one, other = (read_delta(tmp_path / f"{order}.safetensors") for order in ORDERS)
    assert one.base == other.base
    assert torch.equal(one.parameters[f"{LAYER}.weight"], other.parameters[f"{LAYER}.weight"])


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
    if sharded == "fsdp-then-wrapped":
        shard(model)
    tuned = SelectiveBackward(model, [LAYER])
    if sharded == "wrapped-then-fsdp":
        shard(model)
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": True})
    ran = parallel(model)
    own = IDS[rank::PROCESSES]
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


def assert_close(model, wanted):
    """The sum over processes is another order: a few roundings of float32."""
    for (name, found), expected in zip(model.named_parameters(), wanted.parameters(), strict=True):
        found = found.full_tensor() if hasattr(found, "full_tensor") else found
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max(), name
