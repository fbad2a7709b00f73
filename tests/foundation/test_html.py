"""What notebooks show: tables that say what `repr` says, escaped, with nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import pytest
import torch
from html_checks import Parsed
from profiles import make_profile
from torch import nn

import zest_fast
from zest_fast.finetuning.delta_files import read_delta
from zest_fast.foundation.html_parts import html_table, paragraph

pytestmark = pytest.mark.usefixtures("one_thread")

EVIL = '<img src=x onerror=alert(1)> & "q" \'\x1b[31m'


def small():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)), nn.Linear(4, 3))
    return model, (torch.randn(6, 4), torch.arange(6) % 3)


def shown(thing) -> Parsed:
    found = Parsed(thing._repr_html_())
    assert not found.errors
    return found


def words(text: str) -> list[str]:
    return re.findall(r"[\w.…-]+", text)


def test_a_table_is_escaped_and_has_headings():
    text = html_table(["", "layer", "n"], [["1", EVIL, "2"]], left=2, name=1, caption=EVIL)
    found = Parsed(text)
    assert not found.errors and not found.all("img") and "\x1b" not in text
    assert found.text.count('<img src=x onerror=alert(1)> & "q" \'\\x1b[31m') == 2
    assert [one["scope"] for one in found.all("th")] == ["col", "col", "row"]
    assert Parsed(paragraph(f"{EVIL}\nb")).all("br") == [{}]


def test_what_is_shown_is_what_repr_says():
    model, batch = small()
    profile = zest_fast.profile(model, batch)
    ranking = zest_fast.rank(profile)
    plan = zest_fast.plan(model, ["8", "10"], batch=batch)
    with zest_fast.SelectiveBackward(model, ["8", "10"], head=["12"]) as tuned:
        summary = tuned.summary()
    for thing, pictures in ((profile, 1), (ranking, 1), (plan, 0), (summary, 0)):
        found = shown(thing)
        said = words(found.text)
        assert set(words(str(thing))) <= set(said), set(words(str(thing))) - set(said)
        assert len(found.all("img")) == pictures


def test_names_of_layers_are_text():
    profile = make_profile({EVIL: 1.0, "b": 2.0})
    for thing in (profile, zest_fast.rank(profile, by="snip")):
        found = shown(thing)
        assert "<img src=x" in found.text and all(one["src"].startswith("data:image/png") for one in found.all("img"))


def test_without_matplotlib_tables_stay(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name))
    profile = make_profile({"a": 1.0, "b": 2.0})
    for thing in (profile, zest_fast.rank(profile, by="snip")):
        assert not shown(thing).all("img") and shown(thing).all("table")


def test_nothing_to_show():
    empty = make_profile({})
    for thing in (empty, zest_fast.rank(empty, by="snip")):
        assert not shown(thing).all("table") and " 0 layers" in shown(thing).text
    unscored = make_profile({"a": np.nan})
    assert not shown(zest_fast.rank(unscored, by="snip")).all("img")


def test_a_delta_says_what_it_is_in_three_lines(tmp_path):
    model, batch = small()
    ranking = zest_fast.rank(zest_fast.profile(model, batch))
    with zest_fast.SelectiveBackward(model, ranking.top(7), head=["12"]) as tuned:
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        path = tuned.save(tmp_path / "d.safetensors", ranking=ranking, recipe={"lr": 1e-3, "steps": 1})
        bare = tuned.save(tmp_path / "bare.safetensors")
    first, second, third = repr(read_delta(path)).splitlines()
    assert re.fullmatch(r"Delta: 16 parameters and 0 buffers, 0\.0 MiB, base [0-9a-f]{12}", first)
    assert second.endswith(" and 2 more; head 12") and third == "  ranked by 'Ranker', recipe says lr, steps"
    assert repr(read_delta(bare)).splitlines()[2] == "  no ranking, no recipe"
