"""Whatever a model does in its forward pass, a sweep with reuse gives the scores of one without."""

from __future__ import annotations

import random
import signal
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas
import pytest
import torch
from reuse_models import (
    IMAGES,
    RECOMPUTED,
    REUSED,
    SEQUENCES,
    TOKENS,
    VECTORS,
    BatchMaximum,
    Branch,
    Chain,
    CountsItsPasses,
    Encoder,
    Forgiving,
    Images,
    LooksAsideInLargeBatches,
    LooksBack,
    LooksBackByBranch,
    LooksBackForgivingly,
    Overwrites,
    Patches,
    make_splits,
)
from small_models import assert_same, snapshot
from sweeping_models import RECIPE, Residual, child, make
from torch import nn

from zest_fast.prefix.boundaries import close, trace_calls
from zest_fast.prefix.inputs import rows_of
from zest_fast.sweeping.reused_prefix import ReusedPrefix, find_boundary
from zest_fast.sweeping.sweep import sweep
from zest_fast.sweeping.trials import COMPARED, draw

pytestmark = pytest.mark.usefixtures("one_thread")

# Large rates: what a reused prefix gets wrong is not lost in rounding.
LOUD = replace(RECIPE, layer_lr_factor=0.2, max_layer_lr=0.2)
BOUND = 1e-6  # of a loss in float32: other batch sizes round differently


def swept(make: Callable[[], nn.Module], splits: dict, path: Path, **arguments) -> pandas.DataFrame:
    """The frame, after a look whether the model is as it was."""
    torch.manual_seed(3)
    model = make()
    before, state, python = snapshot(model), torch.get_rng_state(), random.getstate()
    frame = sweep(model, splits, out=path, **{"recipe": LOUD, **arguments})
    assert_same(before, snapshot(model))
    assert torch.equal(state, torch.get_rng_state()) and python == random.getstate()
    assert not any("forward" in vars(module) for module in model.modules())
    return frame


