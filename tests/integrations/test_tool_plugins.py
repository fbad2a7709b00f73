"""Plugins of other training tools: what they refuse, and runs of the tools themselves where they are installed.

axolotl 0.19.0, LLaMA-Factory 0.9.5 and ms-swift 4.6.0 each want other versions of transformers than the newest, so each
was run in an environment of its own; TRL 1.16.0, Lightning 2.6.6 and torchtune 0.6.1 beside this one (docs/tools.md).
Elsewhere those tests are skipped, and the plugins are tested against what stands for the tools (training_tools.py).
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_models import llama
from torch import nn
from training_tools import plugin_of, save_chat_llama, trainer_before_training

import zest_fast
from zest_fast.integrations import tool_settings
from zest_fast.integrations.tool_settings import TESTED, read_settings, refuse_conflicts, warn_untested
from zest_fast.integrations.torchtune import trained_layers
from zest_fast.integrations.trainer import ZestCallback, prepare

pytestmark = pytest.mark.usefixtures("log_as_it_was")

ROOT = Path(__file__).parents[2]
LAYER = "model.layers.1.mlp.up_proj"


# The keys


def test_the_keys_become_settings():
    settings = read_settings({"zest_top": 5, "zest_probe": 0.1, "zest_max_memory": "16GB", "base_model": "x"})
    assert settings.arguments() == {"layers": 5, "probe": 0.1, "max_memory": "16GB"}
    assert read_settings({"zest_layers": [LAYER], "zest_probe": "auto"}).arguments()["layers"] == (LAYER,)
    assert read_settings({"zest_top": 1, "zest_probe": False}).probe is None
    assert read_settings({"zest_top": 1, "zest_probe": None}).probe == "auto"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "neither zest_top .* nor zest_layers"),
        ({"zest_top": 5, "zest_layers": [LAYER]}, "zest_top and zest_layers are both there"),
        ({"zest_top": 0}, "zest_top: expected how many layers train, 1 or more, found 0"),
        ({"zest_top": True}, "zest_top: expected how many"),
        ({"zest_top": "5"}, "zest_top: expected how many layers train, 1 or more, found '5'"),
        ({"zest_topp": 5}, "zest_topp: there is no such key; nearest: 'zest_top'"),
        ({"zest_top": 5, "zest_probe": 2}, "zest_probe: expected a share"),
        (
            {"zest_top": 5, "zest_probe": "5%"},
            "zest_probe: expected a share of a sweep's cost such as 0.05, auto or false",
        ),
        ({"zest_top": 5, "zest_max_memory": "much"}, "zest_max_memory='much' is no size"),
        ({"zest_layers": LAYER}, "zest_layers must be an iterable of layer names"),
        ({"zest_layers": []}, "zest_layers is empty"),
        ({"zest_layers": [LAYER], "zest_max_memory": "1GB"}, "zest_max_memory: chooses among ranked layers"),
    ],
)
def test_keys_that_cannot_be_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        read_settings(values)


def test_another_version_is_named_with_the_tested_one(monkeypatch, recwarn):
    monkeypatch.setattr(tool_settings, "version", lambda package: "99.1")
    with pytest.warns(UserWarning, match=rf"axolotl 99\.1 is installed, .* tested with axolotl {TESTED['axolotl']}"):
        warn_untested("axolotl")
    monkeypatch.setattr(tool_settings, "version", lambda package: f"{TESTED[package]}.post1")
    warn_untested("axolotl")
    monkeypatch.undo()
    assert not recwarn


@pytest.mark.parametrize(
    ("tool", "key", "value"),
    [
        ("axolotl", "unfrozen_parameters", ["^lm_head.weight$"]),
        ("axolotl", "adapter", "lora"),
        ("axolotl", "load_in_4bit", True),
        ("axolotl", "load_in_8bit", True),
        ("axolotl", "spectrum_top_fraction", 0.5),
        ("llamafactory", "freeze_trainable_layers", 2),
        ("llamafactory", "quantization_bit", 4),
        ("llamafactory", "use_badam", True),
        ("llamafactory", "use_ray", True),
        ("swift", "freeze_parameters", ["model.layers"]),
        ("swift", "trainable_parameters", ["lm_head"]),
        ("swift", "quant_bits", 4),
    ],
)
def test_what_says_otherwise_what_trains_is_refused_before_training(tool, key, value, monkeypatch):
    plugin = plugin_of(tool, monkeypatch)
    model = llama()
    trainer = trainer_before_training(model)
    with pytest.raises(ValueError, match=rf"{key}: .* and zest_top: 2 are both there"):
        if tool == "axolotl":
            plugin.ZestArgs.model_validate({"zest_top": 2, key: value})
        elif tool == "llamafactory":
            plugin.train({"stage": "sft", "do_train": True, "finetuning_type": "full", "zest_top": 2, key: value})
        else:
            plugin.register(top=2)
            arguments = SimpleNamespace(tuner_type="full", **{key: value})
            plugin.callbacks_map["zest"](arguments, trainer).on_init_end(arguments, None, None)
    if tool == "axolotl":  # what another plugin writes into the configuration later
        with pytest.raises(ValueError, match=f"{key}: "):
            plugin.ZestPlugin().post_trainer_create({"zest_top": 2, key: value}, trainer)
    assert all(parameter.requires_grad for parameter in model.parameters()) and not trainer.callbacks


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"zest_top": 2, "do_train": True}, "finetuning_type: 'lora' .* write finetuning_type: full"),
        ({"zest_top": 2, "do_train": True, "finetuning_type": "freeze"}, "finetuning_type: 'freeze'"),
        ({"zest_top": 2, "do_train": True, "finetuning_type": "full", "stage": "ppo"}, "stage: 'ppo' is not trained"),
        ({"zest_top": 2, "finetuning_type": "full"}, "do_train: true is not there"),
        ({"do_train": True, "finetuning_type": "full"}, "neither zest_top"),
    ],
)
def test_llama_factory_trains_nothing_that_it_would_train_otherwise(values, message, monkeypatch):
    with pytest.raises(ValueError, match=message):
        plugin_of("llamafactory", monkeypatch).train(values)


def test_the_launcher_gives_the_trainer_back_after_an_error(monkeypatch):
    plugin = plugin_of("llamafactory", monkeypatch)
    train = transformers.Trainer.train

    def fail(values):
        assert values == {"stage": "sft", "do_train": True, "finetuning_type": "full"}
        assert transformers.Trainer.train is not train
        raise OSError("no data")

    monkeypatch.setattr(importlib.import_module("llamafactory.train.tuner"), "run_exp", fail)
    with pytest.raises(OSError, match="no data"):
        plugin.train({"stage": "sft", "do_train": True, "finetuning_type": "full", "zest_top": 2})
    assert transformers.Trainer.train is train


def test_swift_has_to_train_everything_otherwise(monkeypatch):
    plugin = plugin_of("swift", monkeypatch)
    plugin.register(layers=[LAYER])
    arguments = SimpleNamespace(tuner_type="lora")
    with pytest.raises(ValueError, match="--tuner_type lora and the callback zest both say what trains"):
        plugin.callbacks_map["zest"](arguments, trainer_before_training(llama())).on_init_end(arguments, None, None)


# Trainer, which axolotl, LLaMA-Factory, swift and TRL build on


def texts(count=8):
    ids = torch.randint(40, (count, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_of(model, folder, **options):
    arguments = transformers.TrainingArguments(
        str(folder), report_to=[], use_cpu=True, max_steps=2, save_strategy="no", disable_tqdm=True, **options
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=texts())


def test_what_unfreezes_after_the_choice_is_named_before_a_step(tmp_path):
    model = llama()
    trainer = trainer_of(model, tmp_path)
    prepare(trainer, [LAYER])
    model.requires_grad_(True)  # as an option of a tool might
    with pytest.raises(ValueError, match="made to train after the layers were chosen"):
        trainer.train()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_and_inputs_that_require_gradients_change_nothing_of_what_trains(tmp_path, reentrant, caplog):
    model = llama()
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer = trainer_of(model, tmp_path, learning_rate=1e-2, **options)
    tuned = prepare(trainer, [LAYER])
    model.enable_input_require_grads()
    trainer.train()
    assert tuned.verify().startswith("verified") and tuned.trainable_names == (f"{LAYER}.weight",)


def test_prepare_fits_the_layers_into_a_memory(tmp_path):
    model = llama()
    roomy = prepare(trainer_of(model, tmp_path), 2, by="snip", max_memory="1GB")
    roomy.remove()
    tuned = prepare(trainer_of(model, tmp_path), 2, by="snip")
    assert roomy.layers == tuned.layers
    with pytest.raises(ValueError, match="max_memory"):
        prepare(trainer_of(llama(), tmp_path), 2, by="snip", max_memory="1KB")
    with pytest.raises(ValueError, match="max_memory chooses among ranked layers"):
        prepare(trainer_of(llama(), tmp_path), [LAYER], max_memory="1GB")


class WithValueHead(nn.Module):
    """A language model and what PPO of TRL and verl put beside it."""

    def __init__(self):
        super().__init__()
        self.pretrained_model = llama()
        self.v_head = nn.Linear(16, 1)


def test_a_value_head_is_never_frozen_without_a_word():
    with pytest.raises(ValueError, match="value head 'v_head': head='v_head' trains it, head=None freezes it"):
        prepare(trainer_before_training(WithValueHead()), [f"pretrained_model.{LAYER}"])
    for head, names in (("v_head", {"v_head.weight", "v_head.bias"}), (None, set())):
        tuned = prepare(trainer_before_training(WithValueHead()), [f"pretrained_model.{LAYER}"], head=head)
        assert set(tuned.trainable_names) == {f"pretrained_model.{LAYER}.weight"} | names


# torchtune


def test_a_component_of_torchtune_freezes_the_rest():
    config = {"in_features": 2, "out_features": 3}
    assert [p.requires_grad for p in trained_layers("torch.nn.Linear", ["weight"], **config).parameters()] == [
        True,
        True,
    ]
    model = trained_layers(llama, [LAYER], head="lm_head")
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {f"{LAYER}.weight", "lm_head.weight"}
    with pytest.raises(ValueError, match=r"builder: 'torch\.nn\.Lineal' cannot be imported"):
        trained_layers("torch.nn.Lineal", ["weight"], **config)
    with pytest.raises(ValueError, match=r"no layer 'model\.layers\.1\.mlp\.up'"):
        trained_layers(llama, ["model.layers.1.mlp.up"])

    def with_adapters():
        model = llama()
        model.lora_a = nn.Linear(2, 2)
        return model

    with pytest.raises(
        ValueError, match=r"adds adapters \(lora_a\.weight and 1 more\), and layers says what trains too"
    ):
        trained_layers(with_adapters, [LAYER])


def test_a_model_of_torchtune_trains_these_layers():
    builders = pytest.importorskip("torchtune.models.llama3", exc_type=ImportError)
    sizes = {"vocab_size": 40, "num_layers": 12, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 16, "max_seq_len": 16}
    layers = ["layers.1.mlp.w2", "layers.11.attn.output_proj"]
    model = trained_layers(builders.llama3, layers, intermediate_dim=32, **sizes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # of all, as its recipe builds it
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {f"{name}.weight" for name in layers}


# Lightning


class Lit:
    """What a user writes, over whichever LightningModule there is."""

    def __new__(cls, optimized=lambda module: filter(lambda p: p.requires_grad, module.parameters())):
        from lightning.pytorch import LightningModule

        class Module(LightningModule):
            def __init__(self):
                super().__init__()
                self.model = llama()

            def training_step(self, batch, index):
                return self.model(**batch).loss

            def configure_optimizers(self):
                return torch.optim.AdamW(optimized(self), lr=1e-2)

        return Module()


def fit(module, callback, folder):
    from lightning.pytorch import Trainer

    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    loader = torch.utils.data.DataLoader(texts(), batch_size=4)
    Trainer(max_epochs=1, callbacks=[callback], default_root_dir=folder, **options).fit(module, loader)


def test_lightning_trains_these_layers_and_saves_a_delta(tmp_path, caplog):
    pytest.importorskip("lightning.pytorch")
    from zest_fast.integrations.lightning import ZestFinetuning

    module = Lit()
    base = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
    batch = torch.utils.data.default_collate(texts(4))
    callback = ZestFinetuning(2, module="model", batch=batch, delta=tmp_path / "delta.safetensors")
    with caplog.at_level(logging.INFO, "zest_fast"):
        fit(module, callback, tmp_path)
    assert "verified: every chosen weight moved" in caplog.text
    moved = {name for name, tensor in module.model.state_dict().items() if not torch.equal(tensor, base[name])}
    assert moved == set(callback.tuned.trainable_names) and len(moved) == 2
    fresh = llama()
    fresh.load_state_dict(base)
    zest_fast.apply_delta(fresh, tmp_path / "delta.safetensors")
    assert all(torch.equal(tensor, module.model.state_dict()[name]) for name, tensor in fresh.state_dict().items())


def test_lightning_names_an_optimizer_of_everything(tmp_path):
    pytest.importorskip("lightning.pytorch")
    from zest_fast.integrations.lightning import ZestFinetuning

    with pytest.raises(ValueError, match=r"the optimizer holds .*, which are frozen"):
        fit(Lit(lambda module: module.parameters()), ZestFinetuning([LAYER], module="model"), tmp_path)


def test_the_callback_of_lightning_names_bad_input(monkeypatch):
    callback = plugin_of("lightning", monkeypatch).ZestFinetuning
    with pytest.raises(ValueError, match="layers=2 needs batch="):
        callback(2)
    with pytest.raises(ValueError, match="module='net': "):
        callback([LAYER], module="net").setup(None, nn.ModuleDict({"model": llama()}), "fit")


# TRL


def trl_arguments(kind, folder, **options):
    trl = pytest.importorskip("trl")
    common = {
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "max_steps": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return getattr(trl, kind)(
        output_dir=str(folder), per_device_train_batch_size=2, learning_rate=1e-2, **common, **options
    )


def chats():
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list(
        [
            {"prompt": f"add {a} and 1", "chosen": f"{a + 1}", "rejected": f"{a}", "completion": f"{a + 1}"}
            for a in range(8)
        ]
    )


def loaded(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def check_trained(trainer, tuned, count=2):
    trainer.train()
    assert tuned.verify().startswith("verified: every chosen weight moved")
    assert len(tuned.trainable_names) == count
    trainer.save_model()
    folder = trainer.args.output_dir
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("checkpointing", [True, False])
def test_sft_of_trl(tmp_path, checkpointing):
    trl = pytest.importorskip("trl")
    model, tokenizer = loaded(save_chat_llama(tmp_path / "base"))
    data = chats().select_columns(["prompt", "completion"])
    arguments = trl_arguments("SFTConfig", tmp_path / "out", gradient_checkpointing=checkpointing)
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    check_trained(trainer, prepare(trainer, 2, probe=None))


@pytest.mark.parametrize("given", [True, False])
def test_dpo_of_trl_trains_these_layers_and_not_the_reference(tmp_path, given):
    trl = pytest.importorskip("trl")
    folder = save_chat_llama(tmp_path / "base")
    model, tokenizer = loaded(folder)
    data = chats().select_columns(["prompt", "chosen", "rejected"])
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=loaded(folder)[0] if given else None,
        args=trl_arguments("DPOConfig", tmp_path / "out"),
        train_dataset=data,
        processing_class=tokenizer,
    )
    before = {name: tensor.clone() for name, tensor in trainer.ref_model.state_dict().items()}
    check_trained(trainer, prepare(trainer, 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.ref_model.state_dict().items())


def test_grpo_of_trl_generates_between_steps(tmp_path):
    trl = pytest.importorskip("trl")
    model, tokenizer = loaded(save_chat_llama(tmp_path / "base"))
    lengths = []

    def reward(completions, **_):
        lengths.append([len(text) for text in completions])
        return [float(sum(map(ord, text)) % 7) for text in completions]

    arguments = trl_arguments("GRPOConfig", tmp_path / "out", num_generations=2, max_completion_length=6, beta=0.1)
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=chats().select_columns(["prompt"]),
        processing_class=tokenizer,
    )
    reference = {name: tensor.clone() for name, tensor in trainer.ref_model.state_dict().items()}
    tuned = prepare(trainer, 2)
    profiled = len(lengths)
    check_trained(trainer, tuned)
    assert profiled and len(lengths) > profiled
    assert all(torch.equal(tensor, reference[name]) for name, tensor in trainer.ref_model.state_dict().items())


def test_rewards_that_are_all_the_same_rank_nothing(tmp_path):
    trl = pytest.importorskip("trl")
    model, tokenizer = loaded(save_chat_llama(tmp_path / "base"))
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [1.0 for _ in completions],
        args=trl_arguments("GRPOConfig", tmp_path / "out", num_generations=2, max_completion_length=6),
        train_dataset=chats().select_columns(["prompt"]),
        processing_class=tokenizer,
    )
    with pytest.raises(ValueError, match="GRPOTrainer makes of the first batch has no gradient"):
        prepare(trainer, 2)
    with pytest.raises(ValueError, match="GRPOTrainer makes another loss"):
        prepare(trainer, 2, probe=0.05)


def test_a_loss_of_the_trainer_s_own_ranks(tmp_path):
    """As preferences and rewards do: the model takes the batch only in a way that its trainer knows."""

    class Pairs(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            both = [model(input_ids=inputs[side]).logits.mean() for side in ("chosen", "rejected")]
            return -nn.functional.logsigmoid(both[0] - both[1])

    ids = torch.randint(40, (8, 2, 6), generator=torch.Generator().manual_seed(1))
    data = [{"chosen": one, "rejected": other} for one, other in ids]
    arguments = transformers.TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, max_steps=1, remove_unused_columns=False, save_strategy="no"
    )
    trainer = Pairs(model=llama(), args=arguments, train_dataset=data)
    with pytest.raises(ValueError, match="Pairs makes another loss of a batch than the model"):
        prepare(trainer, 2, max_memory="1GB")
    tuned = prepare(trainer, 2, by="snip")
    trainer.train()
    assert tuned.verify().startswith("verified") and len(tuned.layers) == 2


@pytest.mark.parametrize("factor", [1, -1])
def test_a_loss_of_labels_that_is_not_the_model_s_ranks_too(tmp_path, factor):
    """Of pairs with labels a model of texts would make a loss, and another one than the trainer."""

    class Signed(transformers.Trainer):
        calls = 0

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            self.calls += 1
            return factor * model(**inputs).loss

    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, save_strategy="no")
    trainer = Signed(model=llama(), args=arguments, train_dataset=texts())
    modes = [module.training for module in trainer.model.modules()]
    if factor == 1:
        prepare(trainer, 2, by="snip", max_memory="1GB")
        assert trainer.calls == 1
    else:
        with pytest.raises(ValueError, match="Signed makes another loss of a batch than the model"):
            prepare(trainer, 2, by="snip", max_memory="1GB")
        prepare(trainer, 2, by="snip")
        assert trainer.calls > 2
    assert [module.training for module in trainer.model.modules()] == modes


# The tools themselves, from the shell, on a chat model of 12 blocks


def run_tool(folder, *command):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "HF_HOME": str(folder / "cache"),
    }
    found = subprocess.run(
        [sys.executable, "-W", "ignore", *command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert "verified: every chosen weight moved" in found.stderr + found.stdout


def sums(folder):
    save_chat_llama(folder / "base")
    rows = [{"instruction": f"add {a} and {b}", "input": "", "output": f"{a + b}"} for a in range(4) for b in range(8)]
    messages = [
        {"messages": [{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": r["output"]}]}
        for r in rows
    ]
    (folder / "sums.json").write_text(json.dumps(rows))
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in messages))


def check_folder(folder, base, count=2):
    """A folder that from_pretrained loads, in which so many weights moved."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = load_file(base / "model.safetensors")
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(moved) == count


