"""The fastest way to save memory that fits, and what a step holds whose weights stay on disk."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zest_fast import SelectiveBackward, fit_memory, plan
from zest_fast.planning.counted_memory import held_bytes, peak_bytes
from zest_fast.planning.savings import Savings

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 8}
CONFIG = transformers.LlamaConfig(**SIZES, vocab_size=4000)
LAYERS = ("model.layers.1.mlp.up_proj", "model.layers.2.mlp.down_proj")
STEP = {"batch_size": 1, "sequence_length": 64, "device": "cpu", "optimizer": "adamw-in-backward"}
LARGEST = 4 * 1024 * 2048 // 2  # bytes of a weight in bfloat16


@pytest.fixture(scope="module")
def found():
    return fit_memory(CONFIG, LAYERS, "10GB", **STEP)


def test_what_fits_saves_nothing_and_costs_least(found) -> None:
    assert found.savings == Savings() and found.cost == 1.0
    table = found.to_pandas()
    assert len(table) == 12 and table.cost.is_monotonic_increasing
    assert "more would buy" not in str(found)


def test_each_limit_has_the_cheapest_way_that_fits(found) -> None:
    table = found.to_pandas()
    for limit in sorted(table.peak_bytes)[1::5]:
        chosen = fit_memory(CONFIG, LAYERS, int(limit), **STEP)
        fitting = table[table.peak_bytes <= limit]
        assert chosen.plan.peak_bytes <= limit
        assert chosen.cost == pytest.approx(fitting.cost.min())
        if chosen.cost > table.cost.min():
            assert "more would buy" in str(chosen)


def test_nothing_fits(found) -> None:
    least = int(found.to_pandas().peak_bytes.min())
    with pytest.raises(ValueError, match=r"no way to save memory makes a step .* with .*weights on disk it needs"):
        fit_memory(CONFIG, LAYERS, least - 1, **STEP)


@pytest.mark.parametrize("frozen", [None, "int8", "nf4"])
def test_weights_on_disk_count_while_they_multiply(frozen) -> None:
    resident, streamed = (plan(CONFIG, LAYERS, frozen=frozen, stream=stream, **STEP) for stream in (False, True))
    trained = 2 * 2 * 1024 * 2048
    small = 2**20 + (12 * 0.5625 * 1024**2 if frozen == "nf4" else 0)  # norms, tables; packed weights below 1 MiB
    held = streamed.breakdown["weights"] - trained
    packed = {None: 0, "int8": LARGEST // 2, "nf4": 0.29 * LARGEST}[frozen]
    assert held <= small + max(LARGEST + packed, 4000 * 1024 * 2)
    assert streamed.peak_bytes < resident.peak_bytes - (0 if frozen else 3 * LARGEST)
    assert streamed.flops == resident.flops
    others = {"gradients", "optimizer", "activations"}
    if frozen is None and streamed.peak_phase == resident.peak_phase:
        assert all(abs(streamed.breakdown[kind] - resident.breakdown[kind]) < 2**21 for kind in others)


@pytest.mark.parametrize("frozen", [None, "int8", "nf4"])
def test_on_a_gpu_two_buffers_count(frozen) -> None:
    """And of what goes through them only what is unpacked."""
    resident, streamed = (
        plan(CONFIG, LAYERS, frozen=frozen, stream=stream, **{**STEP, "device": "cuda"}) for stream in (False, True)
    )
    trained = 2 * 2 * 1024 * 2048
    small = 2**20 + (12 * 0.5625 * 1024**2 if frozen == "nf4" else 0)
    buffers = 2 * 4000 * 1024 * 2  # the head is the largest, and no larger than a block
    held = streamed.breakdown["weights"] - trained - buffers
    assert 0 <= held <= small + (LARGEST if frozen else 0)
    assert streamed.flops == resident.flops
    wide = transformers.LlamaConfig(**SIZES, vocab_size=40_000)
    lean, plain = (
        plan(wide, LAYERS, stream=True, lean=lean, **{**STEP, "device": "cuda"}).breakdown["weights"] - trained
        for lean in (True, False)
    )
    assert 2 * 2**25 <= lean <= 2 * 2**25 + 2**20  # blocks of the head
    assert lean <= plain <= 2 * 2**25 + 2**20 + 40_000 * 1024 * 2


def test_models_without_blocks_or_linears_have_fewer_ways() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10))
    found = fit_memory(model, ["2"], "1GB", batch_size=2, image_size=8)
    assert not found.to_pandas().checkpoint.notna().any() and not found.to_pandas().frozen.notna().any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stream": True, "layers": "all"}, "stream=True with layers='all'"),
    ],
)
def test_plans_that_cannot_be(arguments, message) -> None:
    layers = arguments.pop("layers", LAYERS)
    with pytest.raises(ValueError, match=message):
        plan(CONFIG, layers, **{**STEP, **arguments})


def test_full_fine_tuning_has_nothing_to_keep_smaller() -> None:
    with pytest.raises(ValueError, match="layers='all'"):
        fit_memory(CONFIG, "all", "1GB", **STEP)


@pytest.mark.parametrize("way", [Savings(frozen="int8"), Savings(cache=True), Savings("above-cut", "int8", cache=True)])
def test_steps_of_a_way_hold_no_more_than_its_plan_says(way, tmp_path) -> None:
    """Those of the first epoch of a cache among them, which find the cut, compare and write."""
    from zest_fast import PrefixCache, SelectiveBackward
    from zest_fast.planning.counted_memory import held_bytes, peak_bytes

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=4, vocab_size=400
    )
    config.use_cache = False
    model = transformers.LlamaForCausalLM(config).train()
    layers = ("model.layers.1.mlp.up_proj", "model.layers.2.mlp.down_proj")
    tokens = [torch.randint(400, (4, 64)) for _ in range(2)]
    planned = fit_memory(model, layers, "1GB", batch={"input_ids": tokens[0], "labels": tokens[0]}, among=[way]).plan
    cache = PrefixCache(tmp_path, samples=8) if way.cache else None
    with SelectiveBackward(model, layers, checkpoint=way.checkpoint, frozen=way.frozen, cache=cache) as tuned:
        optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-4)

        def epochs() -> None:
            for batch in 2 * tokens:
                model(input_ids=batch, labels=batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        own = (value for module in model.modules() for value in vars(module).values())  # of packed weights
        there = held_bytes([*model.parameters(), *model.buffers(), *own, tokens[0]])
        counted = there + peak_bytes(epochs)
    assert counted <= planned.peak_bytes * 1.02
    assert cache is None or (cache.read, cache.computed) == (8, 8)


def test_a_cache_is_a_way_from_two_epochs_on(found) -> None:
    assert not found.to_pandas().cache.any()
    often = fit_memory(CONFIG, LAYERS, "10GB", **STEP, epochs=8).to_pandas()
    assert len(often) == 24 and often.cache.sum() == 12
    few = fit_memory(CONFIG, LAYERS, "10GB", **STEP, epochs=8, steps=10).to_pandas()
    assert few[few.cache].cost.min() > often[often.cache].cost.min() + 0.9  # LEARNING, over ten steps
    with pytest.raises(ValueError, match=r"epochs=0: more than 0"):
        fit_memory(CONFIG, LAYERS, "10GB", **STEP, epochs=0)


def test_only_what_is_left_to_choose_is_planned(found) -> None:
    ways = [Savings(stream=True), Savings(frozen="int8")]
    table = fit_memory(CONFIG, LAYERS, "10GB", **STEP, among=ways).to_pandas()
    whole = found.to_pandas().set_index(["frozen", "stream"])
    assert len(table) == 2 and set(table.peak_bytes) <= set(whole.peak_bytes)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10))
    with pytest.raises(ValueError, match=r"no frozen nn\.Linear"):
        fit_memory(model, ["2"], "1GB", batch_size=2, image_size=8, among=[Savings(frozen="int8")])


def test_a_streamed_step_allocates_what_is_planned(tmp_path) -> None:
    """Beside mapped pages, which no allocator counts."""
    from zest_fast import SelectiveBackward, adamw, open_streamed, optimizer_in_backward
    from zest_fast.planning.counted_memory import peak_bytes

    torch.manual_seed(0)
    transformers.LlamaForCausalLM(CONFIG).to(torch.bfloat16).save_pretrained(tmp_path)
    model = open_streamed(tmp_path, train=LAYERS).train()
    model.config.use_cache = False
    SelectiveBackward(model, LAYERS)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = adamw(trained, lr=1e-4)
    tokens = torch.randint(4000, (1, 64))

    def step() -> None:
        with optimizer_in_backward(optimizer):
            model(input_ids=tokens, labels=tokens).loss.backward()

    step()
    planned = plan(CONFIG, LAYERS, stream=True, **STEP)
    counted = peak_bytes(step)  # beyond what is there before: parameters, states, the batch
    there = sum(parameter.nbytes for parameter in trained) * 3
    assert planned.peak_bytes - planned.breakdown["weights"] - planned.breakdown["optimizer"] <= counted * 1.1 + 2**20
    assert counted + there <= planned.peak_bytes * 1.02 + 2**20


def test_gradients_of_earlier_batches_count(one_thread) -> None:
    """Against what the allocator says of a step of two batches, where activations set the peak."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=500, hidden_size=256, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    model.config.use_cache = False
    ids = torch.randint(500, (16, 64))
    batch, layers = {"input_ids": ids, "labels": ids}, ("model.layers.1.mlp.down_proj", "model.layers.2.mlp.up_proj")
    once, twice = (
        fit_memory(model, layers, "1GB", batch=batch, among=[Savings()], accumulating=accumulating).plan.peak_bytes
        for accumulating in (False, True)
    )
    with SelectiveBackward(model.train(), layers) as tuned:
        parameters = list(tuned.parameters())
        optimizer = torch.optim.AdamW(parameters, foreach=False)

        def step(passes: int) -> None:
            for _ in range(passes):
                model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step(1)
        states = [value for state in optimizer.state.values() for value in state.values()]
        there = held_bytes([*model.parameters(), *model.buffers(), *states, *batch.values()])
        assert there + peak_bytes(lambda: step(1)) == pytest.approx(once, abs=2**14)
        assert there + peak_bytes(lambda: step(2)) == pytest.approx(twice, abs=2**14)
    assert twice - once == sum(parameter.nbytes for parameter in parameters)
