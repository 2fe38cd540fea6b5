"""Every Python example in the docs runs: the blocks of a page one after another, in one namespace and an empty folder."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

PAGES = sorted((Path(__file__).resolve().parent.parent / "docs").glob("*.md"))
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page):
    """Code of each block, with its first line in the page."""
    text = page.read_text()
    return [(text.count("\n", 0, match.start(1)) + 1, match.group(1)) for match in _BLOCK.finditer(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page, tmp_path, monkeypatch):
    found = blocks(page)
    if not found:
        pytest.skip(f"{page.name} has no Python examples")
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    module = types.ModuleType(f"docs_{page.stem}")  # Dynamo looks names up in the module of a function
    monkeypatch.setitem(sys.modules, module.__name__, module)
    try:
        for line, code in found:
            code = re.sub(r"num_hidden_layers=\d+", "num_hidden_layers=1", code)  # what is asked of it is asked of one
            exec(
                compile("\n" * (line - 1) + code, str(page), "exec"), module.__dict__
            )  # errors show the line of the page
    finally:
        torch._dynamo.reset()


def test_there_are_pages_and_examples():
    assert {"debugging.md"} <= {page.name for page in PAGES if blocks(page)}


def test_links_between_pages_lead_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert broken == []


def test_the_layout_names_what_is_there():
    """Every folder and file in CONTRIBUTING's layout exists, and every folder of the package is in it."""
    root = PAGES[0].parent.parent
    block = (root / "CONTRIBUTING.md").read_text().split("## Layout\n")[1].split("\n## ")[0]
    lines = [line[4:] for line in block.splitlines() if line.startswith("    ")]
    named, parents = set(), {}
    for line in lines:
        depth = len(line) - len(line.lstrip())
        folder = next((parents[d] for d in range(depth - 1, -1, -1) if d in parents), root)
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            named.add(folder / name)
            if name.endswith("/"):
                parents = {d: p for d, p in parents.items() if d < depth} | {depth: folder / name}
    assert len(named) > 40 and [str(path) for path in sorted(named) if not path.exists()] == []
    package = root / "intscale_compile"
    there = {path for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert {path.name for path in there | set(package.glob("[!_]*.py")) if path not in named} == set()
