"""One-way imports: each room imports only from rooms to its left, and what must stay light does."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "zest_fast"
ROOMS = (
    "foundation",
    "kernels",
    "profiling",
    "ranking",
    "lean",
    "finetuning",
    "planning",
    "sweeping",
    "integrations",
    "demo",
    "cli",
)
FREE_OF_TORCH = (
    *(f"foundation/{path.name}" for path in sorted((PACKAGE / "foundation").glob("*.py"))),
    "profiling/layer_profile.py",
    "profiling/profile_files.py",
    "profiling/heat_map.py",
    *(f"ranking/{path.name}" for path in sorted((PACKAGE / "ranking").glob("*.py"))),
    "sweeping/tables.py",
    "sweeping/records.py",
)


def imported_by(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "zest_fast" and len(parts) > 1 and parts[1] in ROOMS else None


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_to_the_left(path: Path) -> None:
    place = path.relative_to(PACKAGE)
    room = place.parts[0].removesuffix(".py")
    if room in ("__init__", "__main__"):
        return  # re-exports the public names; starts the command
    assert room in ROOMS, f"{place}: a room that ROOMS does not know"
    for module in imported_by(path):
        other = room_of(module)
        assert other is None or ROOMS.index(other) <= ROOMS.index(room), f"{place} imports {module}, to its right"


@pytest.mark.parametrize("name", FREE_OF_TORCH)
def test_torch_ends_at_the_layer_profile(name: str) -> None:
    assert not {m for m in imported_by(PACKAGE / name) if m.split(".")[0] == "torch"}


def test_cpp_kernels_know_neither_torch_nor_python() -> None:
    for path in (PACKAGE.parent / "csrc").rglob("*"):
        if path.is_file() and path.name != "bindings.cpp":
            text = path.read_text()
            assert "torch/" not in text and "Python.h" not in text and "pybind11" not in text, path


def test_import_loads_neither_transformers_nor_plotting() -> None:
    heavy = ("transformers", "peft", "matplotlib", "pandas", "lightgbm", "scipy")
    code = f"import sys, zest_fast; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("folder", [PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir())], ids=str)
def test_no_room_is_overfull(folder: Path) -> None:
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 22
