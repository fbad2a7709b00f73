"""Users' code type-checks under `mypy --strict`, and what an option cannot be is told before anything runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "data" / "users_script.py"
WRONG = """
import zest_fast
from torch import nn

def wrong(model: nn.Module) -> None:
    zest_fast.profile(model, backend="gpu")
    zest_fast.profile(model, metrics="snip")
    zest_fast.SelectiveBackward(model, ["0"], frozen="int4")
    zest_fast.SelectiveBackward(model, ["0"], checkpoint="all")
    zest_fast.plan(model, "all", batch_size=1, device="tpu")
    zest_fast.Ranker(features="some")
    zest_fast.profiles(model)
"""


def checked(script: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """As for an installed package, whose own files are read and not judged."""
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=", str(script)]
    environment = {**os.environ, "MYPYPATH": str(Path(__file__).parents[1]), "MYPY_CACHE_DIR": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=script.parent)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mypy")
    return tmp_path_factory.mktemp("mypy")


@pytest.mark.slow
def test_what_users_write_passes_the_strictest_check(cache: Path) -> None:
    found = checked(SCRIPT, cache)
    assert found.returncode == 0, found.stdout


@pytest.mark.slow
def test_what_an_option_cannot_be_is_an_error(cache: Path, tmp_path: Path) -> None:
    script = tmp_path / "wrong.py"
    script.write_text(WRONG)
    found = checked(script, cache)
    lines = {int(line.split(":")[1]) for line in found.stdout.splitlines() if ": error:" in line}
    assert lines == set(range(6, 13)), found.stdout
