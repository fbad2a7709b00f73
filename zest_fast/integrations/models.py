"""The user's model from a string: a hub id, a local folder of transformers, or `module:function`.

transformers is imported only when a hub id or a folder asks for it.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zest_fast.integrations.quiet import quiet_transformers
from zest_fast.integrations.references import is_reference, load_function, nearest_path
from zest_fast.profiling.nearest import nearest

# task -> (its Auto class, how the architectures of a checkpoint for it are called)
_AUTO_CLASSES = {
    "text-classification": ("AutoModelForSequenceClassification", ("ForSequenceClassification",)),
    "causal-lm": ("AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel")),
    "image-classification": ("AutoModelForImageClassification", ("ForImageClassification",)),
}
TASKS = tuple(_AUTO_CLASSES)

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode and what turns data into its batches."""

    model: torch.nn.Module
    source: str
    task: str | None  #: one of TASKS; None for `module:function`
    processor: Any | None = None  #: tokenizer or image processor, by task; None where there is none
    class_names: tuple[str, ...] | None = None  #: in the order of the model's outputs; None: the model does not say
    fresh: tuple[str, ...] = ()  #: parameters that the checkpoint does not hold, newly drawn


def find_task(source: str) -> str | None:
    """The task that the checkpoint was made for, from the architectures in its configuration.

    None: `module:function`, or a checkpoint without a head for one of TASKS.
    """
    if is_reference(source):
        return None
    architectures = _config(source).architectures or ()
    for task, (_, marks) in _AUTO_CLASSES.items():
        if any(mark in architecture for architecture in architectures for mark in marks):
            return task
    return None


