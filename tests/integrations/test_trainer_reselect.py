"""ReselectCallback: layers are exchanged between two steps of a Trainer, with the batch of the step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import llama
from test_trainer import QUERY, bert, changed, classified, copy_of, texts, trainer_of

import zest_fast
from zest_fast.integrations.trainer import ReselectCallback, ZestCallback, prepare

VALUE = "bert.encoder.layer.0.attention.self.value"


class Prefer:
    """The layers named, best first, above all others."""

    def __init__(self, *names):
        self.names = names

    def predict(self, profile):
        return np.array([-self.names.index(n) if n in self.names else -10.0 for n in profile.names], dtype=float)


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16"])
def test_layers_are_exchanged_and_the_schedule_goes_on(tmp_path, mixed):
    model = bert()
    zest = ZestCallback([QUERY])
    callback = ReselectCallback(zest, every=2, by=Prefer(VALUE, QUERY), margin=0)
    arguments = {"max_steps": 6, "weight_decay": 0.1, "bf16": mixed, "gradient_accumulation_steps": 2}
    trainer = trainer_of(model, classified(16), tmp_path, callbacks=[zest, callback], arguments=arguments)
    before = copy_of(model)
    trainer.train()
    assert [str(done) for done in callback.reselect.exchanges] == [f"step 2: {VALUE} for {QUERY}"]
    assert callback.reselect.steps == 6
    layers = {f"{layer}.{name}" for layer in (QUERY, VALUE, "classifier") for name in ("weight", "bias")}
    assert changed(before, model) == layers
    decayed, plain = trainer.optimizer.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {f"{VALUE}.weight", "classifier.weight"}
    assert {names[id(p)] for p in plain["params"]} == {f"{VALUE}.bias", "classifier.bias"}
    assert decayed["lr"] == plain["lr"] == 0.0  # linear decay, to its end
    other = bert()
    assert set(zest_fast.apply_delta(other, zest.tuned.save(tmp_path / "delta.safetensors")).layers) == {QUERY, VALUE}
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    zest.tuned.remove()
    assert not model._forward_pre_hooks


def test_training_is_that_without_it_where_nothing_is_exchanged(tmp_path):
    ends = []
    for reselects in (False, True):
        model = llama(attention_dropout=0.2).train()
        zest = ZestCallback(["model.layers.2.mlp.up_proj"])
        more = [ReselectCallback(zest, every=1, by=Prefer("model.layers.2.mlp.up_proj"), margin=0)] if reselects else []
        torch.manual_seed(3)
        trainer = trainer_of(model, texts(), tmp_path, callbacks=[zest, *more], arguments={"max_steps": 4})
        model.load_state_dict({name: torch.full_like(v, 0.02).cumsum(-1) for name, v in model.state_dict().items()})
        trainer.train()
        if more:
            assert more[0].reselect.ranking is not None and more[0].reselect.exchanges == []
        ends.append([*model.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_the_last_step_chooses_nothing(tmp_path):
    model = bert()
    zest = ZestCallback([QUERY])
    callback = ReselectCallback(zest, every=2, by=Prefer(VALUE), margin=0)
    trainer_of(model, classified(), tmp_path, callbacks=[zest, callback]).train()
    assert callback.reselect.exchanges == [] and callback.reselect.steps == 2


def test_what_prepare_returned_and_a_fixed_batch(tmp_path):
    model = bert()
    trainer = trainer_of(model, classified(), tmp_path, arguments={"max_steps": 3})
    tuned = prepare(trainer, [QUERY])
    rows = classified()
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    callback = ReselectCallback(tuned, every=1, by=Prefer(VALUE), margin=0, batch=batch)
    trainer.add_callback(callback)
    trainer.train()
    assert tuned.layers == (VALUE,) and tuned.former_layers == (QUERY,)


def test_a_training_from_a_checkpoint_is_refused(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    zest = ZestCallback([QUERY])
    trainer_of(bert(), classified(), tmp_path, callbacks=[zest], arguments=arguments).train()
    zest = ZestCallback([QUERY])
    callbacks = [zest, ReselectCallback(zest, every=1)]
    trainer = trainer_of(bert(), classified(), tmp_path, callbacks=callbacks, arguments={**arguments, "max_steps": 4})
    with pytest.raises(RuntimeError, match="at step 2 of a checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_callback_without_its_zest_callback_is_named(tmp_path):
    trainer = trainer_of(bert(), classified(), tmp_path, callbacks=[ReselectCallback(ZestCallback([QUERY]))])
    with pytest.raises(RuntimeError, match="its ZestCallback is in no Trainer"):
        trainer.train()
