"""Samples as numbers of tokens with a label each, and the batches that they are padded to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zest_fast.integrations.pretrained import LoadedModel

IGNORED = -100  #: the target that cross-entropy leaves out


@dataclass(frozen=True)
class Tokens:
    """ids: what the model reads. labels: as many, IGNORED where nothing is learnt; of a target sequence, its own."""

    ids: list[int]
    labels: list[int]


def tokenizer_of(loaded: LoadedModel) -> Any:
    """Raises ValueError where the model has none."""
    tokenizer = loaded.processor
    if tokenizer is None or not callable(getattr(tokenizer, "tokenize", None)):
        raise ValueError(
            f"texts need a tokenizer and {loaded.source!r} has none; use a folder with one, or data as module:function"
        )
    return tokenizer


def own_start(tokenizer: Any) -> str:
    """The special token that the tokenizer puts before each text; "" where it puts none."""
    start = tokenizer.bos_token
    return start if start and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else ""


def longest_of(loaded: LoadedModel, max_length: int | None) -> int:
    """Tokens of a sample: as wished, or what both tokenizer and positions can take (one that knows no limit says 1e30).

    Raises ValueError for more than that.
    """
    positions = getattr(loaded.model.config, "max_position_embeddings", None) or 512
    most = min(tokenizer_of(loaded).model_max_length, positions)
    if max_length is not None and max_length > most:
        raise ValueError(f"max length {max_length}: {loaded.source!r} takes {most} tokens at most")
    return max_length or most


def check_vocabulary(loaded: LoadedModel, largest: int) -> None:
    """Raises ValueError for a token that the model has no row for."""
    embedding = loaded.model.get_input_embeddings()  # type: ignore[operator]
    vocabulary = getattr(embedding, "num_embeddings", math.inf)
    if largest >= vocabulary:
        unknown = tokenizer_of(loaded).convert_ids_to_tokens(largest)
        raise ValueError(
            f"token {unknown!r} is beyond the {vocabulary} that {loaded.source!r} embeds; wrong tokenizer?"
        )


def cut(samples: Sequence[Tokens], length: int, *, shifted: bool) -> tuple[list[Tokens], list[str]]:
    """At most `length` tokens of each, without those of which no label is left; and notes that say how many.

    shifted: the label of a place is learnt at the place before, so that the first is not.
    Raises ValueError where most have none left.
    """
    shortened = [Tokens(sample.ids[:length], sample.labels[:length]) for sample in samples]
    kept = [sample for sample in shortened if _learnt(sample, shifted)]
    lost = len(samples) - len(kept)
    if lost > len(samples) / 2:
        raise ValueError(
            f"{lost} of {len(samples)} samples have nothing left to learn from in their first {length} tokens (the "
            "rest is cut off); allow more with max_length=, or shorten the prompts"
        )
    longer = sum(len(sample.ids) > length for sample in samples)
    notes = [f"{longer} of {len(samples)} samples are longer than {length} tokens and are cut"] if longer else []
    if lost:
        notes.append(f"{lost} of {len(samples)} samples have no label left once they are cut, and are left out")
    return kept, notes


def _learnt(sample: Tokens, shifted: bool) -> bool:
    return any(label != IGNORED for label in sample.labels[1 if shifted else 0 :])


def share_learnt(samples: Sequence[Tokens]) -> str:
    """ "38 % of 5,120 tokens"."""
    count = sum(len(sample.ids) for sample in samples)
    learnt = sum(label != IGNORED for sample in samples for label in sample.labels)
    return f"{learnt / max(count, 1):.0%} of {count:,} tokens".replace("%", " %")


def token_collate(
    loaded: LoadedModel, samples: Sequence[Tokens], *, same_length: bool
) -> Callable[[list[Tokens]], dict[str, torch.Tensor]]:
    """Pads on the right, labels with IGNORED; to the longest of all samples, or of each batch."""
    padding = tokenizer_of(loaded).pad_token_id or 0
    widths = (_widest(samples, "ids"), _widest(samples, "labels")) if same_length else (0, 0)

    def collate(batch: list[Tokens]) -> dict[str, torch.Tensor]:
        width = max(widths[0], _widest(batch, "ids"))
        labels = max(widths[1], _widest(batch, "labels"))
        return {
            "input_ids": torch.tensor([_padded(sample.ids, width, padding) for sample in batch]),
            "attention_mask": torch.tensor([_padded([1] * len(sample.ids), width, 0) for sample in batch]),
            "labels": torch.tensor([_padded(sample.labels, labels, IGNORED) for sample in batch]),
        }

    return collate


def _widest(samples: Sequence[Tokens], name: str) -> int:
    return max((len(getattr(sample, name)) for sample in samples), default=0)


def _padded(values: list[int], width: int, filling: int) -> list[int]:
    return values + [filling] * (width - len(values))
