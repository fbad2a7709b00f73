"""Tokens with a tag each: of a list of words and one of tags, or of spans of a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zest_fast.integrations.data.labels import class_names, label_names, shortened
from zest_fast.integrations.data.tables import Table
from zest_fast.integrations.data.tokens import IGNORED, Tokens

OUTSIDE = "O"
_SPAN_LABELS = ("label", "type", "entity")


def tag_names(table: Table, column: str, kind: str) -> tuple[str, ...]:
    """The classes of a token: the tags that occur, or of spans "O", "B-" and "I-" with each label."""
    if kind == "tags":
        return class_names([tag for tags in table.column(column) for tag in tags])
    labels = {span[2] for place, spans in _spans(table, column) for span in spans}
    return tuple(sorted({OUTSIDE, *(f"{mark}-{label}" for label in labels for mark in "BI")}))


def encode_tags(
    table: Table, texts: str, column: str, kind: str, tokenizer: Any, names: Sequence[str], length: int
) -> tuple[list[Tokens], list[str]]:
    """Tokens with the tag of each word on its first token, and notes on what was lost.

    Raises ValueError, naming the row, for lists of different lengths and spans that are none.
    """
    if not tokenizer.is_fast:
        raise ValueError("the tokenizer cannot say which tokens belong to a word (it has no tokenizer.json)")
    order = {name: index for index, name in enumerate(names)}
    read = _tagged_words if kind == "tags" else _tagged_spans
    samples, lost, inside = [], 0, 0
    for place, row in zip(table.places, _rows(table, texts, column, kind), strict=True):
        encoded, tags, cut_words = read(f"{table.path}, {place}", *row, tokenizer, length)
        inside += cut_words
        labels, seen = [], set()
        for word in encoded.word_ids():
            first = word is not None and word not in seen
            seen.add(word)
            labels.append(order[_known(tags[word], order)] if first else IGNORED)
        lost += len(tags) - len(seen - {None})
        samples.append(Tokens(list(encoded["input_ids"]), labels))
    notes = [f"{lost} words have no token within the first {length}, and their tags are left out"] if lost else []
    if inside:
        notes.append(f"{inside} spans begin or end within a word, which is tagged as a whole")
    return samples, notes


def _known(tag: str, order: Mapping[str, int]) -> str:
    if tag not in order:
        raise ValueError(f"label {tag!r} is none of the model's classes: {', '.join(order)}")
    return tag


def _rows(table: Table, texts: str, column: str, kind: str) -> list[tuple[Any, Any]]:
    if kind == "tags":
        return list(zip(table.column(texts), table.column(column), strict=True))
    return list(zip(table.column(texts), (spans for _, spans in _spans(table, column)), strict=True))


def _tagged_words(place: str, words: Any, tags: Any, tokenizer: Any, length: int) -> tuple[Any, list[str], int]:
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words) or not words:
        raise ValueError(f"{place}: {shortened(words)} is no list of words")
    if not isinstance(tags, list) or len(tags) != len(words):
        found = len(tags) if isinstance(tags, list) else shortened(tags)
        raise ValueError(f"{place}: {len(words)} words and {found} tags; each word needs one")
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=length)
    return encoded, label_names(tags), 0


def _tagged_spans(place: str, text: Any, spans: Any, tokenizer: Any, length: int) -> tuple[Any, list[str], int]:
    if not isinstance(text, str):
        raise ValueError(f"{place}: {shortened(text)} is no text")
    whole = tokenizer(text, add_special_tokens=False)
    words = [
        whole.word_to_chars(word) for word in range(max((w for w in whole.word_ids() if w is not None), default=-1) + 1)
    ]
    for word in words:
        if len(text[slice(*word)].split()) > 1:
            raise ValueError(
                f"{place}: the tokenizer takes {shortened(text[slice(*word)])} for one word, and spans are tags of "
                "words: write the words and their tags as lists instead (columns tokens, tags)"
            )
    tags, inside, end_before = [OUTSIDE] * len(words), 0, 0
    for start, end, label in sorted(spans):
        if not 0 <= start < end <= len(text):
            raise ValueError(f"{place}: the span {start} to {end} is not within the {len(text)} characters of the text")
        if start < end_before:
            raise ValueError(f"{place}: the span {start} to {end} overlaps another, and a token has one tag")
        end_before = end
        first, last = _without_blanks(text, start, end)  # a blank belongs to the word after it in many a tokenizer
        covered = [index for index, word in enumerate(words) if word.start < last and first < word.end]
        if not covered:
            raise ValueError(f"{place}: the span {start} to {end} covers no word ({text[start:end]!r})")
        if tags[covered[0]] != OUTSIDE:
            raise ValueError(
                f"{place}: two spans lie in the word {text[slice(*words[covered[0]])]!r}; a token has one tag"
            )
        inside += text[first:last] != text[words[covered[0]].start : words[covered[-1]].end].strip()
        for number, index in enumerate(covered):
            tags[index] = f"{'I' if number else 'B'}-{label}"
    return tokenizer(text, truncation=True, max_length=length), tags, inside


def _without_blanks(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    first = start + len(piece) - len(piece.lstrip())
    return first, max(first, end - len(piece) + len(piece.rstrip()))


def _spans(table: Table, column: str) -> list[tuple[str, list[tuple[int, int, str]]]]:
    found = []
    for place, spans in zip(table.places, table.column(column), strict=True):
        if not isinstance(spans, list):
            raise ValueError(f"{table.path}, {place}: column {column!r} is {shortened(spans)}, and spans are a list")
        found.append((place, [_span(span, f"{table.path}, {place}") for span in spans]))
    return found


def _span(span: Any, place: str) -> tuple[int, int, str]:
    if isinstance(span, Mapping):
        labels = [span[name] for name in _SPAN_LABELS if isinstance(span.get(name), str)]
        span = [span.get("start"), span.get("end"), *labels]
    if isinstance(span, list) and len(span) == 3 and all(type(s) is int for s in span[:2]) and isinstance(span[2], str):
        return span[0], span[1], span[2]
    raise ValueError(f"{place}: {shortened(span)} is no span; one has start, end (characters) and label")
