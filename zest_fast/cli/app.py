"""The app that the commands register with: errors in one line, `--version`, `--debug`."""

from __future__ import annotations

import re
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from zest_fast.cli.show import printable

# IndexError is what torch raises for a label beyond the outputs and a token beyond the vocabulary.
USER_ERRORS = (ValueError, TypeError, KeyError, IndexError, OSError, ImportError, RuntimeError, MemoryError)


# An argument, True or False behind it, and how else a value begins; not in a path, a file's name or a text in quotes.
_ARGUMENT = re.compile(r"(?<![\w./\\'\"=:-])([a-z]\w*)=(?!=)(True\b|False\b)?(?=([\w'\"(\[-]?))")

INTERRUPTED = 130  #: the exit code of a shell for what SIGINT ended


class _OneLineErrors(TyperGroup):
    """Turns what a wrong input raises into one line and exit code 2; bugs (other errors) keep their traceback.

    Ctrl-C is one line and exit code 130.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """`--debug` is an option of the command as a whole, wherever it stands."""
        end = args.index("--") if "--" in args else len(args)
        if "--debug" in args[1:end]:
            args = ["--debug", *(word for word in args[:end] if word != "--debug"), *args[end:]]
        return list(super().parse_args(ctx, args))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):  # RuntimeErrors, too: the end of --help, and of Ctrl-D at a prompt
            raise
        except KeyboardInterrupt as interrupt:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"interrupted{printable(f': {interrupt}' if str(interrupt) else '')}", err=True)
            raise typer.Exit(INTERRUPTED) from interrupt
        except USER_ERRORS as error:
            if ctx.params.get("debug") or isinstance(error, BrokenPipeError):
                raise
            text = error.args[0] if isinstance(error, KeyError) and error.args else error  # str() would quote it
            line = " ".join(str(text).split()) or type(error).__name__
            line = "; ".join([line, *getattr(error, "__notes__", ())])
            typer.echo(f"error: {printable(self._with_options(ctx, line))}{_place(error)}", err=True)
            raise typer.Exit(2) from error

    def _with_options(self, ctx: Any, line: str) -> str:
        """What Python passes as `argument=` is an option of the command, where the command has one of this name.

        "checkpoint='all'" is "--checkpoint 'all'" there, "stream=True" "--stream", "pass sequence_length=" without "=".
        """
        command = self.commands.get(ctx.invoked_subcommand or "")
        options = {p.name: p for p in command.params if p.opts[0].startswith("--")} if command is not None else {}

        def named(found: re.Match[str]) -> str:
            option = options.get(found[1])
            if option is None:
                return found[0]
            if found[2] and getattr(option, "is_flag", False):
                off = option.secondary_opts[0] if option.secondary_opts else f"no {option.opts[0]}"
                return str(option.opts[0] if found[2] == "True" else off)
            return f"{option.opts[0]}{' ' if found[3] or found[2] else ''}{found[2] or ''}"

        return re.sub(_ARGUMENT, named, line)


def _place(error: BaseException) -> str:
    """Where in the user's own code an error was raised: " (KeyError in FILE, line 7)"; "" where it was not."""
    cause: BaseException | None = error
    for _ in range(10):  # causes of causes; a user's exception may be its own
        if cause is None:
            break
        for frame in reversed(traceback.extract_tb(cause.__traceback__)):
            if _is_users(frame.filename):
                return f" ({type(cause).__name__} in {printable(frame.filename)}, line {frame.lineno})"
        cause = cause.__cause__
    return ""


def _is_users(file: str) -> bool:
    """Whether a source file belongs neither to this package nor to Python nor to anything that is installed."""
    if file.startswith("<"):
        return False
    paths = sysconfig.get_paths()
    theirs = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    theirs |= {str(Path(__file__).parents[1]), *(path for path in sys.path if path.endswith("-packages"))}
    where = Path(file).resolve()
    return not any(where.is_relative_to(Path(folder).resolve()) for folder in theirs)


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
