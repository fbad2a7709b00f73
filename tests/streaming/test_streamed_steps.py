"""Steps of streamed models: bit for bit those of the resident ones, and what is resident meanwhile."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import transformers
from safetensors.torch import load_model
from streamed_models import (
    LAYERS,
    assert_bits,
    losses_and_gradients,
    mapped_bytes,
    resident,
    save_llama,
    save_shards,
    tokens,
)

from zest_fast import (
    PrefixCache,
    SelectiveBackward,
    adamw,
    apply_delta,
    merge_delta,
    open_streamed,
    optimizer_in_backward,
    pack,
)
from zest_fast.lean import head_blocks
from zest_fast.streaming import opening
from zest_fast.streaming.mapped_files import Pages, pages_of
from zest_fast.streaming.streamed_linear import StreamedLinear, StreamedQuantisedLinear, StreamedWeight
from zest_fast.streaming.streamed_rows import MappedBlocks

pytestmark = [pytest.mark.usefixtures("one_thread", "everything_is_large")]


@pytest.fixture
def everything_is_large(monkeypatch):
    monkeypatch.setattr(opening, "SMALL", 0)


@pytest.fixture(params=[None, "int8", "nf4"])
def frozen(request):
    if request.param == "nf4":
        pytest.importorskip("bitsandbytes")
    return request.param


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def folder(request, tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama") / "plain", request.param)


def opened(folder, frozen, tmp_path, train=LAYERS, **options):
    if frozen is None:
        return open_streamed(folder, train=train, **options)
    packed = tmp_path / f"packed-{frozen}"
    return open_streamed(packed if packed.exists() else pack(folder, packed, frozen=frozen), train=train, **options)


def streamed_kinds(model):
    return {type(module) for module in model.modules()} & {StreamedLinear, StreamedQuantisedLinear}


@pytest.mark.parametrize("options", [{}, {"checkpoint": "above-cut"}, {"lean": False}], ids=str)
def test_several_steps_are_those_of_the_resident_model(folder, frozen, options, tmp_path):
    """Two forward passes before the backward passes: whatever they keep of weights must not change in between."""
    trained = []
    for model, kind in ((opened(folder, frozen, tmp_path), None), (resident(folder), frozen)):
        assert bool(streamed_kinds(model)) == (kind is None and model.training is False and not trained)
        tuned = SelectiveBackward(model.train(), LAYERS, frozen=kind, **options)
        optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-2)
        found = []
        for step in range(3):
            found += losses_and_gradients(model, tuned, tokens(2 * step), tokens(2 * step + 1))
            model(**tokens(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found += [parameter.detach().clone() for parameter in tuned.parameters()]
        tuned.verify()
        trained.append(found)
    assert all(found.any() for found in trained[0])
    assert_bits(*trained)


def test_a_step_inside_backward_is_the_same(folder, frozen, tmp_path):
    trained = []
    for model, kind in ((opened(folder, frozen, tmp_path), None), (resident(folder), frozen)):
        tuned = SelectiveBackward(model, LAYERS, frozen=kind)
        with optimizer_in_backward(adamw(tuned.parameters(), lr=1e-2)):
            for step in range(2):
                model(**tokens(step)).loss.backward()
        trained.append([parameter.detach() for parameter in tuned.parameters()])
    assert_bits(*trained)


def test_under_autocast_and_without_gradients(folder, frozen, tmp_path):
    results = []
    for model, kind in ((opened(folder, frozen, tmp_path), None), (resident(folder), frozen)):
        tuned = SelectiveBackward(model, LAYERS, frozen=kind)
        with torch.autocast("cpu", torch.bfloat16):
            found = losses_and_gradients(model, tuned, tokens())
        with torch.no_grad():
            found.append(model(**tokens(3)).logits)
        tuned.remove()
        found.append(model(**tokens(3)).logits.detach())
        results.append(found)
    assert_bits(*results)


def test_deltas_go_from_streamed_to_resident_and_back(folder, frozen, tmp_path):
    path = tmp_path / "delta.safetensors"
    models = [(opened(folder, frozen, tmp_path), None), (resident(folder), frozen)]
    for (one, kind), (other, other_kind) in (
        models,
        [(resident(folder), frozen), (opened(folder, frozen, tmp_path), None)],
    ):
        with SelectiveBackward(one, LAYERS, frozen=kind) as tuned:
            for parameter in tuned.parameters():
                parameter.data.add_(0.5)
            tuned.save(path)
            expected = one(**tokens()).logits
        with SelectiveBackward(other, LAYERS, frozen=other_kind) as tuned:
            tuned.load(path)
            assert torch.equal(other(**tokens()).logits, expected)
    other = save_llama(tmp_path / "other", num_key_value_heads=2)
    with (
        SelectiveBackward(open_streamed(other, train=LAYERS), LAYERS) as tuned,
        pytest.raises(ValueError, match=r"differ from those|has dtype"),
    ):
        tuned.load(path)


def test_deltas_are_applied_and_merged(folder, frozen, tmp_path):
    path, merged = tmp_path / "delta.safetensors", tmp_path / "merged.safetensors"
    model = opened(folder, frozen, tmp_path)
    with SelectiveBackward(model, LAYERS) as tuned:
        for parameter in tuned.parameters():
            parameter.data.add_(0.5)
        tuned.save(path)
        expected = model(**tokens()).logits
    merge_delta(opened(folder, frozen, tmp_path), path, merged)
    plain = resident(folder)
    load_model(plain, merged)
    assert torch.equal(plain(**tokens()).logits, expected)
    if frozen is None:  # into weights that are mapped: these pages are private from then on
        other = open_streamed(folder)
        apply_delta(other, path)
        for _ in range(2):
            assert torch.equal(other(**tokens()).logits, expected)


def test_buffers_are_those_that_transformers_computes(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    models = {
        "plain": transformers.LlamaForCausalLM(transformers.LlamaConfig(**_small())),
        "scaled": transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **_small(), rope_parameters={**scaling, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
            )
        ),
        "bert": transformers.BertForSequenceClassification(transformers.BertConfig(**_small(), num_labels=3)),
        "gpt2": transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50)),
    }
    for name, model in models.items():
        for dtype in (torch.float32, torch.bfloat16):
            folder = save_shards(tmp_path / f"{name}-{dtype}", model, dtype)
            found, expected = open_streamed(folder), resident(folder)
            tensors = [dict((*one.named_parameters(), *one.named_buffers())) for one in (found, expected)]
            assert tensors[0].keys() == tensors[1].keys()
            for key, tensor in tensors[1].items():
                assert tensors[0][key].dtype == tensor.dtype and torch.equal(tensors[0][key], tensor), (name, key)
            assert found.training is False and found.config.architectures == expected.config.architectures


def _small():
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }


def test_a_classifier_trains_its_head_too(frozen, tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(**_small(), num_labels=3, hidden_dropout_prob=0.1)
    folder = save_shards(tmp_path / "bert", transformers.BertForSequenceClassification(config), size="20KB")
    layers = ["bert.encoder.layer.1.output.dense"]
    batch = {"input_ids": torch.arange(24).view(3, 8), "labels": torch.arange(3)}
    results = []
    for model, kind in ((opened(folder, frozen, tmp_path, layers), None), (resident(folder), frozen)):
        tuned = SelectiveBackward(model.train(), layers, frozen=kind)
        assert tuned.trainable_names[-2:] == ("classifier.weight", "classifier.bias")
        torch.manual_seed(1)  # of the dropout
        results.append(losses_and_gradients(model, tuned, batch, batch))
    assert_bits(*results)


def test_gpt2_and_its_tied_embeddings(tmp_path):
    """Conv1D is in memory, and the head is the mapped embedding, which the files have once."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=500, n_positions=32)
    folder = save_shards(tmp_path / "gpt2", transformers.GPT2LMHeadModel(config))
    layers = ["transformer.h.1.mlp.c_fc"]
    results = []
    for model in (open_streamed(folder, train=layers), resident(folder)):
        assert model.lm_head.weight is model.transformer.wte.weight
        assert (pages_of(model.lm_head.weight) is not None) == (not results)
        assert pages_of(model.transformer.h[0].mlp.c_fc.weight) is None
        tuned = SelectiveBackward(model, layers)
        results.append(losses_and_gradients(model, tuned, tokens(), tokens(2)))
    assert_bits(*results)


