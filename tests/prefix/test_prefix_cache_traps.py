"""What a second pair of eyes found: with a first version of the cache each training was wrong without a word, or ended
in a traceback."""

from __future__ import annotations

import copy
import errno
import os
import resource
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from zest_fast import PrefixCache, SelectiveBackward
from zest_fast.prefix.passes import Before
from zest_fast.prefix.sample_keys import Samples
from zest_fast.prefix.volatile_state import VolatileState
from zest_fast.prefix.walk import Walk

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(5, 50, (8, 6), generator=torch.Generator().manual_seed(0))


class Chain(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, width), nn.Linear(width, width)
        self.third, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.third(self.second(self.first(x).relu()).relu()).relu())


def outputs(
    make: Callable[[], nn.Module],
    batches: Sequence[Any],
    folder: Path | None,
    layers: Sequence[str] = ("third",),
    during: Callable[[int, nn.Module], object] = lambda step, model: None,
    **options: Any,
) -> tuple[list[torch.Tensor], list[torch.Tensor], nn.Module, PrefixCache | None]:
    """Outputs and the gradient of the lowest layer, in every pass."""
    torch.manual_seed(0)
    model = make()
    cache = None if folder is None else PrefixCache(folder, **options.pop("cache", {}))
    found, gradients = [], []
    options = {"head": "head", **options}
    with SelectiveBackward(model, layers, cache=cache, **options), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of passes that run without it
        for step, batch in enumerate(batches):
            during(step, model)
            arguments = batch if isinstance(batch, tuple) else (batch,)
            output = model(*arguments) if not isinstance(batch, dict) else model(**batch).logits
            found.append(output.detach().clone())
            output.pow(2).mean().backward()
            gradients.append(model.get_submodule(layers[0]).weight.grad.clone())
            model.zero_grad()
    return found, gradients, model, cache


