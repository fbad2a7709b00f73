"""Where a figure was measured: CPU, threads, memory, load, the GPU, and the versions of what took part."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_CACHES = "/sys/devices/system/cpu/cpu0/cache"
_UNKNOWN_CACHE = 64 << 20  # bytes, where the system does not say: more than most have


def describe_machine(device: torch.device | None = None) -> dict[str, object]:
    """CPU, cores, threads, memory and load: what a reader needs to judge a figure; and the GPU, where that is one."""
    found: dict[str, object] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "ram_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": round(os.getloadavg()[0], 2),
    }
    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "driver": driver_version(), "cuda": str(torch.version.cuda)}
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def driver_version() -> str:
    """Of NVIDIA's driver; "unknown" without one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def describe_versions(*more: str) -> dict[str, str]:
    """Of Python, torch, transformers, numpy, zest_fast, and of `more` packages."""
    names = ("torch", "transformers", "numpy", *more, "zest_fast")
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def last_level_cache(device: torch.device, folder: str = _CACHES) -> int:
    """Bytes of the largest cache of a CPU core, as Linux says them, or of a GPU's L2."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_kibibytes(path) for path in Path(folder).glob("index*/size")]
    return max(sizes, default=0) or _UNKNOWN_CACHE


def _kibibytes(path: Path) -> int:
    """Of "32768K"."""
    try:
        return int(path.read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return 0
