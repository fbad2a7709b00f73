"""Batches of the user's data: what was read (`sources.py`), in the form that was found (`forms.py`), for a model.

They come after the model is loaded, since they need its tokenizer or image processor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from zest_fast.foundation.nearest import some
from zest_fast.integrations.data.forms import Form, recognise
from zest_fast.integrations.data.images import ImageFolder, image_collate
from zest_fast.integrations.data.labelled_tokens import read_tokens
from zest_fast.integrations.data.labels import class_names, encode_labels
from zest_fast.integrations.data.reading import Samples, parts_of, second
from zest_fast.integrations.data.sources import Loaders
from zest_fast.integrations.data.tables import Table
from zest_fast.integrations.data.tags import tag_names
from zest_fast.integrations.data.whole_texts import label_sets, read_texts
from zest_fast.integrations.pretrained import LoadedModel


def make_loaders(
    data: Table | ImageFolder | Loaders,
    loaded: LoadedModel,
    *,
    batch_size: int,
    validation_share: float = 0.0,
    seed: int = 0,
    form: Form | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    max_length: int | None = None,
    image_size: int | None = None,
    same_length: bool = False,
    chat_template: str | None = None,
) -> Loaders:
    """Batches of `data` for the model, shuffled and split by `seed`; DataLoaders of the user pass through as they are.

    form: how a table is read; None = as its columns, the model's task and text_column, label_column tell.
    validation_share: is not used where the data bring a part of their own that scores.
    max_length: tokens kept of a sample; None = what the tokenizer and the model's positions allow.
    same_length: pad every sample to the tokens of the longest, so that it is the same in every batch.
    image_size: pixels of both sides of an image, then scaled to 0..1 and normalised with ImageNet's mean and deviation;
        None = the model's image processor, or where it has none the size in its configuration, or 224.
    chat_template: of a chat, instead of the tokenizer's own, whose it becomes.
    Raises ValueError, naming file and row, for what does not fit the form.
    """
    if isinstance(data, Loaders):
        return data
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}: it has to be 1 or more")
    if isinstance(data, ImageFolder):
        read = _images(data, loaded, image_size)
    else:
        form = form or recognise(data, made_for=loaded.task, text_column=text_column, label_column=label_column)
        if form.kind == "texts":
            read = read_texts(data, form, loaded, max_length, same_length)
        else:
            read = read_tokens(data, form, loaded, max_length, same_length, chat_template)
    own = data.validation
    train, validation = (read.train, read.validation) if own else _split(read.train, validation_share, seed)
    taken = f"{read.taken}; {own.path.name} scores" if own else read.taken
    if form is not None and (unused := _unused(data, form)):
        taken += f"; {unused} not used"
    shuffle = torch.Generator().manual_seed(seed)
    return Loaders(
        DataLoader(train, batch_size, shuffle=True, generator=shuffle, collate_fn=read.collate),
        DataLoader(validation, batch_size, collate_fn=read.collate) if len(validation) else None,
        tuple(read.notes),
        taken,
    )


def names_of(data: Table | ImageFolder, form: Form | None) -> tuple[str, ...] | None:
    """What the outputs of a head for these data are called; None where it has no classes.

    Raises ValueError where labels are no classes, and for ones of the part that scores which no sample trains.
    """
    found = _names_of(data, form)
    if found is not None and data.validation is not None:
        other = _names_of(data.validation, form)
        if unknown := sorted(set(other or ()) - set(found)):
            raise ValueError(
                f"{data.validation.path} has the classes {some(unknown)}, and nothing that trains has them"
            )
    return found


def _names_of(data: Table | ImageFolder, form: Form | None) -> tuple[str, ...] | None:
    if isinstance(data, ImageFolder):
        return class_names(data.labels)
    if form is None or form.task in ("causal-lm", "seq2seq-lm", "regression"):
        return None
    if form.task == "token-classification":
        return tag_names(data, form.labels[0], form.kind)
    if form.task == "multi-label":
        return label_sets(data, form.labels).names
    return class_names(data.column(form.labels[0]))


def _images(data: ImageFolder, loaded: LoadedModel, image_size: int | None) -> Samples:
    parts = [
        list(zip(part.files, encode_labels(part.labels, loaded.class_names or class_names(data.labels)), strict=True))
        for part in parts_of(data)
    ]
    taken = f"images in {len(set(data.labels))} sub-folders, one a class"
    return Samples(parts[0], image_collate(loaded, image_size), taken, validation=second(parts))


def _unused(data: Any, form: Form) -> str:
    """Of columns whose names say that they matter."""
    used = {"chat": ("system", "tools"), "instructions": ("system", "history")}.get(form.kind, ())
    names = ("label", "labels", "system", "tools", "history", "input", "context")
    found = [repr(name) for name in names if name in data.columns and name not in (*form.texts, *form.labels, *used)]
    return (
        f"column{'s' if len(found) > 1 else ''} {', '.join(found)} {'are' if len(found) > 1 else 'is'}" if found else ""
    )


def _split(examples: list[Any], share: float, seed: int) -> tuple[Subset[Any], Subset[Any]]:
    if not 0.0 <= share < 1.0:
        raise ValueError(f"validation share {share}: it has to be at least 0 and below 1")
    held_out = round(len(examples) * share)
    if share > 0 and not 0 < held_out < len(examples):
        raise ValueError(f"{len(examples)} examples are too few for a validation share of {share}")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return Subset(examples, order[held_out:]), Subset(examples, order[:held_out])  # type: ignore[arg-type]
