"""ZestCallback and prepare: Trainer's optimizer holds what was chosen, the rest stays bit for bit."""

from __future__ import annotations

import logging
import re
import runpy
import warnings
from pathlib import Path

import pytest
import torch
from small_models import llama
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from zest_fast import MasterWeights, PrefixCache
from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.integrations.trainer import DELTA, WatchCallback, ZestCallback, prepare

EXAMPLES = Path(__file__).parents[2] / "examples"
QUERY = "bert.encoder.layer.1.attention.self.query"


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=30, num_labels=3, **sizes))


def classified(count=8):
    ids = torch.randint(30, (count, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": torch.tensor(place % 3)} for place, row in enumerate(ids)]


def texts(count=8):
    ids = torch.randint(40, (count, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_of(model, data, folder, **kwargs):
    arguments = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "max_steps": 2, **kwargs.pop("arguments", {})}
    options = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no", **arguments}
    return Trainer(model=model, args=TrainingArguments(str(folder), **options), train_dataset=data, **kwargs)


def changed(before, model):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("make", "data", "layer", "trained"),
    [
        (bert, classified(), QUERY, {f"{QUERY}.weight", f"{QUERY}.bias", "classifier.weight", "classifier.bias"}),
        (llama, texts(), "model.layers.2.mlp.up_proj", {"model.layers.2.mlp.up_proj.weight"}),
    ],
    ids=["bert", "llama"],
)
def test_only_the_chosen_layers_move(tmp_path, caplog, make, data, layer, trained):
    model = make()
    callback = ZestCallback([layer])
    with caplog.at_level(logging.INFO, "zest_fast"):
        trainer = trainer_of(model, data, tmp_path, callbacks=[callback])
    assert f"layers    {layer}" in caplog.text
    before = copy_of(model)
    trainer.train()
    assert changed(before, model) == trained == set(callback.tuned.trainable_names)
    assert callback.tuned.cut == layer
    callback.tuned.remove()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_prepare_chooses_on_the_first_batch_and_disturbs_nothing(tmp_path):
    model = bert()
    trainer = trainer_of(model, classified(), tmp_path)
    random = torch.get_rng_state()
    tuned = prepare(trainer, 2, by="rgn", head="classifier")
    assert torch.equal(torch.get_rng_state(), random)
    assert len(tuned.summary().layers) == 2 and tuned.summary().head == ("classifier",)
    before = copy_of(model)
    trainer.train()
    assert changed(before, model) == set(tuned.trainable_names)


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_prefix_cache_changes_nothing_but_the_passes_below_the_cut(tmp_path, mixed, checkpointing):
    found = []
    arguments = {"max_steps": 8, "gradient_checkpointing": checkpointing, "bf16": mixed}
    for cache in (None, PrefixCache(tmp_path / "cache")):
        torch.manual_seed(0)
        model = llama()
        model.config.use_cache = False
        callback = ZestCallback(["model.layers.2.self_attn.o_proj"], cache=cache)
        trainer = trainer_of(model, texts(), tmp_path, callbacks=[callback], arguments=arguments)
        calls = []
        model.model.layers[0].mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train()
        found.append((copy_of(model), [row["loss"] for row in trainer.state.log_history if "loss" in row], len(calls)))
    # Trainer shuffles: a sample has other companions in the next epoch, beside which kernels round otherwise.
    layer = "model.layers.2.self_attn.o_proj.weight"
    torch.testing.assert_close(found[1][0][layer], found[0][0][layer], rtol=0, atol=2e-2 if mixed else 1e-4)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-3)
    assert cache.samples == 8 and (cache.computed, cache.read) == (8, 24)
    assert found[0][2] == 8


def test_a_checkpoint_holds_the_delta(tmp_path):
    model = bert()
    callback = ZestCallback([QUERY], save_delta=True)
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(model, classified(), tmp_path, callbacks=[callback], arguments=saving).train()
    other = bert()
    SelectiveBackward(other, [QUERY]).load(tmp_path / "checkpoint-2" / DELTA)
    assert not changed(copy_of(model), other)


def test_what_training_did_is_verified_and_logged(tmp_path, caplog):
    class Meddler(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            with torch.no_grad():
                model.bert.embeddings.word_embeddings.weight[0, 0] += 1

    for meddlers, level, words in (([], "INFO", "verified: every"), ([Meddler()], "WARNING", "word_embeddings.weight")):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="zest_fast"):
            trainer_of(bert(), classified(), tmp_path, callbacks=[*meddlers, ZestCallback([QUERY])]).train()
        last = [record for record in caplog.records if record.name == "zest_fast"][-1]
        assert last.levelname == level and words in last.getMessage()


def test_an_optimizer_that_was_built_before_is_named(tmp_path):
    model = bert()
    SelectiveBackward(model, ["bert.pooler.dense"]).remove()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("bert.pooler"))
    early = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    message = (
        f"lacks '{QUERY}.weight', '{QUERY}.bias', 'classifier.weight', 'classifier.bias', which train; and it holds "
        "'bert.pooler.dense.weight', 'bert.pooler.dense.bias', which are frozen"
    )
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer_of(model, classified(), tmp_path, callbacks=[ZestCallback([QUERY])], optimizers=(early, None))
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_an_optimizer_of_exactly_what_trains_may_come_from_outside(tmp_path):
    model = bert()
    with SelectiveBackward(model, [QUERY]) as tuned:
        optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
        tuned.summary(optimizer)
    callback = ZestCallback([QUERY])
    before = copy_of(model)
    trainer_of(model, classified(), tmp_path, callbacks=[callback], optimizers=(optimizer, None)).train()
    assert changed(before, model) == set(callback.tuned.trainable_names)


