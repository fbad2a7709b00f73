"""What is on, what is off, and why: for a user whose profile is slow, or who files a report."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from zest_fast import _native
from zest_fast.kernels import cuda, triton_kernels
from zest_fast.kernels.availability import Availability
from zest_fast.kernels.collector import best_backend

_OPTIONAL = {
    "transformers": "models and tokenizers of transformers: pip install 'zest_fast[transformers]'",
    "peft": "LoRA on the best layers: pip install peft",
    "accelerate": "Trainer, and loops of several processes: pip install accelerate",
    "bitsandbytes": "frozen weights in nf4: pip install 'zest_fast[quant]'",
    "gguf": "deltas for llama.cpp: pip install 'zest_fast[gguf]'",
    "ray": "sweeps on a cluster: pip install 'zest_fast[ray]'",
    "matplotlib": "heat maps: pip install 'zest_fast[plot]'",
    "triton": "GPU kernels: comes with a CUDA build of torch",
    "mlxtend": "the demo: pip install 'zest_fast[demo]'",
}


def examine() -> dict[str, Any]:
    """Backends with the reason where one is off, what ``backend="auto"`` takes on each device, versions."""
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return {
        "backends": {
            "cpu": {"on": True, "why": f"{torch.backends.cpu.get_cpu_capability()}, {_cpu_threads()}"},
            "triton": _state(triton_kernels.availability()),
            "cuda": _state(cuda.availability()),
            "reference": {"on": True, "why": "float64 in plain torch: right everywhere, slow"},
        },
        "auto": {device: best_backend(torch.device(device))[0] for device in devices},
        "versions": {
            "zest_fast": _version("zest_fast") or "not installed (running from a folder)",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda of torch": torch.version.cuda or "none",
        },
        "optional": {name: _version(name) or f"not installed ({what})" for name, what in _OPTIONAL.items()},
    }


def _cpu_threads() -> str:
    return f"{torch.get_num_threads()} threads" if _native.has_openmp else "1 thread (built without OpenMP)"


def _state(able: Availability) -> dict[str, Any]:
    return {"on": bool(able), "why": able.reason}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
