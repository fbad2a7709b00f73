"""What the benchmarks share: a JSON that says where it ran. Their clocks are zest_fast.benchmarking.timing."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from zest_fast.benchmarking import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def describe_versions() -> dict[str, str]:
    """Versions of what is measured and what it is measured against, and the commit of this checkout."""
    return {**machine.describe_versions("backpack-for-pytorch", "opacus"), "zest_fast": _commit()}


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", "zest_fast", "csrc", "bench/*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_result(
    name: str, settings: dict[str, object], results: list[dict], out: Path | None = None, module: str | None = None
) -> Path:
    """Write bench/results/<name>.json (or into `out`) with machine, versions and command line beside the results.

    module: of bench, that the command runs; None = the one of that name.
    """
    folder = out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "benchmark": name,
        "command": " ".join(["python", "-m", f"bench.{module or name}", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe_machine(),
        "versions": describe_versions(),
        "settings": settings,
        "results": results,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    return path
