"""The memory claim of the README, by counting what the allocator hands out (not by the clock, so it can be asserted).

Without fisher, a profile needs no more than the same pass with all weights trainable and every gradient dropped as soon
as it exists, plus 16 MiB of scratch. fisher adds the outputs that nothing else keeps.
"""

from __future__ import annotations

import pytest
import torch

import zest_fast
from bench.profile import peers
from bench.profile.memory import WITHOUT_FISHER, outputs_nobody_keeps
from zest_fast.planning.counted_memory import peak_bytes

transformers = pytest.importorskip("transformers")
MIB = 2**20
SCRATCH = 16 * MIB


def llama():
    """Gradients of 100 MiB in all, so that keeping them would show; the largest has 11 MiB."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=2752,
        num_hidden_layers=2,
        num_attention_heads=8,
        vocab_size=512,
        use_cache=False,
    )
    ids = torch.randint(512, (4, 96))
    return transformers.LlamaForCausalLM(config).train(), {"input_ids": ids, "labels": ids}


def resnet():
    torch.manual_seed(0)
    config = transformers.ResNetConfig(depths=[1, 1, 2, 2], num_labels=10)
    model = transformers.ResNetForImageClassification(config).train()
    return model, {"pixel_values": torch.randn(4, 3, 96, 96), "labels": torch.randint(10, (4,))}


def peak(run) -> int:
    run()  # the first call allocates what stays
    return peak_bytes(run)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["stored", "checkpointed", "reentrant"])
@pytest.mark.parametrize("make", [llama, resnet])
def test_no_gradient_is_kept(make, checkpointing) -> None:
    model, batch = make()
    if checkpointing is not None:
        if make is resnet:
            pytest.skip("transformers' ResNet has no gradient checkpointing")
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    dropped = peak(lambda: peers.drop_gradients(model, batch))
    lean = peak(lambda: zest_fast.profile(model, batch, metrics=WITHOUT_FISHER))
    assert lean <= dropped + SCRATCH
    kept = sum(p.numel() * p.element_size() for p in model.parameters() if p.dim() > 1)
    assert kept > 2 * SCRATCH, "the model is too small to tell"
    full = peak(lambda: zest_fast.profile(model, batch))
    assert full <= dropped + SCRATCH + (outputs_nobody_keeps(model, batch) if checkpointing is None else 0)


def test_a_linear_gradient_never_exists_as_a_whole() -> None:
    """One layer with a gradient of 64 MiB: the pass needs a few MiB."""
    model = torch.nn.Sequential(torch.nn.Linear(4096, 4096))
    batch = torch.randn(8, 4096), torch.zeros(8, dtype=torch.long)
    assert peak(lambda: zest_fast.profile(model, batch)) < 8 * MIB


def test_forward_metrics_need_the_memory_of_inference() -> None:
    model, batch = llama()
    with torch.no_grad():
        inference = peak(lambda: model(**batch))
    assert peak(lambda: zest_fast.profile(model, batch, metrics=["act_std", "weight_std"])) <= inference + MIB
