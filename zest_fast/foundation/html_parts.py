"""Pieces of HTML for notebooks and pages: escaped, without colours of their own, and with nothing from elsewhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from zest_fast.foundation.text_table import printable


def escaped(text: object) -> str:
    """As text between tags and in attributes: a layer's name may hold "<" and quotes."""
    return html.escape(printable(str(text)))


def html_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, caption: str = "", name: int = 0
) -> str:
    """The cells of `text_table` as a table: the first `left` columns to the left, numbers to the right.

    name: the column that says what a row is about.
    """

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(_cell(cell, tag if place != name else "th", place < left) for place, cell in enumerate(cells))

    head = "".join(_cell(cell, "th", place < left, "col") for place, cell in enumerate(header))
    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    title = f"<caption>{escaped(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(text: str, tag: str, left: bool, scope: str = "row") -> str:
    scope = f' scope="{scope}"' if tag == "th" and text else ""
    tag = tag if scope else "td"  # a heading without text heads nothing
    return f'<{tag}{scope} style="text-align:{"left" if left else "right"}">{_lines(text)}</{tag}>'


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
