"""Steps that are rounded away in bfloat16 and float16 are named; buffers that the forward pass moves are no fault."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from small_models import Mlp
from torch import nn
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm

from zest_fast.finetuning.rounding import half_steps
from zest_fast.finetuning.selective_backward import SelectiveBackward


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_a_step_is_what_rounding_keeps_in_place(dtype):
    """All positive finite numbers of the type: half a distance less a little stays, a little more moves."""
    top = int(torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(torch.int16))
    weights = torch.arange(0, top, dtype=torch.int16).view(dtype)  # the largest has no next one
    half = half_steps(weights).double()
    exact = weights.double()
    assert torch.equal((exact + 0.99 * half).to(dtype), weights)
    assert ((exact + 1.01 * half).to(dtype) > weights).all()
    assert torch.equal(half_steps(-weights), half_steps(weights))


def large(dtype):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model.to(dtype)


def train(model, optimizer, steps=1):
    x = torch.randn(32, 64).to(model[0].weight.dtype)
    for _ in range(steps):
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_pure_bfloat16_at_the_readmes_rate_is_warned_of():
    model = large(torch.bfloat16)
    tuned = SelectiveBackward(model, ["1"], head="2")
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=2e-5)
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=r"cannot move at a learning rate of 2e-05.*float32") as caught:
        summary = tuned.summary(optimizer)
    share = float(str(caught[0].message).split("%")[0]) / 100
    assert "rounding" in str(summary) and "in bfloat16" in summary.rounding
    train(model, optimizer)
    moved = torch.cat([(model.state_dict()[name] != before[name]).flatten() for name in tuned.trainable_names])
    assert 0.5 < share < 0.9 and abs(float(moved.float().mean()) - (1 - share)) < 0.02  # what it said came true
    with pytest.warns(UserWarning) as caught:
        found = tuned.verify()
    texts = [str(warning.message) for warning in caught]
    assert any("only 3" in text and "have moved" in text for text in texts) and "have moved" in found
    assert any("cannot move at a learning rate of 2e-05" in text for text in texts)


@pytest.mark.parametrize(
    ("dtype", "kind", "rate"),
    [
        (torch.float32, torch.optim.AdamW, 2e-5),
        (torch.bfloat16, torch.optim.AdamW, 1e-2),
        (torch.float16, torch.optim.AdamW, 1e-3),
        (torch.bfloat16, torch.optim.SGD, 1e-5),  # nothing is known before there are gradients
    ],
)
def test_no_warning_where_there_is_nothing_to_say(dtype, kind, rate):
    model = large(dtype)
    tuned = SelectiveBackward(model, ["1"], head="2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.summary(kind(tuned.parameters(), lr=rate)).rounding == ""


def test_the_rate_before_the_warm_up_counts_and_so_do_gradients():
    model = large(torch.bfloat16)
    tuned = SelectiveBackward(model, ["1"], head="2")
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-2)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 100)
    assert optimizer.param_groups[0]["lr"] == 0 and tuned.summary(optimizer).rounding == ""
    sgd = torch.optim.SGD(tuned.parameters(), lr=1e-3)
    model(torch.randn(32, 64).bfloat16()).float().square().mean().backward()
    with pytest.warns(UserWarning, match="cannot move at a learning rate of 0.001"):
        tuned.summary(sgd)


class Normed(nn.Module):
    """Frozen spectral norms of both kinds, and a buffer of its own that every pass moves."""

    def __init__(self):
        super().__init__()
        self.first, self.second = spectral_norm(nn.Linear(4, 4)), old_spectral_norm(nn.Linear(4, 4))
        self.conv = spectral_norm(nn.Conv1d(4, 4, 1))
        self.chosen, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("rests", torch.zeros(1))

    def forward(self, x):
        self.seen += 1
        x = self.conv(self.first(x)[..., None])[..., 0]
        return self.head(self.chosen(self.second(x)).relu())


def test_wrapping_takes_no_step_of_a_power_iteration():
    model = Normed().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    tuned = SelectiveBackward(model, ["chosen"], head="head")
    str(tuned.summary())
    tuned.remove()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_verify_names_what_the_forward_pass_moves_and_blames_what_somebody_else_did(tmp_path):
    model, x = Normed().train(), torch.randn(8, 4)
    tuned = SelectiveBackward(model, ["chosen"], head="head")
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = tuned.verify()
    assert found.startswith("verified: every chosen weight moved")
    for name in ("'first.parametrizations.weight.0._u'", "'second.weight_u'", "'seen'"):
        assert name in found or "more" in found
    assert "seen" in found and "rests" not in found
    run = tuned.save_run(tmp_path / "run", optimizer)
    fresh = Normed().train()
    fresh.load_state_dict({**model.state_dict(), **tuned._base.buffers})
    again = SelectiveBackward(fresh, ["chosen"], head="head")
    with torch.no_grad():
        for parameter in again.parameters():
            parameter -= 1
    again.resume(run, torch.optim.SGD(again.parameters(), lr=0.1))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, fresh.get_buffer(name)), name
    for parameter in again.parameters():
        parameter.data += 1
    assert "seen" in again.verify()  # moved by the passes of the run before
    model.rests += 1
    with pytest.raises(RuntimeError, match=r"frozen, but changed: 'rests'$"):
        tuned.verify()


def test_a_frozen_mlp_reports_nothing_but_the_proof():
    model = Mlp()
    tuned = SelectiveBackward(model, ["b"])
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    assert tuned.verify() == "verified: every chosen weight moved, every frozen tensor is bit for bit as it was"
