"""Opens the model and the data that the command line names, in the order in which they need each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zest_fast.finetuning.delta_files import read_delta
from zest_fast.integrations.datasets import ImageFolder, Loaders, class_names, make_loaders, open_data
from zest_fast.integrations.merging import load_base, put_delta
from zest_fast.integrations.pretrained import LoadedModel, Streamed, find_task, load_model
from zest_fast.integrations.references import is_reference
from zest_fast.integrations.tables import Table
from zest_fast.profiling.heads import find_head

DEFAULT_LABEL_COLUMN = "label"


@dataclass(frozen=True)
class Job:
    loaded: LoadedModel
    loaders: Loaders
    device: torch.device
    without_effect: dict[str, str]  #: options that this model and data have no use for, and why
    own_batches: bool  #: whether the loaders are ours; not the user's
    on_disk: bool  #: whether frozen weights stay there
    in_one_length: Callable[[], Loaders]  #: the same data, each text padded to the longest

    @property
    def model(self) -> torch.nn.Module:
        return self.loaded.model

    def first_batch(self) -> Any:
        """The batch to profile: the first of the shuffled training data, on the model's device."""
        batch = next(iter(self.loaders.train), None)
        if batch is None:
            raise ValueError("the data yields no batch")
        return to_device(batch, self.device)

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
    label_column: str | None,
    seed: int,
    device: str,
    streamed: Streamed | None = None,
    delta: Path | None = None,
    **batching: Any,
) -> Job:
    """streamed: of a model whose frozen weights stay on disk. delta: a file that is put into the model. `batching`:
    the remaining keywords of make_loaders. A fresh head is drawn from `seed`.
    """
    torch.manual_seed(seed)
    opened = open_data(data)
    if task is None:
        task = _task_of(opened, label_column) or find_task(model)
    if task == "text-classification":
        label_column = label_column or DEFAULT_LABEL_COLUMN
        if isinstance(opened, Table) and label_column == batching.get("text_column"):
            raise ValueError(f"--label-column and --text-column are both {label_column!r}: each text would be a class")
    elif task == "causal-lm":
        label_column = None  # see _without_effect
    names = None
    if isinstance(opened, ImageFolder):
        names = class_names(opened.labels)
    elif isinstance(opened, Table) and label_column is not None:
        names = class_names(opened.column(label_column))
    target = pick_device("cpu" if streamed is not None and device == "auto" else device)
    if delta is not None:
        loaded = _with_delta(model, delta)
    else:
        if streamed is not None:
            streamed = replace(streamed, device=str(target))  # for good: such a model is not moved
        loaded = load_model(model, task=task, class_names=names, streamed=streamed)
    _check_kind(opened, data, task)
    if names is not None and loaded.class_names is None:
        _check_outputs(loaded, len(names))
    made = partial(make_loaders, opened, loaded, label_column=label_column, seed=seed, **batching)
    loaders = made()
    loaded.model.to(target)
    without_effect = _without_effect(opened, data, task, is_reference(model))
    own = not isinstance(opened, Loaders)
    return Job(loaded, loaders, target, without_effect, own, streamed is not None, partial(made, same_length=True))


def _with_delta(model: str, file: Path) -> LoadedModel:
    delta = read_delta(file)
    loaded = load_base(model, delta)
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


def _task_of(opened: Table | ImageFolder | Loaders, label_column: str | None) -> str | None:
    if isinstance(opened, ImageFolder):
        return "image-classification"
    if isinstance(opened, Table) and label_column is not None:
        return "text-classification"
    return None


def _without_effect(
    opened: Table | ImageFolder | Loaders, data: str, task: str | None, own_model: bool
) -> dict[str, str]:
    if isinstance(opened, Loaders):
        names = ["text_column", "label_column", "batch_size", "max_length", "image_size", "validation_share"]
        names += ["task"] if own_model else []
        return dict.fromkeys(names, f"{data} makes its own batches")
    if isinstance(opened, ImageFolder):
        return dict.fromkeys(("text_column", "label_column", "max_length"), f"{data} is a folder of images")
    unlabelled = {"label_column": "a causal language model learns the texts alone"} if task == "causal-lm" else {}
    return {"image_size": f"{data} is a table of texts", **unlabelled}


def _check_kind(opened: Table | ImageFolder | Loaders, data: str, task: str | None) -> None:
    if isinstance(opened, Table) and task == "image-classification":
        raise ValueError(f"{data} is a table, and an image classifier needs a folder of images or module:function")
    if isinstance(opened, ImageFolder) and task not in (None, "image-classification"):
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
