"""Where installed packages lie. Versions are pinned; where one is missing, the error is the line that installs it.

`--no-deps`: several ask for heavy dependencies that their files do not need. Packages of npm lie in bench/.data.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from pathlib import Path

NPM = Path(__file__).parents[1] / ".data"


def installed(module: str, package: str, version: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(module)
    found = importlib.metadata.version(package) if spec else None
    if spec is None or spec.origin is None or found != version:
        problem = f"{package} {found} is installed" if found else f"{package} is not installed"
        raise RuntimeError(f"{problem}; run: pip install --no-deps '{package}=={version}'")
    return Path(spec.origin).parent


def installed_by_npm(package: str, version: str) -> Path:
    """The folder of a package in bench/.data, for those that only npm has."""
    folder = NPM / "node_modules" / package
    about = folder / "package.json"
    found = json.loads(about.read_text())["version"] if about.exists() else None
    if found != version:
        problem = f"{package} {found} is installed" if found else f"{package} is not installed"
        command = f"npm install --prefix '{NPM}' --ignore-scripts {package}@{version}"
        raise RuntimeError(f"{problem}; run: {command}")
    return folder


def pinned(path: Path, sha256: str) -> bytes:
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise RuntimeError(f"{path.name} has SHA-256 {found}, not the one that was looked at: it is not loaded")
    return content
