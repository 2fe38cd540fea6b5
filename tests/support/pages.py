"""Open an HTML page in a headless browser and let it say what happened."""

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

# Before anything else of the page: what goes wrong is kept.
LISTEN = """<script>
window.failures = [];
addEventListener("error", (event) => failures.push(event.message || "did not load: " + event.target.outerHTML), true);
addEventListener("unhandledrejection", (event) => failures.push(String(event.reason)));
addEventListener("securitypolicyviolation", (event) => failures.push("refused: " + event.blockedURI));
for (const level of ["error", "warn"]) console[level] = (...words) => failures.push(words.join(" "));
</script>"""
# After everything else: ``check`` fills ``result``; both are written into the page that --dump-dom returns.
REPORT = """<pre id="selftest"></pre><script>
(() => {
  const result = {};
  try { %s } catch (error) { failures.push(String(error)); }
  result.failures = failures;
  result.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  document.getElementById("selftest").textContent = JSON.stringify(result);
})();
</script>"""


def browser() -> str:
    """Path of Chromium or Chrome; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    return found


def open_page(html: str, folder: Path, check: str, width: int = 1280) -> dict:
    """What ``check`` (JavaScript that fills ``result``) finds on the page, with errors and requests."""
    path = folder / "page.html"
    watched = html.replace("<head>", "<head>" + LISTEN, 1).replace("</body>", REPORT % check + "</body>", 1)
    path.write_text(watched, encoding="utf-8")
    command = [
        *(browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"),
        *(f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", "--dump-dom", path.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(folder)})
    found = re.search(r'<pre id="selftest">(.*?)</pre>', done.stdout, re.S)
    assert found and found[1], done.stderr[-2000:]
    return json.loads(unescape(found[1]))