def test_axolotl_itself(tmp_path):
    pytest.importorskip("axolotl.train", exc_type=ImportError)
    sums(tmp_path)
    (tmp_path / "axolotl.yml").write_text(
        "base_model: ./base\ndatasets: [{path: sums.json, ds_type: json, type: alpaca}]\noutput_dir: ./out\n"
        "dataset_prepared_path: ./prepared\nsequence_len: 512\nmicro_batch_size: 4\ngradient_accumulation_steps: 1\n"
        "max_steps: 2\nlearning_rate: 0.01\noptimizer: adamw_torch\nbf16: false\nfp16: false\ntf32: false\n"
        "plugins: [zest_fast.integrations.axolotl.ZestPlugin]\nzest_top: 2\n"
    )
    run_tool(tmp_path, "-m", "axolotl.cli.train", "axolotl.yml")
    check_folder(tmp_path / "out", tmp_path / "base")


def test_axolotl_itself_refuses_what_freezes_as_well(tmp_path):
    pytest.importorskip("axolotl.train", exc_type=ImportError)
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    PluginManager.get_instance().register("zest_fast.integrations.axolotl.ZestPlugin")
    config = {
        "base_model": "x",
        "datasets": [{"path": "x", "type": "alpaca"}],
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.1,
        "plugins": ["zest_fast.integrations.axolotl.ZestPlugin"],
        "zest_top": 2,
    }
    assert validate_config(DictDefault(config)).zest_top == 2
    for key, value in (("adapter", "lora"), ("unfrozen_parameters", ["lm_head"])):
        with pytest.raises(ValueError, match=f"{key}: .* and zest_top: 2"):
            validate_config(DictDefault({**config, key: value}))