def assert_same_as_without(make: Callable[[], nn.Module], batches: Sequence[Any], folder: Path, **options: Any) -> Any:
    plain = outputs(make, batches, None, **{k: v for k, v in options.items() if k != "cache"})
    cached = outputs(make, batches, folder, **options)
    for ours, theirs in zip((*cached[0], *cached[1]), (*plain[0], *plain[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    return cached


# Checkpointing


@pytest.mark.parametrize("how", ["transformers", "above-cut"])
@pytest.mark.parametrize("layer", ["output.dense", "intermediate.dense", "attention.output.dense"])
def test_regions_that_backward_recomputes_are_not_cut_into(how, layer, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.BertConfig(
        **sizes, intermediate_size=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )

    def make() -> nn.Module:
        model = transformers.BertForSequenceClassification(config).train()
        if how == "transformers":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    options = {"checkpoint": "above-cut"} if how == "above-cut" else {}
    options |= {"layers": [f"bert.encoder.layer.1.{layer}"], "head": "classifier"}
    *_, cache = assert_same_as_without(make, [{"input_ids": IDS}] * 4, tmp_path, **options)
    assert cache.read == 24


def test_dropout_in_a_region_that_is_recomputed_is_the_same_twice(tmp_path) -> None:
    class Block(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def block(self, x):
            return x + self.third(self.drop(self.second(x).relu()))

        def forward(self, x):
            return self.head(checkpoint(self.block, self.first(x), use_reentrant=False))

    cache = {"eval_prefix": True}
    found = outputs(lambda: Block().train(), [X[:8]] * 3, tmp_path, cache=cache)
    # The region draws, in forward and in backward alike: no gradient is that of another mask.
    plain = outputs(lambda: Block().train(), [X[:8]] * 3, None)
    for ours, theirs in zip((*found[0], *found[1]), (*plain[0], *plain[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# What a model remembers


def test_tables_that_grow_with_the_length_are_refused(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")

    def make() -> nn.Module:
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
            intermediate_size=24, max_position_embeddings=8, initializer_range=0.7, tie_word_embeddings=False,
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        )  # fmt: skip
        config.use_cache = False
        return transformers.LlamaForCausalLM(config).train()

    batches = [{"input_ids": torch.randint(0, 50, (4, n))} for n in (12, 6)]
    options = {"layers": ["model.layers.1.mlp.down_proj"], "head": None}
    with pytest.raises(ValueError, match=r"writes buffers \(model.rotary_emb.inv_freq\)"):
        outputs(make, batches, tmp_path, **options)


def test_observers_and_counters_above_the_cut_see_the_passes_of_the_user_alone(tmp_path) -> None:
    class Observer(nn.Module):
        mean = None

        def forward(self, x):
            size = x.detach().abs().mean()
            self.mean = size if self.mean is None else 0.9 * self.mean + 0.1 * size
            return x

    class Observed(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.observer, self.calls = Observer(), 0

        def forward(self, x):
            self.calls += 1
            h = self.second(self.first(x).relu()).relu()
            return self.head(self.observer(self.third(h) + h))

    batches = [*X.split(8)] * 2
    plain, cached = outputs(Observed, batches, None)[2], outputs(Observed, batches, tmp_path)[2]
    assert cached.calls == plain.calls == 6
    torch.testing.assert_close(cached.observer.mean, plain.observer.mean)


def test_an_attribute_that_is_the_same_for_any_order_of_samples(tmp_path) -> None:
    class Sized(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            self.scale = y.abs().mean()
            return y

    class Reads(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.second = Sized(6, 6)

        def forward(self, x):
            return self.head(self.third(self.second(self.first(x).relu()).relu()).relu() / self.second.scale)

    with pytest.raises(ValueError, match="does not give the output of the full one"):
        outputs(Reads, [X[:8]], tmp_path)


def test_statistics_above_the_cut_are_of_one_pass_where_it_is_run_again(tmp_path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.vis, self.third = nn.Embedding(20, 6), nn.Linear(5, 6), nn.Linear(6, 6)
            self.bn, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)

        def forward(self, ids, features):
            v, h = self.vis(features), self.emb(ids)
            if (ids == 7).any():
                h = h + v
            return self.head(self.bn(self.third(h).mean(1)).relu())

    a = torch.randint(0, 7, (8, 4), generator=torch.Generator().manual_seed(0))
    b, features = a.clone(), torch.randn(8, 4, 5, generator=torch.Generator().manual_seed(1))
    b[:, 0] = 7
    batches = [(ids, features) for ids in (a, a, b, a)]
    options = {"head": ["head", "bn"]}
    *_, model, _ = assert_same_as_without(lambda: Both().train(), batches, tmp_path, **options)
    assert model.bn.num_batches_tracked == 4 and model.bn.running_mean.isfinite().all()


# Weights


def test_weights_that_are_given_for_a_pass(tmp_path) -> None:
    torch.manual_seed(0)
    model, reference = Chain(), None
    reference = copy.deepcopy(model)
    with SelectiveBackward(model, ["third"], head="head", cache=PrefixCache(tmp_path)):
        for step in range(12):
            given = {"first.weight": torch.full((6, 5), 0.1 * step)}
            found = functional_call(model, given, (X[:8],)).detach()
            assert torch.equal(found, functional_call(reference, given, (X[:8],)))


def test_parameters_that_are_replaced_again_and_again(tmp_path) -> None:
    def replace(step: int, model: nn.Module) -> None:
        torch.manual_seed(step)
        model.first.weight = nn.Parameter(torch.randn(6, 5), requires_grad=False)

    assert_same_as_without(Chain, [X[:8]] * 30, tmp_path, during=replace)


def test_a_buffer_below_the_cut_that_changes_is_another_base_in_this_run_and_the_next(tmp_path) -> None:
    class Normalised(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(6)

        def forward(self, x):
            return self.head(self.third(self.bn(self.second(self.first(x).relu())).relu()))

    def change(step: int, model: nn.Module) -> None:
        if step == 1:
            model.bn.running_mean += 3

    batches = [X[:8], *X.split(8)]
    assert_same_as_without(lambda: Normalised().eval(), batches, tmp_path, during=change)
    assert_same_as_without(lambda: Normalised().eval(), batches, tmp_path)


def test_a_model_in_another_dtype_midway(tmp_path) -> None:
    def widen(step: int, model: nn.Module) -> None:
        if step == 2:
            model.double()

    batches = [X[:8], X[:8], X[:8].double(), X[:8].double()]
    assert_same_as_without(Chain, batches, tmp_path, during=widen)


def test_tables_that_a_parent_holds_are_in_the_key(tmp_path) -> None:
    class Task(Chain):
        shift = 0.0

        def __init__(self) -> None:
            super().__init__()
            self.task = nn.Parameter(torch.randn(2, 6))
            self.task.data[1] += Task.shift

        def forward(self, x, t):
            return self.head(self.third(self.second((self.first(x) + self.task[t]).relu()).relu()).relu())

    zeros = torch.zeros(8, dtype=torch.long)
    batches = [(X[:8], zeros), (X[8:16], zeros + 1), (X[16:], zeros + 1)]
    for Task.shift in (0.0, 5.0):  # another checkpoint, and only later batches read what differs
        assert_same_as_without(Task, batches, tmp_path)


# Code


def test_a_forward_that_somebody_has_wrapped_is_applied_once(tmp_path) -> None:
    def wrap(step: int, model: nn.Module) -> None:
        if step == 0:
            forward = model.forward
            model.forward = lambda x: forward((x - 1) / 2)

    torch.manual_seed(0)
    plain, cached = Chain(), Chain()
    cached.load_state_dict(plain.state_dict())
    tuned = SelectiveBackward(cached, ["third"], head="head", cache=PrefixCache(tmp_path))
    wrap(0, plain)
    wrap(0, cached)
    for _ in range(3):
        assert torch.equal(cached(X[:8]), plain(X[:8]))
    assert tuned.cut == "third"


def test_a_placeholder_that_is_written_into_another_tensor(tmp_path) -> None:
    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.vis = nn.Embedding(20, 6), nn.Linear(5, 6)
            self.third, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, ids, features):
            v, h, chosen = self.vis(features), self.emb(ids).clone(), ids == 7
            h[chosen] = v[chosen]
            return self.head(self.third(h).relu())

    a = torch.randint(0, 7, (8, 4), generator=torch.Generator().manual_seed(0))
    b, features = a.clone(), torch.randn(8, 4, 5, generator=torch.Generator().manual_seed(1))
    b[:, 0] = 7
    assert_same_as_without(Merged, [(ids, features) for ids in (a, a, b, a, b)], tmp_path)


@pytest.mark.parametrize("where", ["torch", "Python"])
def test_random_numbers_between_modules_are_refused(where, tmp_path) -> None:
    import random

    class Augments(Chain):
        def forward(self, x):
            h = self.first(x).relu()
            h = h * (torch.rand(len(h), 1) > 0.02) if where == "torch" else h * (random.random() > 0.02)
            return self.head(self.third(self.second(h).relu()).relu())

    with pytest.raises(ValueError, match="the code of the model draws random numbers below the cut"):
        outputs(lambda: Augments().train(), [X[:8]], tmp_path)


def test_hooks_of_others_below_the_cut_see_every_pass(tmp_path) -> None:
    seen: list[float] = []

    def make() -> nn.Module:
        model = Chain()
        seen.clear()
        model.first.register_forward_hook(lambda module, args, output: seen.append(output.sum().item()))
        return model

    batches = [*X.split(8)] * 2
    outputs(make, batches, None)
    plain = list(seen)
    outputs(make, batches, tmp_path)
    assert set(seen) >= set(plain) and seen[-1] == plain[-1]  # and those by which passes are compared


def test_keys_and_values_that_lack_blocks_are_said(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=24)).eval()
    with SelectiveBackward(model, ["model.layers.2.mlp.down_proj"], cache=PrefixCache(tmp_path)):
        model(input_ids=IDS, use_cache=True)
        with pytest.warns(UserWarning, match="past_key_values of the output lack the blocks below the cut"):
            model(input_ids=IDS, use_cache=True)


def test_numbers_in_outputs_that_depend_on_the_samples(tmp_path) -> None:
    class Scale(nn.Module):
        def forward(self, x):
            return x, float(x.abs().mean())

    class Scaled(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.scale = Scale()

        def forward(self, x):
            h, scale = self.scale(self.second(self.first(x).relu()).relu())
            return self.head(self.third(h).relu() / scale)

    x = X[:8] * torch.linspace(0.1, 10, 8)[:, None]
    assert_same_as_without(Scaled, [x, x, x[:4], x[4:]], tmp_path)


def test_a_first_batch_of_equal_samples_teaches_nothing(tmp_path) -> None:
    class Module(nn.Module):
        def forward(self, x):
            return x / x.abs().mean()

    class Depends(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.depends = Module()

        def forward(self, x):
            return self.head(self.third(self.second(self.depends(self.first(x))).relu()).relu())

    batches = [X[:1].repeat(8, 1), *X.split(8), *X.split(8)]
    assert_same_as_without(Depends, batches, tmp_path)


def test_one_huge_feature_does_not_hide_what_the_others_take_from_the_batch(tmp_path) -> None:
    class Centred(nn.Module):
        def forward(self, x):
            return torch.cat([x[:, :1], x[:, 1:] - x[:, 1:].mean(0)], dim=1)

    class Depends(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.centred, self.second = Centred(), nn.Linear(5, 6)

        def forward(self, x):
            return self.head(self.third(self.second(self.centred(x) * torch.tensor([1e-6, 1, 1, 1, 1])).relu()).relu())

    x = X.clone()
    x[:, 0] = 1e6 * (1 + 0.1 * x[:, 0])
    with pytest.raises(ValueError, match="'centred' depends on the other samples of its batch"):
        outputs(Depends, [x[:8]], tmp_path)


def test_arguments_are_told_apart_by_how_they_are_nested(tmp_path) -> None:
    class Optional(Chain):
        def forward(self, x, more=None):
            h = self.first(x) if more is None else 2 * self.first(x)
            return self.head(self.third(self.second(h.relu()).relu()).relu())

    x = X[:8]
    assert_same_as_without(Optional, [(x,), (x, []), (x, ()), (x,), (x, [])], tmp_path)


# Batches of which no part can run


def test_a_mask_that_has_as_many_rows_as_the_last_batch_samples(tmp_path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.TransformerEncoderLayer(8, 2, 16, 0, batch_first=True) for _ in range(2))
            self.head = nn.Linear(8, 3)

        def forward(self, x, mask):
            return self.head(self.two(self.one(x, src_mask=mask), src_mask=mask))

    mask = nn.Transformer.generate_square_subsequent_mask(4)
    x = torch.randn(20, 4, 8, generator=torch.Generator().manual_seed(0))
    batches = [(rows, mask) for rows in (*x.split(8), *x.split(8))]
    assert_same_as_without(Masked, batches, tmp_path, layers=["two.linear2"])


def test_pairs_of_samples_run_as_whole_batches(tmp_path) -> None:
    class Pairs(nn.Module):
        def forward(self, x):
            return x.view(-1, 2, 6).flip(1).reshape(-1, 6)

    class Paired(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.pairs = Pairs()

        def forward(self, x):
            return self.head(self.third(self.second(self.pairs(self.first(x))).relu()).relu())

    with pytest.raises(ValueError, match="does not run on a part of a batch"):
        outputs(Paired, [X[:6]], tmp_path)


# Files


def test_shapes_without_end_leave_files_for_others(tmp_path) -> None:
    class Scaled(Chain):
        def forward(self, x, step=0):
            return super().forward(x)

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 100, hard))
        outputs(Scaled, [(X[:8], step) for step in range(150)], tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_frozen_scale_above_the_cut_may_move(tmp_path) -> None:
    class Scaled(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, x):
            return super().forward(x) * self.scale

    def clamp(step: int, model: nn.Module) -> None:
        with torch.no_grad():
            model.scale.clamp_(0, 4.6).mul_(1.01)

    *_, cache = assert_same_as_without(Scaled, [*X.split(8)] * 10, tmp_path, during=clamp)
    assert cache.computed == 24


def test_the_limit_is_of_all_shapes_together(tmp_path) -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Embedding(50, 6), nn.Linear(6, 6)
            self.third, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, ids):
            return self.head(self.third(self.second(self.first(ids))))

    torch.manual_seed(0)
    batches = [torch.randint(0, 50, (2, 10 + step % 10)) for step in range(100)]
    outputs(Embedded, batches, tmp_path, cache={"limit": 5_000})
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.activations")) <= 5_000


@pytest.mark.parametrize("call", ["read", "describe"])
def test_disks_that_fail(call, tmp_path, monkeypatch) -> None:
    if call == "describe":
        first = Path.write_text

        def full(path: Path, *args: Any, **keywords: Any) -> int:
            if "description" in path.name and len(list(tmp_path.rglob("description.json"))) > 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return first(path, *args, **keywords)

        monkeypatch.setattr(Path, "write_text", full)
        ids = torch.randint(0, 50, (4, 9))
        x = torch.randn(4, 9, 5)
        assert_same_as_without(Chain, [X[:8], x, X[:8], x], tmp_path)
        del ids
        return
    preadv = os.preadv
    reads: list[int] = []

    def failing(*args: Any) -> int:
        reads.append(1)
        if len(reads) % 5 == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", failing)
    assert_same_as_without(Chain, [*X.split(8)] * 3, tmp_path)


# Copies, and a cache that serves again


def test_a_copy_of_the_wrapper_can_be_removed(tmp_path) -> None:
    tuned = SelectiveBackward(Chain(), ["third"], head="head", cache=PrefixCache(tmp_path))
    tuned.model(X[:8])
    copied = copy.deepcopy(tuned)
    copied.remove()
    assert not any("forward" in vars(module) for module in copied.model.modules())
    tuned.remove()


def test_a_cache_that_has_served_another_model_tells_of_a_loader_that_augments(tmp_path) -> None:
    cache = PrefixCache(tmp_path, samples=8)
    for augments in (False, True):
        with (
            SelectiveBackward(Chain(), ["third"], head="head", cache=cache) as tuned,
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            for _ in range(3):
                tuned.model(X[:8] + augments * torch.randn(8, 5))
        assert any("different samples came" in str(warning.message) for warning in caught) == augments


def test_a_module_that_takes_the_place_of_another_is_seen_by_the_next_look():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Dropout(0.5)))
    walk = Walk(model)
    assert walk.modules == list(model.modules()) and walk.modules is walk.modules
    model[1][0] = nn.GELU()
    assert walk.modules == list(model.modules())
    model[1].append(nn.Linear(4, 4))
    assert walk.modules == list(model.modules())
    model[0].inner = nn.ReLU()  # of what had none
    assert walk.modules == list(model.modules())
    model.__dict__["_modules"] = {"0": nn.Tanh()}
    assert walk.modules == list(model.modules())


@pytest.mark.parametrize("norms", [1, 3])
def test_buffers_that_a_pass_writes_are_put_back_one_and_many(norms):
    """One buffer of its dtype is joined by no copy, unless it is asked for."""
    model = nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(norms)))
    model[0].register_buffer("wide", torch.ones(1).expand(3))
    model[0].register_buffer("nothing", torch.full((2,), torch.nan))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = VolatileState(model)
    assert not state.changed_buffers()
    model(torch.randn(8, 4))
    written = {name for name in before if not name.endswith(("wide", "nothing"))}
    assert set(state.changed_names()) == written
    state.restore()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer.nan_to_num(7.0), before[name].nan_to_num(7.0)), name
    assert not state.changed_buffers()


class Remembers(nn.Module):
    """A counter, a list, a tensor, a buffer that is replaced and one that is written."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.seen, self.latest = 0, [], torch.zeros(2)
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("written", torch.zeros(2))

    def forward(self, x):
        self.count += 1
        self.seen.append(self.count)
        self.latest = x
        self.replaced = x + self.count
        self.written.add_(x)
        return x

    def state(self):
        return self.count, [*self.seen], self.latest.tolist(), self.replaced.tolist(), self.written.tolist()


@pytest.mark.parametrize("lets_go", [False, True])
def test_what_is_remembered_anew_is_that_of_the_moment(lets_go):
    """Whatever was changed since, in a pass or by hand, and be it through `.data`, which no version counts."""
    model = nn.Sequential(nn.Linear(2, 2), Remembers(), nn.BatchNorm1d(2))
    inner = model[1]
    before = Before(model, list(model.modules()))
    for step in range(6):
        if lets_go:
            before.let_go()
        if step == 1:
            inner.written.data.add_(5)
        if step == 2:
            inner.register_buffer("another", torch.ones(3))
            inner.more = [1]
        if step == 3:
            inner.double()
        if step == 4:
            model[0].note = "another"
            torch.manual_seed(step)
        before.renew()
        expected, drawn = inner.state(), torch.get_rng_state()
        inner(torch.full((2,), 1.5, dtype=inner.written.dtype))
        torch.rand(1)
        model[0].note = "changed"
        if step > 2:
            inner.more.append(2)
            inner.another.zero_()
        before.restore()
        assert inner.state() == expected and torch.equal(torch.get_rng_state(), drawn)
        assert getattr(model[0], "note", None) == ("another" if step > 3 else None)
        assert step < 3 or (inner.more == [1] and bool(inner.another.all()))
        inner(torch.full((2,), 0.5, dtype=inner.written.dtype))  # which stays


def test_what_was_let_go_is_not_held():
    model = nn.Sequential(Remembers())
    model[0](torch.ones(2))
    before = Before(model, list(model.modules()))
    held = weakref.ref(model[0].latest)
    before.let_go()
    model[0].latest = None
    assert held() is None


def test_digests_of_samples_tell_memory_formats_and_all_arguments_apart():
    images = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    last = images.contiguous(memory_format=torch.channels_last)

    def digests(*args: torch.Tensor) -> list[bytes]:
        found = Samples.of(args, {})
        assert isinstance(found, Samples)
        return found.digests

    assert digests(images) == digests(images.clone()) and len({*digests(images), *digests(last)}) == 4
    as_they_lie = last.permute(0, 2, 3, 1).contiguous().view(2, 3, 4, 5)  # the same bytes, another image
    assert not {*digests(as_they_lie)} & {*digests(last)}
    for rows in ([0], [1, 0]):
        part = last[rows].contiguous(memory_format=torch.channels_last)
        assert digests(part) == [digests(last)[row] for row in rows]
    lengthways = images.transpose(0, 1).contiguous().transpose(0, 1)  # samples do not lie one by one
    assert digests(lengthways) == digests(images)
    assert digests(images.expand(2, 3, 4, 5), torch.zeros(2)) != digests(images, torch.ones(2))
