"""The app that the commands register with: errors in one line, `--version`, `--debug`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

# IndexError is what torch raises for a label beyond the outputs and a token beyond the vocabulary.
USER_ERRORS = (ValueError, TypeError, KeyError, IndexError, OSError, ImportError, RuntimeError)


class _OneLineErrors(TyperGroup):
    """Turns what a wrong input raises into one line and exit code 2; bugs (other errors) keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except USER_ERRORS as error:
            if ctx.params.get("debug") or isinstance(error, BrokenPipeError):
                raise
            text = error.args[0] if isinstance(error, KeyError) and error.args else error  # str() would quote it
            typer.echo(f"error: {' '.join(str(text).split()) or type(error).__name__}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    name="zest-fast",
    cls=_OneLineErrors,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Which layers of this model are worth fine-tuning? One pass tells; then tune only those.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"zest-fast {version('zest_fast')}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command; `debug` is read by _OneLineErrors."""
