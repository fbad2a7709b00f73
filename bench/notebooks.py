"""`python -m bench.notebooks` makes examples/notebooks/*.ipynb of the guides in docs/; `--check` compares them.

A notebook holds what its guide holds: text as text, Python as cells, commands as cells of a shell where the guide says
that they run, and as text where they need a GPU, the hub or minutes. The first cell makes the tiny models and data
that the guides name. tests/docs/test_notebooks.py runs them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from bench.measure import ROOT
from bench.pages import Block, blocks, commands

NOTEBOOKS = ROOT / "examples" / "notebooks"
GUIDES = (
    *("start", "data", "trainer", "tools", "llama", "streaming", "vision", "deltas", "planning", "cache", "probe"),
    *("sweep", "watch", "watch_logs", "report", "profile", "processes", "bench"),
)

_SET_UP = """\
# The folders that this guide names: tiny models drawn at random, and a few samples. Put your own in their place.
# It needs the checkout that this notebook lies in, and what `pip install -e '.[test]'` installs.
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path("../../tests/support").resolve()))
from checkpoints import save_what_guides_name

os.chdir(tempfile.mkdtemp())
save_what_guides_name(Path.cwd())
sorted(path.name for path in Path.cwd().iterdir())
"""


def main() -> None:
    """Parse the command line; exit status 1 where --check finds a notebook out of date."""
    parser = argparse.ArgumentParser(prog="python -m bench.notebooks", description="notebooks of the guides in docs/")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if one is out of date")
    check = parser.parse_args().check
    wanted = {NOTEBOOKS / f"{guide}.ipynb": notebook_of(ROOT / "docs" / f"{guide}.md") for guide in GUIDES}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if check and stale:
        sys.exit(f"{', '.join(path.name for path in stale)}: not what docs/ says; run python -m bench.notebooks")
    NOTEBOOKS.mkdir(parents=True, exist_ok=True)
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")


def notebook_of(page: Path) -> str:
    """The notebook of a page, as JSON."""
    text = page.read_text(encoding="utf-8")
    cells, end = [_code(_SET_UP)], 0
    for block in blocks(text):
        cells += [_text(text[end : block.span[0]]), _cell(block)]
        end = block.span[1]
    cells.append(_text(text[end:]))
    title, *rest = _joined([cell for cell in cells[1:] if cell["source"]])
    found = [title, cells[0], *rest]
    for place, cell in enumerate(found):
        cell["id"] = f"cell-{place}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    document = {"cells": found, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _cell(block: Block) -> dict[str, Any]:
    kind = block.test.split()[0] if block.test else ""
    if block.language == "python" and kind != "compile":
        return _code(block.code, *(["raises-exception"] if kind == "raises" else []))
    if block.language == "sh" and kind == "run" and commands(block):
        return _code(f"%%bash -e\n{block.code}")
    return _text(f"```{block.language}\n{block.code}```")


def _code(source: str, *tags: str) -> dict[str, Any]:
    metadata = {"tags": list(tags)} if tags else {}
    return {
        "cell_type": "code",
        "execution_count": None,
        "metadata": metadata,
        "outputs": [],
        "source": source.strip().splitlines(keepends=True),
    }


def _text(source: str) -> dict[str, Any]:
    """Links lead where they led; comments are for tests and generated tables."""
    source = re.sub(r"<!--.*?-->\n?", "", source, flags=re.DOTALL).strip()
    source = re.sub(r"\]\((?!https?:|#)([^)]+)\)", r"](../../docs/\1)", source)
    return {"cell_type": "markdown", "metadata": {}, "source": source.splitlines(keepends=True)}


def _joined(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Text behind text in one cell: a command that is only shown belongs to what is said of it."""
    found: list[dict[str, Any]] = []
    for cell in cells:
        if found and cell["cell_type"] == found[-1]["cell_type"] == "markdown":
            found[-1]["source"] += ["\n\n", *cell["source"]]
        else:
            found.append(cell)
    return found


if __name__ == "__main__":
    main()
