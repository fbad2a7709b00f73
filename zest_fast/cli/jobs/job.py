"""Opens the model and the data that the command line names, in the order in which they need each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zest_fast.finetuning.delta_files import read_delta
from zest_fast.integrations.data.forms import Form, recognise, uses_template
from zest_fast.integrations.data.images import ImageFolder
from zest_fast.integrations.data.loaders import make_loaders, names_of
from zest_fast.integrations.data.sources import Loaders, open_data
from zest_fast.integrations.data.tables import Table
from zest_fast.integrations.merging import load_base, put_delta
from zest_fast.integrations.pretrained import LoadedModel, Streamed, find_task, has_single_output, load_model
from zest_fast.integrations.references import is_reference
from zest_fast.profiling.heads import find_head


@dataclass(frozen=True)
class Job:
    loaded: LoadedModel
    loaders: Loaders
    device: torch.device
    without_effect: dict[str, str]  #: options that this model and data have no use for, and why
    own_batches: bool  #: whether the loaders are ours; not the user's
    on_disk: bool  #: whether frozen weights stay there
    in_one_length: Callable[[], Loaders]  #: the same data, each text padded to the longest
    form: Form | None = None  #: of a table: its task and columns
    own_validation: bool = False  #: whether the data bring the part that scores

    @property
    def model(self) -> torch.nn.Module:
        return self.loaded.model

    def first_batch(self) -> Any:
        """The batch to profile: the first of the shuffled training data, on the model's device."""
        batch = next(iter(self.loaders.train), None)
        if batch is None:
            raise ValueError("the data yields no batch")
        return to_device(batch, self.device)

    def batches(self, count: int) -> Iterator[Any]:
        """The first `count` of them, in the same way. Raises ValueError where there are fewer."""
        batches = iter(self.loaders.train)
        for done in range(count):
            batch = next(batches, None)
            if batch is None:
                raise ValueError(f"--batches {count}: the data yields {done}; ask for fewer, or a smaller --batch-size")
            yield to_device(batch, self.device)

    def any_batch(self) -> Any:
        """One as large as those that train, without moving the data loader on; None of a loader of the user's."""
        loader: Any = self.loaders.train
        if not self.own_batches:
            return None
        count = min(len(loader.dataset), loader.batch_size)
        return to_device(loader.collate_fn([loader.dataset[place] for place in range(count)]), self.device)


def open_job(
    model: str,
    data: str,
    *,
    task: str | None,
    seed: int,
    device: str,
    text_column: str | None = None,
    label_column: str | None = None,
    chat_template: str | None = None,
    split: str | None = None,
    config: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    streamed: Streamed | None = None,
    delta: Path | None = None,
    **batching: Any,
) -> Job:
    """streamed: of a model whose frozen weights stay on disk. delta: a file that is put into the model. `batching`:
    the remaining keywords of make_loaders. A fresh head is drawn from `seed`.
    """
    torch.manual_seed(seed)
    opened = open_data(data, split=split, config=config)
    form = None
    if isinstance(opened, Table):
        form = _form_of(opened, model, task, text_column, label_column, trust_remote_code)
        task = _said_task(form, model, task, trust_remote_code)
    elif isinstance(opened, ImageFolder):
        _check_kind(data, task)
        task = "image-classification"
    else:
        task = task or find_task(model, trust_remote_code=trust_remote_code)
    names = None if isinstance(opened, Loaders) else names_of(opened, form)
    target = pick_device("cpu" if streamed is not None and device == "auto" else device)
    if delta is not None:
        loaded = _with_delta(model, delta, trust_remote_code)
    else:
        if streamed is not None:
            streamed = replace(streamed, device=str(target))  # for good: such a model is not moved
        loaded = load_model(
            model,
            task=task,
            class_names=names,
            streamed=streamed,
            dtype=None if dtype is None else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
        )
    if names is not None and loaded.class_names is None:
        _check_outputs(loaded, len(names))
    made = partial(make_loaders, opened, loaded, form=form, seed=seed, chat_template=chat_template, **batching)
    loaders = made()
    loaded.model.to(target)
    own = not isinstance(opened, Loaders)
    return Job(
        loaded,
        loaders,
        target,
        without_effect=_without_effect(opened, data, form, is_reference(model)),
        own_batches=own,
        on_disk=streamed is not None,
        in_one_length=partial(made, same_length=True),
        form=form,
        own_validation=own and opened.validation is not None,
    )


def _form_of(
    table: Table, model: str, task: str | None, text_column: str | None, label_column: str | None, trusted: bool
) -> Form:
    return recognise(
        table,
        task=task,
        made_for=find_task(model, trust_remote_code=trusted),
        single_output=has_single_output(model, trust_remote_code=trusted),
        text_column=text_column,
        label_column=None if task == "causal-lm" else label_column,  # see _without_effect
    )


def _said_task(form: Form, model: str, task: str | None, trusted: bool) -> str | None:
    """The task of the form; None where only texts speak for a language model, whose head would be drawn at random."""
    guessed = task is None and form.task == "causal-lm" and find_task(model, trust_remote_code=trusted) is None
    return None if guessed else form.task


def _with_delta(model: str, file: Path, trust_remote_code: bool) -> LoadedModel:
    delta = read_delta(file)
    loaded = load_base(model, delta, trust_remote_code=trust_remote_code)
    put_delta(loaded.model, file, delta)
    return replace(loaded, class_names=delta.class_names or loaded.class_names, fresh=())


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name!r} is unknown; use auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch {torch.__version__} finds no CUDA device; use cpu or auto")
    return device


def to_device(batch: Any, device: torch.device) -> Any:
    """The tensors of a mapping, a list or a tuple on `device`; everything else as it is."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return tuple(to_device(value, device) for value in batch)
    return batch


def _without_effect(
    opened: Table | ImageFolder | Loaders, data: str, form: Form | None, own_model: bool
) -> dict[str, str]:
    own = (
        {"dtype": "a function makes the model", "trust_remote_code": "a function makes the model"} if own_model else {}
    )
    if isinstance(opened, Loaders):
        names = ["text_column", "label_column", "chat_template"]
        names += ["batch_size", "max_length", "image_size", "validation_share"] + (["task"] if own_model else [])
        return own | dict.fromkeys(names, f"{data} makes its own batches")
    if opened.validation is not None:
        own["validation_share"] = f"{opened.validation.path.name} scores"
    if isinstance(opened, ImageFolder):
        names = ["text_column", "label_column", "chat_template", "max_length"]
        return own | dict.fromkeys(names, f"{data} is a folder of images")
    assert form is not None
    own["image_size"] = f"{data} is a table of texts"
    if form.task == "causal-lm":
        own["label_column"] = "a causal language model learns the texts alone"
    if not uses_template(opened, form):
        own["chat_template"] = "these are no conversations"
    return own


def _check_kind(data: str, task: str | None) -> None:
    if task not in (None, "image-classification"):
        raise ValueError(f"{data} is a folder of images, and {task} needs a table of texts or module:function")


def _check_outputs(loaded: LoadedModel, classes: int) -> None:
    """A model of the user has a head of its own: fewer outputs than classes would only fail in the loss."""
    try:
        name = find_head(loaded.model)
    except ValueError:
        return
    outputs = getattr(loaded.model.get_submodule(name), "out_features", classes) if name else classes
    if outputs < classes:
        raise ValueError(f"the data has {classes} classes, and {loaded.source!r} {outputs} outputs (layer {name!r})")
