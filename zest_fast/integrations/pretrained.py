"""The user's model from a string: a hub id, a local folder of transformers, or `module:function`.

transformers is imported only when a hub id or a folder asks for it.
"""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch

from zest_fast.foundation.documents import check_stored, parse_json, whole_file
from zest_fast.foundation.hub_kernels import refuse_kernels
from zest_fast.foundation.nearest import nearest, some
from zest_fast.foundation.text_table import first_line
from zest_fast.integrations.quiet import quiet_transformers
from zest_fast.integrations.references import is_reference, load_function, nearest_path
from zest_fast.streaming.opening import open_streamed

# task -> (its Auto class, how the architectures of a checkpoint for it are called)
_OF_SEQUENCES = ("AutoModelForSequenceClassification", ("ForSequenceClassification",))
_AUTO_CLASSES = {
    "text-classification": _OF_SEQUENCES,
    "regression": _OF_SEQUENCES,
    "multi-label": _OF_SEQUENCES,
    "token-classification": ("AutoModelForTokenClassification", ("ForTokenClassification",)),
    "causal-lm": ("AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel")),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM", ("ForConditionalGeneration",)),
    "image-classification": ("AutoModelForImageClassification", ("ForImageClassification",)),
}
_WITHOUT_CLASSES = ("causal-lm", "seq2seq-lm")  # whose head is that of the vocabulary
# How transformers calls the loss of a head for sequences.
PROBLEMS = {
    "text-classification": "single_label_classification",
    "regression": "regression",
    "multi-label": "multi_label_classification",
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
    fresh: tuple[
        str, ...
    ] = ()  #: parameters that are newly drawn: not in the checkpoint, or of a head that was replaced
    notes: tuple[str, ...] = ()  #: what was decided while loading and the user should know, a sentence each
    new_head: bool = False  #: whether the head was made for the classes of the data


def find_task(source: str, *, trust_remote_code: bool = False) -> str | None:
    """The task that the checkpoint was made for, from the architectures and the problem in its configuration.

    None: `module:function`, or a checkpoint without a head for one of TASKS.
    """
    if is_reference(source):
        return None
    return _made_for(_config(source, trust_remote_code))


def _made_for(config: Any) -> str | None:
    architectures = config.architectures or ()
    for task, (_, marks) in _AUTO_CLASSES.items():
        if any(mark in architecture for architecture in architectures for mark in marks):
            if marks == _OF_SEQUENCES[1]:
                said = (name for name, problem in PROBLEMS.items() if problem == config.problem_type)
                return next(said, task)
            if task in _WITHOUT_CLASSES:
                return _language_task(config)
            return task
    return None


def _language_task(config: Any) -> str | None:
    """Of an encoder with a decoder, whatever the class is called; None where the source is no text (images, sound)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as SEQUENCES

    if not getattr(config, "is_encoder_decoder", False):
        decoder = any("ForConditionalGeneration" not in name for name in config.architectures)
        return "causal-lm" if decoder else None
    return "seq2seq-lm" if config.model_type in SEQUENCES else None


def has_single_output(source: str, *, trust_remote_code: bool = False) -> bool:
    """Whether the head for sequences has one output, and the configuration does not say for what."""
    if is_reference(source):
        return False
    config = _config(source, trust_remote_code)
    return _made_for(config) == "text-classification" and config.num_labels == 1 and config.problem_type is None


def load_model(
    source: str,
    *,
    task: str | None = None,
    class_names: Sequence[str] | None = None,
    streamed: Streamed | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Loads the model that `source` names.

    source: a hub id, a folder that `save_pretrained` wrote, or `module:function` whose function returns a
        torch.nn.Module. An existing folder goes before a hub id of the same name.
    task: one of TASKS; None = what the checkpoint was made for.
    class_names: the classes of the data. A head that the checkpoint has for them is kept: one that knows every class by
        name, or that has so many outputs where the classes are their numbers. Else a fresh one is drawn from torch's
        random state, and `.notes` says what was replaced and why. For one class a row a multi-label head is refused.
    streamed: its frozen weights stay on disk (`open_streamed`); a folder is needed, or a hub id that is downloaded, and
        a head that is kept.
    dtype: of the weights; None = as the checkpoint has them. Not of a `module:function`, nor of a streamed one.
    trust_remote_code: import and run code that comes with the weights, with all that the user may do.

    Otherwise such code is not run. Names in the folder's files that lead out of it are refused;
    links in it are followed, since the caches of the hub are made of them.
    Raises ValueError or TypeError in one line, with the nearest valid value; ImportError without transformers.
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"task {task!r} is unknown; {nearest(task, TASKS)}")
    if streamed is not None:
        folder = downloaded_folder(source)
        if folder is None:
            raise ValueError(
                f"model {source!r} is no folder, whose weights could stay on disk: name the folder of a model, or "
                "download the hub's first"
            )
        source = str(folder)
    if is_reference(source):
        model = load_function(source)()
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"{source!r} returned {type(model).__name__}; it has to return a torch.nn.Module")
        return LoadedModel(model.eval(), source, None)
    config = _config(source, trust_remote_code)
    made_for = _made_for(config)
    task = task or made_for
    if task is None:
        raise ValueError(f"model {source!r} ({config.architectures}) does not say its task; pass one of {TASKS}")
    if task == "causal-lm":
        _check_causal(source, config)
    head, alike = _Head(), made_for is not None and _AUTO_CLASSES[made_for] == _AUTO_CLASSES[task]
    if task not in _WITHOUT_CLASSES:
        head = _choose_head(source, config, class_names, task) if alike else _new_head(class_names, task)
    if streamed is not None:
        if trust_remote_code or dtype is not None:
            raise ValueError(
                "weights that stay on disk are read as they are, by code of transformers: leave out dtype= "
                "and trust_remote_code="
            )
        return _open_streamed(source, task, made_for if not alike else task, head, streamed)
    if Path(source).is_dir():
        _check_weights(Path(source))
    loading = {"trust_remote_code": trust_remote_code, **({} if dtype is None else {_dtype_argument(): dtype})}
    model, missing, replaced = _from_pretrained(source, task, head.changes, config.num_labels, loading)
    if head.changes and alike and not replaced:  # of the same size, so that it was loaded
        replaced = _redraw_head(model)
    _set_problem(model, task)
    notes = [*head.notes]
    if missing:
        notes.insert(0, f"{source} does not hold {some(missing)}; drawn at random")
    if not trust_remote_code and (own := _own_code(config)):
        notes.append(
            f"{source} brings code of its own ({own}), which is not run: {type(model).__name__} of transformers is used"
        )
    fresh = tuple(sorted({*missing, *replaced}))
    processor, new_head = _processor(source, task, model, trust_remote_code), bool(head.changes)
    return LoadedModel(model.eval(), source, task, processor, head.names, fresh, tuple(notes), new_head)


def _set_problem(model: Any, task: str) -> None:
    """The loss of a head for sequences, which transformers would else take from the labels of its first batch."""
    if task in PROBLEMS:
        model.config.problem_type = PROBLEMS[task]


def downloaded_folder(source: str) -> Path | None:
    """The folder that `source` names, or in which a hub id lies that was downloaded; the hub is not asked."""
    if Path(source).is_dir():
        return Path(source)
    if is_reference(source) or _is_path(source):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


@dataclass(frozen=True)
class Streamed:
    """Of a model whose frozen weights stay on disk: what trains and where it runs, as for `open_streamed`."""

    layers: tuple[str, ...]
    head: str | list[str] | None = "auto"
    device: str = "cpu"


def _open_streamed(source: str, task: str, made_for: str | None, head: _Head, streamed: Streamed) -> LoadedModel:
    if head.changes or made_for != task:
        why = "; ".join(head.notes) or f"it was saved for {made_for}, not for {task}"
        raise ValueError(
            f"{source} needs another head, which would be drawn at random ({why}): load it once, give it that head and "
            "save it; then its weights can stay on disk"
        )
    model: Any = open_streamed(source, train=streamed.layers, head=streamed.head, device=streamed.device)
    _set_problem(model, task)
    notes = (*head.notes, "frozen weights stay on disk and are read as they are used")
    return LoadedModel(model, source, task, _processor(source, task, model), head.names, (), notes)


@dataclass(frozen=True)
class _Head:
    """Changes to the configuration, class names in the order of the outputs (None: the model does not say), notes."""

    changes: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def _choose_head(source: str, config: Any, wanted: Sequence[str] | None, task: str) -> _Head:
    """The head of a checkpoint that was made for this kind of task: kept where the classes fit it, else replaced.

    Raises ValueError for a multi-label head with one class a row, and for a single class that the head does not know.
    """
    trained = [str(config.id2label.get(index, f"LABEL_{index}")) for index in range(config.num_labels)]
    unnamed = trained == [f"LABEL_{index}" for index in range(len(trained))]  # what transformers fills in
    if task == "regression":
        return _head_of_number(source, trained, unnamed)
    if wanted is None:
        return _Head(names=None if unnamed else tuple(trained))
    what = f"the head of {source} ({_count(len(trained), 'output')}{'' if unnamed else f': {some(trained)}'})"
    if config.problem_type == "multi_label_classification" and task == "text-classification":
        raise ValueError(
            f"{what} is for several labels at once (problem_type multi_label_classification), and the data has one "
            "class a row: write its labels as lists, or as columns of 0 and 1; to train classes instead, give it a "
            "head of your own and pass it as module:function"
        )
    if config.problem_type == "regression" or (len(trained) == 1 and task != "multi-label"):
        why = "it is for regression, and the labels are classes"
    elif (outputs := _outputs(config, trained, wanted)) is not None:
        return _kept_head(source, trained, unnamed, wanted, outputs)
    elif unnamed:
        why = f"its outputs have no names and the labels are not their numbers, 0 to {len(trained) - 1}; number the "
        why += "labels so to keep it"
    else:
        known = {name.strip().casefold() for name in trained}
        strange = [name for name in wanted if name.strip().casefold() not in known]
        why = f"it knows no {some(map(repr, strange or wanted))}"
    new = _new_head(wanted, task)
    note = (
        f"{what} is replaced by a new one for {_count(len(wanted), 'class')} ({some(wanted)}), drawn at random: {why}"
    )
    return _Head(new.changes, new.names, (note,))


def _head_of_number(source: str, trained: Sequence[str], unnamed: bool) -> _Head:
    if len(trained) == 1:
        return _Head()
    what = f"the head of {source} ({len(trained)} outputs{'' if unnamed else f': {some(trained)}'})"
    note = (
        f"{what} is replaced by a new one of one output, drawn at random: it is for classes, and the labels are numbers"
    )
    return _Head(_new_head(None, "regression").changes, None, (note,))


def _new_head(wanted: Sequence[str] | None, task: str) -> _Head:
    if task == "regression":
        return _Head({"num_labels": 1, "problem_type": PROBLEMS[task]})
    if wanted is None:
        return _Head()
    if len(wanted) < 2 and task != "multi-label":
        raise ValueError(f"the data has a single class, {wanted[0]!r}; a new classification head needs two or more")
    changes = {
        "num_labels": len(wanted),
        "id2label": dict(enumerate(wanted)),
        "label2id": {name: index for index, name in enumerate(wanted)},
        "problem_type": PROBLEMS.get(task, PROBLEMS["text-classification"]),
    }
    return _Head(changes, tuple(wanted))


def _outputs(config: Any, trained: Sequence[str], wanted: Sequence[str]) -> dict[str, int] | None:
    """The output of each class: by its name in id2label or label2id, else by the name in any case, else by number."""
    by_name = {name: index for index, name in enumerate(trained)} if len(set(trained)) == len(trained) else {}
    by_id = {str(name): index for name, index in (config.label2id or {}).items() if isinstance(index, int)}
    numbers = {str(index): index for index in range(len(trained))}
    for table in (by_name, by_id, numbers):
        if all(name in table for name in wanted):
            found = {name: table[name] for name in wanted}
            if len(set(found.values())) == len(wanted) and max(found.values()) < len(trained):
                return found
    folded = {name.strip().casefold(): index for name, index in by_name.items()}
    if len(folded) == len(by_name) and all(name.strip().casefold() in folded for name in wanted):
        found = {name: folded[name.strip().casefold()] for name in wanted}
        return found if len(set(found.values())) == len(wanted) else None
    return None


def _kept_head(source: str, trained: list[str], unnamed: bool, wanted: Sequence[str], outputs: dict[str, int]) -> _Head:
    notes = []
    differing = {name: index for name, index in outputs.items() if trained[index] != name}
    if differing and not unnamed:
        pairs = (f"{name!r} as its output {index}, {trained[index]!r}" for name, index in sorted(differing.items()))
        notes.append(f"the head of {source} is kept, and the labels are taken so: {some(pairs)}")
    if len(wanted) < len(trained):
        notes.append(f"the head of {source} is kept: the data has {len(wanted)} of its {_count(len(trained), 'class')}")
    names = [str(index) for index in range(len(trained))] if unnamed else list(trained)
    spelt = {index: name for name, index in outputs.items()}
    for index, name in enumerate(names):  # the labels of the data as they are spelt there, and no name twice
        names[index] = spelt.get(index, name if name not in outputs else f"output {index} ({name})")
    return _Head({}, tuple(names), tuple(notes))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 'es' if what.endswith('s') else 's'}"


def _check_causal(source: str, config: Any) -> None:
    """An encoder has a form as language model whose tokens see those that they are to predict: no loss to learn by."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    if config.model_type in MASKED and not (
        getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    ):
        raise ValueError(
            f"model {source!r} ({config.model_type}) is an encoder: as causal-lm its tokens would see the ones they "
            "are to predict; use text-classification, or set is_decoder in its config.json"
        )


