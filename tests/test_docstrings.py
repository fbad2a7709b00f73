"""Every public name says what it takes, gives and refuses, in one form, with an example that runs."""

from __future__ import annotations

import builtins
import doctest
import inspect
import re
from pathlib import Path
from typing import get_args

import pytest
import torch

import zest_fast
from zest_fast.foundation.options import MetricName
from zest_fast.profiling.metrics import ALL_METRIC_NAMES

KERNELS = [name for name in zest_fast.kernels.__all__ if inspect.isfunction(getattr(zest_fast.kernels, name))]
CALLABLES = {
    **{name: getattr(zest_fast, name) for name in zest_fast.__all__ if callable(getattr(zest_fast, name))},
    **{f"kernels.{name}": getattr(zest_fast.kernels, name) for name in KERNELS},
}

GIVEN = {
    "Choice",
    "Fit",
    "LoraExport",
    "NoiseScale",
    "Plan",
    "WatchedStep",
}  # types of what others return: users read their attributes, and make none
METHODS = {
    f"{one.__name__}.{name}": getattr(one, name)
    for one in CALLABLES.values()
    if inspect.isclass(one)
    for name, method in vars(one).items()
    if not name.startswith("_") and (inspect.isfunction(method) or isinstance(method, classmethod))
}


def sections(documentation: str) -> list[str]:
    return re.findall(r"^(Args|Attributes|Returns|Raises|Examples):$", documentation, re.MULTILINE)


def entries(documentation: str, section: str) -> list[str]:
    """What stands before the colons of a section."""
    found = re.search(rf"^{section}:\n((?:    .*\n|\n)*)", documentation + "\n", re.MULTILINE)
    return re.findall(r"^    (\S.*?):(?= |$)", found[1], re.MULTILINE) if found else []


@pytest.mark.parametrize("name", CALLABLES)
def test_a_public_name_says_what_it_takes_gives_and_refuses(name: str) -> None:
    what = CALLABLES[name]
    documentation = inspect.getdoc(what) or ""
    found = sections(documentation)
    assert found == [one for one in ("Args", "Attributes", "Returns", "Raises", "Examples") if one in found]
    expected = {"Args", "Raises", "Examples"} | (set() if inspect.isclass(what) else {"Returns"})
    assert ({"Attributes", "Examples"} if name in GIVEN else expected) <= set(found)


@pytest.mark.parametrize("name", sorted(GIVEN))
def test_each_attribute_has_a_line(name: str) -> None:
    what = CALLABLES[name]
    fields = [one for one in what.__annotations__ if not one.startswith("_")]
    assert entries(inspect.getdoc(what) or "", "Attributes") == fields


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_takes_gives_and_refuses(name: str) -> None:
    documentation = inspect.getdoc(METHODS[name]) or ""
    parameters = [one for one in inspect.signature(METHODS[name]).parameters.values() if one.name != "self"]
    if parameters:
        assert {"Args", "Returns", "Raises"} <= set(sections(documentation))
    assert entries(documentation, "Args") == [
        ("**" if one.kind is one.VAR_KEYWORD else "") + one.name for one in parameters
    ]


@pytest.mark.parametrize("name", sorted(CALLABLES.keys() - GIVEN))
def test_each_parameter_and_each_error_has_a_line(name: str) -> None:
    what = CALLABLES[name]
    documentation = inspect.getdoc(what) or ""
    parameters = inspect.signature(what).parameters.values()
    assert entries(documentation, "Args") == [
        ("**" if one.kind is one.VAR_KEYWORD else "") + one.name for one in parameters
    ]
    for errors in entries(documentation, "Raises"):
        for error in errors.split(", "):
            assert issubclass(getattr(builtins, error), Exception)


@pytest.mark.parametrize("name", CALLABLES)
def test_an_example_runs_and_shows_what_it_gives(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (example,) = doctest.DocTestFinder(recurse=False).find(CALLABLES[name], name, globs={})
    assert example.examples
    told: list[str] = []
    results = doctest.DocTestRunner(verbose=False).run(example, out=told.append)
    assert results.failed == 0, "".join(told)


def test_the_names_of_metrics_are_those_that_type_checkers_know() -> None:
    assert get_args(MetricName) == ALL_METRIC_NAMES
