"""The choice of a GPU backend; and gpu_backend_cases.py, on a GPU or in Triton's interpreter in a process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from model_zoo import build

import zest_fast
from zest_fast import kernels
from zest_fast.kernels import collector, cuda, triton_kernels
from zest_fast.kernels.availability import Availability

TESTS = Path(__file__).parent
GPU = torch.device("cuda", 0)


@pytest.fixture
def forgotten_choices() -> Iterator[None]:
    """The choice is made, and its warning given, once in a process."""
    collector._best_or_warn.cache_clear()
    yield
    collector._best_or_warn.cache_clear()


def reasons(monkeypatch: pytest.MonkeyPatch, *, triton: str, cuda_cpp: str) -> None:
    """Makes the two backends unavailable for these reasons; available where the reason is empty."""
    monkeypatch.setattr(triton_kernels, "availability", lambda: Availability(triton))
    monkeypatch.setattr(cuda, "availability", lambda device=None: Availability(cuda_cpp))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_whole_models_through_the_kernels_of_a_gpu() -> None:
    environment = dict(os.environ) if torch.cuda.is_available() else {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "gpu_backend_cases.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS.parents[1])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize(
    ("triton", "cuda_cpp", "choice"),
    [("", "", "cuda"), ("", "built without nvcc", "triton"), ("no Triton", "", "cuda")],
)
@pytest.mark.usefixtures("forgotten_choices")
def test_auto_takes_the_best_that_runs_and_says_nothing(
    triton: str, cuda_cpp: str, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons(monkeypatch, triton=triton, cuda_cpp=cuda_cpp)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.pick_backend("auto", GPU) == choice


@pytest.mark.usefixtures("forgotten_choices")
def test_where_nothing_runs_auto_falls_back_with_one_warning_that_names_the_reasons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reasons(monkeypatch, triton="Triton 3.1 is installed", cuda_cpp="the driver is too old")
    with pytest.warns(RuntimeWarning, match="reference on cuda:0") as caught:
        choices = {kernels.pick_backend("auto", GPU) for _ in range(3)}
    assert choices == {"reference"}
    (warning,) = caught
    assert "cuda: the driver is too old; triton: Triton 3.1 is installed" in str(warning.message)


@pytest.mark.usefixtures("forgotten_choices")
def test_a_device_without_kernels_takes_the_reference_with_a_warning() -> None:
    with pytest.warns(RuntimeWarning, match="no kernels for mps"):
        assert kernels.pick_backend("auto", torch.device("mps")) == "reference"


@pytest.mark.parametrize(("backend", "reason"), [("triton", "no Triton here"), ("cuda", "the driver is too old")])
def test_a_backend_by_name_never_falls_back(backend: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons(monkeypatch, triton="no Triton here", cuda_cpp="the driver is too old")
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot run on cuda:0: {reason}"):
        kernels.pick_backend(backend, GPU)


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("cuda", "cannot run on cpu: it is for tensors on a CUDA device"),
        ("triton", "cannot run on cpu: Triton runs on a GPU .*TRITON_INTERPRET=1"),
        ("gpu", "one of auto, reference, cpu, triton, cuda is needed"),
    ],
)
def test_a_backend_that_cannot_run_is_refused_before_the_pass(
    backend: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model, closure = build("mlp")
    with pytest.raises(ValueError, match=reason):
        zest_fast.profile(model, closure=closure, backend=backend)
    with pytest.raises(ValueError, match=reason):
        kernels.moments([torch.ones(3)], backend=backend)


def test_the_cpu_backend_is_refused_on_a_gpu() -> None:
    with pytest.raises(ValueError, match="cannot run on cuda:0: it is for tensors on the CPU; use 'auto'"):
        kernels.pick_backend("cpu", GPU)


def test_on_a_cpu_auto_is_the_cpu_backend_even_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.pick_backend("auto", torch.device("cpu")) == "cpu"
