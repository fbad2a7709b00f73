"""What MkDocs cannot do by itself: pages that also read well on GitHub, and an API page that forgets no public name.

- A link to a file of the repository outside of docs/ is its path in words; the plots of bench/results are copied.
- `<!-- api: PACKAGE -->` becomes the reference of every name in the package's `__all__` (or of its public functions and
  classes), in one line of mkdocstrings each.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PLOTS = "bench/results/"


def on_files(files: Any, config: Any) -> Any:
    """The plots beside the pages."""
    from mkdocs.structure.files import File  # here, so that tests read the names below without MkDocs

    for plot in sorted((ROOT / PLOTS).glob("*.svg")):
        files.append(File.generated(config, f"plots/{plot.name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The text of a page for the site."""
    markdown = markdown.replace(f"](../{PLOTS}", "](plots/")
    markdown = re.sub(r"(?<!!)\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)
    return re.sub(r"<!-- api: ([\w.]+) -->", lambda found: "\n\n".join(_references(found[1])), markdown)


def _references(package: str) -> list[str]:
    return [_by_hand(package, name) or f"::: {package}.{name}" for name in public_names(package)]


def _by_hand(package: str, name: str) -> str:
    """The entry of a function that has the name of a module beside it, which mkdocstrings would show instead."""
    path = ROOT.joinpath(*package.split("."))
    if not (path / f"{name}.py").exists():
        return ""
    tree = ast.parse((path / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            signature = f"{name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns) if node.returns else None}"
            text = f"```python\n{signature}\n```\n\n```text\n{ast.get_docstring(node)}\n```"
            return f"### <code>{package}.{name}</code> {{ #{package}.{name} }}\n\n{text}"
    return ""


def public_names(package: str) -> list[str]:
    """Names of `__all__`, else functions and classes without an underscore; read, not imported."""
    path = ROOT.joinpath(*package.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(source.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return [name for name in ast.literal_eval(node.value) if not name.startswith("_") and name != "kernels"]
    defined = (node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))
    return [node.name for node in defined if not node.name.startswith("_")]
