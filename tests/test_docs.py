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
