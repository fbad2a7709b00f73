"""Pieces of HTML for notebooks and pages: escaped, without colours of their own, and with nothing from elsewhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Collection, Sequence
from typing import Any

from zest_fast.foundation.text_table import printable

_LEFT, _RIGHT = "text-align:left", "text-align:right"
_PROSE = f"{_LEFT};white-space:normal;min-width:16em"


def escaped(text: object) -> str:
    """As text between tags and in attributes: a layer's name may hold "<" and quotes."""
    return html.escape(printable(str(text)))


def html_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: int = 1,
    caption: str = "",
    name: int = 0,
    prose: Collection[int] = (),
) -> str:
    """The cells of `text_table` as a table: the first `left` columns to the left, numbers to the right.

    name: the column that says what a row is about. prose: columns of text that may be wrapped.
    """
    styles = [_PROSE if place in prose else _LEFT if place < left else _RIGHT for place in range(len(header))]

    def line(cells: Sequence[str], tag: str, scope: str) -> str:
        heads = [scope if tag == "th" or place == name else "" for place in range(len(cells))]
        return "".join(map(_cell, cells, styles, heads))

    body = "".join(f"<tr>{line(row, 'td', 'row')}</tr>" for row in rows)
    title = f"<caption>{escaped(caption)}</caption>" if caption else ""
    head = f"<thead><tr>{line(header, 'th', 'col')}</tr></thead>" if any(header) else ""
    return f"<table>{title}{head}<tbody>{body}</tbody></table>"


def _cell(text: str, style: str, scope: str) -> str:
    """scope: what it heads; a cell without text heads nothing."""
    if scope and text:
        return f'<th scope="{scope}" style="{style}">{_lines(text)}</th>'
    return f'<td style="{style}">{_lines(text)}</td>'


def paragraph(text: str) -> str:
    """Lines stay lines."""
    return f"<p>{_lines(text)}</p>"


def _lines(text: str) -> str:
    return "<br>".join(map(escaped, text.split("\n")))


def inline_image(figure: Any, alt: str) -> str:
    """A figure of matplotlib as an image within the page; on white, which is readable in a dark notebook, too."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100, facecolor="white", bbox_inches="tight", pad_inches=0.1)
    encoded = base64.b64encode(picture.getvalue()).decode("ascii")
    return f'<img src="data:image/png;base64,{encoded}" alt="{escaped(alt)}" style="max-width:100%">'
