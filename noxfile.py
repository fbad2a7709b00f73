#!/usr/bin/env -S uv run --script
# /// script
# dependencies = ["nox>=2025.2.9"]
# ///
"""`nox -l` lists the sessions, `nox -s lint` runs one. Each makes an environment of its own.

The README's test line and .ci/run need no nox; sessions call the same commands. Versions are those of constraints.txt,
but for `versions`.
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


NEWEST = ("-r", "pyproject.toml", "--extra", "test")
CELLS = {  # of bench/versions.py, which says what each is for: Python and what is installed
    "oldest": ("3.11", ("--resolution", "lowest-direct", *NEWEST)),
    "oldest torch": ("3.13", ("torch==2.8.0", *NEWEST)),
    "oldest transformers": ("3.13", ("transformers==5.0.0", "peft==0.14.0", *NEWEST)),
    "pinned": ("3.11", (*CONSTRAINED, *NEWEST)),
    "pinned on 3.12": ("3.12", (*CONSTRAINED, *NEWEST)),
    "pinned on 3.13": ("3.13", (*CONSTRAINED, *NEWEST)),
    "newest": ("3.13", NEWEST),
}


@nox.session(default=False, venv_backend="uv")
@nox.parametrize("python,cell", [(python, cell) for cell, (python, _) in CELLS.items()], ids=list(CELLS))
def versions(session: nox.Session, cell: str) -> None:
    """A quick subset of the suite on a wheel, at both ends of every range (`nox -s 'versions(oldest)' -- --whole`)."""
    wheels = session.create_tmp()
    python = f"{session.bin}/python"
    session.run("uv", "build", "--wheel", "-p", python, "-C", "cmake.define.ZEST_CUDA=OFF", "-o", wheels, external=True)
    session.install(*CELLS[cell][1])
    session.install("--no-deps", *map(str, Path(wheels).glob("*.whl")))
    session.run("python", "-m", "bench.versions", cell, *session.posargs)


@nox.session(default=False)
def sanitizers(session: nox.Session) -> None:
    """The CPU kernels under ASan, UBSan and TSan, and under qemu on processors without AVX2 (needs g++)."""
    session.install(*CONSTRAINED, "-e", ".[test]", "pybind11>=2.13")
    session.run("tests/sanitizers/run.sh", *session.posargs, external=True, env={"PYTHON": f"{session.bin}/python"})


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
    """A source archive and a wheel of this machine; those of a release are made by .github/workflows/wheels.yml.

    `nox -s wheels -- -C cmake.define.ZEST_CUDA=OFF` builds as that does.
    """
    session.install("build>=1.2", "twine>=6", "check-wheel-contents>=0.6")
    shutil.rmtree(Path("dist"), ignore_errors=True)
    session.run("python", "-m", "build", *session.posargs)
    session.run("twine", "check", "--strict", *map(str, Path("dist").glob("*")))
    session.run("check-wheel-contents", "dist")


if __name__ == "__main__":
    nox.main()
