"""The interfaces of other training tools, for the plugins: the tool itself where it is installed, else the part of it
that a plugin is written against, as its documentation has it.

axolotl 0.19.0, src/axolotl/integrations/base.py: BasePlugin. ms-swift 4.6.0, swift/callbacks: TrainerCallback, which
gets (args, trainer), and callbacks_map. Lightning 2.6.6: pytorch.Callback. LLaMA-Factory 0.9.5,
src/llamafactory/train/tuner.py: run_exp(args, callbacks).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn


class BasePlugin:
    def register(self, cfg: Any) -> None: ...
    def get_input_args(self) -> str | None: ...
    def post_trainer_create(self, cfg: Any, trainer: Any) -> None: ...


class SwiftCallback(transformers.TrainerCallback):
    def __init__(self, args: Any, trainer: Any) -> None:
        self.args, self.trainer = args, trainer


class LightningCallback:
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None: ...


FAKES: dict[str, dict[str, Any]] = {
    "axolotl.integrations.base": {"BasePlugin": BasePlugin},
    "swift.callbacks": {"TrainerCallback": SwiftCallback, "callbacks_map": {}},
    "lightning.pytorch": {"Callback": LightningCallback},
    "llamafactory.train.tuner": {"run_exp": None},
}


INSTALLED = {tool for tool in {path.split(".")[0] for path in FAKES} if importlib.util.find_spec(tool)}


def plugin_of(tool: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`zest_fast.integrations.<tool>`, over the tool or over what stands for it."""
    name = f"zest_fast.integrations.{tool}"
    path = next(path for path in FAKES if path.split(".")[0] == tool)
    if tool not in INSTALLED and path not in sys.modules:
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        vars(sys.modules[path]).update(FAKES[path])
        monkeypatch.delitem(sys.modules, name, raising=False)  # one over the part of another test
    return importlib.import_module(name)


def trainer_before_training(model: nn.Module, **more: Any) -> Any:
    """What of a Trainer is there when it was made and has not trained."""
    callbacks: list[Any] = []
    return SimpleNamespace(
        model=model,
        optimizer=None,
        args=None,
        state=None,
        control=None,
        callbacks=callbacks,
        add_callback=callbacks.append,
        **more,
    )


def save_chat_llama(folder: Path) -> Path:
    """A LLaMA of 12 blocks with a tokenizer of bytes and a chat template, as trainers of chats want them."""
    torch.manual_seed(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    fast.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=12,
        num_attention_heads=2,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder
