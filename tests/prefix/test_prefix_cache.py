"""Whatever a model does below the cut, training with a prefix cache is training without one, or is refused by name."""

from __future__ import annotations

import copy
import errno
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from reuse_models import IMAGES, RECOMPUTED, REUSED, TOKENS, VECTORS, Chain, Encoder, Images, make_splits
from small_models import assert_same, llama, snapshot
from torch import nn

from zest_fast import PrefixCache, SelectiveBackward
from zest_fast.prefix.inputs import count, rows_of
from zest_fast.profiling.loss import call_model, logits_of

pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS = 3
Batches = Sequence[tuple[Any, torch.Tensor]]


def batches_of(kind: str, sizes: Sequence[int] = (8, 8, 8)) -> Batches:
    inputs, targets = make_splits(kind)["train"]
    rows = torch.arange(count(inputs))[: sum(sizes)].split(list(sizes))
    return [(rows_of(inputs, part), targets[part]) for part in rows]


def trained(
    make: Callable[[], nn.Module],
    layers: Sequence[str],
    batches: Batches,
    cache: PrefixCache | None = None,
    *,
    head: Any = "head",
    train: bool = False,
    **options: Any,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses, and what trained; a look whether the model is given back as it was."""
    torch.manual_seed(3)
    model = make().train(train)
    before = snapshot(model)
    losses = []
    with SelectiveBackward(model, layers, head=head, cache=cache, **options) as tuned:
        optimizer = torch.optim.SGD(tuned.parameters(), lr=0.05)
        for epoch in range(EPOCHS):
            order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(epoch)).tolist()
            losses += [step(model, *batches[place], optimizer) for place in order]
        names = tuned.trainable_names
    after = snapshot(model)
    assert before[1:] == after[1:] and not any("forward" in vars(module) for module in model.modules())
    parameters = dict(model.named_parameters())
    assert all(torch.equal(before[0][name], after[0][name]) for name in parameters if name not in names)
    return losses, {name: parameters[name].detach().clone() for name in names}


def step(model: nn.Module, inputs: Any, targets: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
    loss = nn.functional.cross_entropy(logits_of(call_model(model, inputs)), targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def assert_trained_alike(ours: Any, theirs: Any, tolerance: float = 0.0) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=0, abs=tolerance)
    for name, value in theirs[1].items():
        torch.testing.assert_close(ours[1][name], value, rtol=0, atol=tolerance, msg=name)


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.activations"))


def make_chain() -> nn.Module:
    return Chain(nn.GELU()).eval()


# Models that do everything


def upper_layer_and_head(make: Callable[[], nn.Module]) -> tuple[str, str]:
    """One that these models call late, and what ends in classes."""
    torch.manual_seed(3)
    names = [name for name, module in make().named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    head = next(name for name in reversed(names) if name.endswith("head"))
    names.remove(head)
    return next((name for name in names if name.endswith("third")), names[-1]), head


READ = "trains, and its values are read"
REFUSED = {
    "dropout that is always on": "'between.0' below the cut draws random numbers",
    "Python's chance": "'between.0' below the cut draws random numbers",
    "by the direction of the weight": READ,
    "by its cosine": READ,
    "by its signs": READ,
    "by a weight of zeros": READ,
    "by the bias": READ,
    "by the head": f"'head.weight' {READ}",
    "a gradient without a value": READ,
    "beside a huge logit": READ,
    "beside a class at minus infinity": READ,
    "an attribute that a later module reads": "does not give the output of the full one",
    "a moving average": "writes buffers (between.0.average)",
}
FOUND_LATER = {"by the largest of the batch": "what 'second' gives is not what was kept"}
"""What few batches show: samples that are compared alone do."""
MODELS = {**REUSED, **RECOMPUTED}


@pytest.mark.parametrize("name", MODELS)
def test_training_is_that_without_the_cache_or_is_refused(name, tmp_path) -> None:
    make, kind = MODELS[name]
    batches, (layer, head) = batches_of(kind), upper_layer_and_head(make)
    cache = PrefixCache(tmp_path)
    if name in REFUSED:
        with pytest.raises(ValueError, match=re.escape(REFUSED[name])):
            trained(make, [layer], batches, cache, head=head)
        return
    if name in FOUND_LATER:
        with pytest.raises(RuntimeError, match=re.escape(FOUND_LATER[name])):
            trained(make, [layer], batches, cache, head=head)
        return
    plain = trained(make, [layer], batches, head=head)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of passes that take another way, and run without it
        found = trained(make, [layer], batches, cache, head=head)
    assert_trained_alike(found, plain)
    assert cache.read == 2 * cache.computed or cache.plain


@pytest.mark.parametrize("layer", ["self_attn.o_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"])
@pytest.mark.parametrize("options", [{}, {"checkpoint": "above-cut"}, {"lean": False}, {"frozen": "int8"}])
@pytest.mark.parametrize("size", [1, 4])
def test_llama_bit_for_bit(layer, options, size, tmp_path) -> None:
    tokens = torch.randint(0, 90, (8, 6), generator=torch.Generator().manual_seed(0))
    found = []
    for cache in (None, PrefixCache(tmp_path)):
        torch.manual_seed(0)
        model = llama(num_hidden_layers=3, vocab_size=90).train()
        tuned = SelectiveBackward(model, [f"model.layers.1.{layer}"], cache=cache, **options)
        optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-2)
        losses = []
        for rows in tokens.split(size) * EPOCHS:
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        tuned.verify()
        found.append((losses, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}))
    assert_trained_alike(found[1], found[0])
    assert (cache.computed, cache.read, cache.kept) == (8, 16, 8)


def test_what_an_embedding_left_in_a_variable_is_not_kept(tmp_path) -> None:
    """`inputs_embeds` of transformers stays alive in the frame of the model and is never read again."""
    model = llama(num_hidden_layers=3, vocab_size=90)
    cache = PrefixCache(tmp_path)
    SelectiveBackward(model, ["model.layers.1.mlp.down_proj"], cache=cache)
    tokens = torch.randint(0, 90, (4, 6))
    model(input_ids=tokens, labels=tokens, use_cache=False)
    width, inner = model.config.hidden_size, model.config.intermediate_size
    # The output of block 0 and of attention, whose sum is the residual, and both factors of the product.
    assert cache.bytes_kept == 4 * (20 + 6 * 4 * (2 * width + 2 * inner))


@pytest.mark.parametrize("names", [["encoder.layers.1.self_attn.out_proj"], ["encoder.layers.1.linear1"]])
def test_a_weight_that_its_parent_uses_counts_where_the_parent_runs(names, tmp_path) -> None:
    batches = batches_of(TOKENS)
    layers = [name for name, _ in Encoder().named_modules() if name.endswith(names[0].split(".", 1)[1])]
    cache = PrefixCache(tmp_path)
    found = trained(Encoder, layers[-1:], batches, cache)
    assert_trained_alike(found, trained(Encoder, layers[-1:], batches))
    assert cache.read == 2 * cache.computed > 0


def test_convolutions_in_channels_last(tmp_path) -> None:
    def make() -> nn.Module:
        return Images().to(memory_format=torch.channels_last)

    batches = [(x.to(memory_format=torch.channels_last), y) for x, y in batches_of(IMAGES)]
    layer, head = upper_layer_and_head(make)
    cache = PrefixCache(tmp_path)
    assert_trained_alike(trained(make, [layer], batches, cache, head=head), trained(make, [layer], batches, head=head))
    assert cache.read


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_other_dtypes(kind, tmp_path) -> None:
    def make() -> nn.Module:
        return make_chain().to(kind)

    batches = [(x.to(kind), y) for x, y in batches_of(VECTORS)]
    assert_trained_alike(trained(make, ["third"], batches, PrefixCache(tmp_path)), trained(make, ["third"], batches))


# How samples come


def test_other_companions_of_a_sample_change_no_more_than_rounding(tmp_path) -> None:
    inputs, targets = make_splits(VECTORS)["train"]
    torch.manual_seed(0)
    batches = [(inputs[rows], targets[rows]) for _ in range(3) for rows in torch.randperm(24).split(7)]
    cache = PrefixCache(tmp_path)
    found = trained(make_chain, ["third"], batches, cache)
    assert_trained_alike(found, trained(make_chain, ["third"], batches), tolerance=1e-6)
    assert (cache.computed, cache.kept) == (24, 24) and cache.read == 9 * 24 - 24


def test_lengths_are_samples_of_their_own(tmp_path) -> None:
    batches = [
        ({name: value[:, :length] for name, value in inputs.items()}, targets)
        for inputs, targets in batches_of(TOKENS)
        for length in (3, 4)
    ]
    cache = PrefixCache(tmp_path)
    assert_trained_alike(trained(Encoder, ["head"], batches, cache), trained(Encoder, ["head"], batches))
    assert cache.kept == cache.computed > 40 and cache.read == 144 - cache.computed


def test_gradients_are_accumulated_over_graphs_that_are_alive_together(tmp_path) -> None:
    gradients = []
    for cache in (None, PrefixCache(tmp_path)):
        torch.manual_seed(3)
        model = make_chain()
        with SelectiveBackward(model, ["third"], cache=cache) as tuned:
            for _ in range(2):
                losses = [nn.functional.cross_entropy(model(x), y) for x, y in batches_of(VECTORS)]
                sum(losses).backward()
            gradients.append([p.grad.clone() for p in tuned.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert cache.read == 24


def test_inputs_that_require_a_gradient_get_it(tmp_path) -> None:
    model, cache = make_chain(), PrefixCache(tmp_path)
    (x, y), *_ = batches_of(VECTORS)
    with SelectiveBackward(model, ["third"], cache=cache):
        model(x)
        x = x.clone().requires_grad_()
        with pytest.warns(UserWarning, match="requires a gradient|backward runs"):
            nn.functional.cross_entropy(model(x), y).backward()
    assert x.grad.abs().sum() > 0


def test_what_is_made_to_train_below_later_gets_its_gradient(tmp_path) -> None:
    model, cache = make_chain(), PrefixCache(tmp_path)
    (x, y), *_ = batches_of(VECTORS)
    with SelectiveBackward(model, ["third"], cache=cache):
        for _ in range(2):
            nn.functional.cross_entropy(model(x), y).backward()
        assert cache.read == 8
        model.second.weight.requires_grad_(True)
        for _ in range(2):
            model.second.weight.grad = None
            nn.functional.cross_entropy(model(x), y).backward()
            assert model.second.weight.grad.abs().sum() > 0
        assert cache.read == 16  # of the lower cut


def test_validation_runs_through_the_model(tmp_path) -> None:
    model, cache = make_chain(), PrefixCache(tmp_path)
    (x, _), *_ = batches_of(VECTORS)
    with SelectiveBackward(model, ["third"], cache=cache), torch.no_grad():
        assert torch.equal(model(x), make_like(model)(x))
    assert cache.computed == 0 and not files_in(tmp_path)


def make_like(model: nn.Module) -> nn.Module:
    plain = make_chain()
    plain.load_state_dict(model.state_dict())
    return plain


def test_threads_that_run_at_once_are_right(tmp_path) -> None:
    torch.manual_seed(3)
    model, cache = make_chain(), PrefixCache(tmp_path)
    batches = batches_of(VECTORS)
    expected = [model(x).detach() for x, _ in batches]
    found: dict[int, list[bool]] = {}
    with SelectiveBackward(model, ["third"], cache=cache), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(batches[0][0])

        def work(place: int) -> None:
            x, y = batches[place][0], expected[place]
            found[place] = [torch.allclose(model(x), y, rtol=0, atol=1e-6) for _ in range(30)]

        threads = [threading.Thread(target=work, args=(place,)) for place in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(all(right) for right in found.values()) and len(found) == 3
    assert not any("forward" in vars(module) for module in model.modules())


# Modes


def test_dropout_below_the_cut_is_refused_and_eval_mode_offered(tmp_path) -> None:
    def make() -> nn.Module:
        return Chain(nn.Dropout(0.5))

    batches = batches_of(VECTORS)
    with pytest.raises(ValueError, match=r"'between.0' below the cut draws random numbers .* eval_prefix=True"):
        trained(make, ["third"], batches, PrefixCache(tmp_path), train=True)
    cache = PrefixCache(tmp_path, eval_prefix=True)
    found = trained(make, ["third"], batches, cache, train=True)
    assert_trained_alike(found, trained(make, ["third"], batches))  # which has no other dropout
    assert cache.read == 48


def test_dropout_above_the_cut_draws_what_it_draws_without_the_cache(tmp_path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 3))

    batches = batches_of(VECTORS)
    options = {"head": "4", "train": True}
    cache = PrefixCache(tmp_path)
    assert_trained_alike(trained(make, ["2"], batches, cache, **options), trained(make, ["2"], batches, **options))
    assert cache.read == 48


def test_a_module_of_both_sides_is_in_eval_mode_below_only(tmp_path) -> None:
    class Twice(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.head(self.drop(self.third(self.drop(self.first(x)))))

    torch.manual_seed(3)
    model = Twice().train()
    (x, _), *_ = batches_of(VECTORS)
    with SelectiveBackward(model, ["third"], cache=PrefixCache(tmp_path, eval_prefix=True)):
        model(x)
        assert not torch.equal(model(x), model(x))  # drops above
    assert model.drop.training


# What is on disk


def train_some(folder: Path, make: Callable[[], nn.Module] = make_chain, layers: Sequence[str] = ("third",)) -> Any:
    cache = PrefixCache(folder)
    return cache, trained(make, layers, batches_of(VECTORS), cache)


def test_another_run_reads_what_the_first_has_written(tmp_path) -> None:
    first, losses = train_some(tmp_path)
    second, again = train_some(tmp_path)
    assert_trained_alike(again, losses)
    assert (first.computed, second.computed) == (24, 0)
    assert len(files_in(tmp_path)) == 1


OTHERS = {
    "another base": lambda: _with_other_weight(make_chain()),
    "another dtype": lambda: make_chain().double(),
    "another activation": lambda: Chain(nn.ReLU()),
}


def _with_other_weight(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.first.weight[0, 0] += 1
    return model


@pytest.mark.parametrize("name", ["another base", "another dtype", "another cut"])
def test_a_cache_of_something_else_is_named_and_not_used(name, tmp_path, caplog) -> None:
    train_some(tmp_path)
    make = OTHERS.get(name, make_chain)
    layers = ["second"] if name == "another cut" else ["third"]
    kind = torch.float64 if name == "another dtype" else torch.float32
    batches = [(x.to(kind), y) for x, y in batches_of(VECTORS)]
    cache = PrefixCache(tmp_path)
    with caplog.at_level(logging.INFO, "zest_fast"):
        found = trained(make, layers, batches, cache)
    assert_trained_alike(found, trained(make, layers, batches))
    assert cache.computed == 24
    what = "cut" if name == "another cut" else "base"
    assert any("also holds activations of another" in r.message and what in r.message for r in caplog.records)


@pytest.mark.parametrize("where", ["in a module", "between modules"])
def test_other_code_with_the_same_weights_is_noticed(where, tmp_path) -> None:
    class Doubled(nn.GELU):
        def forward(self, x):
            return 2 * super().forward(x)

    class DoublesBetween(Chain):
        def forward(self, x):
            return self.head(self.third(self.second(2 * self.between(self.first(x)).relu()).relu()).relu())

    _, losses = train_some(tmp_path)
    if where == "between modules":  # which is in no key
        DoublesBetween.__name__ = "Chain"
        with pytest.raises(RuntimeError, match="are not what 'second' computes: the code of the model has changed"):
            train_some(tmp_path, lambda: DoublesBetween(nn.GELU()))
        return
    cache, found = train_some(tmp_path, lambda: Chain(Doubled()))
    assert_trained_alike(found, trained(lambda: Chain(Doubled()), ["third"], batches_of(VECTORS)))
    assert cache.computed == 24 and found[0] != losses[0]


def test_weights_below_the_cut_that_change_are_another_base(tmp_path) -> None:
    (x, _), *_ = batches_of(VECTORS)
    torch.manual_seed(3)
    model, cache = make_chain(), PrefixCache(tmp_path)
    with SelectiveBackward(model, ["third"], cache=cache):
        model(x)
        before = model(x)
        with torch.no_grad():
            model.first.weight.mul_(2)
        assert torch.equal(model(x), make_like(model)(x)) and not torch.equal(model(x), before)
    other = PrefixCache(tmp_path)
    torch.manual_seed(3)
    model = make_chain()
    with SelectiveBackward(model, ["third"], cache=other):
        assert torch.equal(model(x), before) and torch.equal(model(x), before)


def test_damaged_files_are_named_and_computed_again(tmp_path) -> None:
    _, losses = train_some(tmp_path)
    (path,) = files_in(tmp_path)
    contents = bytearray(path.read_bytes())
    contents[10 * 44 + 30] ^= 1  # in the activations of the tenth record; a digest would be another sample's
    path.write_bytes(contents)
    cache = PrefixCache(tmp_path)
    with pytest.warns(UserWarning, match=re.escape(f"{os.fspath(path)!r} is damaged at byte")):
        again = trained(make_chain, ["third"], batches_of(VECTORS), cache)
    assert_trained_alike(again, losses)
    assert cache.computed == 1


@pytest.mark.parametrize("left", [0, 10, 25, 1000])
def test_of_a_file_that_was_cut_off_whole_records_are_read(left, tmp_path) -> None:
    _, losses = train_some(tmp_path)
    (path,) = files_in(tmp_path)
    record = path.stat().st_size // 24
    os.truncate(path, left)
    cache = PrefixCache(tmp_path)
    found = trained(make_chain, ["third"], batches_of(VECTORS), cache)
    assert_trained_alike(found, losses, tolerance=1e-6)  # kernels round otherwise for a part of a batch
    assert cache.computed == 24 - left // record


def test_a_file_that_is_shortened_while_it_is_read(tmp_path) -> None:
    train_some(tmp_path)
    (path,) = files_in(tmp_path)
    torch.manual_seed(3)
    model, cache = make_chain(), PrefixCache(tmp_path)
    (x, _), (other, _), _ = batches_of(VECTORS)
    with SelectiveBackward(model, ["third"], cache=cache):
        model(x)
        os.truncate(path, 0)
        with pytest.warns(UserWarning, match="damaged"):
            assert torch.equal(model(other), make_like(model)(other))


def test_a_file_that_is_deleted_meanwhile_is_still_read(tmp_path) -> None:
    train_some(tmp_path)
    torch.manual_seed(3)
    model, cache = make_chain(), PrefixCache(tmp_path)
    (x, _), *_ = batches_of(VECTORS)
    with SelectiveBackward(model, ["third"], cache=cache):
        model(x)
        files_in(tmp_path)[0].unlink()
        assert torch.equal(model(x), make_like(model)(x))
    assert cache.computed == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_training_goes_on_where_the_disk_is_full(code, tmp_path, monkeypatch) -> None:
    written = []
    pwrite = os.pwrite

    def full(descriptor: int, contents: Any, offset: int) -> int:
        written.append(len(contents))
        if len(written) > 11:
            raise OSError(code, os.strerror(code))
        return pwrite(descriptor, contents, offset)

    monkeypatch.setattr(os, "pwrite", full)
    cache = PrefixCache(tmp_path)
    with pytest.warns(UserWarning, match="is full" if code != errno.EIO else "cannot be written"):
        found = trained(make_chain, ["third"], batches_of(VECTORS), cache)
    assert_trained_alike(found, trained(make_chain, ["third"], batches_of(VECTORS)), tolerance=1e-6)
    (path,) = files_in(tmp_path)
    assert path.stat().st_size == 5 * (20 + 24)  # 11 writes are five records and a head, which was taken back
    assert "nothing more is kept" in str(cache)


def test_beyond_the_limit_samples_are_computed(tmp_path) -> None:
    cache = PrefixCache(tmp_path, limit=10 * (20 + 24))
    batches = batches_of(VECTORS)
    assert_trained_alike(trained(make_chain, ["third"], batches, cache), trained(make_chain, ["third"], batches), 1e-6)
    assert cache.read == 20 and cache.computed == 24 + 2 * 14
    assert sum(path.stat().st_size for path in files_in(tmp_path)) == 10 * (20 + 24)
    other = PrefixCache(tmp_path, limit=10 * (20 + 24))  # of the whole folder, whoever wrote it
    trained(make_chain, ["second"], batches, other)
    assert other.read == 0


def test_a_loader_that_augments_at_random_is_told_from_the_first_sample_too_many(tmp_path) -> None:
    torch.manual_seed(0)
    inputs, _ = make_splits(VECTORS)["train"]
    model, cache = make_chain(), PrefixCache(tmp_path, samples=24)
    with SelectiveBackward(model, ["third"], cache=cache), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch in range(3):
            for rows in torch.arange(24).split(8):
                model(inputs[rows] + 0.01 * torch.randn(8, 5))
            assert len(caught) == (epoch > 0)
    assert "32 different samples came where an epoch has 24" in str(caught[0].message)
    assert sum(path.stat().st_size for path in files_in(tmp_path)) <= 32 * 44
    assert "other samples in every epoch" in str(cache)


def test_two_caches_on_one_folder_at_a_time(tmp_path) -> None:
    torch.manual_seed(3)
    models = [make_chain(), make_chain()]
    models[1].load_state_dict(models[0].state_dict())
    caches = [PrefixCache(tmp_path), PrefixCache(tmp_path)]
    wrapped = [SelectiveBackward(m, ["third"], cache=c) for m, c in zip(models, caches, strict=True)]
    batches = batches_of(VECTORS)
    for x, _ in [*batches, *batches]:
        assert torch.equal(models[0](x), models[1](x))
    assert [cache.kept for cache in caches] == [24, 24] and len(files_in(tmp_path)) == 2
    third, _ = train_some(tmp_path)
    assert third.computed == 0 and third.kept == 24
    del wrapped


def test_a_process_that_is_killed_leaves_whole_records(tmp_path) -> None:
    program = (
        "import os, signal, sys, torch\n"
        f"sys.path[:0] = {sys.path!r}\n"
        "from test_prefix_cache import make_chain, batches_of, trained, VECTORS\n"
        "from zest_fast import PrefixCache\n"
        "pwrite, done = os.pwrite, []\n"
        "def killed(descriptor, contents, offset):\n"
        "    done.append(1)\n"
        "    if len(done) == 20: pwrite(descriptor, contents[:7], offset); os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return pwrite(descriptor, contents, offset)\n"
        "os.pwrite = killed\n"
        "torch.set_num_threads(1)\n"
        f"trained(make_chain, ['third'], batches_of(VECTORS), PrefixCache({os.fspath(tmp_path)!r}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    plain = trained(make_chain, ["third"], batches_of(VECTORS))
    cache, found = train_some(tmp_path)
    assert_trained_alike(found, plain)
    assert cache.computed == 24 - 9


def test_an_interrupt_leaves_the_model_and_the_cache_right(tmp_path) -> None:
    class Interrupted(nn.GELU):
        calls = 0

        def forward(self, x):
            Interrupted.calls += 1
            if Interrupted.calls in (3, 9, 12):
                raise KeyboardInterrupt
            return super().forward(x)

    torch.manual_seed(3)
    model, cache = Chain(Interrupted()), PrefixCache(tmp_path)
    plain = make_chain()
    plain.load_state_dict(model.state_dict())
    before, interrupted = snapshot(model), 0
    with SelectiveBackward(model, ["third"], cache=cache):
        for x, _ in [*batches_of(VECTORS)] * 4:
            try:
                assert torch.equal(model(x), plain(x))
            except KeyboardInterrupt:
                interrupted += 1
    assert interrupted >= 2
    assert_same(before, snapshot(model))


# Bad input


def test_arguments(tmp_path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        PrefixCache(file)
    with pytest.raises(ValueError, match="limit='much' is no size"):
        PrefixCache(tmp_path, limit="much")
    with pytest.raises(ValueError, match="samples=0"):
        PrefixCache(tmp_path, samples=0)
    with pytest.raises(TypeError, match="cache must be a PrefixCache or None, not str"):
        SelectiveBackward(make_chain(), ["third"], cache="folder")
    cache = PrefixCache(tmp_path / "cache")
    first, second = make_chain(), make_chain()
    before = snapshot(second)
    with SelectiveBackward(first, ["third"], cache=cache):
        with pytest.raises(RuntimeError, match="serves another model"):
            SelectiveBackward(second, ["third"], cache=cache)
        assert_same(before, snapshot(second))
    with SelectiveBackward(second, ["third"], cache=cache):  # which is free again
        second(torch.randn(4, 5))
    assert cache.kept == cache.computed == 4


def test_nothing_below_the_cut(tmp_path) -> None:
    with pytest.raises(ValueError, match="nothing that could be kept runs before 'first', which trains"):
        trained(make_chain, ["first"], batches_of(VECTORS), PrefixCache(tmp_path))


def test_what_changes_from_pass_to_pass_is_found_by_the_comparison(tmp_path) -> None:
    passes = []  # where nobody looks

    class Ages(nn.GELU):
        def forward(self, x):
            passes.append(1)
            return super().forward(x) * (1 + (len(passes) > 20))

    model, cache = Chain(Ages()).eval(), PrefixCache(tmp_path)
    (x, _), *_ = batches_of(VECTORS)
    with (
        SelectiveBackward(model, ["third"], cache=cache),
        pytest.raises(RuntimeError, match="'second' gives is not what was kept"),
    ):
        for _ in range(100):
            model(x)
    assert not sum(path.stat().st_size for path in files_in(tmp_path))  # no other run reads it


def test_what_a_few_samples_do_not_show_is_learned_from_the_whole_batch(tmp_path) -> None:
    """Of more than eight samples a module below the cut gives a second tensor, which is added above it."""

    class WithMeans(nn.Linear):
        def forward(self, x):
            return super().forward(x), (x.mean(1, keepdim=True) if len(x) > 8 else None)

    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.third, self.head = WithMeans(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            y, means = self.first(x)
            return self.head(self.third(y) if means is None else self.third(y) + means)

    batches = batches_of(VECTORS, sizes=(20, 20))
    cache = PrefixCache(tmp_path)
    found = trained(Adds, ["third"], batches, cache)
    assert_trained_alike(found, trained(Adds, ["third"], batches))
    assert not cache.plain and (cache.computed, cache.read) == (40, 80)


def test_two_samples_of_many_read_batches_are_held_against_the_layers(tmp_path) -> None:
    """Weights that change through `.data`, which torch does not tell of: two steps later."""
    model, cache = Chain(nn.GELU()).eval(), PrefixCache(tmp_path)
    (x, _), *_ = batches_of(VECTORS)
    with SelectiveBackward(model, ["third"], cache=cache):
        for _ in range(3):
            model(x)
        model.get_submodule("second").weight.data.mul_(1.01)
        with pytest.raises(RuntimeError, match="what 'second' gives is not what was kept"):
            for _ in range(3):
                model(x)


def test_counters_below_the_cut_are_refused(tmp_path) -> None:
    class Counts(nn.GELU):
        passes = 0

        def forward(self, x):
            self.passes += 1
            return super().forward(x) * (1 + (self.passes > 20))

    with pytest.raises(ValueError, match=re.escape("counts its passes (between.0.passes)")):
        trained(lambda: Chain(Counts()), ["third"], batches_of(VECTORS), PrefixCache(tmp_path))


def test_copies_and_pickles_of_a_wrapped_model_run_without_it(tmp_path) -> None:
    torch.manual_seed(3)
    model, cache = make_chain(), PrefixCache(tmp_path)
    (x, _), *_ = batches_of(VECTORS)
    with SelectiveBackward(model, ["third"], cache=cache):
        expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), expected) and torch.equal(other(x), expected)
        assert torch.equal(model(x), expected) and cache.read == 8


def test_the_summary_says_what_it_did(tmp_path) -> None:
    model, cache = make_chain(), PrefixCache(tmp_path, samples=8)
    (x, _), *_ = batches_of(VECTORS)
    with SelectiveBackward(model, ["third"], cache=cache) as tuned:
        assert "cache     nothing yet" in str(tuned.summary())
        for _ in range(3):
            model(x)
        assert re.search(
            r"cache     8 samples in .* GB; 8 computed, 16 read \(in .* ms each in place of", str(tuned.summary())
        )
