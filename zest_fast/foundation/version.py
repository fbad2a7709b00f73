"""The version of this library, from where it is installed or, in a checkout that is not, from pyproject.toml."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def _version() -> str:
    try:
        return version("zest_fast")
    except PackageNotFoundError:
        return declared(Path(__file__).parents[2] / "pyproject.toml")


def declared(pyproject: Path) -> str:
    """What the file declares; "unknown" where there is none (a copy of the bare package)."""
    if not pyproject.is_file():
        return "unknown"
    found = re.search(r'^version = "(.+)"$', pyproject.read_text(encoding="utf-8"), re.MULTILINE)
    return "unknown" if found is None else found[1]


__version__ = _version()
