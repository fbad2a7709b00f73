"""axe-core over a page in headless Chromium, where both are there: ZEST_AXE names axe.min.js, of npm's axe-core."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

_RUN = """<script>axe.run().then(found => {
  const pre = parent.document.createElement("pre");
  pre.id = "axe-result";
  pre.textContent = JSON.stringify({
    violations: found.violations.map(one => [one.id, one.nodes.map(node => node.html.slice(0, 200))]),
    passes: found.passes.length,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    width: innerWidth,
    needs: document.documentElement.scrollWidth,
  });
  parent.document.body.append(pre);
})</script>"""
_DARK = "--blink-settings=preferredColorScheme=0"


def missing() -> str:
    """What is not there; "" where a page can be looked at."""
    axe = os.environ.get("ZEST_AXE", "")
    if not Path(axe).is_file():
        return f"ZEST_AXE={axe!r} names no axe.min.js (npm install axe-core)"
    return "" if _browser() else "no chromium on the PATH"


def _browser() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def look_at(page: Path, folder: Path, *, width: int, dark: bool) -> dict:
    """What axe found in the page, in a frame as wide as `width`: a window has a least width of its own."""
    library = Path(os.environ["ZEST_AXE"]).read_text(encoding="utf-8")
    text = page.read_text(encoding="utf-8").replace("</body>", f"<script>{library}</script>{_RUN}</body>")
    (folder / "looked-at.html").write_text(text, encoding="utf-8")
    around = folder / "around.html"
    around.write_text(
        f'<!doctype html><body><iframe src="looked-at.html" style="width:{width}px;height:900px;border:0">'
    )
    command = [_browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-web-security"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={folder / 'browser'}", "--window-size=1400,1000"]
    command += ["--virtual-time-budget=30000", "--dump-dom", *([_DARK] if dark else []), around.resolve().as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'<pre id="axe-result">(.*?)</pre>', shown, re.DOTALL)
    assert found, shown[-2000:]
    return json.loads(html.unescape(found[1]))