def load_model(source: str, *, task: str | None = None, class_names: Sequence[str] | None = None) -> LoadedModel:
    """Loads the model that `source` names.

    source: a hub id, a folder that `save_pretrained` wrote, or `module:function` whose function returns a
        torch.nn.Module. An existing folder goes before a hub id of the same name.
    task: one of TASKS; None = what the checkpoint was made for.
    class_names: the classes of the data. A head that the checkpoint has for them is kept, else a fresh one is drawn
        from torch's random state.

    Raises ValueError or TypeError in one line, with the nearest valid value; ImportError without transformers.
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"task {task!r} is unknown; {nearest(task, TASKS)}")
    if is_reference(source):
        model = load_function(source)()
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"{source!r} returned {type(model).__name__}; it has to return a torch.nn.Module")
        return LoadedModel(model.eval(), source, None)
    config = _config(source)
    made_for = find_task(source)
    task = task or made_for
    if task is None:
        raise ValueError(f"model {source!r} ({config.architectures}) does not say its task; pass one of {TASKS}")
    changes: dict[str, Any] = {}
    names = None
    if task != "causal-lm":
        trained = [config.id2label[index] for index in range(config.num_labels)] if made_for == task else []
        changes, names = _head(trained, class_names)
    if Path(source).is_dir():
        _check_weights(Path(source))
    model, fresh = _from_pretrained(source, task, changes)
    return LoadedModel(model.eval(), source, task, _processor(source, task, model), names, fresh)


def _head(trained: list[str], wanted: Sequence[str] | None) -> tuple[dict[str, Any], tuple[str, ...] | None]:
    """Changes to the configuration, and the class names in the order of the outputs.

    The trained head stays if it knows every class by name, or if the classes are the integers of its outputs.
    """
    unnamed = trained == [f"LABEL_{index}" for index in range(len(trained))]  # what transformers fills in
    if wanted is None:
        return {}, None if unnamed else tuple(trained)
    if set(wanted) <= set(trained):
        return {}, tuple(trained)
    if list(wanted) == [str(index) for index in range(len(trained))]:
        return {}, tuple(wanted)
    if len(wanted) < 2:
        raise ValueError(f"the data has a single class, {wanted[0]!r}; a new classification head needs two or more")
    return {
        "num_labels": len(wanted),
        "id2label": dict(enumerate(wanted)),
        "label2id": {name: index for index, name in enumerate(wanted)},
        "problem_type": "single_label_classification",
    }, tuple(wanted)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("a hub id or a model folder needs transformers: pip install 'zest_fast[transformers]'") from (
            error
        )
    return transformers


def _config(source: str) -> Any:
    folder = Path(source)
    transformers = _transformers()
    if folder.is_dir():
        _check_json(folder / "config.json", "configuration")
    elif folder.exists():
        raise ValueError(f"model {source!r} is a file; give the folder that holds config.json and the weights")
    elif _is_path(source):
        raise ValueError(f"model folder {source!r} does not exist; {nearest_path(folder, _folders_beside(folder))}")
    try:
        with quiet_transformers():
            return transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        if folder.is_dir():
            raise ValueError(f"{folder / 'config.json'}: {_first_line(error)}") from error
        raise ValueError(
            f"model {source!r} is no folder here, no module:function, and the hub did not give it "
            f"({_first_line(error)}); {nearest_path(folder, _folders_beside(folder))}"
        ) from error


def _is_path(source: str) -> bool:
    """Whether a missing `source` can only be a folder; `name` and `owner/name` may be on the hub."""
    inside_a_folder = "/" in source and Path(source).parent.is_dir()
    return inside_a_folder or source.startswith((".", "~", "/")) or source.count("/") > 1


def _from_pretrained(source: str, task: str, changes: dict[str, Any]) -> tuple[torch.nn.Module, tuple[str, ...]]:
    transformers = _transformers()
    auto = getattr(transformers, _AUTO_CLASSES[task][0])
    try:
        with quiet_transformers():
            model, report = auto.from_pretrained(
                source, output_loading_info=True, ignore_mismatched_sizes=bool(changes), **changes
            )
    except (OSError, ValueError) as error:
        if "Unrecognized configuration class" in str(error):
            raise ValueError(f"model {source!r} ({_config(source).model_type}) has no form for {task}") from error
        raise ValueError(f"model {source!r}: {_first_line(error)}") from error
    mismatched = (key[0] for key in report["mismatched_keys"])
    return model, tuple(sorted({*report["missing_keys"], *mismatched}))


def _processor(source: str, task: str, model: torch.nn.Module) -> Any | None:
    """Tokenizer or image processor; None where the checkpoint has none."""
    transformers = _transformers()
    folder = Path(source)
    if task == "image-classification":
        if folder.is_dir() and not (folder / "preprocessor_config.json").exists():
            return None
        return _load(transformers.AutoImageProcessor, source)
    # From a folder without its files AutoTokenizer makes an empty vocabulary up, and every word would be unknown.
    if folder.is_dir() and not any((folder / name).exists() for name in _TOKENIZERS):
        return None
    tokenizer = _load(transformers.AutoTokenizer, source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    config: Any = model.config
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id  # classifiers of decoders look for the last token before it
    return tokenizer


def _load(auto: Any, source: str) -> Any:
    try:
        with quiet_transformers():
            return auto.from_pretrained(source)
    except Exception as error:  # tokenizers raises plain Exception for a torn file
        raise ValueError(f"{auto.__name__} of {source!r}: {_first_line(error)}") from error


def _check_weights(folder: Path) -> None:
    """Names a missing or torn weights file, which transformers and safetensors do not."""
    index = next((folder / name for name in _WEIGHTS if (folder / name).exists()), None)
    if index is None:
        there = [entry for entry in folder.iterdir() if entry.is_file()]
        raise ValueError(f"{folder} has no weights file; {nearest_path(folder / _WEIGHTS[0], there)}")
    files = [index]
    if index.suffix == ".json":
        files = [folder / name for name in sorted(set(_check_json(index, "weights index")["weight_map"].values()))]
    for file in files:
        if not file.exists():
            raise ValueError(f"weights file {file} is missing, although {index.name} lists it")
        if file.suffix == ".safetensors":
            _check_safetensors(file)
        elif _is_zip_start(file) and not zipfile.is_zipfile(file):  # the directory is a zip's last part
            raise ValueError(f"weights file {file} is torn (it ends too early); copy or download it again")


def _is_zip_start(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(2) == b"PK"


def _check_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt"):
            pass  # opening compares the header with the length of the file
    except SafetensorError as error:
        raise ValueError(f"weights file {file} is torn ({_first_line(error)}); copy or download it again") from error


def _check_json(file: Path, what: str) -> Any:
    if not file.exists():
        there = [entry for entry in file.parent.iterdir() if entry.is_file()]
        raise ValueError(f"{what} {file} does not exist; {nearest_path(file, there)}")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{what} {file} is torn: {error}") from error


def _folders_beside(path: Path) -> list[Path]:
    parent = next(folder for folder in path.parents if folder.is_dir())
    return [entry for entry in parent.iterdir() if entry.is_dir()]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
