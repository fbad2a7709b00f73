"""No wrong layer: every exporter and plugin lets exactly the chosen layers and the head train, on 20 architectures.

Blocks are a dozen deep, so that `layers.1` is the beginning of `layers.10`. What trains is read from the tool: PEFT is
asked itself, axolotl's and LLaMA-Factory's rules of names are those of test_exports.py. The default suite takes some of
the choices; `pytest -m slow` takes 200 for each.
"""

from __future__ import annotations

import copy
import importlib
import random
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from deep_models import ARCHITECTURES, deep, deep_with_data
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from test_exports import unfrozen_by_axolotl, unfrozen_by_llama_factory
from torch import nn
from training_tools import plugin_of, trainer_before_training

import zest_fast
from zest_fast.finetuning.trainable_layers import chosen_layers, head_modules
from zest_fast.integrations.exports import axolotl, axolotl_lora, llama_factory
from zest_fast.integrations.peft import lora_config, shira_config
from zest_fast.integrations.torchtune import trained_layers
from zest_fast.integrations.trainer import prepare
from zest_fast.profiling.layers import find_layers, is_transformers_conv1d

pytestmark = pytest.mark.usefixtures("log_as_it_was")

SEED, CHOICES = 19, 200 // len(ARCHITECTURES)


def choices(architecture, model, count, fits=lambda module: True):
    """Random layers, one to five of them, and neither the head nor what has its weight."""
    drawn = random.Random(f"{SEED} {architecture}")
    modules = dict(model.named_modules())
    whole = head_modules(model, "auto") or [name for name, module in modules.items() if is_output(model, module)]
    held = {id(parameter) for name in whole for parameter in modules[name].parameters()}
    names = [
        layer.name
        for layer in find_layers(modules)
        if id(layer.weight.parameter) not in held and fits(modules.get(layer.name))
    ]
    if not names:  # a ResNet has no nn.Linear beside its head, GPT-2 none at all
        return []
    return [drawn.sample(names, drawn.randint(1, min(5, len(names)))) for _ in range(count)]


def is_output(model, module):
    return module is model.get_output_embeddings()