def _redraw_head(model: Any) -> tuple[str, ...]:
    """New weights for what depends on the number of classes, as the model's class draws them; their names."""
    config = copy.deepcopy(model.config)
    config.num_labels = model.config.num_labels + 1
    with torch.device("meta"):
        larger = {name: parameter.shape for name, parameter in type(model)(config).named_parameters()}
    names = [name for name, parameter in model.named_parameters() if larger.get(name) != parameter.shape]
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in names):
        module = model.get_submodule(owner)
        for tensor in (module, *module.parameters()):
            if hasattr(tensor, "_is_hf_initialized"):  # or transformers would leave it as it was loaded
                del tensor._is_hf_initialized
        with torch.no_grad():
            model._init_weights(module)
    return tuple(names)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("a hub id or a model folder needs transformers: pip install 'zest_fast[transformers]'") from (
            error
        )
    return transformers


def _config(source: str, trust_remote_code: bool = False) -> Any:
    folder = Path(source)
    transformers = _transformers()
    if folder.is_dir():
        _check_json(folder / "config.json", "configuration")
    elif folder.exists():
        raise ValueError(f"model {source!r} is a file; give the folder that holds config.json and the weights")
    elif _is_path(source):
        raise ValueError(f"model folder {source!r} does not exist; {nearest_path(folder, _folders_beside(folder))}")
    if folder.is_dir():
        _check_names(folder)
    try:
        with quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # a configuration of strange types makes transformers raise anything
        if "trust_remote_code" in str(error):
            raise _refused_code(f"model {source!r}", error, _auto_map(folder / "config.json")) from error
        if folder.is_dir():
            raise ValueError(f"{folder / 'config.json'}: {first_line(error)}") from error
        raise ValueError(
            f"model {source!r} is no folder here, no module:function, and the hub did not give it "
            f"({first_line(error)}); {nearest_path(folder, _folders_beside(folder))}"
        ) from error
    refuse_kernels(source, config)
    architectures = config.architectures
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise ValueError(
            f"the configuration of {source!r} has architectures {architectures!r}, which is no list of names"
        )
    return config


