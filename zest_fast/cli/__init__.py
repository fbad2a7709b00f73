"""The command `zest-fast`. torch and transformers are imported inside the commands, so that `--help` is quick."""

from zest_fast.cli import (  # noqa: F401 (they register their commands)
    bench,
    commands,
    convert,
    deltas,
    evaluating,
    export,
    pack,
    plan,
    push,
    rank,
    report,
    sweep,
    train_ranker,
    watch,
)
from zest_fast.cli.app import app

__all__ = ["app"]
