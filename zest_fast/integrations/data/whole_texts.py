"""Texts as a whole, one a sample or two, tokenised with their batch: of classifiers, and of a language model.

A classifier's labels are classes, numbers, or several a row; a language model learns every token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from zest_fast.foundation.nearest import some
from zest_fast.integrations.data.forms import Form
from zest_fast.integrations.data.labels import (
    LabelSets,
    encode_labels,
    label_names,
    sets_of_columns,
    sets_of_lists,
    strange_classes,
    targets_of,
)
from zest_fast.integrations.data.reading import Samples, parts_of, second, texts_of
from zest_fast.integrations.data.tables import Table
from zest_fast.integrations.data.tokens import IGNORED, check_vocabulary, longest_of, own_start, tokenizer_of
from zest_fast.integrations.pretrained import LoadedModel

_LOOKED_AT = 64  # texts whose tokens are counted


def read_texts(data: Table, form: Form, loaded: LoadedModel, max_length: int | None, same_length: bool) -> Samples:
    tokenizer = tokenizer_of(loaded)
    limit, columns = longest_of(loaded, max_length), form.texts
    parts = []
    start = own_start(tokenizer) if form.task == "causal-lm" else ""  # which may be written in the texts already
    for part in parts_of(data):
        texts = list(
            zip(*([t.removeprefix(start) or t for t in texts_of(part, name)] for name in columns), strict=True)
        )
        parts.append(list(zip(texts, _labels(part, form, loaded), strict=True)))
    first = [texts for texts, _ in parts[0]]
    length = None
    notes = _unknown_words([" ".join(texts) for texts in first[:_LOOKED_AT]], tokenizer)
    notes += _cut_off(first[:_LOOKED_AT], tokenizer, limit)
    if same_length:
        every = [texts for part in parts for texts, _ in part]
        length = max(len(ids) for ids in tokenizer(*_columns(every), truncation=True, max_length=limit)["input_ids"])
        notes = [f"texts are padded to {length} tokens, as many as the longest has", *notes]
    if form.task == "text-classification":
        notes = [*strange_classes(label_names(data.column(form.labels[0]))), *notes]
    collate = _text_collate(loaded, limit, length, form.task)
    return Samples(parts[0], collate, _taken_texts(data, form), tuple(notes), second(parts))


def _labels(data: Table, form: Form, loaded: LoadedModel) -> list[Any]:
    if form.task == "regression":
        name = form.labels[0]
        try:
            return targets_of(data.column(name), data.places, name)
        except ValueError as error:
            raise _in(data, error) from None
    if form.task == "multi-label":
        sets = label_sets(data, form.labels)
        if len(form.labels) > 1 and (missing := [name for name in loaded.class_names or () if name not in sets.names]):
            raise ValueError(
                f"{data.path}: the model has the labels {some(missing)}, of which no column says whether they are "
                "there; name a column for each with label_column="
            )
        return sets.encoded(loaded.class_names)
    if form.task == "text-classification":
        return encode_labels(data.column(form.labels[0]), loaded.class_names)
    return [None] * len(data.places)


def label_sets(data: Table, columns: Sequence[str]) -> LabelSets:
    try:
        if len(columns) > 1:
            return sets_of_columns({name: data.column(name) for name in columns}, data.places)
        return sets_of_lists(data.column(columns[0]), data.places, columns[0])
    except ValueError as error:
        raise _in(data, error) from None


def _in(data: Table, error: ValueError) -> ValueError:
    """An error of a row, with the file that it is in."""
    text = str(error)
    return error if text.startswith(str(data.path)) else ValueError(f"{data.path}, {text}")


def _columns(texts: Sequence[tuple[str, ...]]) -> list[list[str]]:
    """Of one text a sample, or two."""
    return [list(column) for column in zip(*texts, strict=True)]


def _taken_texts(data: Table, form: Form) -> str:
    texts = " and ".join(map(repr, form.texts))
    read = f"pairs of texts of columns {texts}" if len(form.texts) > 1 else f"texts of column {texts}"
    if form.task == "causal-lm":
        return f"{read}, loss on every token"
    what = {"text-classification": "classes", "regression": "numbers", "multi-label": "labels, several a row,"}
    many = "columns" if len(form.labels) > 1 else "column"
    return f"{read}, {what[form.task]} of {many} {' and '.join(map(repr, form.labels))} ({form.task})"


def _unknown_words(texts: list[str], tokenizer: Any) -> list[str]:
    """A note where most tokens of the first texts are unknown: they say nothing, and look all alike to the model."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None:
        return []
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    share = ids.count(unknown) / max(len(ids), 1)
    return [f"{share:.0%} of the tokens are unknown to the tokenizer: is it for this language?"] if share > 0.5 else []


def _cut_off(texts: Sequence[tuple[str, ...]], tokenizer: Any, limit: int) -> list[str]:
    longer = sum(len(ids) > limit for ids in tokenizer(*_columns(texts), verbose=False)["input_ids"])
    return [f"{longer} of the first {len(texts)} texts are longer than {limit} tokens and are cut"] if longer else []


def _text_collate(
    loaded: LoadedModel, limit: int, length: int | None, task: str
) -> Callable[[list[tuple[tuple[str, ...], Any]]], Any]:
    """length: to pad to; None = to the longest of each batch."""
    tokenizer = tokenizer_of(loaded)
    accepted = inspect.signature(loaded.model.forward).parameters
    padding: dict[str, Any] = {"padding": True, "truncation": True, "max_length": limit}
    # Many a tokenizer is saved with padding on the left, to generate: learned positions would be counted from there.
    padding["padding_side"] = "left" if loaded.model.config.model_type == "xlnet" else "right"  # type: ignore[union-attr]
    if length is not None:
        padding |= {"padding": "max_length", "max_length": length}

    def collate(examples: list[tuple[tuple[str, ...], Any]]) -> dict[str, torch.Tensor]:
        texts, labels = zip(*examples, strict=True)
        encoded = tokenizer(*_columns(texts), return_tensors="pt", **padding)
        check_vocabulary(loaded, int(encoded["input_ids"].max()))
        batch = {name: tensor for name, tensor in encoded.items() if name in accepted}
        if task == "causal-lm":
            batch["labels"] = batch["input_ids"].masked_fill(encoded["attention_mask"] == 0, IGNORED)
        else:
            batch["labels"] = torch.tensor(labels)
        return batch

    return collate
