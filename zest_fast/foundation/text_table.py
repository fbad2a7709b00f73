"""Plain-text tables for `repr`, and names from files and models made fit to be printed."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligned columns, the first `left` of them to the left, the others (numbers) to the right."""
    header, rows = [printable(cell) for cell in header], [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    lines = []
    for line in (header, *rows):
        cells = [
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Of Markdown: the first column is text and the others are figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def number(value: float) -> str:
    """Four significant digits: enough to compare, short enough to read."""
    return f"{value:.4g}"


def first_line(error: BaseException, empty: str | None = None) -> str:
    """Of an error that is not ours, for a message of ours; `empty`, or else its class, where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__ if empty is None else empty)


def shorten(name: str, width: int = 44) -> str:
    """Leave out the middle of a long layer name: block numbers at the front and the type at the end both matter."""
    if len(name) <= width:
        return name
    head = (width - 1) // 2
    return f"{name[:head]}…{name[head + 1 - width :]}"


def printable(text: str) -> str:
    """`text` with what a terminal obeys (escapes, line breaks, text that runs backwards) as \\x1b, \\n, \\u202e.

    A backslash of its own stays as it is: layer names have none, and a path keeps its spelling.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)
