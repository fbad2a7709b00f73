"""Which task a table is for, and which of its columns are what: by options, the model's head and the columns' names.

What is taken for what is said in a line (`loaders.py`); what could be two things is refused, with the option that says
which. Known names of columns are those of the hub's usual data sets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from zest_fast.foundation.nearest import nearest, some
from zest_fast.integrations.data.labels import are_lists, are_numbers, have_fractions
from zest_fast.integrations.data.tables import Table

Kind = Literal["texts", "chat", "prompts", "instructions", "tags", "spans", "sequences"]


@dataclass(frozen=True)
class Form:
    """How a table is read. texts, labels: columns; two of texts are pairs, or a prompt and what is to follow it."""

    task: str
    kind: Kind
    texts: tuple[str, ...]
    labels: tuple[str, ...] = ()


LABELLED = ("text-classification", "regression", "multi-label")

_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "answer"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
)
_LABELS = ("label", "labels")
_CAUSAL: Mapping[tuple[str, ...], Kind] = {
    ("messages",): "chat",
    ("conversations",): "chat",
    ("conversation",): "chat",
    ("prompt", "completion"): "prompts",
    ("prompt", "response"): "prompts",
    ("question", "answer"): "prompts",
    ("instruction", "input", "output"): "instructions",
    ("instruction", "input", "response"): "instructions",
    ("instruction", "context", "response"): "instructions",
    ("instruction", "output"): "instructions",
    ("instruction", "response"): "instructions",
    ("text",): "texts",
}
_TAGS = ("tags", "ner_tags", "pos_tags", "chunk_tags", "labels")
_SPANS = ("entities", "spans")
_SEQUENCES = (
    ("source", "target"),
    ("text", "target"),
    ("text", "summary"),
    ("document", "summary"),
    ("dialogue", "summary"),
    ("article", "highlights"),
    ("input", "target"),
    ("prompt", "completion"),
    ("question", "answer"),
)
_KNOWN = {
    "text-classification": "text or a pair such as sentence1, sentence2; and label",
    "causal-lm": "text; messages or conversations; prompt, completion; or instruction, input, output",
    "token-classification": "tokens and tags (ner_tags, pos_tags); or text and entities (spans)",
    "seq2seq-lm": "source, target; text, summary; or other two, named",
}


def recognise(
    table: Table,
    *,
    task: str | None = None,
    made_for: str | None = None,
    single_output: bool = False,
    text_column: str | None = None,
    label_column: str | None = None,
) -> Form:
    """The form of a table.

    task: what the user says; None = by columns and model. made_for: the task of the checkpoint, None where it does not
        say. single_output: its head has one output, and it does not say for what.
    text_column, label_column: names, separated by commas; None = by the names that are known.
    Raises ValueError that names the columns where nothing fits, where two things do, and for preference pairs.
    """
    texts, labels = _named(table, text_column), _named(table, label_column)
    if texts is None:
        _refuse_preferences(table)
    family = _family(table, task, made_for, texts, labels)
    if family == "causal-lm":
        return _causal(table, texts)
    if family == "token-classification":
        return _tagged(table, texts, labels)
    if family == "seq2seq-lm":
        return _sequences(table, texts, labels)
    if family == "image-classification":
        raise ValueError(
            f"{table.path} is a table, and an image classifier needs a folder of images or module:function"
        )
    return _labelled(table, task, made_for, single_output, texts, labels)


def _named(table: Table, joined: str | None) -> tuple[str, ...] | None:
    """Columns that an option names; ValueError for one that is not there."""
    if joined is None:
        return None
    names = (joined,) if joined in table.columns else tuple(name.strip() for name in joined.split(","))
    for name in names:
        if name not in table.columns:
            raise ValueError(f"{table.path} has no column {name!r}; {nearest(name, table.columns)}")
    if len(set(names)) < len(names):
        raise ValueError(f"the columns {joined!r} name one twice")
    return names


def _refuse_preferences(table: Table) -> None:
    columns = table.columns
    unpaired = {"prompt", "completion", "label"} <= columns.keys() and all(
        isinstance(value, bool) for value in columns["label"]
    )
    if {"chosen", "rejected"} <= columns.keys() or unpaired:
        found = "'prompt', 'completion' and a 'label' of true and false" if unpaired else "'chosen' and 'rejected'"
        raise ValueError(
            f"{table.path} holds preferences (columns {found}), which no loss here learns from: train them with TRL's "
            "DPOTrainer or KTOTrainer and zest_fast.integrations.trainer.ZestCallback, or name columns to be read "
            "otherwise with text_column="
        )


def _family(
    table: Table, task: str | None, made_for: str | None, texts: Sequence[str] | None, labels: Sequence[str] | None
) -> str:
    if task is not None:
        return task
    if labels is not None and made_for not in ("token-classification", "seq2seq-lm"):
        tagged = texts is not None and all(are_lists(table.columns[name]) for name in (texts[0], labels[0]))
        return "token-classification" if tagged else "text-classification"
    if made_for is not None:
        return made_for
    forms = _forms_of(table)
    labelled, tags = bool(forms["text-classification"]), bool(forms["token-classification"])
    if labelled != tags:
        return "token-classification" if tags else "text-classification"
    return "causal-lm"


def _causal(table: Table, texts: tuple[str, ...] | None) -> Form:
    found = texts or _only(table, "causal-lm", _largest(_of(table, _CAUSAL)))
    if len(found) > 3:
        raise ValueError(
            f"{some(found)} are {len(found)} columns, and causal-lm reads at most three: {_KNOWN['causal-lm']}"
        )
    by_number: dict[int, Kind] = {2: "prompts", 3: "instructions"}
    kind = _CAUSAL.get(found) or by_number.get(len(found)) or "texts"
    if kind == "texts" and any(isinstance(value, list) for value in table.columns[found[0]][:1]):
        kind = "chat"
    return Form("causal-lm", kind, found)


def _labelled(
    table: Table,
    task: str | None,
    made_for: str | None,
    single_output: bool,
    texts: tuple[str, ...] | None,
    labels: tuple[str, ...] | None,
) -> Form:
    if texts is not None and len(texts) > 2:
        raise ValueError(
            f"text_column={','.join(texts)} names {len(texts)} columns, and a classifier reads one or a pair"
        )
    if texts is None:
        texts = _only(table, "text-classification", _of(table, (("text",), *_PAIRS)))
    if labels is None:
        labels = _only(table, "text-classification", _of(table, _one_each(_LABELS)), "label_column=")
    if twice := set(texts) & set(labels):
        raise ValueError(f"--label-column and --text-column are both {min(twice)!r}: each text would be a class")
    task = task or _task_of(table, labels, made_for, single_output)
    if len(labels) > 1 and task != "multi-label":
        raise ValueError(
            f"{some(labels)} are {len(labels)} columns of labels, and {task} has one; several are multi-label"
        )
    return Form(task, "texts", texts, labels)


def _task_of(table: Table, labels: tuple[str, ...], made_for: str | None, single_output: bool) -> str:
    if len(labels) > 1:
        return "multi-label"
    values = table.column(labels[0])
    if are_lists(values):
        return "multi-label"
    if have_fractions(values) or (made_for == "regression" and are_numbers(values)):
        return "regression"
    if single_output and are_numbers(values):
        raise ValueError(
            f"the labels of column {labels[0]!r} are whole numbers and the model has one output, which may be classes "
            "for a new head or numbers to predict: say task=text-classification or task=regression"
        )
    return "text-classification"


def _tagged(table: Table, texts: tuple[str, ...] | None, labels: tuple[str, ...] | None) -> Form:
    if texts is None:
        among = ("tokens", "words") if labels is None or are_lists(table.columns[labels[0]]) else ()
        texts = _only(table, "token-classification", _of(table, _one_each((*among, "text")))[:1])
    tags = any(isinstance(value, list) for value in table.columns[texts[0]][:1])
    if labels is None:
        names = _one_each(_TAGS if tags else _SPANS)
        labels = _only(table, "token-classification", _of(table, names), "label_column=")
    if len(texts) > 1 or len(labels) > 1:
        raise ValueError(
            f"token-classification reads one column of tokens and one of tags: {_KNOWN['token-classification']}"
        )
    return Form("token-classification", "tags" if tags else "spans", texts, labels)


def _sequences(table: Table, texts: tuple[str, ...] | None, labels: tuple[str, ...] | None) -> Form:
    found = (*(texts or ()), *(labels or ()))
    if not found:
        found = _only(table, "seq2seq-lm", _of(table, _SEQUENCES))
    if len(found) != 2:
        raise ValueError(
            f"{some(found)}: seq2seq-lm reads a column of sources and one of targets: text_column=source,target"
        )
    return Form("seq2seq-lm", "sequences", found[:1], found[1:])


def _forms_of(table: Table) -> dict[str, list[tuple[str, ...]]]:
    """The columns that each task would know."""
    texts = _of(table, (("text",), *_PAIRS)) if _of(table, _one_each(_LABELS)) else []
    tagged = [("tokens", name) for name in _TAGS] + [("text", name) for name in _SPANS]
    known = {"causal-lm": _CAUSAL, "token-classification": tagged, "seq2seq-lm": _SEQUENCES}
    return {"text-classification": texts, **{task: _of(table, forms) for task, forms in known.items()}}


def _one_each(names: Iterable[str]) -> list[tuple[str, ...]]:
    return [(name,) for name in names]


def _of(table: Table, known: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    return [names for names in known if set(names) <= table.columns.keys()]


def _largest(found: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Without those that are parts of another one."""
    return [names for names in found if not any(set(names) < set(other) for other in found)]


def _only(table: Table, task: str, found: list[tuple[str, ...]], option: str = "text_column=") -> tuple[str, ...]:
    if len(found) == 1:
        return found[0]
    columns = some(map(repr, table.columns), 8)
    if not found:
        others = [f"task={other}" for other, forms in _forms_of(table).items() if forms and other != task]
        raise ValueError(
            f"{table.path} has the columns {columns}, and {task} knows {_KNOWN[task]}; name others with {option}"
            + (f", or say {' or '.join(others)}, which knows these" if others else "")
        )
    either = " or ".join(f"{option}{','.join(names)}" for names in found)
    raise ValueError(
        f"{table.path} has the columns {columns}, which may be read in {len(found)} ways for {task}: say {either}"
    )


def uses_template(table: Table, form: Form) -> bool:
    """Whether samples are conversations, or can be."""
    messages = form.kind == "prompts" and isinstance(table.columns[form.texts[0]][0], list)
    return messages or form.kind in ("chat", "instructions")
