"""A library that is not installed, for as long as a test runs."""

from __future__ import annotations

import builtins

import pytest


def refuse_import(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    real_import = builtins.__import__

    def refuse(name, *rest, **named):
        if name == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real_import(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
