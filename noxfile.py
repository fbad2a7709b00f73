#!/usr/bin/env -S uv run --script
# /// script
# dependencies = ["nox>=2025.2.9"]
# ///
"""`nox -l` lists the sessions, `nox -s lint` runs one. Each makes an environment of its own.

The README's test line and .ci/run need no nox; sessions call the same commands. Versions are those of constraints.txt,
but for `oldest_torch`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"

CONSTRAINED = ("-c", "constraints.txt")


@nox.session
def tests(session: nox.Session) -> None:
    """The suite, two processes (`nox -s tests -- tests/lean -n 0`)."""
    session.install(*CONSTRAINED, "-e", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session(default=False)
def tests_slow(session: nox.Session) -> None:
    """Every architecture of transformers, the whole demo, thousands of damaged files: an hour."""
    session.install(*CONSTRAINED, "-e", ".[test]")
    session.run("pytest", "-m", "slow", *session.posargs)


@nox.session(default=False)
def oldest_torch(session: nox.Session) -> None:
    """The suite on the oldest torch that pyproject.toml allows."""
    session.install("torch==2.6.0", "transformers==4.48.3", "numpy<2.3")
    session.install("-e", ".[test]", "torch==2.6.0", "transformers==4.48.3", "numpy<2.3")
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff's format and rules; changes nothing."""
    session.install(*CONSTRAINED, "ruff")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """mypy, with the libraries whose types it reads."""
    session.install(*CONSTRAINED, "-e", ".[test]")
    session.run("mypy", *session.posargs)


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """The site, in which every warning is an error, and the generated tables."""
    session.install(*CONSTRAINED, "-e", ".[docs]")
    session.run("mkdocs", "build", "--strict", *session.posargs)
    session.run("python", "-m", "bench.readme", "--check")


@nox.session(default=False)
def looking(session: nox.Session) -> None:
    """Every notebook, and axe-core over a page of `zest-fast report`, light, dark and at the width of a phone.

    npm and a Chromium have to be there.
    """
    session.install(*CONSTRAINED, "-e", ".[test]")
    npm = session.create_tmp()
    session.run("npm", "install", "--prefix", npm, "axe-core@4", external=True)
    axe = Path(npm).resolve() / "node_modules/axe-core/axe.min.js"
    tests = ("tests/docs/test_notebooks.py", "tests/cli/test_cli_report.py")
    session.run("pytest", "-m", "slow or not slow", *tests, *session.posargs, env={"ZEST_AXE": str(axe)})


@nox.session(default=False)
def wheels(session: nox.Session) -> None:
    """A source archive and a wheel of this machine; those of a release are made by .github/workflows/wheels.yml."""
    session.install("build>=1.2", "twine>=6")
    shutil.rmtree(Path("dist"), ignore_errors=True)
    session.run("python", "-m", "build")
    session.run("twine", "check", "--strict", *map(str, Path("dist").glob("*")))


if __name__ == "__main__":
    nox.main()
