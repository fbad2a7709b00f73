"""Runs triton_cases.py where Triton can run: on the GPU, or in Triton's interpreter in a process of its own.

The interpreter is chosen before Triton is imported, and offline compilation (tests/bench/test_offline.py) needs it off.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zest_fast.kernels import triton_kernels

CASES = Path(__file__).parent / "triton_cases.py"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_kernels_agree_with_the_float64_reference() -> None:
    environment = dict(os.environ) if torch.cuda.is_available() else {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_without_triton_or_gpu_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # any import of it fails
    assert "pip install triton" in triton_kernels.availability().reason


def test_import_never_loads_triton() -> None:
    code = "import sys, zest_fast, zest_fast.kernels.triton_kernels; print('triton' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