def compare(make: Callable[[], nn.Module], splits: dict, folder: Path, bound: float = BOUND, **arguments) -> list[str]:
    """Asserts that reuse does not change the scores; returns what it warned of."""
    plain = swept(make, splits, folder / "plain.jsonl", reuse=False)
    torch.manual_seed(4)  # where the caller's generators stand is no part of it
    random.seed(4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reused = swept(make, splits, folder / "reused.jsonl", **arguments)
    pandas.testing.assert_frame_equal(reused, plain, rtol=0, atol=bound)
    return [str(warning.message) for warning in caught if "reused" in str(warning.message)]


@pytest.mark.parametrize("name", REUSED)
def test_reuse_changes_no_score(name, tmp_path) -> None:
    make, kind = REUSED[name]
    assert compare(make, make_splits(kind), tmp_path) == []


@pytest.mark.parametrize("name", RECOMPUTED)
def test_what_cannot_be_reused_is_recomputed_and_said_so(name, tmp_path) -> None:
    make, kind = RECOMPUTED[name]
    assert compare(make, make_splits(kind), tmp_path)


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "num_labels": 3}
TRANSFORMERS = {
    "BertForSequenceClassification": (TOKENS, "BertConfig", SIZES),
    "DistilBertForSequenceClassification": (
        TOKENS, "DistilBertConfig", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "num_labels": 3},
    ),
    "ViTForImageClassification": (IMAGES, "ViTConfig", {**SIZES, "image_size": 8, "patch_size": 4, "num_channels": 1}),
    "SwinForImageClassification": (
        IMAGES, "SwinConfig",
        {"image_size": 8, "patch_size": 2, "num_channels": 1, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2],
         "window_size": 2, "num_labels": 3},
    ),
    "ConvNextForImageClassification": (
        IMAGES, "ConvNextConfig",
        {"num_channels": 1, "patch_size": 2, "hidden_sizes": [8, 8], "depths": [1, 2], "num_stages": 2,
         "num_labels": 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_small_models_of_transformers_reuse_what_lies_below_every_layer(name, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    kind, config, options = TRANSFORMERS[name]
    options = {**options, "vocab_size": 40} if kind == TOKENS else options

    def make() -> nn.Module:
        return getattr(transformers, name)(getattr(transformers, config)(**options))

    assert compare(make, make_splits(kind), tmp_path) == []


def with_one_large_row(split: str) -> dict:
    """Small inputs, but for a row that no probe sees: of the score split, or among the training samples."""
    splits = make_splits(VECTORS, (24, 40, 70))
    row = 9 if split == "score" else int(draw(40, 16, 1).sort().values[-1])
    for name, (inputs, targets) in splits.items():
        splits[name] = (inputs.clamp(-3, 3), targets)
    splits[split][0][row] *= 40 / splits[split][0][row].abs().max()
    return splits


@pytest.mark.parametrize("split", ["train", "score"])
@pytest.mark.parametrize("make", [Branch, LooksBack, LooksBackForgivingly, lambda: Chain(BatchMaximum(8.0))])
def test_a_way_that_one_sample_takes_is_noticed_when_it_does(make, split, tmp_path) -> None:
    said = compare(make, with_one_large_row(split), tmp_path)
    assert any("was not reused" in message and "'" in message for message in said)


@pytest.mark.parametrize("split", ["train", "score"])
@pytest.mark.parametrize(
    ("make", "found"),
    [
        (LooksBack, "not kept"),
        (LooksBackForgivingly, "not kept"),
        (LooksBackByBranch, "not kept"),
        (Overwrites, "written into another tensor"),
    ],
)
def test_an_output_that_was_not_kept_shows_in_the_batch_that_needs_it(make, found, split, tmp_path, monkeypatch):
    monkeypatch.setattr(ReusedPrefix, "check", lambda *_: None)  # as in a batch that is not among those compared
    said = compare(make, with_one_large_row(split), tmp_path)
    assert any("'fourth'" in message and found in message for message in said)


def test_a_loss_that_is_nan_by_itself_is_no_fault_of_the_reuse(tmp_path) -> None:
    splits = make_splits(VECTORS)
    splits["score"][0][9] = torch.nan
    said = compare(Chain, splits, tmp_path)
    assert said == []


def test_errors_that_a_model_catches_do_not_hide_another_way(tmp_path) -> None:
    said = compare(Forgiving, with_one_large_row("score"), tmp_path)
    assert any("was not reused" in message for message in said)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
@pytest.mark.parametrize(
    ("make", "kind"), [(Images, IMAGES), (Patches, IMAGES), (Encoder, TOKENS), (lambda: Chain(nn.GELU()), VECTORS)]
)
def test_models_in_bfloat16(make, kind, cache_bytes, tmp_path) -> None:
    splits = make_splits(kind)
    if kind != TOKENS:
        splits = {name: (inputs.bfloat16(), targets) for name, (inputs, targets) in splits.items()}
    # A unit in the last place of a logit, which other batch sizes may move.
    assert compare(lambda: make().bfloat16(), splits, tmp_path, bound=2e-2, cache_bytes=cache_bytes) == []


@pytest.mark.parametrize("name", ["bytes", "windows", "a view of a permuted output", "experts of tokens"])
def test_outputs_of_any_kind_are_kept_on_disk(name, tmp_path) -> None:
    make, kind = REUSED[name]
    assert compare(make, make_splits(kind), tmp_path, cache_bytes=0) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.jsonl", "reused.jsonl"]


def test_a_process_that_is_killed_leaves_nothing_but_its_records(tmp_path) -> None:
    program = (
        "import os, signal\n"
        "from sweeping_models import RECIPE, Residual, make\n"
        "from zest_fast.sweeping.sweep import sweep\n"
        "os.posix_fallocate = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "model, splits = make(Residual)\n"
        f"sweep(model, splits, recipe=RECIPE, out={str(tmp_path / 'records.jsonl')!r}, cache_bytes=0)\n"
    )
    assert child(program).wait(timeout=120) == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]


@pytest.mark.parametrize("moment", [2, 12, 22, 32, 42, 47, 52])
def test_an_interrupt_at_any_pass_leaves_the_model_and_the_records_as_they_should_be(moment, tmp_path) -> None:
    class Interrupted(nn.GELU):
        calls = 0

        def forward(self, x):
            Interrupted.calls += 1
            if Interrupted.calls == moment:
                raise KeyboardInterrupt
            return super().forward(x)

    torch.manual_seed(3)
    model = Chain(Interrupted())
    splits = make_splits(VECTORS)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        sweep(model, splits, out=tmp_path / "records.jsonl", recipe=LOUD)
    assert_same(before, snapshot(model))
    assert not any("forward" in vars(module) for module in model.modules())
    resumed = sweep(model, splits, out=tmp_path / "records.jsonl", recipe=LOUD)
    whole = sweep(model, splits, out=tmp_path / "whole.jsonl", recipe=LOUD)
    pandas.testing.assert_frame_equal(resumed, whole)


def test_a_trial_that_was_run_again_starts_from_the_same_weights_and_buffers(tmp_path) -> None:
    # The order of the trials is no part of a score: buffers that passes move start each trial from where they were.
    make, splits = (lambda: Chain(CountsItsPasses())), make_splits(VECTORS)
    whole = swept(make, splits, tmp_path / "whole.jsonl", reuse=False)
    alone = swept(make, splits, tmp_path / "alone.jsonl", reuse=False, layers=["third"])
    chosen = whole[whole.layer == "third"].reset_index(drop=True)
    pandas.testing.assert_frame_equal(alone[["seed", "loss"]], chosen[["seed", "loss"]])


def test_dimensions_of_samples_are_told_from_others_of_the_same_size(tmp_path) -> None:
    # Three samples are traced; here three tokens, three channels and three layers of a state stand beside them.
    class Threes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.top, self.head = nn.GRU(3, 3, num_layers=3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            y, state = self.rnn(x[:, :3, :3].transpose(0, 1))
            return self.head(self.top(y).relu().mean(0) + state.mean(0))

    torch.manual_seed(3)
    model, inputs = Threes().eval().requires_grad_(False), make_splits(SEQUENCES)["train"][0]
    trace = trace_calls(model, inputs[:5])
    place = trace.first_call(model.top)
    boundary = find_boundary(model, trace, place, (model.top.weight, *model.head.parameters()), inputs[:5], 1 << 20)
    assert [call.name for call in boundary.live] == ["rnn"]
    assert [leaf.dim for leaf in boundary.live[0].output] == [1, 1]
    cache = ReusedPrefix(model, inputs, limit=1 << 20, folder=tmp_path, batch_size=7)
    cache.advance(boundary)
    rows = torch.tensor([30, 2, 17])
    torch.testing.assert_close(cache.run(rows), model(rows_of(inputs, rows)), rtol=0, atol=1e-6)


def test_the_layers_together_are_compared_on_every_sample(tmp_path, monkeypatch) -> None:
    compared: dict[int, list[set[int]]] = {}  # by the size of the split
    check = ReusedPrefix.check

    def noted(self, rows):
        compared.setdefault(len(self), []).append(set(rows.tolist()))
        check(self, rows)

    monkeypatch.setattr(ReusedPrefix, "check", noted)
    model, splits = make(Residual)
    sweep(model, splits, out=tmp_path / "records.jsonl", recipe=RECIPE)
    scored = compared[len(splits["score"][1])]
    assert len(scored) == 6  # all but the stem, below which nothing lies; once for both seeds
    assert all(len(rows) == COMPARED for rows in scored[1:])  # of the first a whole chunk
    assert set.union(*scored[1:]) == set(range(len(splits["score"][1])))


def test_what_a_model_does_to_larger_batches_alone_is_noticed(tmp_path) -> None:
    torch.manual_seed(0)
    splits = {name: (torch.randn(64, 5), torch.arange(64) % 3) for name in ("head", "train", "score")}
    recipe = replace(LOUD, batch_size=16)
    for size in (16, 64):  # of training, of scoring alone
        make = partial(LooksAsideInLargeBatches, size)
        plain = swept(make, splits, tmp_path / f"plain{size}.jsonl", recipe=recipe, reuse=False)
        with pytest.warns(UserWarning, match="beside those of the full pass") as caught:
            reused = swept(make, splits, tmp_path / f"reused{size}.jsonl", recipe=recipe)
        assert len(caught) == 3
        pandas.testing.assert_frame_equal(reused, plain, rtol=0, atol=BOUND)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("special", [[], [torch.nan], [torch.inf], [-torch.inf, torch.nan]])
def test_close_is_a_difference_of_each_entry_on_the_scale_of_the_largest(special, dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    expected = torch.cat([torch.randn(50, generator=generator), torch.tensor([-4.0, *special])]).to(dtype)
    for change, same in ((0.0, True), (0.25, True), (0.75, False), (torch.nan, False), (torch.inf, False)):
        for sign in (1, -1):
            found = expected.clone()
            found[7] += sign * change
            assert close(found, expected, 0.125) is same  # of 4: half a unit is allowed
    assert not close(expected[1:], expected, 1.0)
    assert close(expected[:0], expected[:0], 0.0)
