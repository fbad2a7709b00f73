"""The paper's data sets: where the hub keeps them, what their rows look like, and with which rates they are trained.

Rates, decay and epochs are those of the paper's section 4.1. It names neither batch size nor schedule: ours are 16
sequences or 32 images, and a linear decay to zero. Multiple choice is prompted and scored as the Language Model
Evaluation Harness does it (v0.4: acc and acc_norm). GLUE's STS-B is left out: it is a regression.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """weight_decay: of AdamW, decoupled."""

    lr: float
    weight_decay: float
    epochs: int
    batch_size: int


LLAMA = Recipe(lr=2e-5, weight_decay=1e-2, epochs=3, batch_size=16)
BERT = Recipe(lr=5e-5, weight_decay=1e-2, epochs=3, batch_size=32)
CIFAR = Recipe(lr=3e-4, weight_decay=5e-4, epochs=30, batch_size=32)
CUB = Recipe(lr=6e-4, weight_decay=5e-4, epochs=30, batch_size=32)


@dataclass(frozen=True)
class Item:
    """A question: one of `choices` continues `context`, after a space."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Labelled:
    """One sample of a classifier: a text, a pair of texts, or an image (path, bytes or Pillow's)."""

    sample: Any
    label: int


@dataclass(frozen=True)
class DataSet:
    """kind: choice, text or image. evaluated: the split that the hub has labels for."""

    kind: str
    hub: str
    config: str | None
    evaluated: str
    read: Callable[[Row], Item | Labelled]
    recipe: Recipe


def _arc(row: Row) -> Item:
    labels = list(row["choices"]["label"])
    return Item(f"Question: {row['question']}\nAnswer:", tuple(row["choices"]["text"]), labels.index(row["answerKey"]))


def _openbookqa(row: Row) -> Item:
    labels = list(row["choices"]["label"])
    return Item(row["question_stem"], tuple(row["choices"]["text"]), labels.index(row["answerKey"].strip()))


def _hellaswag(row: Row) -> Item:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return Item(_cleaned(context), tuple(_cleaned(ending) for ending in row["endings"]), int(row["label"]))


def _cleaned(text: str) -> str:
    """Without the marks that WikiHow's articles left in HellaSwag."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _piqa(row: Row) -> Item:
    return Item(f"Question: {row['goal']}\nAnswer:", (row["sol1"], row["sol2"]), int(row["label"]))


def _sciq(row: Row) -> Item:
    context = f"{row['support']}\nQuestion: {row['question']}\nAnswer:".lstrip()
    return Item(context, (row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]), 3)


def _glue(*columns: str) -> Callable[[Row], Labelled]:
    return lambda row: Labelled(tuple(row[column] for column in columns), int(row["label"]))


def _choice(hub: str, config: str | None, evaluated: str, read: Callable[[Row], Item]) -> DataSet:
    return DataSet("choice", hub, config, evaluated, read, LLAMA)


def _of_glue(config: str, *columns: str, evaluated: str = "validation") -> DataSet:
    return DataSet("text", "nyu-mll/glue", config, evaluated, _glue(*columns), BERT)


DATASETS = {
    "arc-e": _choice("allenai/ai2_arc", "ARC-Easy", "test", _arc),
    "arc-c": _choice("allenai/ai2_arc", "ARC-Challenge", "test", _arc),
    "hellaswag": _choice("Rowan/hellaswag", None, "validation", _hellaswag),
    "piqa": _choice("ybisk/piqa", None, "validation", _piqa),
    "openbookqa": _choice("allenai/openbookqa", "main", "test", _openbookqa),
    "sciq": _choice("allenai/sciq", None, "test", _sciq),
    "cola": _of_glue("cola", "sentence"),
    "sst2": _of_glue("sst2", "sentence"),
    "mrpc": _of_glue("mrpc", "sentence1", "sentence2"),
    "qqp": _of_glue("qqp", "question1", "question2"),
    "mnli": _of_glue("mnli", "premise", "hypothesis", evaluated="validation_matched"),
    "qnli": _of_glue("qnli", "question", "sentence"),
    "rte": _of_glue("rte", "sentence1", "sentence2"),
    "wnli": _of_glue("wnli", "sentence1", "sentence2"),
    "cifar100": DataSet(
        "image", "uoft-cs/cifar100", None, "test", lambda row: Labelled(row["img"], int(row["fine_label"])), CIFAR
    ),
    "cub": DataSet(
        "image",
        "bentrevett/caltech-ucsd-birds-200-2011",
        None,
        "test",
        lambda row: Labelled(row["image"], int(row["label"])),
        CUB,
    ),
}