def test_prepare_after_training_is_too_late(tmp_path):
    trainer = trainer_of(bert(), classified(), tmp_path)
    trainer.train()
    with pytest.raises(RuntimeError, match=r"has its optimizer already.*before train\(\)"):
        prepare(trainer, [QUERY])


def test_a_callback_that_comes_too_late_is_refused(tmp_path):
    trainer = trainer_of(bert(), classified(), tmp_path)
    trainer.add_callback(ZestCallback([QUERY]))
    with pytest.raises(RuntimeError, match=r"prepare\(trainer, layers\)"):
        trainer.train()


def test_a_head_may_be_an_iterator(tmp_path):
    """It is asked for more than once."""
    callback = ZestCallback([QUERY], head=iter(["classifier"]))
    trainer_of(bert(), classified(), tmp_path, callbacks=[callback])
    prepared = prepare(trainer_of(bert(), classified(), tmp_path), 1, by="rgn", head=iter(["classifier"]))
    assert callback.tuned.summary().head == prepared.summary().head == ("classifier",)


def test_one_callback_serves_one_trainer(tmp_path):
    callback = ZestCallback([QUERY])
    trainer_of(bert(), classified(), tmp_path, callbacks=[callback])
    with pytest.raises(RuntimeError, match="in a Trainer already"):
        trainer_of(bert(), classified(), tmp_path, callbacks=[callback])


@pytest.mark.parametrize("name", ["accelerate_loop", "lora_on_the_best_layers"])
def test_the_examples_run_as_they_are(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    losses = [float(loss) for loss in re.findall(r"loss ([0-9.]+)", capsys.readouterr().out)]
    assert len(losses) >= 2 and losses[-1] < losses[0]
    assert (tmp_path / "delta.safetensors").exists() == (name == "accelerate_loop")


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (["bert.encoder.layer.1.attention.self.querry"], ValueError, f"nearest: '{QUERY}'"),
        (QUERY, TypeError, "layers must be an iterable of layer names"),
        (100, ValueError, "n=100, but there are only"),
    ],
)
def test_bad_layers_leave_the_model_alone(tmp_path, layers, error, message):
    model = bert()
    trainer = trainer_of(model, classified(), tmp_path)
    with pytest.raises(error, match=re.escape(message)):
        prepare(trainer, layers, by="rgn")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_layers_of_a_model_that_nobody_swept_are_probed(tmp_path, caplog, monkeypatch):
    from zest_fast.integrations import trainer as integration

    seen = []
    create = integration.run_probe
    monkeypatch.setattr(integration, "run_probe", lambda *a, **k: seen.append(create(*a, **k)) or seen[-1])
    trainer = trainer_of(bert(), classified(96), tmp_path)
    state = torch.get_rng_state()
    with caplog.at_level(logging.INFO, logger="zest_fast"):
        tuned = prepare(trainer, 2)
    assert torch.equal(state, torch.get_rng_state())
    assert len(seen) == 1 and seen[0].cost <= 0.05 and "a probe of each layer" in caplog.text
    tuned.remove()
    for options in ({"probe": None}, {"by": "snip"}):
        prepare(trainer, 2, **options).remove()
    assert len(seen) == 1
    prepare(trainer, 2, probe=0.1).remove()
    assert len(seen) == 2