def test_llama_factory_itself(tmp_path):
    pytest.importorskip("llamafactory.train.tuner", exc_type=ImportError)
    sums(tmp_path)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"sums": {"file_name": "sums.json"}}))
    (tmp_path / "lf.yml").write_text(
        "model_name_or_path: ./base\nstage: sft\ndo_train: true\nfinetuning_type: full\ndataset: sums\ndataset_dir: .\n"
        "template: default\ncutoff_len: 512\noutput_dir: ./out\nper_device_train_batch_size: 4\nmax_steps: 2\n"
        "learning_rate: 0.01\nreport_to: none\nzest_top: 2\n"
    )
    run_tool(tmp_path, "-m", "zest_fast.integrations.llamafactory", "lf.yml")
    check_folder(tmp_path / "out", tmp_path / "base")


def test_swift_itself(tmp_path):
    pytest.importorskip("swift.pipelines.train.sft", exc_type=ImportError)
    sums(tmp_path)
    (tmp_path / "zest.py").write_text("from zest_fast.integrations.swift import register\n\nregister(top=2)\n")
    options = {
        "model": "./base",
        "model_type": "llama",
        "template": "llama",
        "dataset": "sums.jsonl",
        "tuner_type": "full",
        "external_plugins": "zest.py",
        "callbacks": "zest",
        "max_steps": "2",
        "learning_rate": "0.01",
        "max_length": "1024",
        "output_dir": "out",
        "add_version": "false",
        "torch_dtype": "float32",
        "save_steps": "2",
        "split_dataset_ratio": "0",
        "report_to": "none",
    }
    run_tool(tmp_path, "-m", "swift.cli.sft", *(word for key, value in options.items() for word in (f"--{key}", value)))
    check_folder(tmp_path / "out" / "checkpoint-2", tmp_path / "base")


def test_a_callback_that_names_layers_still_refuses_conflicts_by_name():
    with pytest.raises(ValueError, match="adapter: 'lora' and zest_layers: "):
        refuse_conflicts({"zest_layers": [LAYER], "adapter": "lora"}, ["adapter"])
    assert ZestCallback([LAYER]).layers == (LAYER,)
