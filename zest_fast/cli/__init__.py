"""The command `zest-fast`. torch and transformers are imported inside the commands, so that `--help` is quick."""

from zest_fast.cli import export  # noqa: F401 (its command registers itself)
from zest_fast.cli.commands import app

__all__ = ["app"]
