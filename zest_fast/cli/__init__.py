"""The command `zest-fast`. torch and transformers are imported inside the commands, so that `--help` is quick."""

from zest_fast.cli import plan  # noqa: F401 (it registers its command)
from zest_fast.cli.commands import app

__all__ = ["app"]
