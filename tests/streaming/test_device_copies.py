"""Streamed to a device: bit for bit the resident model's steps, over buffers that are spoiled as early as may be."""

from __future__ import annotations

import copy
import gc
import os
import signal
import threading

import pytest
import torch
import transformers
from adversarial_transfer import AdversarialTransfer
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
    open_streamed,
    optimizer_in_backward,
    pack,
    plan,
)
from zest_fast.lean import head_blocks
from zest_fast.planning import step as planned_step
from zest_fast.streaming import opening
from zest_fast.streaming.buffer_ring import BufferRing, CopiedWeight, Part
from zest_fast.streaming.mapped_files import MappedFile, pages_of
from zest_fast.streaming.streamed_linear import StreamedLinear, StreamedQuantisedLinear
from zest_fast.streaming.streamed_rows import CopiedHead, LookedUpEmbedding

pytestmark = [pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def late(monkeypatch):
    return put_in(monkeypatch, AdversarialTransfer())


def put_in(monkeypatch, found):
    """In the place of a GPU; weights of any size are copied, and the head goes in eight blocks."""
    monkeypatch.setattr(opening, "SMALL", 0)
    monkeypatch.setattr(opening, "_let_go_of_freed_memory", lambda: None)  # which has no use for models this small
    monkeypatch.setattr(opening, "_transfer", lambda device: None if device == "cpu" else found)
    monkeypatch.setattr(head_blocks, "BLOCK", 64 * 64 * 4)
    return found


@pytest.fixture(params=[None, "int8", "nf4"])
def frozen(request):
    if request.param == "nf4":
        pytest.importorskip("bitsandbytes")
    return request.param


# bitsandbytes takes seconds for a small model on a CPU, and packs for any test alike.
plain_or_int8 = pytest.mark.parametrize("frozen", [None, "int8"])


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def folder(dtype, tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama") / "plain", dtype)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama") / "plain")


def opened(folder, frozen, train=LAYERS, **options):
    if frozen is not None:
        packed = folder.with_name(f"{folder.name}-{frozen}")
        folder = packed if packed.exists() else pack(folder, packed, frozen=frozen)
    return open_streamed(folder, train=train, device="a test's", **options)


