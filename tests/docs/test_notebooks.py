"""The notebooks of the guides: made of what docs/ says now, and run from the first cell to the last."""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig

import pytest

from bench.measure import ROOT
from bench.notebooks import GUIDES, NOTEBOOKS, notebook_of

QUICK = "watch"


def test_every_guide_has_a_notebook_of_what_it_says_now():
    guides = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("- Guides:")[2].partition("- Results:")[0]
    assert guides.split() == [word for guide in GUIDES for word in ("-", f"{guide}.md")]
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == sorted(GUIDES)
    for guide in GUIDES:
        found = (NOTEBOOKS / f"{guide}.ipynb").read_text(encoding="utf-8")
        assert found == notebook_of(ROOT / "docs" / f"{guide}.md"), f"{guide}: run python -m bench.notebooks"


def test_blocks_become_cells_as_the_guide_says(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\nSee [it](other.md#a), [code](../bench/x.py) and [there](https://example.org).\n\n"
        "<!-- hidden\nx = 1\n-->\n\n```python\nassert x == 1\n```\n\n"
        "<!-- test: compile (a GPU) -->\n```python\nfast()\n```\n\nText.\n\n"
        "<!-- test: raises ValueError, bad -->\n```python\nraise ValueError('bad')\n```\n\n"
        "<!-- test: run -->\n```sh\nzest-fast doctor\n```\n\n<!-- test: parse -->\n```sh\nzest-fast demo\n```\n"
    )
    cells = json.loads(notebook_of(page))["cells"]
    said = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    assert [kind for kind, _ in said] == ["markdown", "code", "code", "code", "markdown", "code", "code", "markdown"]
    links = "[it](../../docs/other.md#a), [code](../../docs/../bench/x.py) and [there](https://example.org)"
    assert said[0][1].endswith(f"{links}.") and "save_what_guides_name" in said[1][1]
    assert [text for _, text in said[2:4]] == ["x = 1", "assert x == 1"]
    assert said[4][1] == "```python\nfast()\n```\n\nText." and said[7][1] == "```sh\nzest-fast demo\n```"
    assert cells[5]["metadata"]["tags"] == ["raises-exception"] and said[6][1] == "%%bash -e\nzest-fast doctor"


@pytest.mark.parametrize(
    "guide", [guide if guide == QUICK else pytest.param(guide, marks=pytest.mark.slow) for guide in GUIDES]
)
def test_a_notebook_runs(guide, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOKS / f"{guide}.ipynb", as_version=4)
    nbformat.validate(notebook)
    monkeypatch.setenv("PATH", os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    assert shutil.which("zest-fast"), "the command is not installed"
    resources = {"metadata": {"path": str(NOTEBOOKS)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert shown and not (guide == "report" and not any("text/html" in one.get("data", {}) for one in shown))
