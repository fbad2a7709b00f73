"""What a run of `zest-fast` in this process has to have come to."""

from __future__ import annotations

import json
from typing import Any

from click.testing import Result


def done(result: Result) -> Result:
    assert result.exit_code == 0, result.output
    return result


def document(result: Result) -> Any:
    """What --json printed."""
    return json.loads(done(result).stdout)


def refused(result: Result, *parts: str) -> None:
    """One line that holds these parts, and no result."""
    assert result.exit_code == 2 and result.stdout == "", result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and all(part in line for part in parts), line