def test_where_samples_are_too_few_for_a_probe_it_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="zest_fast"):
        prepare(trainer_of(bert(), classified(8), tmp_path), 2).remove()
    assert "no probe: the batches hold 8 samples" in caplog.text


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16"])
def test_a_watched_training_is_bit_equal_and_logs_its_steps(tmp_path, mixed):
    arguments = {
        "max_steps": 5,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "bf16": mixed,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "max_grad_norm": 0.1,
    }
    found, log = [], []
    callback = WatchCallback(every=2, log=log.append, metrics="all", noise=True, updates=True)
    for callbacks in ([], [callback]):
        torch.manual_seed(0)
        model = bert()
        trainer = trainer_of(
            model, classified(20), tmp_path, callbacks=callbacks, arguments=arguments, eval_dataset=classified(4)
        )
        trainer.train()
        found.append((copy_of(model), torch.get_rng_state()))
    assert all(torch.equal(found[0][0][name], tensor) for name, tensor in found[1][0].items())
    assert torch.equal(found[0][1], found[1][1])
    assert [step.step for step in log] == [0, 2, 4] and callback.watched.steps == 5
    clipped = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    for step in log:
        assert not step.notes and QUERY in step.profile and not any(step.profile.column("fisher") <= 0)
        assert step.totals["update_ratio"] > 0 and step.profile.loss > 0
    assert not clipped or log[0].totals["grad_norm"] == pytest.approx(clipped[0], rel=0.2)  # that has biases as well


def test_a_training_that_fails_leaves_no_watch_behind(tmp_path):
    class Failing(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            raise ZeroDivisionError

    model, callback = bert(), WatchCallback(every=1)
    with pytest.raises(ZeroDivisionError):
        trainer_of(model, classified(), tmp_path, callbacks=[callback, Failing()]).train()
    trainer_of(model, classified(), tmp_path, callbacks=[callback]).train()  # it begins anew
    assert callback.watched.steps == 2
    callback.remove()


def low_trainer(tmp_path, dtype=torch.bfloat16, **options):
    model = tiny_bert().to(dtype)
    arguments = {"max_steps": 4, "learning_rate": 2e-5, "report_to": [], "use_cpu": True, "save_strategy": "no"}
    arguments |= options.pop("arguments", {})
    return Trainer(model=model, args=TrainingArguments(tmp_path / "out", **arguments), train_dataset=rows(), **options)


def tiny_bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=20, max_position_embeddings=16, hidden_dropout_prob=0.0, **sizes)
    return BertForSequenceClassification(config)


def rows():
    torch.manual_seed(1)
    ids = torch.randint(5, 20, (16, 12))
    return [{"input_ids": row, "labels": torch.tensor(place % 2)} for place, row in enumerate(ids)]


LOW_LAYERS = ["bert.encoder.layer.1.output.dense"]


def test_prepare_keeps_masters_of_what_is_in_low_precision(tmp_path, caplog):
    trainer = low_trainer(tmp_path, arguments={"save_strategy": "steps", "save_steps": 2})
    tuned = prepare(trainer, LOW_LAYERS)
    before = [parameter.detach().float().clone() for parameter in tuned.parameters()]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot move")
        trainer.train()
    optimizer = trainer.optimizer
    while not isinstance(optimizer, MasterWeights):
        optimizer = optimizer.optimizer
    assert type(optimizer.inner) is torch.optim.AdamW
    for parameter, value in zip(tuned.parameters(), before, strict=True):
        assert parameter.dtype == torch.bfloat16 and (optimizer.master_of(parameter) != value).all()
    assert "what trains keeps float32 masters: MasterWeights around AdamW" in caplog.text
    whole = [optimizer.master_of(parameter).clone() for parameter in tuned.parameters()]
    again = low_trainer(tmp_path)
    other = prepare(again, LOW_LAYERS)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    optimizer = again.optimizer
    while not isinstance(optimizer, MasterWeights):
        optimizer = optimizer.optimizer
    for parameter, master in zip(other.parameters(), whole, strict=True):
        assert torch.equal(optimizer.master_of(parameter), master)


@pytest.mark.parametrize("how", ["float32", "declined", "factory", "own"])
def test_prepare_leaves_the_optimizer_where_masters_have_no_place(tmp_path, how, caplog):
    options = {}
    if how == "own":
        options["optimizer_cls_and_kwargs"] = (torch.optim.SGD, {"lr": 1e-3})
    trainer = low_trainer(tmp_path, torch.float32 if how == "float32" else torch.bfloat16, **options)
    if how == "factory":
        trainer.get_optimizer_cls_and_kwargs = lambda *a: (torch.optim.AdamW, {"params": [], "lr": 1.0})
    found = trainer.optimizer_cls_and_kwargs
    tuned = prepare(trainer, LOW_LAYERS, masters=how != "declined")
    assert trainer.optimizer_cls_and_kwargs is found
    assert ("no float32 masters" in caplog.text) == (how in ("factory", "own"))
    tuned.remove()
