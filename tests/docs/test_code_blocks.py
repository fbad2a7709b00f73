"""Every code block of README.md and docs/ runs as a reader would run it, on tiny models in the folders that it names.

Blocks of one page share a namespace and a folder. Comments in the page say how each is tested: bench/pages.py.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save_what_guides_name
from typer.main import get_command
from typer.testing import CliRunner

from bench.pages import Block, blocks, commands
from zest_fast.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the pages name: my-bert, my-llama, my-resnet, photos, reviews.jsonl, texts.jsonl."""
    save_what_guides_name(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_code_of(page, folder):
    namespace: dict[str, Any] = {"__name__": f"page_{page.stem}"}
    for block in blocks(page.read_text(encoding="utf-8")):
        where = f"{page.relative_to(ROOT)}, line {block.line}"
        if block.language == "python":
            _run_python(block, where, namespace)
        elif block.language == "sh":
            _run_shell(block, where)
        else:
            assert block.language in ("", "text") and "zest_fast" not in block.code, where


def _run_python(block: Block, where: str, namespace: dict[str, Any]) -> None:
    code = compile("\n" * (block.line - 1) + block.code, where, "exec")
    kind, _, argument = block.test.partition(" ")
    if kind == "compile":
        assert argument, f"{where}: say why it is only compiled"
    elif kind == "raises":
        error, _, text = argument.partition(", ")
        with pytest.raises(getattr(builtins, error), match=re.escape(text)):
            exec(code, namespace)
    else:
        assert not kind, f"{where}: {block.test!r} is no way to test Python"
        exec(code, namespace)


def _run_shell(block: Block, where: str) -> None:
    found = commands(block)
    if not found:  # what builds the package, which .ci/run does
        assert "venv" in block.code or "mkdocs" in block.code, where
        return
    assert block.test in ("run", "parse"), f"{where}: say whether the commands are run or parsed"
    for arguments in found:
        if block.test == "run":
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, f"{where}: zest-fast {shlex.join(arguments)}: {result.output}"
        else:
            command, words = get_command(app), arguments
            while hasattr(command, "commands"):  # `bench` has commands of its own
                command, words = command.commands[words[0]], words[1:]
            assert command.make_context(command.name, words).params, where


def test_a_broken_block_is_found(folder):
    page = folder / "page.md"
    page.write_text(
        "<!-- hidden\nx = 1\n-->\n```python\nassert x == 1\n```\n\n"
        "<!-- test: parse -->\n```sh\nzest-fast rank a --topp 5\n```\n"
    )
    hidden, code, shell = blocks(page.read_text())
    assert (hidden.line, code.line, shell.line) == (2, 5, 10) and shell.test == "parse"
    with pytest.raises(AssertionError):
        _run_python(code, "page", {"x": 2})
    with pytest.raises(Exception, match="topp"):
        _run_shell(shell, "page")


def test_every_page_of_the_site_is_tested_and_every_marker_is_understood():
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    fences = {page: len(re.findall(r"^```\w*$", text, re.MULTILINE)) for page, text in texts.items()}
    found = {page: list(blocks(texts[page])) for page in PAGES}
    for page, text in texts.items():
        visible = len(found[page]) - len(re.findall("<!-- hidden", text))
        assert fences[page] == 2 * visible, page
        assert len(re.findall(r"<!-- test:", text)) == sum(bool(block.test) for block in found[page]), page
    assert sum(block.language == "python" for every in found.values() for block in every) > 30


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    packages = re.findall(r"<!-- api: ([\w.]+) -->", page)
    assert {
        "zest_fast",
        "zest_fast.kernels",
        "zest_fast.integrations.exports",
        "zest_fast.integrations.trainer",
    } <= set(packages)
    found = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    for package in packages:
        names, module = found["public_names"](package), importlib.import_module(package)
        assert names and all(hasattr(module, name) for name in names)
        public = [name for name in getattr(module, "__all__", names) if not name.startswith("_") and name != "kernels"]
        assert names == public
        shown = found["on_page_markdown"](f"<!-- api: {package} -->")
        assert all(f"::: {package}.{name}" in shown or f"{{ #{package}.{name} }}" in shown for name in names)


def test_headings_of_troubleshooting_are_pieces_of_messages():
    said = [text for file in (ROOT / "zest_fast").rglob("*.py") for text in _literals(ast.parse(file.read_text()))]
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    pieces = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    assert len(pieces) > 20
    for piece in pieces:
        pattern = re.compile(".+".join(map(re.escape, piece.split("..."))))
        assert any(pattern.search(text) for text in said), f"no message says {piece!r}"


def _literals(tree: ast.AST) -> Iterator[str]:
    """Texts of the source; "<>" stands for what is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "<>" for part in node.values)


def test_readme_is_a_landing_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


def test_links_lead_somewhere():
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in _anchors(file), f"{page.name} links to {target}#{anchor}"


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}