def _refused_code(what: str, error: Exception, names: Mapping[str, Any] | None) -> ValueError:
    code = f" ({_named_code(names)})" if names else ""
    return ValueError(
        f"{what} asks to run code of its own{code}, which is not done unasked: it can do whatever you can, such as "
        "read your files and send them away. Read it first; then trust_remote_code=True imports and runs it, or build "
        "the model in a function of yours and pass module:function"
        + ("" if names else f" (transformers: {first_line(error)})")
    )


def _named_code(auto_map: Mapping[str, Any]) -> str:
    return some(f"{auto}: {name}" for auto, name in auto_map.items())


def _own_code(config: Any) -> str:
    """The code for models that the configuration names, "" where it names none."""
    auto_map = getattr(config, "auto_map", None)
    if not isinstance(auto_map, Mapping):
        return ""
    return _named_code({auto: name for auto, name in auto_map.items() if str(auto).startswith("AutoModel")})


def _auto_map(file: Path) -> Mapping[str, Any] | None:
    if not file.is_file():
        return None
    try:
        found = parse_json(whole_file(file)).get("auto_map")
    except (ValueError, AttributeError):
        return None
    return found if isinstance(found, Mapping) else {"auto_map": found} if found else None


def _check_names(folder: Path) -> None:
    """Refuses, before anything else is read, names in files of the folder that lead out of it."""
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        base = _check_json(adapter, "adapter configuration").get("base_model_name_or_path")
        raise ValueError(
            f"{folder} holds a PEFT adapter (of {base!r}), which is not put into its model here: merge the two and "
            "save that, or build them in a function and pass module:function"
        )
    for index in sorted(folder.glob("*.index.json")):
        for name in _shards(index):
            _check_inside(name, index)
    for file, name in _named_files(folder):
        _check_inside(name, file)


