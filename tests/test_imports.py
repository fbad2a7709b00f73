"""One-way imports: each room imports only from rooms to its left, and what must stay light does."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import zest_fast
from zest_fast.foundation.version import declared

PACKAGE = Path(__file__).parent.parent / "zest_fast"
ROOMS = (
    "foundation",
    "kernels",
    "profiling",
    "ranking",
    "lean",
    "prefix",
    "finetuning",
    "streaming",
    "planning",
    "sweeping",
    "probing",
    "watching",
    "integrations",
    "benchmarking",
    "demo",
    "cli",
)
FREE_OF_TORCH = (
    *(f"foundation/{p.name}" for p in sorted((PACKAGE / "foundation").glob("*.py")) if p.name != "torch_private.py"),
    "profiling/layer_profile.py",
    "profiling/profile_files.py",
    "profiling/heat_map.py",
    *(f"ranking/{path.name}" for path in sorted((PACKAGE / "ranking").glob("*.py"))),
    "sweeping/tables.py",
    "sweeping/records.py",
    "watching/watched_step.py",
    *(
        f"watching/logs/{path.name}"
        for path in sorted((PACKAGE / "watching" / "logs").glob("*.py"))
        if path.name != "trackers.py"
    ),
)
FORMER = {"finetuning/lean.py", "finetuning/lean_optimizer.py", "finetuning/plan.py"}  # old paths, nothing but imports


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
    if str(place) in FORMER:
        return  # names of another room under the path they had; nobody within the package imports it
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


HEAVY = (
    *("torch", "transformers", "peft", "matplotlib", "pandas", "pyarrow", "lightgbm", "scipy", "bitsandbytes", "ray"),
    "submitit",
)
READERS = ("LayerProfile", "Ranker", "Ranking", "Recipe", "__version__", "load_records", "load_watch", "rank")


def loaded_by(names: Iterable[str]) -> set[str]:
    """Which heavy packages are loaded once these public names are used, in a fresh process."""
    uses = f"import sys, zest_fast; [getattr(zest_fast, name) for name in {list(names)}]"
    code = f"{uses}; print(*({set(HEAVY)} & {{*sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_who_reads_profiles_and_ranks_layers_waits_for_nothing_heavy() -> None:
    assert loaded_by(READERS) == set()


def test_all_public_names_load_torch_and_no_optional_package() -> None:
    assert loaded_by(zest_fast.__all__) == {"torch"}


def test_every_public_name_is_there_and_has_a_home() -> None:
    for name in zest_fast.__all__:
        assert getattr(zest_fast, name) is not None and name in dir(zest_fast)
    with pytest.raises(AttributeError, match="no attribute 'plans'"):
        _ = zest_fast.plans


def test_the_version_is_that_of_pyproject(tmp_path: Path) -> None:
    assert declared(PACKAGE.parent / "pyproject.toml") == zest_fast.__version__
    assert declared(tmp_path / "pyproject.toml") == "unknown"


@pytest.mark.parametrize(
    ("path", "home"),
    [
        ("zest_fast.finetuning.lean.apply_lean", zest_fast.apply_lean),
        ("zest_fast.finetuning.lean_optimizer.adamw", zest_fast.adamw),
        ("zest_fast.finetuning.lean_optimizer.optimizer_in_backward", zest_fast.optimizer_in_backward),
        ("zest_fast.finetuning.plan.planned_peak", zest_fast.planned_peak),
        ("zest_fast.kernels.moments", zest_fast.kernels.moments),
        ("zest_fast.profiling.metrics.METRICS", None),
        ("zest_fast.integrations.trainer.ZestCallback", None),
        ("zest_fast.integrations.trainer.prepare", None),
        ("zest_fast.integrations.peft.lora_config", None),
    ],
)
def test_paths_that_were_public_still_import(path: str, home: object) -> None:
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert home is None or found is home


@pytest.mark.parametrize("folder", [PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir())], ids=str)
def test_no_room_is_overfull(folder: Path) -> None:
    files = {str(path.relative_to(PACKAGE)) for path in folder.glob("*.py") if path.name != "__init__.py"}
    assert len(files - FORMER) <= 22


@pytest.mark.parametrize("name", sorted(FORMER))
def test_former_places_hold_nothing_of_their_own(name: str) -> None:
    body = ast.parse((PACKAGE / name).read_text()).body
    assert [type(node) for node in body] == [ast.Expr, ast.ImportFrom, ast.Assign]