@pytest.mark.parametrize(
    ("frozen", "options"),
    [(kind, options) for kind in (None, "int8") for options in ({}, {"checkpoint": "above-cut"}, {"lean": False})]
    + [("nf4", {"checkpoint": "above-cut"})],
    ids=str,
)
def test_several_steps_are_those_of_the_resident_model(folder, frozen, options, late, tmp_path):
    """Two forward passes before the backward passes, so that gradients accumulate and no buffer holds what it held."""
    if frozen == "nf4":
        pytest.importorskip("bitsandbytes")
    trained = []
    for model, kind in ((opened(folder, frozen), None), (resident(folder), frozen)):
        tuned = SelectiveBackward(model.train(), LAYERS, frozen=kind, **options)
        optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-2)
        found = []
        for step in range(2):
            found += losses_and_gradients(model, tuned, tokens(2 * step), tokens(2 * step + 1))
            model(**tokens(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found += [parameter.detach().clone() for parameter in tuned.parameters()]
        tuned.verify()
        trained.append(found)
        tuned.save(tmp_path / f"{len(trained)}.safetensors")
    assert all(found.any() for found in trained[0])
    assert_bits(*trained)
    tuned.load(tmp_path / "1.safetensors")
    assert len(late.copies) > 4 * 28


@plain_or_int8
def test_copies_that_are_done_at_once(plain, frozen, monkeypatch):
    """The other extreme: what is too early to be overwritten is overwritten."""
    put_in(monkeypatch, AdversarialTransfer(late=False))
    results = []
    for model, kind in ((opened(plain, frozen), None), (resident(plain), frozen)):
        tuned = SelectiveBackward(model, LAYERS, frozen=kind, checkpoint="above-cut")
        results.append(losses_and_gradients(model, tuned, tokens(), tokens(2)))
    assert_bits(*results)


def test_on_the_cpu_blocks_of_the_head_are_the_same(folder, monkeypatch):
    """Where the weights are changes nothing: the blocks of the loss are as large."""
    put_in(monkeypatch, AdversarialTransfer())
    results = []
    for model in (
        open_streamed(folder, train=LAYERS),
        resident(folder),
        open_streamed(folder, train=LAYERS, device=""),
    ):
        with SelectiveBackward(model, LAYERS) as tuned:
            results.append(losses_and_gradients(model, tuned, tokens(), tokens(2, 150)))
    assert_bits(results[0], results[1])
    assert_bits(results[2], results[1])


@plain_or_int8
def test_the_files_are_read_and_their_mapping_is_not(frozen, late, tmp_path):
    """So that a file that is cut short is an error and no SIGBUS, and nothing computes with a weight of the host."""
    folder = save_llama(tmp_path / "wide", hidden_size=256, intermediate_size=1024)
    model = opened(folder, frozen)
    kinds = {type(module) for module in model.modules()}
    assert {CopiedHead, LookedUpEmbedding, StreamedQuantisedLinear if frozen else StreamedLinear} <= kinds
    tuned = SelectiveBackward(model, LAYERS, lean=False)
    for parameter in model.parameters():
        if pages_of(parameter):
            pages_of(parameter).drop()
    before = mapped_bytes(tmp_path)
    for _ in range(2):
        losses_and_gradients(model, tuned, tokens())
    assert mapped_bytes(tmp_path) <= before


@plain_or_int8
def test_everything_else_is_on_the_device(frozen, monkeypatch, tmp_path):
    """On the meta device torch itself refuses to compute with a tensor of the host."""
    transfer = put_in(monkeypatch, AdversarialTransfer("meta"))
    monkeypatch.setattr(opening._Opened, "_move", _move_to_meta)
    model = opened(save_llama(tmp_path / "llama"), frozen)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x = torch.empty(2, 12, 64, device="meta", requires_grad=True)
    logits = model(inputs_embeds=x, attention_mask=torch.zeros(2, 1, 12, 12, device="meta")).logits
    logits.sum().backward()
    assert logits.device.type == x.grad.device.type == "meta" and transfer.copies
    where = {parameter.device.type for parameter in model.parameters() if pages_of(parameter) is None}
    assert where == {"meta"} and {buffer.device.type for buffer in model.buffers()} == {"meta"}


def _move_to_meta(opened, mapped, device):
    for module in opened._model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in mapped:
                    moved = tensor.detach().to(device)
                    tensors[name] = torch.nn.Parameter(moved) if tensors is module._parameters else moved
    opened._check = lambda used: None


@plain_or_int8
def test_a_step_inside_backward_and_under_autocast(plain, frozen, late):
    results = []
    for model, kind in ((opened(plain, frozen), None), (resident(plain), frozen)):
        tuned = SelectiveBackward(model, LAYERS, frozen=kind)
        with torch.autocast("cpu", torch.bfloat16):
            found = losses_and_gradients(model, tuned, tokens())
            with torch.no_grad():
                found.append(model(**tokens(3)).logits)
            logits = model(input_ids=tokens()["input_ids"]).logits
        (found_of_logits,) = torch.autograd.grad(logits.float().square().mean(), [*tuned.parameters()][:1])
        with optimizer_in_backward(adamw(tuned.parameters(), lr=1e-2)):
            for step in range(2):
                model(**tokens(step)).loss.backward()
        found += [found_of_logits, *(parameter.detach() for parameter in tuned.parameters())]
        tuned.remove()
        with torch.inference_mode():
            found.append(model(**tokens(3)).logits)
        results.append(found)
    assert_bits(*results)


@plain_or_int8
def test_checkpointing_of_transformers_reentrant_or_not(plain, frozen, late):
    for reentrant in (False, True):
        results = []
        for model, kind in ((opened(plain, frozen), None), (resident(plain), frozen)):
            model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
            tuned = SelectiveBackward(model, LAYERS, frozen=kind)
            results.append(losses_and_gradients(model, tuned, tokens(), tokens(2)))
        assert_bits(*results)


@plain_or_int8
def test_an_input_is_differentiated_twice(plain, frozen, late):
    results = []
    for model, kind in ((opened(plain, frozen), None), (resident(plain), frozen)):
        model.config._attn_implementation = "eager"  # torch's fused attention has no second derivative
        tuned = SelectiveBackward(model, LAYERS, frozen=kind, lean=False)
        x = model.get_input_embeddings()(tokens()["input_ids"]).detach().requires_grad_(True)
        loss = model(inputs_embeds=x).logits.square().mean()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        gradient.square().sum().backward()
        results.append([x.grad, *(parameter.grad for parameter in tuned.parameters())])
    assert_bits(*results)


@plain_or_int8
def test_a_layer_that_is_used_several_times(plain, frozen, late):
    results = []
    for model, kind in ((opened(plain, frozen), None), (resident(plain), frozen)):
        model.model.layers[3].mlp.gate_proj = model.model.layers[1].mlp.gate_proj
        model.model.layers[3].mlp.down_proj = model.model.layers[2].mlp.down_proj
        tuned = SelectiveBackward(model, LAYERS, frozen=kind)
        results.append(losses_and_gradients(model, tuned, tokens(), tokens(2)))
    assert_bits(*results)


@plain_or_int8
def test_several_threads_and_backward_in_another_one(plain, frozen, late):
    """More threads than buffers: who finds none waits."""
    model = opened(plain, frozen)
    tuned = SelectiveBackward(model, LAYERS)
    parameters = list(tuned.parameters())

    def step(seed):
        loss = model(**tokens(seed)).loss
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    expected = {seed: step(seed) for seed in range(4)}
    found: dict[int, list] = {seed: [] for seed in expected}
    threads = [
        threading.Thread(target=lambda seed=seed: found[seed].extend(step(seed) for _ in range(3))) for seed in expected
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, steps in found.items():
        assert len(steps) == 3
        for one in steps:
            assert_bits(one, expected[seed])
    losses = []
    thread = threading.Thread(target=lambda: losses.append(model(**tokens(1)).loss))
    thread.start()
    thread.join()
    assert_bits(list(torch.autograd.grad(losses[0], parameters)), expected[1][1:])


def test_gpt2_whose_head_is_its_embedding_and_a_classifier(late, tmp_path):
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    gpt2 = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=500, n_positions=32)
    bert = transformers.BertConfig(**small, vocab_size=500, num_labels=3, hidden_dropout_prob=0.1)
    cases = [
        (transformers.GPT2LMHeadModel(gpt2), "transformer.h.1.mlp.c_fc", tokens()),
        (transformers.BertForMaskedLM(bert), "bert.encoder.layer.1.output.dense", tokens()),
        (
            transformers.BertForSequenceClassification(bert),
            "bert.encoder.layer.1.output.dense",
            {"input_ids": tokens()["input_ids"], "labels": torch.arange(2)},
        ),
    ]
    for number, (made, layer, batch) in enumerate(cases):
        folder = save_shards(tmp_path / str(number), made)
        results = []
        for model in (open_streamed(folder, train=[layer], device="a test's"), resident(folder)):
            tuned = SelectiveBackward(model.train(), [layer])
            torch.manual_seed(1)  # of the dropout
            results.append(losses_and_gradients(model, tuned, batch, batch))
        assert_bits(*results)


@plain_or_int8
def test_tied_weights_also_where_they_train(frozen, late, tmp_path):
    folder = save_llama(tmp_path / "tied", tie_word_embeddings=True)
    for head in (None, "lm_head"):
        results = []
        for model, kind in ((opened(folder, frozen, head=head), None), (resident(folder), frozen)):
            assert model.lm_head.weight is model.model.embed_tokens.weight
            tuned = SelectiveBackward(model, LAYERS, head=head, frozen=kind)
            results.append(losses_and_gradients(model, tuned, tokens()))
        assert_bits(*results)


def test_embeddings_of_other_classes_are_on_the_device(late, tmp_path):
    """They have a forward of their own, of which a row that was read knows nothing."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Gemma3TextConfig(**sizes, num_key_value_heads=2, head_dim=16, vocab_size=500)
    folder = save_shards(tmp_path / "gemma", transformers.Gemma3ForCausalLM(config))
    model, other = open_streamed(folder, device="a test's"), resident(folder)
    assert pages_of(model.get_input_embeddings().weight) is None
    assert torch.equal(model(**tokens()).logits, other(**tokens()).logits)


def test_rows_that_are_not_there(plain, late):
    model = open_streamed(plain, device="a test's")
    for number in (-1, 500):
        with pytest.raises(IndexError, match="of 500 rows of an embedding"):
            model(input_ids=torch.tensor([[1, number]]))
    embedding = model.get_input_embeddings()
    assert embedding(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 64)
    ids = torch.tensor([[3, 3, 499], [0, 3, 1]], dtype=torch.int32)
    assert torch.equal(embedding(ids), resident(plain).get_input_embeddings()(ids))


# What changes under it


def test_what_is_written_is_used(plain, late):
    """After it was copied, too: a buffer that holds what was there before is not used again."""
    model, other = open_streamed(plain, device="a test's"), resident(plain)
    model(**tokens()), other(**tokens())
    torch.manual_seed(3)
    state = {name: torch.randn_like(tensor) / 8 for name, tensor in other.state_dict().items()}
    for one in (model, other):
        one.load_state_dict(state)
    for one in (model, other):
        one.lm_head.weight.data = one.lm_head.weight.data * 2
        one.model.layers[0].mlp.up_proj.weight.data = one.model.layers[0].mlp.up_proj.weight.data * 2
        layer = one.model.layers[1].mlp
        layer.up_proj.weight, layer.gate_proj.weight = layer.gate_proj.weight, layer.up_proj.weight
        one.model.layers[2].mlp.down_proj.weight = torch.nn.Parameter(torch.ones(64, 172), requires_grad=False)
    for _ in range(2):
        assert torch.equal(model(**tokens()).logits, other(**tokens()).logits)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_a_delta_that_is_applied_is_used(plain, late, tmp_path):
    with SelectiveBackward(open_streamed(plain, train=LAYERS, device="a test's"), LAYERS) as tuned:
        for parameter in tuned.parameters():
            parameter.data.add_(0.5)
        tuned.save(tmp_path / "delta.safetensors")
    model, other = open_streamed(plain, device="a test's"), resident(plain)
    model(**tokens())
    for one in (model, other):
        apply_delta(one, tmp_path / "delta.safetensors")
    assert torch.equal(model(**tokens()).logits, other(**tokens()).logits)


def test_layers_that_were_not_opened_to_train(plain, late):
    results = []
    for model in (open_streamed(plain, device="a test's"), resident(plain)):
        tuned = SelectiveBackward(model, LAYERS)
        for step in range(2):
            model(**tokens(step)).loss.backward()
            optimizer = torch.optim.SGD(tuned.parameters(), lr=1.0)
            optimizer.step()
            optimizer.zero_grad()
        tuned.remove()
        results.append([model(**tokens(5)).logits])
    assert_bits(*results)


@plain_or_int8
def test_with_a_prefix_cache(plain, frozen, late, tmp_path):
    found = []
    for options in ({}, {"cache": PrefixCache(tmp_path / "cache")}):
        model = opened(plain, frozen)
        tuned = SelectiveBackward(model, LAYERS, **options)
        found.append([model(**tokens(seed)).loss.detach() for _ in range(3) for seed in (1, 2)])
        count = len(late.copies)
        model(**tokens(1)).loss.backward()
        found[-1] += [parameter.grad for parameter in tuned.parameters()]
        found[-1].append(torch.tensor(float(len(late.copies) - count)))
    assert_bits(found[0][:-1], found[1][:-1])
    assert found[1][-1] < found[0][-1] - 7  # of the block below the cut none


# What goes wrong


def test_a_file_that_is_cut_short_while_it_is_open(late, tmp_path):
    """The thread that reads says it to who asked, in forward and backward, and goes on when the file is whole again."""
    folder = save_llama(tmp_path / "llama", size="1GB")
    path = folder / "model.safetensors"
    contents, expected = path.read_bytes(), resident(folder)(**tokens()).loss
    model = open_streamed(folder, train=LAYERS, device="a test's")
    tuned = SelectiveBackward(model, LAYERS, lean=False)
    loss = model(**tokens()).loss
    os.truncate(path, len(contents) - 300_000)
    with pytest.raises(RuntimeError, match=r"weight cannot be read as it is used: .*model\.safetensors' ends at byte"):
        loss.backward()
    os.truncate(path, 4096)
    with pytest.raises((RuntimeError, OSError), match=r"model\.safetensors' ends at byte"):
        model(**tokens())
    with open(path, "r+b") as file:  # the same file: another one of its name would not be read
        file.write(contents)
    for parameter in tuned.parameters():
        parameter.grad = None
    loss = model(**tokens()).loss
    loss.backward()
    assert torch.equal(loss, expected)


def test_passes_that_end_in_the_middle(plain, late):
    model, other = open_streamed(plain, train=LAYERS, device="a test's"), resident(plain)
    tuned = SelectiveBackward(model, LAYERS)

    def end(*_):
        raise ZeroDivisionError

    for module in (model.model.layers[0].mlp.up_proj, model.model.layers[3].mlp.down_proj, model.lm_head):
        handle = module.register_forward_pre_hook(end)
        with pytest.raises(ZeroDivisionError):
            model(**tokens())
        handle.remove()
    for module in (model.model.layers[3].input_layernorm, model.model.layers[2].mlp.down_proj):
        x: list[torch.Tensor] = []
        handle = module.register_forward_hook(lambda *found, x=x: x.append(found[-1]))
        loss = model(**tokens()).loss
        handle.remove()
        x[0].register_hook(end)
        with pytest.raises(ZeroDivisionError):
            loss.backward()
    for parameter in tuned.parameters():
        parameter.grad = None
    with SelectiveBackward(other, LAYERS) as plainly:
        expected = losses_and_gradients(other, plainly, tokens(4))
    assert_bits(losses_and_gradients(model, tuned, tokens(4)), expected)


def test_an_interrupt_while_the_thread_reads(plain, late, monkeypatch):
    model = open_streamed(plain, device="a test's")
    read, begun, goes_on = CopiedWeight.read, threading.Event(), threading.Event()

    def slowly(weight, staging):
        begun.set()
        assert goes_on.wait(60)
        read(weight, staging)

    monkeypatch.setattr(CopiedWeight, "read", slowly)

    def interrupt():
        begun.wait(60)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        model(**tokens())
    thread.join()
    goes_on.set()
    monkeypatch.undo()
    assert torch.equal(model(**tokens()).logits, resident(plain)(**tokens()).logits)


def test_a_process_that_was_forked_is_told(plain, late):
    model = open_streamed(plain, device="a test's")
    model(**tokens())
    end, other_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            model(**tokens())
        except BaseException as error:
            os.write(other_end, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(other_end)
    with os.fdopen(end) as file:
        assert "forked" in file.read()


# Memory


def test_two_buffers_are_there_and_go_with_the_model(plain, frozen, late):
    """On either side, as large as the largest layer or block of the head."""
    gc.collect()
    before = set(threading.enumerate())
    model = opened(plain, frozen)
    tuned = SelectiveBackward(model, LAYERS, checkpoint="above-cut")
    losses_and_gradients(model, tuned, tokens())
    streamed = [module for module in model.modules() if isinstance(module, StreamedLinear | StreamedQuantisedLinear)]
    largest = max(sum(p.nbytes for p in (*module.parameters(),)) for module in streamed)
    sizes = sorted(buffer.numel() for buffer in late.alive)
    assert len(sizes) == 4 and sizes[0] == sizes[3] and largest <= sizes[0] <= max(largest, head_blocks.BLOCK) + 512
    assert max(late.copies) <= sizes[0]
    (thread,) = set(threading.enumerate()) - before
    tuned.remove()
    del model, tuned, streamed
    gc.collect()
    assert not late.alive and not thread.is_alive()


def test_a_ring_waits_for_nobody_when_it_goes(tmp_path):
    """Also where the thread itself collects it, and where it never read anything."""
    transfer = AdversarialTransfer()
    ring = BufferRing(transfer, 100)
    thread = ring._shared.thread
    del ring
    assert not thread.is_alive() and not transfer.alive


def test_a_weight_is_copied_once_for_uses_in_a_row_and_again_for_others(plain, late):
    weights = []
    for path in sorted(plain.glob("*.safetensors"))[:3]:
        file = MappedFile(path)
        name = max(file.entries, key=lambda name: len(file.entries[name].shape))
        parameter = file.parameter(name)
        weights.append((parameter, CopiedWeight(name, (Part(parameter.pages, parameter.dtype, parameter.shape),))))
    ring = BufferRing(late, max(weight.size for _, weight in weights))
    for number in (0, 0, 1, 0, 1, 2, 2, 0):
        parameter, weight = weights[number]
        with ring.holding(weight) as (copied,):
            assert torch.equal(copied, parameter)
    assert len(late.copies) == 4
    with torch.no_grad():
        weights[0][0].add_(1)
    with ring.holding(weights[0][1]) as (copied,):
        assert torch.equal(copied, weights[0][0])


@plain_or_int8
def test_a_plan_counts_what_is_on_the_device(frozen, late, monkeypatch, tmp_path):
    """Beside what a step makes: what trains and what is small, the buffers, and a weight that is unpacked."""
    monkeypatch.setattr(planned_step, "SMALL", 0)
    folder = save_llama(tmp_path / "wide", hidden_size=256, intermediate_size=1024, vocab_size=3000)
    model = opened(folder, frozen)
    there = [tensor for tensor in (*model.parameters(), *model.buffers()) if pages_of(tensor) is None]
    held = sum(tensor.nbytes for tensor in there) + sum(buffer.numel() for buffer in late.alive) // 2
    sizes = {"batch_size": 1, "sequence_length": 8, "dtype": "float32", "optimizer": "sgd", "device": "cuda"}
    planned = plan(folder, LAYERS, frozen=frozen, stream=True, **sizes).breakdown["weights"]
    assert held <= planned <= held + (256 * 1024 * 4 if frozen else 0) + 512 * (len(there) + 2)


# What it says


@plain_or_int8
def test_moves_copies_and_devices(plain, frozen, late, monkeypatch):
    model = opened(plain, frozen)
    assert model.to("cpu") is model  # where it is, as far as this transfer goes
    for one in (model, model.lm_head, model.get_input_embeddings(), model.model.layers[0].mlp.up_proj):
        with pytest.raises(NotImplementedError, match=r"from 'cpu' to 'meta'.*open_streamed\(\.\.\., device="):
            one.to("meta")
        with pytest.raises(NotImplementedError, match="stay in the dtype of the file"):
            one.double()
        with pytest.raises(TypeError, match=r"call zest_fast\.open_streamed again"):
            copy.deepcopy(one)
    monkeypatch.undo()
    for device, kind, message in (
        ("gpu", ValueError, "device='gpu' is unknown"),
        (3.5, ValueError, r"device=3\.5 is unknown"),
        ("meta", NotImplementedError, "device='meta'"),
    ):
        with pytest.raises(kind, match=message):
            open_streamed(plain, device=device)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"device='cuda': torch .* finds no CUDA device"):
            open_streamed(plain, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"checkpoint": "above-cut"}, {"lean": False}], ids=str)
def test_on_a_gpu_steps_are_those_of_the_resident_model(plain, frozen, options, monkeypatch, tmp_path):
    monkeypatch.setattr(opening, "SMALL", 0)
    folder = plain if frozen is None else pack(plain, tmp_path / "packed", frozen=frozen)
    model = open_streamed(folder, train=LAYERS, device="cuda")
    trained = []
    for one, kind in ((model, None), (resident(plain).to("cuda"), frozen)):
        tuned = SelectiveBackward(one.train(), LAYERS, frozen=kind, **options)
        optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-2)
        batches = [{key: value.to("cuda") for key, value in tokens(seed, 200).items()} for seed in range(6)]
        found = []
        for first, second in zip(batches[::2], batches[1::2], strict=True):
            found += losses_and_gradients(one, tuned, first, second)
            one(**first).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(found)
    assert_bits(*trained)
