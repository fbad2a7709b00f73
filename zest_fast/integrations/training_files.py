"""Plan what a configuration file of axolotl, LLaMA-Factory or transformers' Trainer would do.

Read are the keys that decide memory: model, what trains, sizes, dtype, optimizer, quantisation, checkpointing. What is
neither read nor known to be without weight for memory is named in the notes of the plan.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from zest_fast.foundation.documents import parse_json, shown, text_of, whole_file
from zest_fast.foundation.nearest import nearest, some
from zest_fast.integrations.references import nearest_path
from zest_fast.planning.plan import plan_setting
from zest_fast.planning.report import Plan
from zest_fast.planning.settings import Setting, dtype_name
from zest_fast.planning.skeletons import named_model

_MOST_BYTES = 2**16  # PyYAML takes a second or two for as much
_MOST_TEXT, _MOST_NAMES = 1_000, 1_000
_LONGEST, _MOST_RANK, _MOST_BLOCKS = 2**22, 2**14, 10_000

_OPTIMIZERS = {
    "adamw_torch": "adamw-foreach",
    "adamw_hf": "adamw",
    "adamw_torch_fused": "adamw-fused",
    "adamw_bnb_8bit": "adamw-8bit",
    "adamw_8bit": "adamw-8bit",
    "paged_adamw_8bit": "adamw-8bit",
    "sgd": "sgd",
}

# The beginnings of keys that change neither the size nor the number of tensors of a step.
_WEIGHTLESS = re.compile(
    r"(learning_rate|lr_|warmup|weight_decay|adam_|max_grad_norm|num_epochs|num_train_epochs|max_steps|save_|saves_|"
    r"logging|eval|do_|output_dir|overwrite|dataset|val_set|val_size|train_on|shuffle|seed|data_seed|report_to|wandb|"
    r"mlflow|hub_|push_to|run_name|template|chat_template|preprocessing|plot_loss|dataloader|group_by|special_tokens|"
    r"tokenizer|trust_remote|strict|stage|max_samples|ddp_timeout|resume|load_best|metric_for|greater_is|remove_unused|"
    r"early_stopping|debug|loss_watchdog|lora_dropout|lora_alpha|tf32|is_.*derived_model|model_type|include_|label|"
    r"per_device_eval|xformers|s2_|pad_to_sequence_len|sample_packing|gradient_checkpointing_kwargs)"
)


class _Keys:
    """A mapping that remembers what was read, and checks it. What it refuses, it names with its file and its key."""

    def __init__(self, values: Mapping[str, Any], path: str) -> None:
        self._values, self._read, self._path = dict(values), set[str](), path
        self.notes: list[str] = []

    def _get(self, *names: str) -> tuple[str, Any]:
        """The first of these keys that is there and not None, and its value."""
        self._read.update(names)
        return next(
            ((name, self._values[name]) for name in names if self._values.get(name) is not None), (names[0], None)
        )

    def read(self, *names: str) -> None:
        self._read.update(names)

    def flag(self, *names: str) -> bool:
        name, value = self._get(*names)
        if not isinstance(value, bool | str | None) and value not in (0, 1):
            raise self.wrong(name, "true or false", value)
        return value if isinstance(value, bool) else str(value).lower() not in ("false", "no", "none", "0", "")

    def whole(self, *names: str, low: int, high: int, default: int | None = None) -> int | None:
        """A whole number, also one in quotes."""
        name, value = self._get(*names)
        if value is None:
            return default
        if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,18}\s*", value):
            value = int(value)
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(name, f"a whole number from {low:,} to {high:,}", value)
        return value

    def text(self, *names: str, default: str | None = None) -> str | None:
        name, value = self._get(*names)
        if value is None:
            return default
        if not isinstance(value, str) or len(value) > _MOST_TEXT or "\0" in value:
            raise self.wrong(name, f"a name of at most {_MOST_TEXT:,} characters", value)
        return value

    def names(self, *names: str, default: str | None = None) -> list[str] | None:
        """A list of names, or one text of names between commas."""
        name, value = self._get(*names)
        value = default if value is None else value
        if value is None:
            return None
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list) or len(parts) > _MOST_NAMES:
            raise self.wrong(name, f"a list of at most {_MOST_NAMES:,} names", value)
        for part in parts:
            if not isinstance(part, str | int) or isinstance(part, bool) or len(str(part)) > _MOST_TEXT:
                raise self.wrong(name, f"names of at most {_MOST_TEXT:,} characters", part)
        return [str(part).strip() for part in parts if str(part).strip()]

    def patterns(self, name: str) -> list[str] | None:
        """Regular expressions, which may hold commas."""
        value = self._get(name)[1]
        return self.names(name) if not isinstance(value, str) else [value]

    def wrong(self, name: str, expected: str, value: Any) -> ValueError:
        return ValueError(f"{self._path!r}, {name}: expected {expected}, found {shown(value)}")

    def unread(self) -> list[str]:
        return [
            name
            for name, value in self._values.items()
            if name not in self._read and not _WEIGHTLESS.match(name) and value not in (None, False, "", [], {})
        ]

    def __contains__(self, name: str) -> bool:
        return name in self._values


def plan_training_file(
    path: str | os.PathLike[str],
    *,
    model: Any = None,
    sequence_length: int | None = None,
    image_size: int | None = None,
) -> Plan:
    """A plan of the step that the trainer would run on one device.

    path: YAML or JSON. model, sequence_length, image_size: as for `plan`, in place of what the file says, or because it
    says nothing (Trainer's arguments name no model).
    Raises ValueError for a file that is none of the three, and for what is missing; it names the keys.
    """
    keys = _Keys(_load(Path(path)), os.fspath(path))
    kind = _kind_of(keys, path)
    named = keys.text("base_model", "model_name_or_path")
    source = model if model is not None else named
    if source is None:
        raise ValueError(f"{os.fspath(path)!r} names no model; pass model=")
    keys.read("base_model", "model_name_or_path", "base_model_config")
    name, skeleton = named_model(source)
    changes = {"axolotl": _axolotl, "LLaMA-Factory": _llama_factory, "Trainer": _trainer}[kind](keys, skeleton)
    skeleton = changes.pop("model", skeleton)
    length = changes.pop("sequence_length", None)
    setting = Setting(
        layers=None,
        sequence_length=length if sequence_length is None and image_size is None else sequence_length,
        image_size=image_size,
        optimizer=_optimizer(keys),
        accumulating=_size(keys, 1, "gradient_accumulation_steps") > 1,
        lean=False,
        **changes,
    )
    if unread := keys.unread():
        keys.notes.append(f"not read, and it may change memory: {some(unread, most=20)}")
    return plan_setting(f"{name} by {kind}", skeleton, setting, tuple(keys.notes))


def _load(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        raise ValueError(f"file {str(path)!r} does not exist; {nearest_path(path)}")
    contents = whole_file(path, _MOST_BYTES)
    try:
        text = text_of(contents)
        values = parse_json(text) if path.suffix == ".json" else _read_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} is torn: {shown(' '.join(str(error).split()), 500)}") from error
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} holds no keys and values, as a configuration of a trainer does")
    for name in values:
        if not isinstance(name, str) or len(name) > _MOST_TEXT:
            raise ValueError(f"{path} has the key {shown(name)}; the keys of a trainer are short names")
    return values


def _read_yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("a YAML file needs PyYAML, which comes with zest_fast[transformers]") from error
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(error) from error  # tags such as !!bool and !!int let through what Python raises


def _kind_of(keys: _Keys, path: Any) -> str:
    if "base_model" in keys:
        return "axolotl"
    if "finetuning_type" in keys or ("model_name_or_path" in keys and "stage" in keys):
        return "LLaMA-Factory"
    known = ("per_device_train_batch_size", "output_dir", "learning_rate", "optim", "num_train_epochs", "max_steps")
    if any(name in keys for name in known):
        return "Trainer"
    raise ValueError(
        f"{os.fspath(path)!r} is no configuration of axolotl (base_model), LLaMA-Factory (finetuning_type) or Trainer "
        f"({', '.join(known)})"
    )


def _size(keys: _Keys, default: int, *names: str, high: int = 2**16) -> int:
    found = keys.whole(*names, low=1, high=high, default=default)
    assert found is not None
    return found


def _axolotl(keys: _Keys, model: nn.Module) -> dict[str, Any]:
    low = "bfloat16" if keys.flag("bf16", "bfloat16") else "float16" if keys.flag("fp16", "float16") else "float32"
    frozen = "nf4" if keys.flag("load_in_4bit") else "int8" if keys.flag("load_in_8bit") else None
    changes: dict[str, Any] = {
        "batch_size": _size(keys, 1, "micro_batch_size"),
        "sequence_length": keys.whole("sequence_len", low=1, high=_LONGEST),
        "dtype": low,
        "frozen": frozen,
        "checkpoint": "transformers" if keys.flag("gradient_checkpointing") else None,
    }
    adapter = keys.text("adapter")
    patterns = keys.patterns("unfrozen_parameters")
    if adapter is not None:
        targets = keys.names("lora_target_modules")
        every = keys.flag("lora_target_linear")
        changes["model"] = _lora(model, _size(keys, 8, "lora_r", high=_MOST_RANK), None if every else targets, adapter)
    elif patterns:
        _train_matching(model, "unfrozen_parameters", patterns, keys)
    else:
        _train_all(model)
    return changes


def _llama_factory(keys: _Keys, model: nn.Module) -> dict[str, Any]:
    pure = keys.flag("pure_bf16")
    low = "bfloat16" if keys.flag("bf16") or pure else "float16" if keys.flag("fp16") else "float32"
    bits = keys.whole("quantization_bit", low=0, high=64, default=0)
    if bits not in (0, 4, 8):
        raise ValueError(f"quantization_bit: {bits} is not planned; 4 (nf4) and 8 (int8) are")
    changes: dict[str, Any] = {
        "batch_size": _size(keys, 8, "per_device_train_batch_size"),
        "sequence_length": _size(keys, 2048, "cutoff_len", high=_LONGEST),
        "dtype": low,
        "trained_float32": low != "float32" and not pure,
        "frozen": {0: None, 4: "nf4", 8: "int8"}[bits],
        "checkpoint": None if keys.flag("disable_gradient_checkpointing") else "transformers",
    }
    kind = keys.text("finetuning_type", default="lora")
    if kind == "lora":
        targets = keys.names("lora_target", default="all")
        rank = _size(keys, 8, "lora_rank", high=_MOST_RANK)
        changes["model"] = _lora(model, rank, None if targets == ["all"] else targets, kind)
    elif kind == "freeze":
        _train_frozen_kind(keys, model)
    elif kind == "full":
        _train_all(model)
    else:
        raise ValueError(f"finetuning_type: {kind!r} is not planned; {nearest(kind, ('full', 'freeze', 'lora'))}")
    return changes


def _trainer(keys: _Keys, model: nn.Module) -> dict[str, Any]:
    low = "bfloat16" if keys.flag("bf16") else "float16" if keys.flag("fp16") else None
    loaded = dtype_name(keys.text("dtype", "torch_dtype", "model_dtype"))
    if loaded is None and low is not None:
        keys.notes.append("the file does not say in which dtype the model is loaded: taken as float32 under autocast")
    _train_all(model)
    keys.notes.append("Trainer's arguments do not say what trains: taken as full fine-tuning")
    return {
        "batch_size": _size(keys, 8, "per_device_train_batch_size"),
        "sequence_length": keys.whole("max_length", "max_seq_length", low=1, high=_LONGEST),
        "dtype": loaded or (f"{low}-mixed" if low else "float32"),
        "checkpoint": "transformers" if keys.flag("gradient_checkpointing") else None,
    }


def _optimizer(keys: _Keys) -> str:
    name = keys.text("optim", "optimizer", default="adamw_torch_fused") or ""
    if name not in _OPTIMIZERS:
        keys.notes.append(f"optimizer {name!r} is not planned and counted as adamw; {nearest(name, _OPTIMIZERS)}")
    return _OPTIMIZERS.get(name, "adamw")


def _train_all(model: nn.Module) -> None:
    _train_where(model, lambda name: True)


def _train_where(model: nn.Module, chosen: Callable[[str], bool]) -> list[str]:
    names = [name for name, parameter in model.named_parameters() if chosen(name)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in set(names))
    return names


def _train_matching(model: nn.Module, key: str, patterns: Iterable[str], keys: _Keys) -> None:
    """axolotl: regular expressions over names of parameters, [a:b] behind one for a range of rows."""
    compiled = []
    for pattern in patterns:
        whole = re.sub(r"\[\d*:\d*\]$", "", pattern)
        if whole != pattern:
            keys.notes.append(f"{key}: {pattern} trains rows only; memory is that of the whole tensor")
        try:
            compiled.append(re.compile(whole))
        except re.error as error:
            raise ValueError(f"{key}: {pattern!r} is no regular expression: {error}") from error
        names = [name for name, _ in model.named_parameters()]
        if not any(compiled[-1].match(name) for name in names):
            raise ValueError(f"{key}: {pattern!r} matches no parameter; {nearest(whole, names)}")
    _train_where(model, lambda name: any(pattern.match(name) for pattern in compiled))


def _train_frozen_kind(keys: _Keys, model: Any) -> None:
    """LLaMA-Factory's "freeze": the last n blocks, or with a negative n the first ones, or some modules of them."""
    count = model.config.num_hidden_layers
    wanted = keys.whole("freeze_trainable_layers", low=-_MOST_BLOCKS, high=_MOST_BLOCKS, default=2) or 0
    numbers = range(max(count - wanted, 0), count) if wanted > 0 else range(min(-wanted, count))
    modules = keys.names("freeze_trainable_modules", default="all") or []
    extra = keys.names("freeze_extra_modules", default="") or []
    parts = [f".{number}.{'' if module == 'all' else module}" for number in numbers for module in modules]
    if not _train_where(model, lambda name: any(part in name for part in (*parts, *extra))):
        raise ValueError(f"freeze_trainable_modules: {modules} name no parameter of the blocks {list(numbers)}")


def _lora(model: Any, rank: int, targets: list[str] | None, adapter: str) -> nn.Module:
    if adapter not in ("lora", "qlora"):
        raise ValueError(f"adapter: {adapter!r} is not planned; lora and qlora are")
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"planning {adapter} needs peft: pip install peft") from error
    names = "all-linear" if targets is None else targets
    try:
        wrapped: nn.Module = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=names))
    except (ValueError, LookupError, TypeError) as error:  # peft has errors of its own for names that fit nothing
        raise ValueError(
            f"{adapter}: peft cannot adapt {shown(', '.join(targets or ['all linear layers']), 200)} "
            f"({shown(str(error), 300)}); name layers of the model"
        ) from error
    return wrapped
