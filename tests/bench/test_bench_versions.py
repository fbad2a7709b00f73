"""The table of versions says what was run, and only that."""

from __future__ import annotations

import json
from pathlib import Path

from bench.versions import CELLS, PACKAGES, QUICK, add_row, outcomes, versions_text

ROOT = Path(__file__).parents[2]
REPORT = """<testsuites><testsuite>
<testcase classname="a" name="passes"/>
<testcase classname="a" name="fails"><failure/></testcase>
<testcase classname="a" name="breaks"><error/></testcase>
<testcase classname="a" name="waits"><skipped/></testcase>
</testsuite></testsuites>"""


def row(cell: str, failed: int, subset: str = "quick") -> dict:
    versions = dict.fromkeys(PACKAGES, "1.0")
    counts = {"passed": 5, "failed": failed, "skipped": 0, "failures": []}
    return {"cell": cell, "subset": subset, "date": "2026-12-01", "python": "3.11.7", **versions, **counts}


def test_outcomes_are_those_of_the_report(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    found = outcomes(tmp_path / "report.xml")
    assert found == {"passed": 1, "failed": 2, "skipped": 1, "failures": ["a::breaks", "a::fails"]}


def test_a_cell_is_green_red_or_not_run(tmp_path: Path) -> None:
    path = tmp_path / "versions.json"
    for one in (row("newest", 3), row("oldest", 1), row("oldest", 0)):
        add_row(path, one)
    rows = json.loads(path.read_text())["results"]
    assert [(one["cell"], one["failed"]) for one in rows] == [("oldest", 0), ("newest", 3)]
    lines = dict(zip(CELLS, versions_text({"results": rows}).splitlines()[2:], strict=True))
    assert "| green |" in lines["oldest"] and "**red**: 3 failed" in lines["newest"]
    assert all("not run" in lines[cell] for cell in CELLS if cell not in ("oldest", "newest"))


def test_files_of_the_subset_are_there() -> None:
    assert all((ROOT / name).is_file() for name in QUICK)
