"""`python -m bench.versions CELL` runs the quick subset of the suite on the wheel that is installed here, and writes
one row of bench/results/versions.json; `nox -s versions` makes an environment for each cell and calls it there.

Cells are those of noxfile.py. A cell that has no row was not run, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from importlib.metadata import distribution, version
from pathlib import Path

from bench.measure import RESULTS, ROOT, describe_versions
from zest_fast.benchmarking.machine import describe_machine
from zest_fast.foundation.text_table import markdown_table

CELLS = {
    "oldest": "every lower bound of pyproject.toml",
    "oldest torch": "the oldest torch, the newest of all else",
    "oldest transformers": "the oldest transformers and peft, the newest of all else",
    "pinned": "constraints.txt",
    "pinned on 3.12": "constraints.txt",
    "pinned on 3.13": "constraints.txt",
    "newest": "the newest of everything",
}
QUICK = (
    "tests/foundation/test_torch_private.py",
    "tests/foundation/test_old_files.py",
    "tests/kernels/test_kernels.py",
    "tests/kernels/test_layout.py",
    "tests/kernels/test_storage.py",
    "tests/profiling/test_profile.py",
    "tests/ranking/test_ranking.py",
    "tests/prefix/test_prefix_cache.py",
    "tests/finetuning/test_selective_backward.py",
    "tests/finetuning/test_cut.py",
    "tests/planning/test_plan.py",
    "tests/cli/test_cli.py",
)
"""What touches torch, transformers, peft, pandas, LightGBM and the command line: two minutes on one core."""
SHORT = "not compiled and not within_two_percent"
"""Of these files what takes half of the time is left to the whole suite: torch.compile, and steps that are counted."""
PACKAGES = ("torch", "transformers", "peft", "numpy", "pandas", "lightgbm", "typer")
NOT_COPIED = {"zest_fast", "build", "dist", "site", ".data", ".git", ".nox", ".venv", "__pycache__"}


def main() -> None:
    """Parse the command line; exit status 1 where a test fails, after the row is written."""
    parser = argparse.ArgumentParser(prog="python -m bench.versions", description=__doc__.split("\n\n")[0])
    parser.add_argument("cell", choices=CELLS)
    parser.add_argument("--whole", action="store_true", help="the whole suite, not the quick subset")
    parser.add_argument("--out", type=Path, default=RESULTS / "versions.json")
    options = parser.parse_args()
    row = run(options.cell, () if options.whole else QUICK)
    add_row(options.out, row)
    print(f"{options.cell}: {row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped")
    sys.exit(row["failed"] > 0 or row["passed"] == 0)


def run(cell: str, tests: tuple[str, ...]) -> dict:
    """A row: what passed, failed and was skipped on the versions that are installed, and which tests failed."""
    commit = describe_versions()["zest_fast"]
    with tempfile.TemporaryDirectory() as folder:
        tree, report = Path(folder) / "tree", Path(folder) / "report.xml"
        _lay_out(tree)
        command = ["-m", "pytest", "-q", "-n", "0", *tests, f"--junit-xml={report}", *(("-k", SHORT) if tests else ())]
        finished = subprocess.run([sys.executable, *command], cwd=tree, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if not report.exists():
            raise RuntimeError(f"{cell}: pytest wrote no report; it ended with status {finished.returncode}")
        counts = outcomes(report)
    return {
        "cell": cell,
        "subset": "quick" if tests else "whole",
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "zest_fast": commit,
        **counts,
    }


def _lay_out(tree: Path) -> None:
    """The checkout with the installed package in the place of its own: tests are of the wheel."""
    installed = Path(str(distribution("zest_fast").locate_file("zest_fast")))
    if not (installed / "__init__.py").exists():
        raise RuntimeError("zest_fast is not installed here as a wheel; run nox -s versions")
    shutil.copytree(ROOT, tree, ignore=lambda folder, names: NOT_COPIED & set(names))
    (tree / "zest_fast").symlink_to(installed)


def outcomes(report: Path) -> dict[str, object]:
    """Counts of a JUnit report, and the names of the tests that failed."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    return {
        "passed": len(cases) - len(failed) - skipped,
        "failed": len(failed),
        "skipped": skipped,
        "failures": sorted(f"{c.get('classname')}::{c.get('name')}" for c in failed),
    }


def add_row(path: Path, row: dict) -> None:
    """Puts a row in the place of that of the same cell and subset, in the order of CELLS."""
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"results": []}
    key = (row["cell"], row["subset"])
    rows = [one for one in document["results"] if (one["cell"], one["subset"]) != key] + [row]
    rows.sort(key=lambda one: (list(CELLS).index(one["cell"]), one["subset"]))
    document = {
        "benchmark": "versions",
        "command": "nox -s versions",
        "date": min(one["date"] for one in rows),
        "machine": describe_machine(),
        "versions": {"torch": ", ".join(sorted({one["torch"] for one in rows}))},
        "results": rows,
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def versions_text(document: dict) -> str:
    """A row for each cell and subset: the versions it ran on and what came of it, or that it was not run."""
    ran = {(row["cell"], row["subset"]): row for row in document["results"]}
    rows = []
    for cell, meaning in CELLS.items():
        found = [row for (name, _), row in ran.items() if name == cell]
        rows += [[f"{cell} ({meaning})", *_cells(row)] for row in found]
        if not found:
            rows.append([f"{cell} ({meaning})", *[""] * (len(PACKAGES) + 1), "not run", ""])
    return markdown_table(["cell", "Python", *PACKAGES, "result", "tests"], rows)


def _cells(row: dict) -> list[str]:
    result = "green" if row["failed"] == 0 and row["passed"] else f"**red**: {row['failed']} failed"
    tests = f"{row['passed']} passed, {row['skipped']} skipped ({row['subset']})"
    return [row["python"], *(row[name] for name in PACKAGES), result, tests]


if __name__ == "__main__":
    main()
