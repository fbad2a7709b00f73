"""The code blocks of a page of the docs, and how each of them is run.

What readers need not see is in a comment, `<!-- hidden ... -->`. A comment before a fence says how its block is tested:

- `<!-- test: compile (why) -->`: Python that needs the hub, a GPU or minutes; compiled only.
- `<!-- test: raises KIND, text -->`: Python that has to raise this error with this text in it.
- `<!-- test: run -->`: every `zest-fast` line of a shell block is run.
- `<!-- test: parse -->`: its lines are read by the command's own parser, so that arguments and options exist.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

_BLOCK = re.compile(
    r"<!-- hidden\n(?P<hidden>.*?)-->|(?:<!-- test: (?P<test>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass
class Block:
    """language: "python", "sh", or "" for pictures. line: of its first line of code, from 1 on. span: of all of it in
    the page, comments and fences included."""

    language: str
    code: str
    test: str
    line: int
    hidden: bool
    span: tuple[int, int]


def blocks(text: str) -> Iterator[Block]:
    for found in _BLOCK.finditer(text):
        hidden = found["hidden"] is not None
        group = "hidden" if hidden else "code"
        line = text.count("\n", 0, found.start(group)) + 1
        language = "python" if hidden else found["language"]
        yield Block(language, found[group], found["test"] or "", line, hidden, found.span())


def commands(block: Block) -> list[list[str]]:
    """The arguments of each `zest-fast` line."""
    return [
        shlex.split(line, comments=True)[1:]
        for line in block.code.replace("\\\n", " ").splitlines()
        if line.startswith("zest-fast ")
    ]
