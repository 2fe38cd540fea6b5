"""The public names: one place for each, on docs/api.md, apart from names of modules, and the only ones that the docs use."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import intscale_compile

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
make_api = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_api)

FUNCTIONS_AND_CLASSES = {
    f"{module}.{name}": getattr(importlib.import_module(module), name)
    for module, names in make_api.public().items()
    for name in names
}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.py"))]


def test_the_page_is_up_to_date_and_says_something_of_each_name():
    assert make_api.PAGE.read_text() == make_api.page(), "run python docs/make_api.py"
    assert re.findall(r"^\| `(\w+)` \|\s*\|$", make_api.page(), re.MULTILINE) == []


def test_each_name_is_documented_once():
    names = Counter(name.rpartition(".")[2] for name in FUNCTIONS_AND_CLASSES)
    assert [name for name, times in names.items() if times > 1] == []
    things = Counter(map(id, FUNCTIONS_AND_CLASSES.values()))
    assert [name for name, thing in FUNCTIONS_AND_CLASSES.items() if things[id(thing)] > 1] == []


def test_no_module_has_the_name_of_a_public_function():
    files = (ROOT / "intscale_compile").rglob("*.py")
    modules = {file.parent.name if file.name == "__init__.py" else file.stem for file in files} - {"intscale_compile"}
    assert {name.rpartition(".")[2] for name in FUNCTIONS_AND_CLASSES} & modules == set()


def test_a_process_that_imports_nothing_else():
    """Modules as attributes, no errors or results beside the functions; nothing is said, and no other package is needed.

    What we register with transformers is there when it is imported later. The command line then says one line where the path
    is wrong, and nothing of what it imports does.
    """
    script = """
        import logging, sys
        import intscale_compile as package
        for name in ("tensor_parallel.parallelize", "communication.WireFormat", "errors.ConfigError", "debug.compile_times"):
            module, name = name.split(".")
            getattr(getattr(package, module), name)
        print([n for n in dir(package) if n.endswith(("Error", "Report", "Explanation", "Compilation"))])
        print(logging.getLogger("torchao").filters)
        print([name for name in sys.modules if name == "transformers" or "vllm" in name.split(".")])
        print("transformers follows", file=sys.stderr, flush=True)
        import transformers
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        print("intscale" in ALL_EXPERTS_FUNCTIONS, flush=True)
        import intscale_cli
        intscale_cli.main(["quantize", "/no/such folder", "/no/such result"])
    """
    script = "\n".join(line[8:] for line in script.splitlines())
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert run.stdout.split() == ["[]", "[]", "[]", "True"]
    mend = "give the folder of a transformers model, or its hub name."
    said = f"intscale: /no/such folder: there is no such folder: {mend}"
    assert run.stderr.splitlines() == ["transformers follows", said] and run.returncode == 2, run.stderr[-2000:]


def code_of(page: Path) -> str:
    text = page.read_text()
    return (
        text
        if page.suffix == ".py"
        else "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_docs_and_examples_use_public_names_only(page):
    used = set()
    for node in ast.walk(ast.parse(code_of(page))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "intscale_compile":
            used |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif (
            isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "intscale_compile"
        ):
            used.add(f"intscale_compile.{node.attr}")
    known = {*FUNCTIONS_AND_CLASSES, *make_api.MODULES}
    assert used - known == set()


def test_names_say_what_torchao_and_transformers_users_expect():
    top = set(intscale_compile.__all__)
    assert {"IntScaleConfig", "CalibrationConfig", "from_quantized", "save_pretrained", "save_safetensors"} <= top
    assert not any(name.startswith(("make_", "import_")) for name in top)