def _shards(index: Path) -> list[str]:
    content = _check_json(index, "weights index")
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"weights index {index} has no weight_map from the names of parameters to files")
    return sorted(set(shards.values()))


def _named_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Files that settings name, in versions of transformers that open them: (settings, file)."""
    weights = _check_json(folder / "config.json", "configuration").get("transformers_weights")
    if isinstance(weights, str):
        yield folder / "config.json", weights
    settings = folder / "tokenizer_config.json"
    for key, value in _check_json(settings, "tokenizer configuration").items() if settings.exists() else ():
        names = value if isinstance(value, list) and key == "fast_tokenizer_files" else [value]
        for name in names if key.endswith(("_file", "_files")) and key != "special_tokens_map_file" else ():
            # What was saved on another machine may name a file there: it is not here, so nothing can open it.
            if isinstance(name, str) and (folder / name).exists():
                yield settings, name


def _check_inside(name: str, listed_in: Path) -> None:
    """By its words alone: a link in the folder may lead anywhere, since caches of the hub are made of links."""
    pure = PurePosixPath(name), PureWindowsPath(name)
    if not name or "\0" in name or any(path.anchor or ".." in path.parts for path in pure):
        raise ValueError(
            f"{listed_in} names the file {name!r}, which is outside of {listed_in.parent}; nothing was read: such a "
            "folder is broken or made to read other files of yours"
        )


def _is_path(source: str) -> bool:
    """Whether a missing `source` can only be a folder; `name` and `owner/name` may be on the hub."""
    inside_a_folder = "/" in source and Path(source).parent.is_dir()
    return inside_a_folder or source.startswith((".", "~", "/")) or source.count("/") > 1


def _from_pretrained(
    source: str, task: str, changes: dict[str, Any], trained_labels: int, loading: dict[str, Any]
) -> tuple[torch.nn.Module, tuple[str, ...], tuple[str, ...]]:
    """The model, the parameters that the checkpoint lacks, and those of a head of another size."""
    transformers = _transformers()
    auto = getattr(transformers, _AUTO_CLASSES[task][0])
    try:
        with quiet_transformers():
            model, report = auto.from_pretrained(
                source,
                output_loading_info=True,
                ignore_mismatched_sizes=bool(changes),
                **loading,
                **changes,
            )
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise _refused_code(f"model {source!r}", error, _auto_map(Path(source) / "config.json")) from error
        if "Weights only load failed" in str(error):
            raise ValueError(
                f"model {source!r}: its weights are a pickle with more in it than tensors, which could run code when "
                "it is loaded; this is never done here: save them as safetensors where you trust them"
            ) from error
        if "Unrecognized configuration class" in str(error):
            kind = _config(source, loading["trust_remote_code"]).model_type
            raise ValueError(f"model {source!r} ({kind}) has no form for {task}") from error
        raise ValueError(f"model {source!r}: {first_line(error)}") from error
    missing = tuple(sorted(report["missing_keys"]))
    _check_something_fits(source, model, missing, report["unexpected_keys"])
    for name, held, wanted in report["mismatched_keys"]:
        sizes = {(old, new) for old, new in zip(held, wanted, strict=False) if old != new}
        if len(held) != len(wanted) or sizes != {(trained_labels, changes["num_labels"])}:
            raise ValueError(
                f"model {source!r}: {name} is {list(held)} in the weights and {list(wanted)} by its config.json; they "
                "do not belong together"
            )
    return model, missing, tuple(sorted(key[0] for key in report["mismatched_keys"]))


def _dtype_argument() -> str:
    """How versions before 4.56 call it."""
    transformers = _transformers()
    return "dtype" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56) else "torch_dtype"


def _check_something_fits(source: str, model: Any, missing: tuple[str, ...], unexpected: Sequence[str]) -> None:
    """Weights under other names (of a wrapper, another library) leave a model at random values behind the head, too."""
    base = getattr(model, model.base_model_prefix, model)
    within = "" if base is model else f"{model.base_model_prefix}."
    wanted = [f"{within}{name}" for name, _ in base.named_parameters()]
    if wanted and set(wanted) <= set(missing):
        held = f"; they hold {some(sorted(unexpected), 3)}" if unexpected else ""
        raise ValueError(
            f"model {source!r}: its weights have no name that {type(model).__name__} knows, such as {wanted[0]}{held}"
        )


def _processor(source: str, task: str, model: torch.nn.Module, trust_remote_code: bool = False) -> Any | None:
    """Tokenizer or image processor; None where the checkpoint has none."""
    transformers = _transformers()
    folder = Path(source)
    if task == "image-classification":
        if folder.is_dir() and not (folder / "preprocessor_config.json").exists():
            return None
        try:
            return _load(transformers.AutoImageProcessor, source, trust_remote_code)
        except ValueError as error:
            if folder.is_dir() or "preprocessor_config.json" not in str(error) or "code of its own" in str(error):
                raise
            return None  # the hub has the model, and no such file of it
    # From a folder without its files AutoTokenizer makes an empty vocabulary up, and every word would be unknown.
    if folder.is_dir() and not any((folder / name).exists() for name in _TOKENIZERS):
        return None
    tokenizer = _load(transformers.AutoTokenizer, source, trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    config: Any = model.config
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id  # classifiers of decoders look for the last token before it
    return tokenizer


def _load(auto: Any, source: str, trust_remote_code: bool) -> Any:
    try:
        with quiet_transformers():
            return auto.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises plain Exception for a torn file
        if "trust_remote_code" in str(error):
            files = ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json")
            names = next(filter(None, (_auto_map(Path(source) / file) for file in files)), None)
            raise _refused_code(f"{auto.__name__} of {source!r}", error, names) from error
        raise ValueError(f"{auto.__name__} of {source!r}: {first_line(error)}") from error


def _check_weights(folder: Path) -> None:
    """Names a missing or torn weights file, which transformers and safetensors do not."""
    index = next((folder / name for name in _WEIGHTS if (folder / name).exists()), None)
    if index is None:
        there = [entry for entry in folder.iterdir() if entry.is_file()]
        raise ValueError(f"{folder} has no weights file; {nearest_path(folder / _WEIGHTS[0], there)}")
    files = [index]
    if index.suffix == ".json":
        files = [folder / name for name in _shards(index)]
    for file in files:
        if not file.exists():
            raise ValueError(f"weights file {file} is missing, although {index.name} lists it")
        if file.suffix == ".safetensors":
            _check_safetensors(file)
        elif _is_zip_start(file):
            _check_archive(file)


def _check_archive(file: Path) -> None:
    if not zipfile.is_zipfile(file):  # the directory is a zip's last part
        raise ValueError(f"weights file {file} is torn (it ends too early); copy or download it again")
    try:
        check_stored(file)
    except ValueError as error:
        raise ValueError(f"weights file {file}: {error}; take one that torch.save wrote") from error


def _is_zip_start(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(2) == b"PK"


def _check_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt"):
            pass  # opening compares the header with the length of the file
    except SafetensorError as error:
        raise ValueError(f"weights file {file} is torn ({first_line(error)}); copy or download it again") from error


def _check_json(file: Path, what: str) -> dict[str, Any]:
    if not file.exists():
        there = [entry for entry in file.parent.iterdir() if entry.is_file()]
        raise ValueError(f"{what} {file} does not exist; {nearest_path(file, there)}")
    try:
        content = parse_json(whole_file(file))
    except (ValueError, OSError) as error:
        raise ValueError(f"{what} {file} is torn: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{what} {file} holds a {type(content).__name__}, not an object with keys")
    return content


def _folders_beside(path: Path) -> list[Path]:
    parent = next(folder for folder in path.parents if folder.is_dir())
    return [entry for entry in parent.iterdir() if entry.is_dir()]