def wanted(model, layers, head="auto"):
    """Names of the parameters of these layers, and of a head that trains whole."""
    chosen = {id(p) for part in chosen_layers(model, layers) for p in part.parameters}
    chosen |= {id(p) for name in head_modules(model, head) for p in model.get_submodule(name).parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# Adapters: PEFT says which modules it adapts, and which it trains whole.


def adapted(model, config):
    """Names of the modules that PEFT gave an adapter, and of those that train whole; the model is as it was."""
    wrapped = get_peft_model(copy.deepcopy(model), config)
    names = {name.removeprefix("base_model.model."): module for name, module in wrapped.named_modules()}
    parameters = {name.removeprefix("base_model.model.") for name in trained(wrapped)}
    with_adapter = {name for name, module in names.items() if isinstance(module, BaseTunerLayer)}
    whole = {name for name, module in names.items() if isinstance(module, ModulesToSaveWrapper)}
    inside = tuple(f"{name}." for name in with_adapter | whole)
    assert all(name.startswith(inside) for name in parameters)
    return with_adapter, whole


def has_lora(module):
    conv = isinstance(module, nn.Conv2d) and module.groups == 1
    return conv or isinstance(module, nn.Linear) or (module is not None and is_transformers_conv1d(module))


def as_axolotl_does(settings):
    return LoraConfig(
        r=settings["lora_r"],
        lora_alpha=settings["lora_alpha"],
        target_modules=settings["lora_target_modules"],
        modules_to_save=settings.get("lora_modules_to_save"),
    )


def as_llama_factory_does(settings):
    return LoraConfig(
        r=settings["lora_rank"],
        lora_alpha=settings["lora_alpha"],
        target_modules=settings["lora_target"].split(","),
        modules_to_save=settings["additional_target"].split(",") if "additional_target" in settings else None,
    )


ADAPTERS = {
    "axolotl_lora": (lambda layers, model: as_axolotl_does(axolotl_lora(layers, model)), has_lora),
    "llama_factory": (lambda layers, model: as_llama_factory_does(llama_factory(layers, model)), has_lora),
    "lora_config": (lambda layers, model: lora_config(layers, model), has_lora),
    "shira_config": (lambda layers, model: shira_config(layers, model, r=1), lambda m: isinstance(m, nn.Linear)),
}


def check_adapters(architecture, count):
    model = deep(architecture)
    whole = set(head_modules(model, "auto"))
    for make, fits in ADAPTERS.values():
        for layers in choices(architecture, model, count, fits):
            found = adapted(model, make(layers, model))
            outside = {name for name in layers if not any(f"{name}.".startswith(f"{head}.") for head in whole)}
            assert found == (outside, whole), architecture


# Whole layers


def check_patterns(architecture, count):
    model = deep(architecture)
    for layers in choices(architecture, model, count):
        patterns = axolotl(layers, model)["unfrozen_parameters"]
        assert unfrozen_by_axolotl(model, patterns) == wanted(model, layers), architecture


def check_freeze(architecture, count):
    """Whole modules of the first or last blocks, which is what LLaMA-Factory can say."""
    model = deep(architecture)
    parts = re.compile(r"(.*\.(\d+)\.([^.]+))(\..*)?")
    found = [parts.fullmatch(layer.name) for layer in find_layers(dict(model.named_modules()))]
    if not hasattr(model.config, "num_hidden_layers") or not any(found):
        return
    drawn, depth = random.Random(SEED), model.config.num_hidden_layers
    kinds = sorted({match[3] for match in found if match})
    refused = 0
    for _ in range(count):
        modules = drawn.sample(kinds, drawn.randint(1, len(kinds)))
        blocks = (
            range(depth - drawn.randint(1, depth), depth) if drawn.random() < 0.5 else range(drawn.randint(1, depth))
        )
        layers = [match[0] for match in found if match and int(match[2]) in blocks and match[3] in modules]
        try:
            settings = llama_factory(layers, model, method="freeze")
        except ValueError:  # norms inside of such a module, two towers: it cannot be said, and is not
            refused += 1
            continue
        assert unfrozen_by_llama_factory(model, settings) == wanted(model, layers), architecture
    return refused


def by_trainer(model, layers, monkeypatch):
    return prepare(trainer_before_training(model), layers)


def by_axolotl(model, layers, monkeypatch):
    trainer = trainer_before_training(model)
    plugin_of("axolotl", monkeypatch).ZestPlugin().post_trainer_create({"zest_layers": layers}, trainer)
    return trainer.callbacks[0].tuned


def by_llama_factory(model, layers, monkeypatch):
    plugin = plugin_of("llamafactory", monkeypatch)
    trainer = trainer_before_training(model)
    begun = []
    monkeypatch.setattr(transformers.Trainer, "train", begun.append)
    tuner = importlib.import_module("llamafactory.train.tuner")
    monkeypatch.setattr(tuner, "run_exp", lambda values: transformers.Trainer.train(trainer))
    plugin.train({"stage": "sft", "do_train": True, "finetuning_type": "full", "zest_layers": layers})
    assert begun == [trainer] and transformers.Trainer.train == begun.append  # the launcher's own is gone
    return trainer.callbacks[0].tuned


def by_swift(model, layers, monkeypatch):
    plugin = plugin_of("swift", monkeypatch)
    plugin.register(layers=layers)
    arguments = SimpleNamespace(tuner_type="full")
    callback = plugin.callbacks_map["zest"](arguments, trainer_before_training(model))
    callback.on_init_end(arguments, None, None, model=model)
    return callback.zest.tuned


def by_lightning(model, layers, monkeypatch):
    callback = plugin_of("lightning", monkeypatch).ZestFinetuning(layers, module="model")
    callback.setup(None, nn.ModuleDict({"model": model}), "fit")
    return callback.tuned


PLUGINS = {
    "trainer": by_trainer,
    "axolotl": by_axolotl,
    "llamafactory": by_llama_factory,
    "swift": by_swift,
    "lightning": by_lightning,
}


def check_plugin(name, architecture, count, monkeypatch):
    model = deep(architecture)
    for layers in choices(architecture, model, count):
        tuned = PLUGINS[name](model, layers, monkeypatch)
        own_head = tuned.head  # SelectiveBackward's: the last layer of a classifier alone
        assert trained(model) == set(tuned.trainable_names) == wanted(model, layers, own_head or None), architecture
        tuned.remove()
        assert all(parameter.requires_grad for parameter in model.parameters())


def check_torchtune(architecture, count):
    model = deep(architecture)
    for layers in choices(architecture, model, count):
        model.requires_grad_(True)
        assert trained_layers(lambda: model, layers) is model
        assert trained(model) == wanted(model, layers, None), architecture


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exactly_these_layers_train(architecture, monkeypatch):
    check_patterns(architecture, CHOICES)
    check_torchtune(architecture, CHOICES)
    check_adapters(architecture, 1)
    names = list(PLUGINS)
    check_plugin(names[list(ARCHITECTURES).index(architecture) % len(names)], architecture, 1, monkeypatch)


def test_whole_blocks_train_as_llama_factory_says_them():
    assert check_freeze("llama", 10) < 10 and check_freeze("falcon", 10) < 10


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exactly_these_layers_train_for_200_choices(architecture, monkeypatch):
    check_freeze(architecture, CHOICES)
    check_adapters(architecture, CHOICES)
    for name in PLUGINS:
        check_plugin(name, architecture, CHOICES, monkeypatch)


@pytest.mark.parametrize("architecture", ["gpt2", pytest.param("vit"), pytest.param("qwen3", marks=pytest.mark.slow)])
def test_a_step_moves_exactly_these_layers(architecture):
    tiny = deep_with_data(architecture)
    for layers in choices(
        architecture, tiny.model, 2, lambda module: isinstance(module, nn.Linear) or has_lora(module)
    ):
        with zest_fast.SelectiveBackward(tiny.model, layers) as tuned:
            tiny.closure().backward()
            torch.optim.AdamW(tuned.parameters(), lr=1e-2).step()
            assert tuned.verify().startswith("verified: every chosen weight moved")
            tiny.model.zero_grad()