def test_tied_embeddings_of_a_llama_also_where_they_train(frozen, tmp_path):
    folder = save_llama(tmp_path / "tied", tie_word_embeddings=True)
    for head in (None, "lm_head"):
        results = []
        for model, kind in ((opened(folder, frozen, tmp_path, head=head), None), (resident(folder), frozen)):
            assert model.lm_head.weight is model.model.embed_tokens.weight
            tuned = SelectiveBackward(model, LAYERS, head=head, frozen=kind)
            results.append(losses_and_gradients(model, tuned, tokens()))
        assert_bits(*results)


def test_an_input_is_differentiated_twice(folder, frozen, tmp_path):
    results = []
    for model, kind in ((opened(folder, frozen, tmp_path), None), (resident(folder), frozen)):
        model.config._attn_implementation = "eager"  # torch's fused attention has no second derivative
        tuned = SelectiveBackward(model, LAYERS, frozen=kind, lean=False)
        x = model.get_input_embeddings()(tokens()["input_ids"]).detach().float().requires_grad_(True)
        loss = model(inputs_embeds=x.to(model.dtype)).logits.float().square().mean()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        gradient.square().sum().backward()
        results.append([x.grad, *(parameter.grad for parameter in tuned.parameters())])
    assert_bits(*results)


def test_several_threads_run_a_streamed_model(folder, frozen, tmp_path):
    model = opened(folder, frozen, tmp_path)
    tuned = SelectiveBackward(model, LAYERS)
    expected = {seed: losses_and_gradients(model, tuned, tokens(seed))[0] for seed in range(4)}
    found: dict[int, list[torch.Tensor]] = {seed: [] for seed in expected}

    def run(seed):
        for _ in range(5):
            loss = model(**tokens(seed)).loss
            torch.autograd.grad(loss, list(tuned.parameters()))
            found[seed].append(loss.detach())

    threads = [threading.Thread(target=run, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, losses in found.items():
        assert len(losses) == 5 and all(torch.equal(loss, expected[seed]) for loss in losses)


# What is resident


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """50 MiB, so that a layer is larger than what a huge page goes over its ends."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4000}
    return save_llama(tmp_path_factory.mktemp("wide") / "plain", size="40MB", **sizes)


@pytest.mark.parametrize("lean", [True, False])
def test_about_two_layers_are_resident(wide, frozen, lean, monkeypatch):
    """Sampled where most is: when a layer has been used and not yet dropped. Huge pages go over its ends."""
    model = opened(wide, frozen, wide.parent)
    folder = wide if frozen is None else wide.parent / f"packed-{frozen}"
    mapped = sum(parameter.nbytes for parameter in model.parameters() if pages_of(parameter))
    largest = max(sum(p.nbytes for p in m.parameters()) for m in model.modules() if hasattr(m, "streamed"))
    room = 2 * (2 << 20)
    tuned = SelectiveBackward(model, LAYERS, lean=lean)  # plain, backward reads the head's weight, too
    samples, backward = [mapped_bytes(folder)], []
    assert samples[0] <= room  # of hashing nothing stays

    drop = StreamedWeight.drop

    def sampled(weight):
        samples.append(mapped_bytes(folder))
        backward.append(torch._C._current_graph_task_id() != -1)
        drop(weight)

    monkeypatch.setattr(StreamedWeight, "drop", sampled)
    loss = model(**tokens()).loss
    assert mapped_bytes(folder) <= room
    loss.backward()
    assert True in backward and False in backward
    assert largest <= max(samples) <= 2 * largest + room < mapped
    assert mapped_bytes(folder) <= room
    torch.optim.AdamW(tuned.parameters(), lr=1e-2).step()
    monkeypatch.undo()
    model(**tokens()).loss.backward()
    torch.optim.AdamW(tuned.parameters(), lr=1e-2).step()
    tuned.verify()
    assert mapped_bytes(folder) <= room


def test_blocks_of_the_head_are_dropped_as_they_are_used(tmp_path, monkeypatch):
    """While the loss is taken no more than a block is resident, where the head is the largest weight by far."""
    folder = save_llama(tmp_path / "wordy", size="1GB", hidden_size=256, vocab_size=60_000)
    model = open_streamed(folder, train=LAYERS)
    tuned = SelectiveBackward(model, LAYERS)
    block = 8 << 20
    monkeypatch.setattr(head_blocks, "BLOCK", block)
    monkeypatch.setattr(
        model.lm_head.weight, "blocks", MappedBlocks(model.lm_head.weight, pages_of(model.lm_head.weight))
    )
    samples = []
    log_softmax = torch.nn.functional.log_softmax

    def sampled(*arguments, **options):
        samples.append(mapped_bytes(folder))
        return log_softmax(*arguments, **options)

    will_need = Pages.will_need
    monkeypatch.setattr(Pages, "will_need", lambda pages: (samples.append(mapped_bytes(folder)), will_need(pages)))
    monkeypatch.setattr(torch.nn.functional, "log_softmax", sampled)
    model(**tokens()).loss.backward()
    assert len(samples) > 14 and max(samples) <= block + 2 * (2 << 20) < model.lm_head.weight.nbytes / 4
    tuned.remove()


def test_the_next_layer_is_asked_for_and_in_backward_the_previous(folder, monkeypatch):
    model = open_streamed(folder, train=LAYERS)
    names = {pages_of(p): name.removesuffix(".weight") for name, p in model.named_parameters() if pages_of(p)}
    asked: list[str] = []
    monkeypatch.setattr(Pages, "will_need", lambda pages: asked.append(names[pages]))
    tuned = SelectiveBackward(model, LAYERS)
    first = "model.layers.0.self_attn.q_proj"
    asked.clear()
    model(**tokens()).loss.backward()  # learns
    asked.clear()
    loss = model(**tokens()).loss
    assert asked[:2] == [first, "model.layers.0.self_attn.k_proj"]
    last = "model.layers.3.mlp.down_proj"
    assert asked[-2:] == [last, "lm_head"] and len(asked) == len(set(asked)) == 27  # layers and the head, once
    asked.clear()
    loss.backward()
    assert asked[:2] == [last, "model.layers.3.mlp.up_proj"] and len(asked) == len(set(asked))
    assert not any(name.startswith(("model.layers.0", "model.layers.1")) for name in asked)  # below the cut
    assert "model.layers.2.mlp.down_proj" in asked
    tuned.remove()


# What is written to, moved or copied


def test_a_mapped_weight_that_trains_after_all_is_kept(folder):
    """SelectiveBackward around other layers than were opened to train: their pages become private and stay."""
    other = "model.layers.2.mlp.gate_proj"
    results = []
    for model in (open_streamed(folder), resident(folder)):
        tuned = SelectiveBackward(model, [other])
        for step in range(2):
            model(**tokens(step)).loss.backward()
            optimizer = torch.optim.SGD(tuned.parameters(), lr=1.0)
            optimizer.step()
            optimizer.zero_grad()
        tuned.verify()
        tuned.remove()
        results.append([model(**tokens(5)).logits, model.get_submodule(other).weight.detach()])
    assert_bits(*results)


def test_what_was_loaded_into_a_mapped_weight_stays_and_the_file_is_as_it_was(folder):
    files = {path: path.read_bytes() for path in folder.iterdir()}
    model = open_streamed(folder)
    state = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    model(**tokens())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert files == {path: path.read_bytes() for path in folder.iterdir()}


def test_moves_and_copies_are_refused(folder, frozen, tmp_path):
    model = opened(folder, frozen, tmp_path)
    before = {name: (tensor.dtype, tensor.device) for name, tensor in model.state_dict().items()}
    module = model.model.layers[0].mlp.up_proj
    assert model.to("cpu") is model
    for move in (
        lambda: model.to("meta"),
        lambda: torch.nn.Sequential(model).to("meta"),
        lambda: module.to("meta"),
        lambda: model.to_empty(device="meta"),
    ):
        with pytest.raises(
            NotImplementedError, match=r"cannot be moved from 'cpu' to 'meta'.*open_streamed\(\.\.\., device="
        ):
            move()
    for convert in (model.double, module.half):
        with pytest.raises(NotImplementedError, match="stay in the dtype of the file"):
            convert()
    for take in (copy.deepcopy, pickle.dumps):
        for one in (model, module):
            with pytest.raises(TypeError, match=r"call zest_fast\.open_streamed again"):
                take(one)
    assert before == {name: (tensor.dtype, tensor.device) for name, tensor in model.state_dict().items()}


def test_small_weights_are_in_memory(folder, monkeypatch):
    monkeypatch.undo()
    model = open_streamed(folder, train=LAYERS)
    assert streamed_kinds(model) == set() and not any(pages_of(parameter) for parameter in model.parameters())
    assert torch.equal(copy.deepcopy(model)(**tokens()).logits, resident(folder)(**tokens()).logits)


def test_with_a_prefix_cache_blocks_below_the_cut_are_read_in_the_first_epoch_only(folder, frozen, tmp_path):
    model = opened(folder, frozen, tmp_path)
    plain = opened(folder, frozen, tmp_path)
    cache = PrefixCache(tmp_path / "cache")
    found = []
    for one, options in ((plain, {}), (model, {"cache": cache})):
        tuned = SelectiveBackward(one, LAYERS, **options)
        optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
        losses = []
        for _ in range(3):
            for seed in (1, 2):
                loss = one(**tokens(seed)).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        found.append((losses, [parameter.detach().clone() for parameter in tuned.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    assert cache.computed == 4 and cache.read == 8
